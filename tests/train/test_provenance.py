import json
import sys
from pathlib import Path

import torch

import moesaic
from moesaic.train.provenance import code_fingerprint, write_provenance


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
