"""What the benchmark scripts share: paired timing, the machine's description, and results as a table and JSON."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# The allocator settings that help any PyTorch program on glibc; peers are timed with and without them.
TUNED_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "8589934592",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def restart_with_tuned_allocator() -> None:
    """Begin the script again with these settings, unless it has them: every contender gets the good allocator."""
    if os.environ.get("MALLOC_TRIM_THRESHOLD_") is None:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **TUNED_ALLOCATOR})


def time_in_turn(
    candidates: dict[str, Callable[[], Any]], *, repeats: int = 7, warmup: int = 2
) -> dict[str, list[float]]:
    """Return seconds per call, candidates in turn (A B C A B C ...), so that a drifting machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for round_number in range(warmup + repeats):
        for name, call in candidates.items():
            started = time.perf_counter()
            call()
            if round_number >= warmup:
                times[name].append(time.perf_counter() - started)
    return times


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def paired_ratio(times: dict[str, list[float]], name: str, other: str) -> float:
    """Return the median over rounds of time(name) / time(other)."""
    return statistics.median(a / b for a, b in zip(times[name], times[other], strict=True))


def bandwidth_probe() -> Callable[[], float]:
    """Return a function that measures the bytes a second that memory is read at now, the best of three passes."""
    from moesaic.kernels.limits import streamed_buffer
    from moesaic.kernels.select import cpu_library

    library, buffer = cpu_library(), streamed_buffer("cpu")
    assert library is not None, "this is a measurement of the C++ kernels"
    read = library.function("moesaic_limit_read", "pi")

    def once() -> float:
        started = time.perf_counter()
        read(buffer.data_ptr(), buffer.nbytes)
        return buffer.nbytes / (time.perf_counter() - started)

    return lambda: max(once() for _ in range(3))


def machine() -> str:
    import torch

    model = platform.processor() or platform.machine()
    path = Path("/proc/cpuinfo")
    if path.exists():
        names = [
            line.split(":", 1)[1].strip() for line in path.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    capability = torch.backends.cpu.get_cpu_capability()
    return (
        f"{model}, {os.cpu_count()} cores, {capability}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )


def run_child(arguments: Sequence[str], *, environment: dict[str, str]) -> dict[str, Any]:
    """Run this script again with arguments in a fresh process and return the JSON of its last line of output."""
    drop = set(TUNED_ALLOCATOR)
    base = {key: value for key, value in os.environ.items() if key not in drop}
    done = subprocess.run(
        [sys.executable, sys.argv[0], *arguments],
        env={**base, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print rows of equal keys as an aligned table."""
    keys = list(rows[0])
    cells = [keys] + [[_text(row[key]) for key in keys] for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(keys))]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def write_json(path: Path | None, values: Any) -> None:
    """Write results, where a place for them was named."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values, indent=1) + "\n")


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
