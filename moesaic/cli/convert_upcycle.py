"""`moesaic convert upcycle`: experts for a dense run. Parses, calls moesaic.convert.upcycle and prints."""

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from moesaic.cli.console import open_console, print_json
from moesaic.cli.lists import expert_counts, integers
from moesaic.cli.progress import shown_progress
from moesaic.cli.start import loading_modules

if TYPE_CHECKING:
    from rich.console import Group

    from moesaic.convert.upcycle import UpcycleReport


def upcycle(
    dense: Annotated[
        str, typer.Argument(metavar="DENSE", help="RUN (its best checkpoint) or RUN@step, of a dense model.")
    ],
    output: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of the new run, to be made.")],
    experts: Annotated[
        str, typer.Option("--experts", metavar="N", help="Of every MoE layer, or one count for each: 16 or 8,8,16,16.")
    ],
    layers: Annotated[
        str | None, typer.Option("--layers", metavar="LIST", help="The layers that get experts, rising, from 0: 1,3,5.")
    ] = None,
    every: Annotated[
        int | None, typer.Option("--every", metavar="N", help="Or every N-th layer, the N-th first. \\[default: 2]")
    ] = None,
    top_k: Annotated[int, typer.Option("--top-k", metavar="K", help="Experts that a token uses.")] = 1,
    residual: Annotated[
        bool,
        typer.Option(
            "--residual",
            help="Keep the MLP beside the experts, which start at nothing: exactly the same model at first.",
        ),
    ] = False,
    granularity: Annotated[
        int,
        typer.Option("--granularity", metavar="N", help="With --residual: experts are slices of an N-th of the MLP."),
    ] = 1,
    noise: Annotated[
        float | None,
        typer.Option(
            "--noise",
            metavar="X",
            help="On the experts, times each matrix's standard deviation. \\[default: 0.01 with --residual, else 0]",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of noise and routers.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON instead of a table.")] = False,
) -> None:
    """Make a mixture-of-experts run whose experts start as the MLPs of a dense one.

    Train it with `moesaic train RUN --data DIR --output NEW`.

    Example: moesaic convert upcycle runs/dense runs/upcycled --experts 8 --residual
    """
    with loading_modules():
        from moesaic.convert.upcycle import upcycle_run
        from moesaic.logs import log_to_stderr

    log_to_stderr()
    counts = expert_counts(experts)
    with shown_progress(kept="nothing was written", output=output) as show:
        report = upcycle_run(
            dense,
            output,
            experts=counts,
            layers=None if layers is None else integers("--layers", layers),
            every=every,
            top_k=top_k,
            residual=residual,
            granularity=granularity,
            noise=noise,
            seed=seed,
            on_progress=show,
        )
    if as_json:
        print_json({"output": str(output), **report.to_json()})
        return
    console = open_console()
    console.print(_tables(report))
    console.print(
        f"Written to {output}. Next: moesaic train {quote(str(output))} --data DIR --output NEW", soft_wrap=True
    )


def _tables(report: "UpcycleReport") -> "Group":
    from rich.console import Group

    from moesaic.report.model_summary import describe_bytes, describe_indices
    from moesaic.report.quantities import short_number
    from moesaic.report.tables import plain_table

    sizes = plain_table("", "dense", "upcycled")
    sizes.add_row("parameters", short_number(report.parameters_before), short_number(report.parameters_after))
    sizes.add_row(
        "active per token", short_number(report.active_parameters_before), short_number(report.active_parameters_after)
    )
    sizes.add_row("stored", describe_bytes(report.bytes_before), describe_bytes(report.bytes_after))
    counts = sorted(set(report.num_experts))
    experts = str(counts[0]) if len(counts) == 1 else ", ".join(map(str, report.num_experts))
    lines = [
        f"layers {describe_indices(report.layers)}: {experts} experts of {report.expert_intermediate_size}, "
        f"top-{report.top_k}{' beside the MLP' if report.residual else ''}, noise {report.noise:g}",
        "the model did not fit in memory to compare its logits with the dense one's"
        if report.max_logit_difference is None
        else f"largest difference of logits from the dense run's, on a prompt: {report.max_logit_difference:.3g}",
    ]
    if not report.is_same_function and report.top_k == 1:
        lines.append(
            "with top-1 the experts' output is the MLP's times the routing probability, so the model is another one at "
            "first"
        )
    return Group(sizes, "", *lines, "")
