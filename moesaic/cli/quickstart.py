"""`moesaic quickstart`."""

from pathlib import Path
from typing import Annotated

import typer


def quickstart(
    output: Annotated[Path, typer.Option("--output", "-o", help="The run folder; its data lies beside it.")] = Path(
        "runs/quickstart"
    ),
    short: Annotated[bool, typer.Option("--short", help="Only a few steps: a check, not a model.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, and no progress.")] = False,
) -> None:
    """Prepare real text, train a small Pyramid-Residual MoE on it and generate, in a few minutes on two cores.

    The text is the embedded corpus: 249 State of the Union addresses. An interrupted quickstart goes on where it was.

    Example: moesaic quickstart
    """
    import json

    from rich.console import Console

    from moesaic.logs import log_to_stderr
    from moesaic.quickstart import life
    from moesaic.report.terminal import TrainingDisplay

    if as_json:
        result = life.quickstart(output, short=short, device=device)
        fields = {"run_folder": str(result.run_folder), "data_folder": str(result.data_folder)}
        typer.echo(json.dumps({**vars(result), **fields}))
        return
    log_to_stderr()
    console = Console(highlight=False, soft_wrap=True)
    try:
        result = life.quickstart(
            output,
            short=short,
            device=device,
            say=lambda line: console.print(line, markup=False),
            show=lambda config: TrainingDisplay(total_tokens=config.tokens),
        )
    except KeyboardInterrupt:
        console.print("Stopped; the same command goes on from here.")
        raise typer.Exit(130) from None
    for prompt, continuation in result.samples:
        console.print(f"\n[bold]{prompt}[/]", end="")
        console.print(continuation, markup=False)
    console.print(f"\nRun folder: {output}   plots: {output / 'plots'}")
    for path in sorted((output / "plots").glob("*.png")):
        console.print(f"  {path}")
    console.print(
        "Try next:\n"
        f"  moesaic inspect {output}\n"
        f'  moesaic generate {output} --prompt "Peace and commerce"\n'
        f"  moesaic train {life.PRESET} --data {result.data_folder} --output runs/longer --set tokens=12e6\n"
        "  moesaic prepare YOUR_TEXT --output data/yours",
        markup=False,
    )
