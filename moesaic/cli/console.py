"""What commands print to: consoles, and JSON for those who read it with a program."""

import json
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console


def open_console(*, stderr: bool = False) -> "Console":
    """Return a console without markup: paths, names and messages hold brackets of their own. Styles are rich's Text."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, emoji=False)


def print_json(values: dict[str, Any]) -> None:
    """Print a whole answer as JSON that a person can read too."""
    typer.echo(json.dumps(values, indent=2, allow_nan=False))
