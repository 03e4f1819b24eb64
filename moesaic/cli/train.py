"""`moesaic train`."""

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from moesaic.cli.console import print_json
from moesaic.cli.start import loading_modules
from moesaic.cli.training import one_of_several, print_end, print_run, result_values, run_shown


def train(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG",
            help="A preset name, a YAML file (docs/guides/configuration.md), or RUN or RUN@step: that run's config, "
            "starting from its weights.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The run folder.")],
    data: Annotated[Path | None, typer.Option(help="Prepared shards; the same as --set data.path=DIR.")] = None,
    assignments: Annotated[list[str] | None, typer.Option("--set", help="a.b=VALUE, as often as needed.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last good checkpoint.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, and no progress.")] = False,
) -> None:
    """Train a model; everything about the run is written into its folder.

    Ctrl-C saves a checkpoint and stops; --resume goes on from it, bit for bit on the CPU.

    Given a run it starts a new one from its weights: the same model and settings, but for --data and --set.

    On several GPUs or machines: torchrun --nproc-per-node 8 -m moesaic train ...

    Example: moesaic train pr-moe-tiny-8-16 --data shards/ --output runs/first --set tokens=2e6
    """
    with loading_modules():
        from moesaic.config.load import load_train_config, with_options
        from moesaic.report.terminal import TrainingDisplay
        from moesaic.train.loop import Trainer

    with one_of_several() as world:
        with world.together():
            settings = with_options(assignments or [], {"data.path": ("--data", data)})
            source = _own_config(output, config) or config if resume else config
            resolved = load_train_config(source, settings)
        is_shown = world.is_main and not as_json
        display = TrainingDisplay(total_tokens=resolved.total_tokens) if is_shown else None
        result = run_shown(Trainer(resolved, output, device=device, resume=resume, display=display), display)
    if not world.is_main:
        return
    if as_json:
        print_json(result_values(result))
        return
    print_end(result)
    print_run(result)
    run = quote(str(result.run_folder))
    typer.echo(f"Next: moesaic inspect {run}   moesaic generate {run} --prompt '...'")


def _own_config(output: Path, config: str) -> Path | None:
    """Return the config in a run's own folder where `config` is that run, or the one it started from.

    What it started from may be gone by the time it is resumed.
    """
    from moesaic.config.load import read_values

    own = output / "config.yaml"
    if not own.is_file():
        return None
    given = Path(config)
    return own if given == output or read_values(own).get("init_from") == str(given) else None
