"""How fast is a model whose weights do not fit into memory, and how much of what it needs is there when it is needed?

The run's packed weights are mapped (model/packed_file.py), the process is given a limit of memory by a control group,
and single tokens are decoded, random ones, so that experts change. What the disk gave is what Linux counts for the
process; what a token needs are its projections, its experts and the head. The hit rate is 1 - read / needed, by bytes.
With and without the threads that read experts ahead (kernels/cpu/source/expert_reader.h).
Where other programs run, the time that a token waits for the disk says more than the clock: with one thread it is what
remains when the processor's time and the time in its queue are taken off.
Run, as root: python benchmarks/larger_than_memory.py RUN [--limits 1500 2000 0] [--steps 60] [--rounds 1] [--alike]
     (limits in megabytes, 0: none)
"""

import argparse
import os
import statistics
import sys
import time
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path

from measure import machine, run_child

GROUP = Path("/sys/fs/cgroup/memory/moesaic-benchmark")  # version 1; version 2 has no folder for the kind
GROUP_2 = Path("/sys/fs/cgroup/moesaic-benchmark")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("--limits", type=int, nargs="+", default=[1500, 2000, 0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--child", type=int)
    parser.add_argument("--without-reader", action="store_true")
    parser.add_argument("--alike", action="store_true", help="states and routers alike, so that guesses are right")
    arguments = parser.parse_args()
    if arguments.child is not None:
        print(
            measure(
                arguments.run,
                arguments.child,
                arguments.steps,
                without_reader=arguments.without_reader,
                alike=arguments.alike,
            )
        )
        return
    print(machine())
    alike = ["--alike"] * arguments.alike
    for limit, _, switch in product(arguments.limits, range(arguments.rounds), ([], ["--without-reader"])):
        if limit == 0 and switch:
            continue
        child = [arguments.run, "--child", str(limit), "--steps", str(arguments.steps), *switch, *alike]
        result = run_child(child, environment=dict(os.environ))
        said = ", ".join(f"{name} {value:.4g}" for name, value in result.items())
        print(f"limit {limit} MB{''.join(switch)}: {said}", flush=True)
    for group in (GROUP, GROUP_2):
        with suppress(OSError):
            group.rmdir()


def limit_memory(megabytes: int) -> None:
    """Put this process under a limit; its own page cache counts."""
    group, name = (GROUP, "memory.limit_in_bytes") if GROUP.parent.is_dir() else (GROUP_2, "memory.max")
    group.mkdir(exist_ok=True)
    (group / name).write_text(str(megabytes << 20))
    (group / "cgroup.procs").write_text(str(os.getpid()))


def read_bytes() -> int:
    """Return what this process has had read from disks, by page faults too."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["read_bytes"])


def queued_seconds() -> float:
    """Return how long this thread has waited for a processor."""
    return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9


def measure(run: str, limit: int, steps: int, *, without_reader: bool, alike: bool) -> str:
    import json

    import torch

    from moesaic.checkpoint.store import resolve_checkpoint
    from moesaic.model.kv_cache import BatchCache
    from moesaic.model.load import load_run
    from moesaic.model.pack import packed_tensors

    folder = resolve_checkpoint(run).path
    with (folder / "packed-bf16.safetensors").open("rb") as file:  # written by `moesaic generate RUN`
        os.fsync(file.fileno())
        # Pages count for the group of who had them read, so none may be there yet.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if limit:
        limit_memory(limit)
    model = load_run(run, device="cpu").model
    tensors = packed_tensors(model)
    experts = {name: each for name, each in tensors.items() if ".experts." in name}
    of_experts = sum(each.nbytes for each in experts.values())
    moe = model.config.moe
    assert moe is not None and isinstance(moe.num_experts, int), "one count of experts for all layers is required"
    own_embedding = 0 if model.config.tie_embeddings else tensors["embedding"].nbytes
    always = sum(each.nbytes for each in tensors.values()) - of_experts - own_embedding
    needed = always + of_experts * moe.top_k // moe.num_experts
    generator = torch.Generator().manual_seed(0)
    cache = BatchCache(model.config, 1, 2 * steps, dtype=torch.bfloat16, device=torch.device("cpu"))
    torch.set_num_threads(1)
    model.reads_ahead = model.reads_ahead and not without_reader
    if alike:  # what one router chooses from states that hardly differ is guessed nearly always
        part = model.decode_part
        assert part is not None and isinstance(part.embedding, torch.Tensor)
        model.decode_part = replace(part, embedding=1000 * part.embedding)
        plan = model.find_plan()
        assert plan is not None
        plan.__dict__["_routers"] = plan._routers[:1] * len(plan._routers)
    seconds, processor, queued, read = [], [], [], []
    with torch.no_grad():
        for _ in range(2 * steps):  # the first half fills what memory there is
            token = torch.randint(model.config.vocab_size, (1, 1), generator=generator)
            busy, queue, before, started = time.thread_time(), queued_seconds(), read_bytes(), time.perf_counter()
            model.logits(model(token, cache=cache).hidden[0, -1])
            seconds.append(time.perf_counter() - started)
            processor.append(time.thread_time() - busy)
            queued.append(queued_seconds() - queue)
            read.append(read_bytes() - before)
    mean_seconds, mean_processor, mean_queued, mean_read = (
        statistics.mean(values[steps:]) for values in (seconds, processor, queued, read)
    )
    result = {
        "tokens/s": 1 / mean_seconds,
        "processor ms": 1e3 * mean_processor,
        "disk ms": 1e3 * (mean_seconds - mean_processor - mean_queued),
        "MB needed": needed / 1e6,
        "MB read": mean_read / 1e6,
        "hit rate": 1 - mean_read / needed,
        "guessed": model.guessed_share or 0.0,
        "weights MB": sum(each.nbytes for each in tensors.values()) / 1e6,
    }
    sys.stdout.flush()
    return json.dumps(result)


if __name__ == "__main__":
    main()
