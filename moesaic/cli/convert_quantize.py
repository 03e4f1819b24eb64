"""`moesaic convert quantize`: a run with matrices of 8 or 4 bits. Parses, calls moesaic.convert.quantize and prints."""

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from moesaic.cli.console import open_console, print_json
from moesaic.cli.progress import shown_progress
from moesaic.cli.start import loading_modules
from moesaic.convert.defaults import CALIBRATION_TOKENS, MAX_KL, MAX_PERPLEXITY_RATIO, REPORT_TOKENS

if TYPE_CHECKING:
    from rich.console import Group

    from moesaic.convert.quantize import QuantizationReport


def quantize(
    run: Annotated[str, typer.Argument(metavar="RUN", help="RUN (its best checkpoint) or RUN@step.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The folder of the quantised run, to be made.")],
    experts: Annotated[
        str | None,
        typer.Option("--experts", metavar="FORMAT", help="int8, int4 or mxfp4 (gpt-oss's own). \\[default: int8]"),
    ] = None,
    rest: Annotated[
        str,
        typer.Option(
            "--rest",
            metavar="FORMAT",
            help="int4, int8 or bf16, of attention, dense and residual MLPs, and the output matrix.",
        ),
    ] = "int8",
    group_size: Annotated[
        int | None,
        typer.Option(
            "--group-size", metavar="N", help="Columns that share a step in int4: 32, 64, 128. \\[default: 64]"
        ),
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(
            "--calibrate",
            metavar="TEXT",
            help="Round by what reaches each matrix on this text: a file, a folder, or shards written by `moesaic "
            "prepare`, of which the training split is taken; `none` rounds to nearest. \\[default: the run's own "
            "shards where something takes 4 bits and they are there, else none]",
        ),
    ] = None,
    calibration_tokens: Annotated[
        int | None,
        typer.Option("--calibration-tokens", metavar="N", help=f"At most so many. \\[default: {CALIBRATION_TOKENS}]"),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            metavar="TEXT",
            help="What the report measures: a file, a folder, or shards, of which the validation split is taken. "
            "\\[default: the run's own shards]",
        ),
    ] = None,
    text_field: Annotated[
        str | None,
        typer.Option(
            "--text-field",
            metavar="NAME",
            help="Of --text and --calibrate: the field with the text in JSONL and parquet. \\[default: text]",
        ),
    ] = None,
    limit_tokens: Annotated[
        int, typer.Option("--limit-tokens", metavar="N", help="Measure so many tokens of it at most.")
    ] = REPORT_TOKENS,
    max_perplexity_ratio: Annotated[
        float, typer.Option("--max-perplexity-ratio", help="Refuse when the perplexity grows by more than this factor.")
    ] = MAX_PERPLEXITY_RATIO,
    max_kl: Annotated[float, typer.Option("--max-kl", help="Refuse when the KL is more than this, in nats.")] = MAX_KL,
    force: Annotated[bool, typer.Option("--force", help="Write it all the same.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON instead of tables.")] = False,
) -> None:
    """Make a run whose matrices have 8 or 4 bits, and report what that costs in perplexity and KL.

    Norms, routers, residual mixes and biases stay as they are. Nothing is left behind when it is refused.

    Example: moesaic convert quantize runs/first runs/first-int4 --experts int4 --group-size 32
    """
    with loading_modules():
        from moesaic.convert.quantize import quantize_run
        from moesaic.logs import log_to_stderr

    log_to_stderr()
    with shown_progress(kept="nothing was written", output=output) as show:
        report = quantize_run(
            run,
            output,
            experts=experts,  # type: ignore[arg-type]  # checked there
            rest=rest,  # type: ignore[arg-type]
            group_size=group_size,
            calibrate=calibrate,
            calibration_tokens=calibration_tokens,
            text=text,
            text_field=text_field,
            limit_tokens=limit_tokens,
            max_perplexity_ratio=max_perplexity_ratio,
            max_kl=max_kl,
            force=force,
            on_progress=show,
        )
    if as_json:
        print_json({"output": str(output), **report.to_json()})
        return
    console = open_console()
    console.print(_tables(report))
    console.print(f"Written to {output}. Next: moesaic generate {quote(str(output))} --prompt '...'", soft_wrap=True)


def _tables(report: "QuantizationReport") -> "Group":
    from rich.console import Group
    from rich.text import Text

    from moesaic.report.model_summary import describe_bytes
    from moesaic.report.quantities import measured, percent, short_number
    from moesaic.report.tables import plain_table

    sizes = plain_table("tensors", "format", "parameters", "stored", "in bf16", "now", "of bf16", left=2)
    total = [0, 0, 0, 0]

    def add(kind: str, format_: str, parameters: int, stored: int, bf16: int, now: int) -> None:
        texts = (describe_bytes(stored), describe_bytes(bf16), describe_bytes(now))
        sizes.add_row(kind, format_, short_number(parameters), *texts, percent(now / bf16))

    for each in report.kinds:
        numbers = (each.parameters, each.bytes_stored, each.bytes_bf16, each.bytes_quantized)
        add(each.kind, each.format, *numbers)
        total = [a + b for a, b in zip(total, numbers, strict=True)]
    add("all", "", *total)
    quality = plain_table("", "before", "quantised", "change")
    before, after = report.reference, report.quantized
    quality.add_row(
        "perplexity",
        measured(before.perplexity, 3),
        measured(after.perplexity, 3),
        f"x {report.perplexity_ratio:.4f}",
    )
    quality.add_row(
        "bits per byte",
        f"{before.bits_per_byte:.4f}",
        f"{after.bits_per_byte:.4f}",
        f"{after.bits_per_byte - before.bits_per_byte:+.4f}",
    )
    quality.add_row("KL, nats", "", f"{report.kl:.5f}")
    quality.add_row("same likeliest token", "", percent(report.top1_agreement))
    calibrated = (
        "rounded to nearest"
        if report.calibration is None
        else f"calibrated on {report.calibration_tokens:,} tokens of {report.calibration}"
    )
    source = f"{before.num_tokens:,} tokens of {report.text}; {calibrated}"
    return Group(sizes, "", quality, Text(source, style="dim"), "")
