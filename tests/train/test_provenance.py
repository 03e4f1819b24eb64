import json
import os
import sys
from pathlib import Path
from typing import Any

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


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"starts": 3}', '{"starts": [], "data_times": 3}', "\x00", "[" * 100_000]
)
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


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes with names")
def test_a_pipe_in_its_place_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "run.json")
    write_provenance(tmp_path, data_path="d", data_fingerprint="f", data_times={}, device=torch.device("cpu"))
    assert (tmp_path / "run.unreadable.json").is_fifo()
    assert len(json.loads((tmp_path / "run.json").read_text())["starts"]) == 1


def test_a_list_that_may_not_be_read_is_kept_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    path.write_text("{}")
    original = Path.read_text

    def refuse(self: Path, *args: Any, **settings: Any) -> str:
        if self == path and self.stat().st_size == 2:
            raise PermissionError(13, "Permission denied", str(self))
        return original(self, *args, **settings)

    monkeypatch.setattr(Path, "read_text", refuse)
    write_provenance(tmp_path, data_path="d", data_fingerprint="f", data_times={}, device=torch.device("cpu"))
    assert (tmp_path / "run.unreadable.json").read_text() == "{}"
    assert len(json.loads(path.read_text())["starts"]) == 1
