"""`moesaic bench`: this machine's limits, and what an operation reaches of them."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from moesaic.bench.moe_layer import MoELayerResult
    from moesaic.kernels.limits import Limits

app = typer.Typer(no_args_is_help=True)

# A longer look than training's own takes.
_LIMITS_SECONDS = 8.0
_LAYER_SECONDS = 10.0

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.callback()
def bench() -> None:
    """Measure this machine's limits, and what an operation reaches of them.

    Example: moesaic bench moe-layer --tokens 4096 --experts 128 --top-k 1
    """
    from moesaic.kernels.allocator import tune_allocator

    # Before torch allocates anything: the memory that `moesaic train` would have.
    tune_allocator()


@app.command()
def limits(
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Measure memory bandwidth and matrix rates, with our own kernels and with PyTorch's operations.

    Example: moesaic bench limits
    """
    from dataclasses import asdict

    from moesaic.kernels.device import select_device
    from moesaic.kernels.limits import measure_limits

    measured = measure_limits(device=select_device(device).type, seconds=_LIMITS_SECONDS, reuse=False)
    if as_json:
        _print_json(asdict(measured))
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
        Literal["bf16", "int8", "int4"], typer.Option("--dtype", help="Of the weights; int8 and int4 only infer.")
    ] = "bf16",
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Time one MoE layer against a dense MLP of the same active FLOPs, and against the machine's limit.

    Without --backward it infers with packed weights; with it, it trains. The dense MLP is PyTorch's, in bf16.

    Example: moesaic bench moe-layer --tokens 4096 --experts 128 --top-k 1 --backward
    """
    from dataclasses import asdict

    from moesaic.bench.moe_layer import MoELayerCase, bench_moe_layer

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
        _print_json({**values.pop("case"), **values})
    else:
        _print_moe_layer(result)


def _print_limits(limits: "Limits") -> None:
    from rich.console import Console
    from rich.table import Table

    kernels = "none" if limits.kernels == "reference" else limits.kernels
    table = Table(
        title=f"{limits.name}: {limits.threads} threads, torch {limits.torch_version}, our kernels: {kernels}",
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
    Console().print(table)


def _print_moe_layer(result: "MoELayerResult") -> None:
    from rich.console import Console
    from rich.table import Table

    case = result.case
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    residual = " and a residual MLP" if case.has_residual else ""
    table.add_row(
        "layer",
        f"{case.num_experts} experts, top-{case.top_k}{residual}; hidden {case.hidden_size}, intermediate "
        f"{case.intermediate_size}; {case.dtype}",
    )
    what = "forward and backward" if case.has_backward else "forward"
    table.add_row("call", f"{what}, {case.tokens} tokens, {result.touched_experts} experts touched")
    table.add_row(
        "time",
        f"{result.seconds * 1e3:.3f} ms, median of {result.rounds} ({result.fastest_seconds * 1e3:.3f} to "
        f"{result.slowest_seconds * 1e3:.3f}); {result.kernels}, {result.threads} threads",
    )
    table.add_row("dense MLP of the same active FLOPs", f"{result.dense_seconds * 1e3:.3f} ms (PyTorch, bf16)")
    table.add_row("ratio to dense", f"{result.ratio:.3f}")
    table.add_row(
        "share of the limit",
        f"{result.share_of_limit:.1%}, bound by {result.limit}: {result.required_bytes / 1e6:.1f} MB at "
        f"{result.bandwidth_bytes_per_second / 1e9:.1f} GB/s, {result.required_operations / 1e9:.2f} GFLOP at "
        f"{result.operations_per_second / 1e12:.3f} TFLOP/s",
    )
    Console().print(table)


def _print_json(values: dict[str, Any]) -> None:
    import json

    typer.echo(json.dumps(values, indent=2, allow_nan=False))
