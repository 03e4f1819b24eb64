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
) -> None:
    """Prepare real text, train a small Pyramid-Residual MoE on it and generate, in a few minutes on two cores.

    The text is the embedded corpus: 249 State of the Union addresses. An interrupted quickstart goes on where it was.

    Example: moesaic quickstart
    """
    from rich.console import Console

    from moesaic.config.load import load_model_config
    from moesaic.logs import log_to_stderr
    from moesaic.plan.cost import count_parameters
    from moesaic.quickstart import life
    from moesaic.report.terminal import TrainingDisplay

    log_to_stderr()
    console = Console(highlight=False)
    data_folder = output.with_name(f"{output.name}-data")
    config = life.quickstart_config(data_folder, short=short)
    count = count_parameters(load_model_config(life.PRESET))
    console.print(
        f"[bold]1/3[/] Preparing the embedded corpus into {data_folder} (byte-level BPE, "
        f"{config.model.vocab_size} tokens)"
    )
    manifest = life.prepare_quickstart(data_folder, config)
    console.print(
        f"      {manifest.train.num_documents} documents, {manifest.train.num_tokens:,} training tokens, "
        f"{manifest.validation.num_tokens:,} for validation"
    )
    console.print(
        f"[bold]2/3[/] Training {life.PRESET}: {config.model.num_layers} layers, {count.total / 1e6:.1f} M parameters, "
        f"{count.active / 1e6:.1f} M active per token, {config.tokens:,} tokens"
    )
    try:
        with TrainingDisplay(total_tokens=config.tokens) as display:
            seconds = life.train_quickstart(output, config, device=device, display=display)
    except KeyboardInterrupt:
        console.print("Stopped; the same command goes on from here.")
        raise typer.Exit(130) from None
    console.print(
        f"      {seconds / 60:.1f} minutes, validation loss {life.load_validation_loss(output):.3f} nats per token, "
        f"peak memory {life.peak_memory_bytes() / 2**30:.2f} GiB"
    )
    console.print("[bold]3/3[/] Generating")
    for prompt, continuation in life.generate_quickstart(output, device=device):
        console.print(f"\n[bold]{prompt}[/][dim]|[/]", end="", soft_wrap=True)
        console.print(continuation, markup=False, soft_wrap=True)
    console.print(f"\nRun folder: {output}   plots: {output / 'plots'}")
    for path in sorted((output / "plots").glob("*.png")):
        console.print(f"  {path}")
    console.print(
        "Try next:\n"
        f"  moesaic inspect {output}\n"
        f'  moesaic generate {output} --prompt "Peace and commerce"\n'
        f"  moesaic train {life.PRESET} --data {data_folder} --output runs/longer --set tokens=12e6\n"
        "  moesaic prepare YOUR_TEXT --output data/yours",
        markup=False,
        soft_wrap=True,
    )
