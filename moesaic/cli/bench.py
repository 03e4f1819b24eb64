"""`moesaic bench`: this machine's limits, what an operation reaches of them, and how a server answers."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from moesaic.cli.console import open_console, print_json
from moesaic.cli.progress import shown_progress
from moesaic.cli.start import loading_modules
from moesaic.config.api_keys import read_key_file
from moesaic.errors import ConfigError, DataError
from moesaic.folders import check_can_be_written

if TYPE_CHECKING:
    from moesaic.bench.moe_layer import MoELayerResult
    from moesaic.kernels.limits import Limits
    from moesaic.report.serving import ServingResult

app = typer.Typer(no_args_is_help=True)

# A longer look than training's own takes.
_LIMITS_SECONDS = 8.0
_LAYER_SECONDS = 10.0

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.callback()
def bench() -> None:
    """Measure this machine's limits, what an operation reaches of them, and how a server answers.

    Example: moesaic bench moe-layer --tokens 4096 --experts 128 --top-k 1
    """


@app.command()
def limits(
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Measure memory bandwidth and matrix rates, with our own kernels and with PyTorch's operations.

    Example: moesaic bench limits
    """
    from dataclasses import asdict

    with loading_modules():
        from moesaic.kernels.device import select_device
        from moesaic.kernels.limits import measure_limits
        from moesaic.logs import log_to_stderr

    log_to_stderr()
    measured = measure_limits(device=select_device(device).type, seconds=_LIMITS_SECONDS, reuse=False)
    if as_json:
        print_json(asdict(measured))
    else:
        _print_limits(measured)


@app.command("moe-layer")
def moe_layer(
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens of a call.")] = 4096,
    experts: Annotated[int, typer.Option("--experts", min=1)] = 128,
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="Experts of a token.")] = 1,
    hidden: Annotated[int, typer.Option("--hidden", min=1, help="Hidden size.")] = 512,
    intermediate: Annotated[int, typer.Option("--intermediate", min=1, help="Intermediate size of an expert.")] = 2048,
    residual: Annotated[
        bool, typer.Option("--residual", help="An MLP of an expert's size beside the experts.")
    ] = False,
    backward: Annotated[bool, typer.Option("--backward", help="Train: forward and backward.")] = False,
    dtype: Annotated[
        Literal["bf16", "int8", "int4", "mxfp4"],
        typer.Option("--dtype", help="Of the weights; all but bf16 only infer."),
    ] = "bf16",
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Time one MoE layer against a dense MLP of the same active FLOPs, and against the machine's limit.

    Without --backward it infers with packed weights; with it, it trains. The dense MLP is PyTorch's, in bf16, or in
    fp32 where that is faster.

    Example: moesaic bench moe-layer --tokens 4096 --experts 128 --top-k 1 --backward
    """
    from dataclasses import asdict

    with loading_modules():
        from moesaic.bench.moe_layer import MoELayerCase, bench_moe_layer
        from moesaic.logs import log_to_stderr

    log_to_stderr()
    case = MoELayerCase(
        tokens=tokens,
        num_experts=experts,
        top_k=top_k,
        hidden_size=hidden,
        intermediate_size=intermediate,
        has_residual=residual,
        has_backward=backward,
        dtype=dtype,
        device=device,
    )
    result = bench_moe_layer(case, seconds=_LAYER_SECONDS)
    if as_json:
        values = asdict(result)
        print_json({**values.pop("case"), **values})
    else:
        _print_moe_layer(result)


@app.command()
def serve(
    url: Annotated[str, typer.Argument(metavar="URL", help="A server that speaks OpenAI's protocol.")],
    trace: Annotated[
        Path | None,
        typer.Option("--trace", metavar="FILE", help="Lengths, and times, of a real service's requests; CSV or JSONL."),
    ] = None,
    prompt_tokens: Annotated[
        str | None,
        typer.Option("--prompt-tokens", metavar="N|A-B", help="Instead of --trace: of each prompt, 512 or 128-1024."),
    ] = None,
    output_tokens: Annotated[
        str | None,
        typer.Option("--output-tokens", metavar="N|A-B", help="Instead of --trace: of each answer, 128 or 16-256."),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(help="Requests per second on average: at the trace's own times, stretched, else at random ones."),
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(help="Instead of --rate: so many requests at all times, a new one as one ends.")
    ] = None,
    requests: Annotated[
        int | None, typer.Option(help="How many, a trace's first ones. \\[default: 100, or all of a shorter trace]")
    ] = None,
    scale_lengths: Annotated[
        float | None, typer.Option("--scale-lengths", help="Of --trace: multiply all lengths, by 0.25 say.")
    ] = None,
    max_prompt_tokens: Annotated[
        int | None, typer.Option("--max-prompt-tokens", help="Of --trace: cut longer prompts.")
    ] = None,
    max_output_tokens: Annotated[
        int | None, typer.Option("--max-output-tokens", help="Of --trace: cut longer answers.")
    ] = None,
    prompts: Annotated[
        Literal["ids", "text", "chat"],
        typer.Option(help="Random token ids, words to /v1/completions, or words as a message to /v1/chat/completions."),
    ] = "ids",
    vocab_size: Annotated[
        int | None,
        typer.Option(
            "--vocab-size", help="Of token ids: those below this; the model has to have them. \\[default: 1000]"
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Of all that is drawn. Another one, where a server may remember the last run's prompts.")
    ] = 0,
    warmup: Annotated[int, typer.Option(min=0, help="Requests before, which are not counted.")] = 2,
    ttft_limit: Annotated[
        float, typer.Option("--ttft-limit", help="Seconds to the first token that count as good.")
    ] = 2.0,
    tpot_limit: Annotated[
        float, typer.Option("--tpot-limit", help="Seconds per token behind it that count as good.")
    ] = 0.1,
    timeout: Annotated[float, typer.Option(help="Seconds after which a request has failed.")] = 600.0,
    model: Annotated[str | None, typer.Option(help="\\[default: the first that the server lists]")] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option("--api-key-file", metavar="FILE", help="A file with the server's key, as the server reads it."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="What plots call this run. \\[default: the model]")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="Write the result, each request in it, as JSON.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="PNG", help="Draw times to first token, per token, and throughput.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON instead of a table.")] = False,
) -> None:
    """Send requests to a running server, and measure its answers: times, throughput, goodput.

    Prompts are random; answers are as long as asked for. It ends with status 1 where no request succeeded.

    Example: moesaic bench serve http://127.0.0.1:8000 --prompt-tokens 128-768 --output-tokens 64 --rate 2
    """
    from moesaic.bench.serving import Endpoint, bench_serving
    from moesaic.bench.workload import Workload, parse_range
    from moesaic.logs import log_to_stderr

    log_to_stderr()
    workload = Workload(
        trace=trace,
        prompt_tokens=None if prompt_tokens is None else parse_range(prompt_tokens, name="--prompt-tokens"),
        output_tokens=None if output_tokens is None else parse_range(output_tokens, name="--output-tokens"),
        num_requests=requests,
        rate=rate,
        concurrency=concurrency,
        scale_lengths=scale_lengths,
        max_prompt_tokens=max_prompt_tokens,
        max_output_tokens=max_output_tokens,
        prompts=prompts,
        vocab_size=vocab_size,
        seed=seed,
    )
    key = None if api_key_file is None else read_key_file(api_key_file, named=f"--api-key-file {api_key_file}")[0]
    if output is not None:
        check_can_be_written(output)
        if plot is not None and plot.resolve() == output.resolve():
            raise ConfigError(
                f"--output and --plot are both {output}; each is a file of its own; give one of them another name."
            )
    if plot is not None:
        from moesaic.report.drawing import check_figure_path

        check_figure_path(plot)
    interrupted: list[ServingResult] = []
    try:
        with shown_progress(kept="requests that had not ended are not counted") as show:
            result = bench_serving(
                Endpoint(url=url, model=model, api_key=key, timeout_seconds=timeout),
                workload,
                name=name,
                num_warmup=warmup,
                ttft_limit_seconds=ttft_limit,
                tpot_limit_seconds=tpot_limit,
                show=lambda ended, count: show(f"{ended} of {count} requests", ended / count),
                on_interrupt=interrupted.append,
            )
    except typer.Exit:
        for each in interrupted:
            _report_serving(each, output=output, plot=plot, as_json=as_json)
        raise
    _report_serving(result, output=output, plot=plot, as_json=as_json)
    if not result.completed:
        raise typer.Exit(1)


def _report_serving(result: "ServingResult", *, output: Path | None, plot: Path | None, as_json: bool) -> None:
    """Print a result, and write what can be written of it. Raises: DataError for what cannot."""
    from dataclasses import asdict

    from moesaic.report.serving import write_serving

    if as_json:
        values = asdict(result)
        del values["requests"]
        print_json({**values, "summary": asdict(result.summary())})
    else:
        _print_serving(result)
    unwritten: list[str] = []  # what can be kept of a long measurement is
    if output is not None:
        try:
            write_serving(output, result)
        except DataError as error:
            unwritten.append(str(error))
    if plot is not None:
        from moesaic.report.serving_plots import write_serving_plot

        try:
            write_serving_plot(plot, [result])
        except DataError as error:
            unwritten.append(str(error))
    if unwritten:
        raise DataError("\n".join(unwritten))


def _print_serving(result: "ServingResult") -> None:
    from rich.table import Table

    from moesaic.report.quantities import counted, percent

    console, summary = open_console(), result.summary()
    name = "" if result.name == result.model else f"{result.name}: "
    table = Table(title=f"{name}{result.model} at {result.url}", title_justify="left")
    for number, column in enumerate(("seconds", "mean", "p50", "p90", "p95", "p99", "most")):
        table.add_column(column, justify="right" if number else "left", no_wrap=True, min_width=0 if number else 18)
    for label, values in (
        ("first token (TTFT)", summary.ttft),
        ("per token (TPOT)", summary.tpot),
        ("between chunks", summary.inter_token),
        ("end to end", summary.end_to_end),
        ("sent late, by us", summary.lateness),
    ):
        if values is None:
            table.add_row(label, *["-"] * 6)
        else:
            numbers = (values.mean, values.p50, values.p90, values.p95, values.p99, values.max)
            table.add_row(label, *map(_in_seconds, numbers))
    console.print(table)

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    grid.add_row(
        "requests", f"{summary.num_completed} of {summary.num_requests} completed in {summary.duration_seconds:.1f} s"
    )
    if result.num_unended:
        grid.add_row("interrupted", f"{counted(result.num_unended, 'request')} had not ended", style="red")
    for kind, count in summary.errors.items():
        message = next(each.message for each in result.requests if each.error == kind)
        grid.add_row("failed", f"{count} {kind}, the first: {message}", style="red")
    cached = f", {summary.cached_tokens} of them cached" if summary.cached_tokens else ""
    asked = summary.asked_prompt_tokens
    planned = f" ({asked} were planned)" if asked != summary.prompt_tokens else ""
    grid.add_row("tokens", f"{summary.prompt_tokens} of prompts{planned}{cached}; {summary.output_tokens} of answers")
    if summary.num_shorter:
        grid.add_row("shorter", f"{counted(summary.num_shorter, 'answer')} ended before the length that was asked for")
    grid.add_row(
        "throughput",
        f"{summary.requests_per_second:.3f} requests/s, {summary.output_tokens_per_second:.1f} output tokens/s, "
        f"{summary.total_tokens_per_second:.1f} tokens/s with prompts",
    )
    grid.add_row(
        "goodput",
        f"{percent(summary.goodput_share)} of requests, {summary.goodput_per_second:.3f} a second: TTFT within "
        f"{result.ttft_limit_seconds:g} s, TPOT within {result.tpot_limit_seconds:g} s",
    )
    if summary.tokens_per_chunk is not None:
        grid.add_row("tokens per chunk", f"{summary.tokens_per_chunk:.2f}")
    console.print(grid)


def _in_seconds(value: float) -> str:
    return f"{value:.4f}" if value < 10 else f"{value:.1f}"  # short enough to stand whole in 80 columns


def _print_limits(limits: "Limits") -> None:
    from rich.table import Table

    from moesaic.report.quantities import counted

    kernels = "none" if limits.kernels == "reference" else limits.kernels
    table = Table(
        title=f"{limits.name}: {counted(limits.threads, 'thread')}, torch {limits.torch_version}, our kernels: "
        f"{kernels}",
        title_justify="left",
    )
    table.add_column("limit")
    table.add_column("the best", justify="right")
    table.add_column("torch", justify="right")
    read = f"reading memory ({limits.buffer_bytes / 2**20:.0f} MiB)"
    table.add_row(
        read,
        f"{limits.bandwidth_bytes_per_second / 1e9:.1f} GB/s",
        f"{limits.torch_bandwidth_bytes_per_second / 1e9:.1f} GB/s",
    )
    for name, best, torch, unit in (
        ("bf16 products", limits.bf16_flops_per_second, limits.torch_bf16_flops_per_second, "TFLOP/s"),
        ("fp32 products", limits.fp32_flops_per_second, limits.torch_fp32_flops_per_second, "TFLOP/s"),
        ("int8 products", limits.int8_operations_per_second, limits.torch_int8_operations_per_second, "TOP/s"),
    ):
        table.add_row(name, *("none" if rate is None else f"{rate / 1e12:.3f} {unit}" for rate in (best, torch)))
    open_console().print(table)


def _print_moe_layer(result: "MoELayerResult") -> None:
    from rich.table import Table

    from moesaic.report.quantities import counted

    case = result.case
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    residual = " and a residual MLP" if case.has_residual else ""
    table.add_row(
        "layer",
        f"{counted(case.num_experts, 'expert')}, top-{case.top_k}{residual}; hidden {case.hidden_size}, intermediate "
        f"{case.intermediate_size}; {case.dtype}",
    )
    what = "forward and backward" if case.has_backward else "forward"
    touched = f"{counted(result.touched_experts, 'expert')} touched"
    table.add_row("call", f"{what}, {counted(case.tokens, 'token')}, {touched}")
    table.add_row(
        "time",
        f"{result.seconds * 1e3:.3f} ms, median of {result.rounds} ({result.fastest_seconds * 1e3:.3f} to "
        f"{result.slowest_seconds * 1e3:.3f}); {result.kernels}, {counted(result.threads, 'thread')}",
    )
    dense = f"{result.dense_seconds * 1e3:.3f} ms (PyTorch, {result.dense_dtype})"
    table.add_row("dense MLP of the same active FLOPs", dense)
    table.add_row("ratio to dense", f"{result.ratio:.3f}")
    table.add_row(
        "share of the limit",
        f"{result.share_of_limit:.1%}, bound by {result.limit}: {result.required_bytes / 1e6:.1f} MB at "
        f"{result.bandwidth_bytes_per_second / 1e9:.1f} GB/s, {result.required_operations / 1e9:.2f} GFLOP at "
        f"{result.operations_per_second / 1e12:.3f} TFLOP/s",
    )
    open_console().print(table)
