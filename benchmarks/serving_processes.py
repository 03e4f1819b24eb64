"""Servers to be measured, each in processes of its own: how one is started, waited for, and ended.

Which ones are compared, and by what, is serving_loads.py's business; a long day of ours, serving_soak.py's.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

START_SECONDS = 600.0
# Sequences that run at once.
MAX_SEQUENCES = 64


@dataclass(frozen=True)
class Contender:
    """How a server is started."""

    name: str
    command: Callable[[int], list[str]]  # of a port
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Started:
    """A server that answers."""

    url: str
    pid: int
    seconds: float  # from its start to its first answer

    def memory_bytes(self, key: str = "VmRSS") -> int:
        """Resident memory of all its processes; VmHWM: the most of each."""
        return sum(_memory(pid, key) for pid in _family(self.pid))


def ours(folder: Path, name: str, *, threads: str, settings: Sequence[str] = ()) -> Contender:
    """Return our server of the model in a format. settings: as --set has them."""
    assignments = [f"engine.max_sequences={MAX_SEQUENCES}", *settings]
    return Contender(
        f"moesaic {name}",
        lambda port: [
            sys.executable, "-m", "moesaic", "serve", str(folder / f"run-{name}"), "--port", str(port),
            *(part for each in assignments for part in ("--set", each)),
        ],
        {"OMP_NUM_THREADS": threads},
    )  # fmt: skip


def prepare(arguments: argparse.Namespace, *, with_gguf: bool) -> None:
    """Make the model's files in a process of its own, whose memory is gone when servers are measured."""
    command = [
        sys.executable, sys.argv[0], "prepare", "--folder", str(arguments.folder), "--layers", str(arguments.layers),
        "--formats", *arguments.formats, *(["--llama", str(arguments.llama)] if with_gguf else []),
    ]  # fmt: skip
    if subprocess.run(command, check=False).returncode:
        raise SystemExit(f"the model's files could not be made in {arguments.folder}")


class StartError(Exception):
    """A server that ended, or said nothing, before it answered."""


@contextmanager
def started(contender: Contender, log: Path) -> Iterator[Started]:
    """Start a server on a free port, wait for its list of models, and end it and its processes in the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log.parent.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    with log.open("ab") as file:
        process = subprocess.Popen(
            contender.command(port), stdout=file, stderr=file, env={**os.environ, **contender.environment},
            start_new_session=True,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_for(url, process, log)
        yield Started(url, process.pid, time.perf_counter() - begun)
    finally:
        for number, patience in ((signal.SIGTERM, 30.0), (signal.SIGKILL, 10.0)):
            try:
                os.killpg(process.pid, number)  # its own session, so nobody else's
                process.wait(patience)
            except subprocess.TimeoutExpired:
                continue
            except ProcessLookupError:
                break
        process.wait()


def _wait_for(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    import httpx

    end = time.perf_counter() + START_SECONDS
    with httpx.Client(base_url=url, trust_env=False, timeout=5.0) as http:
        while time.perf_counter() < end and process.poll() is None:
            try:
                if http.get("/v1/models").status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.05)
    raise StartError(f"it does not answer; its log is {log}:\n{log.read_text(errors='replace')[-2000:]}")


def _family(pid: int) -> list[int]:
    """Return a process and all below it."""
    found, rest = [], [pid]
    while rest:
        found.append(rest.pop())
        for path in Path(f"/proc/{found[-1]}/task").glob("*/children"):
            rest += [int(child) for child in _text(path).split()]
    return found


def _memory(pid: int, key: str) -> int:
    for line in _text(Path(f"/proc/{pid}/status")).splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) << 10
    return 0


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # it has ended
        return ""
