"""The part `servers` of serve.py: each server under the same loads, one after the other, round by round."""

import argparse
import os
import shlex
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from measure import machine, print_table
from serving_model import quantize_gguf
from serving_processes import MAX_SEQUENCES, Contender, StartError, ours, prepare, started

# llama-server divides its context among its slots, so that more would take more memory.
LLAMA_SLOTS = 16


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
    prepare(arguments, with_gguf=llama is not None)
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
