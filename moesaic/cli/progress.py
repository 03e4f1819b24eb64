"""The progress of a long call on standard error."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from moesaic.cli.console import open_console


@contextmanager
def shown_progress() -> "Iterator[Callable[[str, float], None]]":
    """Show the stage on standard error, where it does not mix with --json."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=open_console(stderr=True), transient=True) as bars:
        task = bars.add_task("reading", total=None)

        def show(stage: str, share: float) -> None:
            # A stage that does not say how far it is, shows that it is busy.
            bars.update(task, description=stage, completed=share, total=1.0 if share else None)

        yield show
