"""The progress of a long call on standard error."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import typer

from moesaic.cli.console import open_console
from moesaic.logs import OnProgress


@contextmanager
def ends_on_interrupt(kept: str, *, output: Path | None = None) -> Iterator[None]:
    """Let Ctrl-C end the command with status 130 and a line on standard error that says what it has kept.

    output: a new folder that appears when it is whole; kept holds until then. SIGTERM and SIGHUP are taken as Ctrl-C.
    """
    is_new = output is not None and not _exists(output)
    try:
        with _signals_as_interrupts():
            yield
    except KeyboardInterrupt:
        if is_new and output is not None and _exists(output):
            kept = f"{output} was written, and is whole"
        typer.echo(f"Stopped; {kept}.", err=True)
        raise typer.Exit(130) from None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long, a folder that may not be entered
        return False


@contextmanager
def _signals_as_interrupts() -> Iterator[None]:
    """Let what ends a process in silence clear up as Ctrl-C does: a batch system's SIGTERM, a lost terminal."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [number for name in names if signal.getsignal(number := getattr(signal, name)) is signal.SIG_DFL]

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    for number in numbers:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


class _WhereThereIsRoom:
    """A stream that takes what it can: no call fails since nobody sees how far it is."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def shown_progress(*, kept: str, output: Path | None = None) -> "Iterator[OnProgress]":
    """Show the stage on standard error, where it does not mix with --json; the rest as ends_on_interrupt takes it."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn())
    console = open_console(stderr=True)
    console.file = _WhereThereIsRoom(console.file)  # type: ignore[assignment]
    bars = Progress(*columns, console=console, transient=True)
    with ends_on_interrupt(kept, output=output), bars:
        task = bars.add_task("reading", total=None)

        def show(stage: str, share: float) -> None:
            # A stage that does not say how far it is, shows that it is busy.
            bars.update(task, description=stage, completed=share, total=1.0 if share else None)

        yield show
