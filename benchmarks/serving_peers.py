"""Prompts of 512 tokens, and single steps behind them, in other systems: what serve.py compares our engine with.

Each runs in a process of the Python that has it installed, on the files that serving_model made in FOLDER, and prints
one line of JSON: for every batch size the seconds of all prompts and of a step, one of each for every round.
Run: BIN/python benchmarks/serving_peers.py vllm|openvino FOLDER [--format int8] [--batches 1 8]
"""

import argparse
import contextlib
import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPT, VOCAB_SIZE = 512, 32_000
# Given the prompts and how many tokens to generate behind each; returns when all are there.
Generate = Callable[[list[list[int]], int], None]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("system", choices=["vllm", "openvino"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--format", default="bf16")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):
        started = time.perf_counter()
        make = {"vllm": start_vllm, "openvino": start_openvino}[arguments.system]
        generate = make(arguments.folder, arguments.format, max(arguments.batches), arguments.steps)
        generate([[1, 2, 3]], 1)
        first_token = time.perf_counter() - started
        results = [measure(generate, batch, arguments.steps, arguments.rounds) for batch in arguments.batches]
    print(json.dumps({"first_token_seconds": first_token, "results": results}))


def measure(generate: Generate, batch: int, steps: int, rounds: int) -> dict[str, Any]:
    """Steps are the difference between a long generation and one of a single token: a system's own loop is in both."""
    draw = random.Random(batch)
    prefills, step_seconds = [], []
    for round_number in range(1 + rounds):  # the first warms up
        times = []
        for count in (1, 1 + steps):
            prompts = [[draw.randrange(VOCAB_SIZE - 1) for _ in range(PROMPT)] for _ in range(batch)]
            started = time.perf_counter()
            generate(prompts, count)
            times.append(time.perf_counter() - started)
        if round_number:
            prefills.append(times[0])
            step_seconds.append((times[1] - times[0]) / steps)
    return {"batch": batch, "prefills": prefills, "steps": step_seconds}


def start_vllm(folder: Path, name: str, most: int, steps: int) -> Generate:
    if name != "bf16":
        raise SystemExit(f"vLLM is measured in bf16, not in {name}")
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
    }
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    model = LLM(
        model=str(folder / "hf"),
        dtype="bfloat16",
        max_model_len=PROMPT + steps + 16,
        max_num_seqs=most,
        max_num_batched_tokens=most * PROMPT,
        enable_prefix_caching=False,
    )

    def generate(prompts: list[list[int]], count: int) -> None:
        sampling = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
        outputs = model.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        assert all(len(output.outputs[0].token_ids) == count for output in outputs)

    return generate


def start_openvino(folder: Path, name: str, most: int, steps: int) -> Generate:
    """OpenVINO GenAI's own continuous batching; folder/openvino-NAME is made by `optimum-cli export openvino`."""
    import openvino_genai as ov_genai  # type: ignore[import-not-found]

    scheduler = ov_genai.SchedulerConfig()
    scheduler.max_num_batched_tokens, scheduler.max_num_seqs = most * PROMPT, most
    scheduler.cache_size, scheduler.enable_prefix_caching = 1, False
    source = str(folder / f"openvino-{name}")
    pipeline = ov_genai.ContinuousBatchingPipeline(source, scheduler, "CPU")
    wanted = ov_genai.GenerationConfig()
    wanted.do_sample, wanted.ignore_eos = False, True

    def generate(prompts: list[list[int]], count: int) -> None:
        import openvino  # type: ignore[import-not-found]

        wanted.max_new_tokens = wanted.min_new_tokens = count
        tensors = [openvino.Tensor(_rows(prompt)) for prompt in prompts]
        results = pipeline.generate(tensors, [wanted] * len(prompts))
        assert all(len(result.m_generation_ids[0]) == count for result in results)

    return generate


def _rows(prompt: list[int]) -> Any:
    import numpy

    return numpy.array([prompt], dtype=numpy.int64)


if __name__ == "__main__":
    main()
