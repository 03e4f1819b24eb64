"""What commands print to: consoles, and JSON for programs."""

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
    """Print an answer as one line of JSON, with null for numbers that are not finite."""
    from moesaic.report.json_values import json_values

    typer.echo(json.dumps(json_values(values), allow_nan=False))
