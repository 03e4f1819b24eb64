"""What a container that has a share of the processors pays for all cores' threads, and for as many as the share keeps.

A model of the shape of benchmarks/serve.py's, 4 layers of it in int8, reads a prompt of 512 tokens and answers, in a
control group of its own whose quota is set before it begins; a process for each number of threads, in turn. Needs root,
and control groups of version 1 or 2 that can be written.
Run: python benchmarks/container_share.py [--processors 1] [--threads 2 1] [--rounds 3] [--seconds 8]
"""

import argparse
import json
import math
import os
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from measure import machine, median, print_table, run_child

PERIOD = 100_000  # microseconds, the kernel's own choice


def main() -> None:
    from moesaic.control_groups import allowed_processors

    parser = argparse.ArgumentParser()
    parser.add_argument("--processors", type=float, default=1.0, help="the share")
    parser.add_argument("--threads", type=int, nargs="+", help="default: of all processors, and of the share")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(answer(arguments.processors, arguments.seconds)))
        return
    threads = arguments.threads or [allowed_processors(), math.ceil(arguments.processors)]
    print(f"{machine()}; {arguments.processors} processors' time")
    runs: dict[int, list[dict[str, float]]] = {count: [] for count in threads}
    flags = ["--child", "--processors", str(arguments.processors), "--seconds", str(arguments.seconds)]
    for _ in range(arguments.rounds):
        for count in threads:
            runs[count].append(run_child(flags, environment={"OMP_NUM_THREADS": str(count)}))
    print_table(
        [
            {"threads": count} | {key: median([run[key] for run in rows]) for key in rows[0]}
            for count, rows in runs.items()
        ]
    )


def answer(processors: float, seconds: float) -> dict[str, float]:
    """Return milliseconds of prompts and tokens."""
    from moesaic.kernels.threads import spin_briefly

    spin_briefly()
    from serving_model import VOCAB_SIZE, build, tokenizer_json

    from moesaic.config.serve import EngineConfig, Sampling
    from moesaic.data.tokenizer import Tokenizer
    from moesaic.serve.engine import Engine

    engine = Engine(
        build(4, "int8"),
        Tokenizer(tokenizer_json()),
        EngineConfig(max_sequences=1, max_length=1024, prefix_caching=False),
    )
    prompts: list[float] = []
    tokens: list[float] = []
    with within_share(processors):
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            prompt = [random.randrange(VOCAB_SIZE) for _ in range(512)]
            engine.add_request(prompt, Sampling(max_tokens=256, temperature=0.0, ignore_end_of_text=True))
            started = time.perf_counter()
            engine.step()
            prompts.append(time.perf_counter() - started)
            while engine.has_work:
                started = time.perf_counter()
                engine.step()
                tokens.append(time.perf_counter() - started)
    return {
        "prompt ms": 1e3 * median(prompts),
        "token ms, mean": 1e3 * statistics.fmean(tokens),
        "median": 1e3 * median(tokens),
        "slowest of 100": 1e3 * statistics.quantiles(tokens, n=100)[98],
    }


@contextmanager
def within_share(processors: float) -> Iterator[None]:
    """Have this process use at most so many processors' time, in a control group beside those at the root."""
    root = Path("/sys/fs/cgroup")
    is_old = (root / "cpu").is_dir()
    group = root / ("cpu" if is_old else "") / f"moesaic-{os.getpid()}"
    group.mkdir()
    try:
        quota = round(PERIOD * processors)
        if is_old:
            (group / "cpu.cfs_period_us").write_text(str(PERIOD))
            (group / "cpu.cfs_quota_us").write_text(str(quota))
        else:
            (group / "cpu.max").write_text(f"{quota} {PERIOD}")
        (group / "cgroup.procs").write_text(str(os.getpid()))
        yield
    finally:
        (group.parent / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


if __name__ == "__main__":
    main()
