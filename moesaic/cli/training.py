"""What `moesaic train` and `moesaic distill` do alike: train with or without a display, and say how it ended."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from moesaic.parallel.world import World
    from moesaic.report.terminal import TrainingDisplay
    from moesaic.train.loop import Trainer, TrainResult


@contextmanager
def one_of_several() -> "Iterator[World]":
    """Give this process's place among those that torchrun started, of which only the main one logs what goes well.

    A group that is left to the interpreter's end may abort there.
    """
    from moesaic.logs import log_to_stderr, logger
    from moesaic.parallel.world import World

    log_to_stderr()
    world = World.join()
    try:
        if not world.is_main:
            logger.setLevel("ERROR")
        yield world
    finally:
        world.leave()


def run_shown(trainer: "Trainer", display: "TrainingDisplay | None") -> "TrainResult":
    """Train, with the trainer's display open: only now, as a mistake found before should leave no empty one behind."""
    with display or nullcontext():
        return trainer.run()


def result_values(result: "TrainResult") -> dict[str, Any]:
    """Return what --json prints of every training."""
    return {
        "run": str(result.run_folder),
        "step": result.step,
        "tokens": result.tokens,
        "loss": result.loss,
        "validation_loss": result.validation_loss,
        "stopped_by": result.stopped_by,
    }


def print_end(result: "TrainResult") -> None:
    """Say how far it came."""
    if result.stopped_by:
        typer.echo(f"Stopped at step {result.step}; go on with the same command and --resume.")
    else:
        loss = "" if result.validation_loss is None else f"; validation loss {result.validation_loss:.4f}"
        typer.echo(f"Trained {result.tokens:,} tokens{loss}.")


def print_run(result: "TrainResult") -> None:
    """Say where it is."""
    typer.echo(f"Run: {result.run_folder}   plots: {result.run_folder / 'plots'}")
