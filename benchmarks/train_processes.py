"""What do `moesaic train` and `distill` gain or lose where several processes share them on one machine's cores?

The models of train_step.py (6 layers, hidden 256, 4 heads, vocabulary 4096, 16 sequences of 512 tokens a step, bf16):
dense, and with 8 to 64 experts of 512, top-2, on real text (the embedded corpus). Contenders, each the whole command,
in turn: `one`, a process with all threads; `spread`, torchrun with the experts spread over the processes; `replicated`,
torchrun with all experts on every process (parallel.expert_degree=1). Seconds are the median of a run's steps from the
fourth on, by its own records, megabytes the largest process's at its peak. With --distill each of these models, hardly
trained, teaches a student of 5 layers to the end; seconds and megabytes are the student's run's, without its report.
Run: python benchmarks/train_processes.py [--distill] [--processes 2] [--experts 0 8 64] [--rounds 3]
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from measure import machine, print_table, run_child, write_json

from moesaic.config.load import load_train_config
from moesaic.data.corpus import embedded_corpus
from moesaic.data.prepare import prepare
from moesaic.distill.run import distill, student_config
from moesaic.parallel.world import World
from moesaic.report.records import read_metrics
from moesaic.train.loop import train

CONTENDERS = ("one", "spread", "replicated")
BATCH, SEQUENCE, WARM_UP = 16, 512, 3


def settings(experts: int, steps: int) -> dict[str, Any]:
    model: dict[str, Any] = {
        "vocab_size": 4096, "hidden_size": 256, "num_layers": 6, "num_heads": 4, "intermediate_size": 1024,
        "max_positions": SEQUENCE, "tie_embeddings": False, "moe": None,
    }  # fmt: skip
    if experts:
        model["moe"] = {"num_experts": experts, "top_k": 2, "intermediate_size": 512}
    return {
        "model": model,
        "data": {"sequence_length": SEQUENCE},
        "batch_size": BATCH,
        "micro_batch_size": BATCH,
        "tokens": steps * BATCH * SEQUENCE,
        "log_every_steps": 1,
        "evaluation": {"sequences": 2},
    }


def run_student(teacher: str, run_folder: str, data: str, degree: str, steps: int) -> None:
    """Distil as `moesaic distill` does, on each process that torchrun has started."""
    assignments = [f"data.path={data}", f"tokens={steps * BATCH * SEQUENCE}", "distill.schedule=throughout"]
    config = student_config(teacher, [*assignments, f"parallel.expert_degree={degree}"], num_layers=5)
    world = World.join()
    try:
        distill(config, run_folder)
    finally:
        world.leave()


def child(name: str, config: str, data: str, processes: int, teacher: str, steps: int) -> None:
    """Train or distil, and print the median step and the largest process's peak memory."""
    with TemporaryDirectory() as folder:
        run_folder = Path(folder) / "run"
        degree = "1" if name == "replicated" else "null"
        what = ["-m", "moesaic", "train", config, "--data", data, "--output", str(run_folder), "--json"]
        what += ["--set", f"parallel.expert_degree={degree}"]
        if teacher:
            what = [__file__, "--steps", str(steps), "--student", teacher, str(run_folder), data, degree]
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *(start if name != "one" else []), *what]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        records = read_metrics(run_folder).train[WARM_UP:]
    seconds = statistics.median(BATCH * SEQUENCE / each.tokens_per_second for each in records)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak_bytes": peak, "loss": records[-1].loss}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=5)
    parser.add_argument("--student", nargs=4)
    parser.add_argument("--distill", action="store_true")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--experts", type=int, nargs="+", default=[0, 8, 64], help="0: dense")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.child:
        name, config, data, processes, teacher = arguments.child
        child(name, config, data, int(processes), teacher, arguments.steps)
        return
    if arguments.student:
        run_student(*arguments.student, arguments.steps)
        return
    print(machine())
    rows = []
    with TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        prepare(embedded_corpus(), data, vocab_size=4096, validation_fraction=0.01)
        for experts in arguments.experts:
            config = Path(folder) / f"{experts}.yaml"
            config.write_text(json.dumps(settings(experts, arguments.steps)))  # JSON is YAML
            teacher = ""
            if arguments.distill:
                teacher = str(Path(folder) / f"teacher-{experts}")
                assignments = [f"data.path={data}", f"tokens={BATCH * SEQUENCE}", "schedule.warmup_tokens=0"]
                train(load_train_config(str(config), assignments), teacher)
            names = [name for name in CONTENDERS if experts or name != "replicated"]
            found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
            for _ in range(arguments.rounds):
                for name in names:
                    call = ["--child", name, str(config), str(data), str(arguments.processes), teacher]
                    call += ["--steps", str(arguments.steps)]
                    found[name].append(run_child(call, environment={}))
            for name in names:
                ratios = [a["seconds"] / b["seconds"] for a, b in zip(found[name], found["one"], strict=True)]
                rows.append(
                    {
                        "experts": experts or "dense",
                        "": name,
                        "s a step": statistics.median(each["seconds"] for each in found[name]),
                        "all runs": " ".join(f"{each['seconds']:.3g}" for each in found[name]),
                        "over one": statistics.median(ratios),
                        "peak MB": found[name][0]["peak_bytes"] / 1e6,
                        "last loss": f"{found[name][0]['loss']:.4f}",
                    }
                )
            print(json.dumps(rows[-len(names) :]), flush=True)
    print_table(rows)
    write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
