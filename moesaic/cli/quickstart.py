"""`moesaic quickstart`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesaic.cli.console import print_json
from moesaic.cli.start import loading_modules

if TYPE_CHECKING:
    from moesaic.quickstart.life import QuickstartResult


def quickstart(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The teacher's run folder; the student and the data lie beside it.")
    ] = Path("runs/quickstart"),
    short: Annotated[bool, typer.Option("--short", help="Only a few steps: a check, not a model.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, and no progress.")] = False,
) -> None:
    """Train a small Pyramid-Residual MoE on real text, distil a student, compare them: ten minutes on two cores.

    The text is the embedded corpus: 249 State of the Union addresses. It ends with a page, report.html, in the run
    folder. An interrupted quickstart goes on where it was.

    Example: moesaic quickstart
    """
    from shlex import quote

    from rich.console import Console
    from rich.markup import escape

    with loading_modules():
        from moesaic.logs import log_to_stderr
        from moesaic.quickstart import life
        from moesaic.report.terminal import TrainingDisplay

    if as_json:
        result = life.quickstart(output, short=short, device=device)
        print_json(_to_json(result))
        return
    log_to_stderr()
    console = Console(highlight=False, soft_wrap=True)
    try:
        result = life.quickstart(
            output,
            short=short,
            device=device,
            say=lambda line: console.print(line, markup=False),
            show=lambda config: TrainingDisplay(total_tokens=config.total_tokens),
        )
    except KeyboardInterrupt:
        console.print("Stopped; the same command goes on from here.")
        raise typer.Exit(130) from None
    for name, stage in (("teacher", result.teacher), ("student", result.student)):
        console.print(f"\n[bold]The {name} writes[/]")
        for prompt, continuation in stage.samples:
            console.print(f"[bold]{escape(prompt)}[/]", end="")
            console.print(continuation, markup=False)
    student, data = result.student.run_folder, quote(str(result.data_folder))
    console.print(
        f"\nReport:      {result.report}\n"
        f"Run folders: {output} (plots: {output / 'plots'})\n"
        f"             {student} (plots: {student / 'plots'})\n"
        "Try next:\n"
        f"  moesaic inspect {quote(str(output))}\n"
        f'  moesaic generate {quote(str(student))} --prompt "Peace and commerce"\n'
        f"  moesaic train {life.PRESET} --data {data} --output runs/longer --set tokens=12e6\n"
        "  moesaic prepare YOUR_TEXT --output data/yours",
        markup=False,
    )


def _to_json(result: "QuickstartResult") -> dict[str, Any]:
    stages = {
        name: {
            "run_folder": str(stage.run_folder),
            "train_seconds": stage.train_seconds,
            "tokens_per_second": stage.tokens_per_second,
            "loss": stage.perplexity.loss,
            "perplexity": stage.perplexity.perplexity,
            "bits_per_byte": stage.perplexity.bits_per_byte,
            "samples": stage.samples,
        }
        for name, stage in (("teacher", result.teacher), ("student", result.student))
    }
    return {
        **stages,
        "report": str(result.report),
        "data_folder": str(result.data_folder),
        "peak_memory_bytes": result.peak_memory_bytes,
    }
