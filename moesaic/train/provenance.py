"""What a run was made with: the command line, versions, and fingerprints of code and data, for run.json."""

import hashlib
import json
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import moesaic
from moesaic.folders import load_own_json, write_whole
from moesaic.logs import logger

RUN_FILE = "run.json"


def code_fingerprint() -> str:
    """SHA-256 over the package's own source files, by path and content."""
    root = Path(moesaic.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def known_data_times(run_folder: Path) -> dict[str, int]:
    """Return when each shard of the data had last been changed at the run's last start; empty where nobody knows."""
    return dict((_read(run_folder / RUN_FILE) or {}).get("data_times", {}))


def write_provenance(
    run_folder: Path,
    *,
    data_path: str,
    data_fingerprint: str,
    data_times: Mapping[str, int],
    device: torch.device,
    processes: int = 1,
    init_from: dict[str, Any] | None = None,
    objective: dict[str, Any] | None = None,
) -> None:
    """Append this start of the run to run.json: one entry per start, the resumed ones after the first.

    init_from: the checkpoint whose weights this start began with, None where they were drawn or resumed. objective:
    what the run's objective says of itself, a student of its teacher for example. data_times: when each shard was last
    changed; of the last start alone. processes: that train together; each has as many threads as this one.
    """
    path = run_folder / RUN_FILE
    values = _read(path)
    if values is None:
        aside = path.with_name("run.unreadable.json")
        path.replace(aside)
        logger.warning("%s cannot be read; it is now called %s, and a new one begins.", path, aside.name)
    starts = (values or {"starts": []})["starts"]
    starts.append(
        {
            "command": sys.argv,
            "moesaic": moesaic.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.processor() or platform.machine(),
            "device": str(device),
            "processes": processes,
            "threads": torch.get_num_threads(),
            "code_fingerprint": code_fingerprint(),
            "data_path": data_path,
            "data_fingerprint": data_fingerprint,
            "init_from": init_from,
            "objective": objective,
        }
    )
    write_whole(path, json.dumps({"starts": starts, "data_times": dict(data_times)}, indent=1))


def _read(path: Path) -> dict[str, Any] | None:
    """Return what run.json holds, no starts where there is none; None where it cannot be read."""
    if not path.exists():
        return {"starts": []}
    try:
        values = load_own_json(path)
        if isinstance(values["starts"], list) and isinstance(values.get("data_times", {}), dict):
            return dict(values)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None
