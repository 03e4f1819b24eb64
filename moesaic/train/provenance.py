"""What a run was made with: the command line, versions, and fingerprints of code and data, for run.json."""

import hashlib
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch

import moesaic


def code_fingerprint() -> str:
    """SHA-256 over the package's own source files, by path and content."""
    root = Path(moesaic.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def write_provenance(
    run_folder: Path,
    *,
    data_path: str,
    data_fingerprint: str,
    device: torch.device,
    init_from: dict[str, Any] | None = None,
    objective: dict[str, Any] | None = None,
) -> None:
    """Append this start of the run to run.json: one entry per start, the resumed ones after the first.

    init_from: the checkpoint whose weights this start began with, None where they were drawn or resumed. objective:
    what the run's objective says of itself, a student of its teacher for example.
    """
    path = run_folder / "run.json"
    starts = json.loads(path.read_text(encoding="utf-8"))["starts"] if path.exists() else []
    starts.append(
        {
            "command": sys.argv,
            "moesaic": moesaic.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.processor() or platform.machine(),
            "device": str(device),
            "threads": torch.get_num_threads(),
            "code_fingerprint": code_fingerprint(),
            "data_path": data_path,
            "data_fingerprint": data_fingerprint,
            "init_from": init_from,
            "objective": objective,
        }
    )
    temporary = path.with_suffix(".writing")
    temporary.write_text(json.dumps({"starts": starts}, indent=1), encoding="utf-8")
    temporary.replace(path)
