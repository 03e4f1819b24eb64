"""The progress of a long call on standard error."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer

from moesaic.cli.console import open_console


@contextmanager
def ends_on_interrupt(kept: str) -> Iterator[None]:
    """Let Ctrl-C end the command with status 130 and a line on standard error that says what it has kept."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"Stopped; {kept}.", err=True)
        raise typer.Exit(130) from None


@contextmanager
def shown_progress(*, kept: str) -> "Iterator[Callable[[str, float], None]]":
    """Show the stage on standard error, where it does not mix with --json; kept: as ends_on_interrupt takes it."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn())
    bars = Progress(*columns, console=open_console(stderr=True), transient=True)
    with ends_on_interrupt(kept), bars:
        task = bars.add_task("reading", total=None)

        def show(stage: str, share: float) -> None:
            # A stage that does not say how far it is, shows that it is busy.
            bars.update(task, description=stage, completed=share, total=1.0 if share else None)

        yield show
