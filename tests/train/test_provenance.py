import json
import sys
from pathlib import Path

import pytest
import torch

import moesaic
from moesaic.train.provenance import code_fingerprint, known_data_times, write_provenance


def test_every_start_of_a_run_is_recorded_in_order(tmp_path: Path) -> None:
    for number in range(2):
        write_provenance(
            tmp_path, data_path="d", data_fingerprint=f"f{number}", data_times={}, device=torch.device("cpu")
        )
    starts = json.loads((tmp_path / "run.json").read_text())["starts"]
    assert [start["data_fingerprint"] for start in starts] == ["f0", "f1"]
    assert starts[0]["command"] == sys.argv and starts[0]["init_from"] is None
    assert starts[0]["moesaic"] == moesaic.__version__ and starts[0]["torch"] == torch.__version__
    assert starts[0]["code_fingerprint"] == code_fingerprint()
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"starts": 3}', '{"starts": [], "data_times": 3}', "\x00"])
def test_an_unreadable_list_is_kept_and_a_new_one_begins(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    (tmp_path / "run.json").write_text(text)
    assert known_data_times(tmp_path) == {}
    with caplog.at_level("WARNING", "moesaic"):
        write_provenance(tmp_path, data_path="d", data_fingerprint="f", data_times={"a": 1}, device=torch.device("cpu"))
    assert "cannot be read; it is now called run.unreadable.json" in caplog.text
    assert (tmp_path / "run.unreadable.json").read_text() == text
    assert len(json.loads((tmp_path / "run.json").read_text())["starts"]) == 1
    assert known_data_times(tmp_path) == {"a": 1}
