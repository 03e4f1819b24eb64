"""How the tables look that commands print."""

from rich.table import Table


def plain_table(*columns: str, left: int = 1, show_header: bool = True) -> Table:
    """Return a table without lines; all columns but the first `left` ones hold numbers."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=show_header)
    for place, name in enumerate(columns):
        table.add_column(name, justify="left" if place < left else "right", overflow="fold")
    return table
