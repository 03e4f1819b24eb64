"""The part `engine` of serve.py: our engine in this process, and its peers in turn after it."""

import argparse
import functools
import json
import os
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from measure import bandwidth_probe, machine, print_table, write_json
from serving_model import (
    EXPERTS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    TOP_K,
    VOCAB_SIZE,
    build,
    build_peer,
    export_openvino,
    quantize_gguf,
    tokenizer_json,
)
from serving_processes import prepare

PROMPT = 512


@dataclass(frozen=True)
class EngineTimes:
    """Seconds of prompts (each round) and of single steps; what a step read and did is counted outside the clock."""

    prefills: list[float]
    steps: list[float]
    bandwidths: list[float] = field(default_factory=list)  # bytes a second, between the rounds
    outside: list[float] = field(default_factory=list)  # of each step, the seconds outside the C++ kernels
    experts_per_step: float = 0.0
    distinct_tokens: int = 0

    def row(self, name: str, batch: int) -> dict[str, Any]:
        step, prompts = statistics.median(self.steps), statistics.median(self.prefills)
        return {
            "engine": name,
            "batch": batch,
            "decode tokens/s": batch / step,
            "step ms": 1e3 * step,
            "least ms": 1e3 * min(self.steps),
            "read GB/s": statistics.median(self.bandwidths) / 1e9,
            "prefill tokens/s": batch * PROMPT / prompts,
        }


def engine_part(arguments: argparse.Namespace) -> None:
    import torch

    from moesaic.bench.share import bound
    from moesaic.data.tokenizer import Tokenizer
    from moesaic.kernels.limits import measure_limits

    limits = measure_limits(device="cpu", seconds=arguments.limits_seconds, reuse=False)
    print(machine())
    rates = (limits.bf16_flops_per_second, limits.int8_operations_per_second or 0.0)
    print(
        f"limits: reads {limits.bandwidth_bytes_per_second / 1e9:.1f} GB/s at best, bf16 {rates[0] / 1e12:.2f} "
        f"TFLOP/s, int8 {rates[1] / 1e12:.2f} TOP/s; kernels: {limits.kernels}"
    )
    bandwidth, clock = bandwidth_probe(), KernelClock()
    tokenizer, rows = Tokenizer(tokenizer_json()), []
    for name in arguments.formats:
        with torch.inference_mode():
            model = build(arguments.layers, name)
        for batch in arguments.batches:
            times = time_engine(model, tokenizer, bandwidth, clock, batch=batch, arguments=arguments)
            decode, prefill = required_work(model, name, batch, times.experts_per_step, arguments.steps)
            here = replace(limits, bandwidth_bytes_per_second=statistics.median(times.bandwidths))
            rows.append(
                {
                    **times.row(f"moesaic {name}", batch),
                    "decode share": bound(decode, here).share(statistics.median(times.steps)),
                    "outside us": 1e6 * statistics.median(times.outside),
                    "outside": statistics.median(times.outside) / statistics.median(times.steps),
                    "MB read": decode.memory_bytes / 1e6,
                    "experts/layer": times.experts_per_step,
                    "distinct tokens": times.distinct_tokens,
                    "prefill share": bound(prefill, here).share(statistics.median(times.prefills)),
                    "of": bound(prefill, here).limit,
                }
            )
        del model
    blank = dict.fromkeys(list(rows[0])[len(EngineTimes([1.0], [1.0], [1.0]).row("", 1)) :], "-")
    for name, each in time_peers(arguments, bandwidth):
        rows += [{**times.row(name, batch), **blank} for batch, times in each]
    print_table(rows)
    write_json(arguments.output, {"machine": machine(), "layers": arguments.layers, "rows": rows})


class KernelClock:
    """Counts the time that this process spends in functions of the C++ kernels."""

    def __init__(self) -> None:
        from moesaic.kernels.cpu import build

        self.seconds, find = 0.0, build._function

        @functools.cache
        def timed(*name: Any) -> Callable[..., int]:
            function = find(*name)

            def call(*arguments: Any) -> int:
                begun = time.perf_counter()
                try:
                    return function(*arguments)
                finally:
                    self.seconds += time.perf_counter() - begun

            return call

        build._function = timed  # type: ignore[assignment]


def time_engine(
    model: Any,
    tokenizer: Any,
    bandwidth: Callable[[], float],
    clock: KernelClock,
    *,
    batch: int,
    arguments: argparse.Namespace,
) -> EngineTimes:
    """Time rounds of `batch` requests that begin together; the first round warms up."""
    from moesaic.config.serve import EngineConfig, Sampling
    from moesaic.serve.engine import Engine

    config = EngineConfig(
        max_sequences=batch,
        max_batch_tokens=arguments.batch_tokens,
        max_length=PROMPT + arguments.steps + 2,
        prefix_caching=False,
    )
    engine = Engine(model, tokenizer, config)
    sampling = Sampling(max_tokens=arguments.steps + 1, temperature=0.0, ignore_end_of_text=True)
    draw = random.Random(batch)
    prefills, steps, outside, bandwidths, tokens = [], [], [], [], []
    expert_bytes, num_layers = 0, len(model.decode_part.layers)
    for round_number in range(1 + arguments.rounds):
        bandwidths.append(bandwidth())
        for _ in range(batch):
            engine.add_request([draw.randrange(VOCAB_SIZE) for _ in range(PROMPT)], sampling)
        begun: set[str] = set()
        started = time.perf_counter()
        while len(begun) < batch:
            begun |= {output.request_id for output in engine.step() if output.tokens}
        prefill = time.perf_counter() - started
        used = engine.stats().expert_bytes_used
        while engine.has_work:
            before, started = clock.seconds, time.perf_counter()
            outputs = engine.step()
            seconds = time.perf_counter() - started
            assert len(outputs) == batch, "a step's experts are counted for a whole batch: raise --batch-tokens"
            if round_number:
                steps.append(seconds)
                outside.append(seconds - (clock.seconds - before))
                tokens += [token.token_id for output in outputs for token in output.tokens]
        if round_number:
            prefills.append(prefill)
            expert_bytes += engine.stats().expert_bytes_used - used
    bandwidths.append(bandwidth())
    each = model.decode_part.layers[0].experts.num_bytes // EXPERTS
    experts = expert_bytes / (len(steps) * num_layers * each)
    return EngineTimes(prefills, steps, bandwidths, outside, experts, len(set(tokens)))


def required_work(model: Any, name: str, batch: int, experts: float, steps: int) -> tuple[Any, Any]:
    """Return what a step, and what the prompts have to move and do: weights as the format stores them, keys, values."""
    from moesaic.bench.share import Work

    assert model.decode_part is not None, "this is a measurement of the C++ kernels"
    layers = model.decode_part.layers
    rest = sum(layer.qkv.num_bytes + layer.o_proj.num_bytes + layer.router.weight.nbytes for layer in layers)
    expert = layers[0].experts.num_bytes / EXPERTS
    head = model.packed_head.num_bytes
    position = len(layers) * 2 * KV_HEADS * HEAD_DIM * 2  # bytes of one token's keys and values
    projections = HIDDEN * HEAD_DIM * (2 * HEADS + 2 * KV_HEADS)
    products = 2 * (projections + 3 * TOP_K * HIDDEN * HIDDEN) * len(layers)  # of a token
    head_products = 2 * HIDDEN * VOCAB_SIZE
    rate = "bf16" if name == "bf16" else "int8"
    decode = Work(
        rest + head + experts * len(layers) * expert + batch * (PROMPT + steps / 2) * position,
        {rate: batch * (products + head_products)},
    )
    attention = len(layers) * 2 * 2 * HEADS * HEAD_DIM * PROMPT * PROMPT / 2  # causal: half of the square
    prefill = Work(
        rest + head + EXPERTS * len(layers) * expert + batch * PROMPT * position,
        {rate: batch * (PROMPT * products + head_products), **({} if rate == "bf16" else {"bf16": batch * attention})},
    )
    if rate == "bf16":
        prefill = Work(prefill.memory_bytes, {"bf16": prefill.operations["bf16"] + batch * attention})
    return decode, prefill


Measured = Iterator[tuple[int, EngineTimes]]  # of each batch size


def time_peers(arguments: argparse.Namespace, bandwidth: Callable[[], float]) -> Iterator[tuple[str, Measured]]:
    """Yield the peers whose place is known, each measured as it is asked for."""
    if arguments.peer:
        yield "transformers bf16", _time_transformers(arguments, bandwidth)
    folder, steps = arguments.folder, ["--steps", str(arguments.steps), "--rounds", str(arguments.rounds)]
    if arguments.vllm or arguments.openvino or arguments.llama:
        prepare(arguments, with_gguf=arguments.llama is not None)
    script = str(Path(__file__).with_name("serving_peers.py"))
    batches = ["--batches", *map(str, arguments.batches)]
    if arguments.vllm:
        command = [str(arguments.vllm), script, "vllm", str(folder), *batches, *steps]
        yield "vLLM bf16", _time_process(command, bandwidth)
    for name in ("int8", "int4") if arguments.openvino else ():
        export_openvino(folder, arguments.openvino, name)
        command = [str(arguments.openvino), script, "openvino", str(folder), "--format", name, *batches, *steps]
        yield f"OpenVINO {name}", _time_process(command, bandwidth)
    for name in arguments.llama_formats if arguments.llama else ():
        model = quantize_gguf(folder, arguments.llama / "llama-quantize", name)
        yield f"llama.cpp {name}", _time_llama(arguments, model, bandwidth)


def _time_transformers(arguments: argparse.Namespace, bandwidth: Callable[[], float]) -> Measured:
    """Time transformers' own forward passes, greedy, with its own cache."""
    import torch

    peer = build_peer(arguments.layers)
    for batch in arguments.batches:
        prefills, steps, bandwidths = [], [], []
        with torch.inference_mode():
            for round_number in range(1 + arguments.rounds):
                bandwidths.append(bandwidth())
                started = time.perf_counter()
                out = peer(torch.randint(VOCAB_SIZE, (batch, PROMPT)), use_cache=True, logits_to_keep=1)
                following = out.logits[:, -1:].argmax(-1)
                prefill = time.perf_counter() - started
                for _ in range(arguments.steps):
                    started = time.perf_counter()
                    out = peer(following, past_key_values=out.past_key_values, use_cache=True)
                    following = out.logits[:, -1:].argmax(-1)
                    if round_number:
                        steps.append(time.perf_counter() - started)
                if round_number:
                    prefills.append(prefill)
        yield batch, EngineTimes(prefills, steps, bandwidths)


def _time_process(command: Sequence[str], bandwidth: Callable[[], float]) -> Measured:
    """Run serving_peers.py; memory is read before and after it."""
    bandwidths = [bandwidth()]
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        print(f"left out: {' '.join(command)}:\n{done.stderr[-2000:]}")
        return
    bandwidths.append(bandwidth())
    said = next(json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"first_token_seconds"'))
    print(f"{Path(command[0]).parent.parent.name} {command[2]}: first token after {said['first_token_seconds']:.1f} s")
    for each in said["results"]:
        yield each["batch"], EngineTimes(each["prefills"], each["steps"], bandwidths)


def _time_llama(arguments: argparse.Namespace, model: Path, bandwidth: Callable[[], float]) -> Measured:
    """Time llama-batched-bench: with flash attention for the prompts and without for the steps, its best of both."""
    seconds: dict[str, dict[int, list[float]]] = {"on": {}, "off": {}}
    bandwidths = []
    most = max(arguments.batches)
    for _ in range(arguments.rounds):
        bandwidths.append(bandwidth())
        for flash, found in seconds.items():
            command = [
                str(arguments.llama / "llama-batched-bench"), "-m", str(model), "-npp", str(PROMPT), "-ntg",
                str(arguments.steps), "-npl", ",".join(map(str, arguments.batches)), "-c",
                str(most * (PROMPT + arguments.steps)), "-b", "2048", "-ub", "512", "-fa", flash, "-t",
                str(arguments.threads), "--output-format", "jsonl",
            ]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            for line in done.stdout.splitlines():
                if line.startswith("{"):
                    said = json.loads(line)
                    value = said["t_pp"] if flash == "on" else said["t_tg"] / arguments.steps
                    found.setdefault(said["pl"], []).append(value)
    for batch in arguments.batches:
        yield batch, EngineTimes(seconds["on"][batch], seconds["off"][batch], bandwidths)
