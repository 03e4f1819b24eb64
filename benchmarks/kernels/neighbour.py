"""How much longer does a kernel call take while another program keeps every core busy?

A small and a large linear layer, ours and torch's, and a layer of experts for one token (three phases, each with its
barrier), alone and beside one foreign busy process per core, in turn. With fair shares each side has half of a core: a
factor of 2 is what the neighbour costs, and the rest is threads that wait for one another. The issue to exclude: a
factor of 10. Each case runs in a fresh process, once as the command line sets OpenMP up (threads spin briefly, then
sleep) and once as it comes.
Whatever else the machine does counts as a neighbour too. On a busy one, a session of its own with the highest weight
helps: setsid -w bash -c 'echo -20 > /proc/self/autogroup; python benchmarks/kernels/neighbour.py'
Run: python benchmarks/kernels/neighbour.py [--seconds 4]
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import machine, median, print_table, run_child

# Rows, K and N of linear layers whose calls take some 10 microseconds and some 10 milliseconds.
LINEAR = {"small": (1, 512, 512), "large": (512, 2048, 4096)}
CASES = (*LINEAR, "experts")
# Alone and beside the neighbour are measured in turns of this many seconds.
TURN_SECONDS = 0.5


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=4.0, help="of timing per row")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure_case(arguments.case, arguments.seconds)))
        return

    from moesaic.kernels.select import cpu_kernels

    print(f"{machine()}, kernels {cpu_kernels().name}")
    rows = []
    for case in CASES:
        for waiting, environment in (("brief", {"GOMP_SPINCOUNT": "1000"}), ("default", {"GOMP_SPINCOUNT": ""})):
            found = run_child(
                ["--case", case, "--seconds", str(arguments.seconds)],
                environment={key: value for key, value in environment.items() if value},
            )
            for kernel, (alone, beside) in found.items():
                rows.append(
                    {
                        "call": case,
                        "kernel": kernel,
                        "waiting": waiting,
                        "alone us": median(alone) * 1e6,
                        "beside us": median(beside) * 1e6,
                        "x": median(beside) / median(alone),
                        "x mean": sum(beside) / len(beside) / (sum(alone) / len(alone)),
                        "beside, 99 % us": sorted(beside)[len(beside) * 99 // 100] * 1e6,
                    }
                )
    print_table(rows)


def measure_case(case: str, seconds: float) -> dict[str, tuple[list[float], list[float]]]:
    """Return for each kernel the seconds of its calls, alone and beside the neighbour."""
    import torch

    kernels = experts() if case == "experts" else linear(*LINEAR[case])
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in kernels}
    end = time.perf_counter() + seconds * len(kernels)
    with torch.inference_mode():
        while time.perf_counter() < end:
            for name, call in kernels.items():
                times[name][0].extend(turn(call))
                with busy_neighbour():
                    times[name][1].extend(turn(call))
    return times


def linear(rows: int, depth: int, columns: int) -> dict[str, Callable[[], object]]:
    import torch

    from moesaic.kernels.packed import pack_weight, packed_linear

    x, weight = torch.randn(rows, depth).bfloat16(), torch.randn(columns, depth).bfloat16()
    packed = pack_weight(weight)
    return {
        "packed_linear": lambda: packed_linear(x, packed),
        "F.linear": lambda: torch.nn.functional.linear(x, weight),
    }


def experts() -> dict[str, Callable[[], object]]:
    """One token, 2 of 16 experts of 1024 x 512."""
    import torch

    from moesaic.kernels.packed import pack_mlp, packed_moe

    packed = pack_mlp(torch.randn(16, 1024, 1024), torch.randn(16, 1024, 512), activation="swiglu")
    x, expert_ids = torch.randn(1, 1024).bfloat16(), torch.tensor([[3, 11]])
    weights = torch.tensor([[0.5, 0.5]])
    return {"packed_moe": lambda: packed_moe(x, expert_ids, weights, packed)}


def turn(call: Callable[[], object]) -> list[float]:
    times = []
    call()
    end = time.perf_counter() + TURN_SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


@contextmanager
def busy_neighbour() -> Iterator[None]:
    """One process per core that never sleeps."""
    command = [sys.executable, "-c", "print(flush=True)\nwhile True: pass"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(os.cpu_count() or 1)]
    try:
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()  # it runs
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
