"""The consoles that commands print to."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def open_console(*, stderr: bool = False) -> "Console":
    """Return a console without markup: paths, names and messages hold brackets of their own. Styles are rich's Text."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, emoji=False)
