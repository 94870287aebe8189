"""What every printed result is made of."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text


def new_console() -> Console:
    """Standard output, as it is now."""
    return Console(highlight=False, soft_wrap=True)


def new_table(*columns: str, title: str | None = None, left: int = 1) -> Table:
    """Columns of figures, but for the first `left`."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < left else "right")
    return table


def print_notes(console: Console, notes: Iterable[str]) -> None:
    """A line each."""
    for note in notes:
        console.print(Text(f"note: {note}", style="dim"))
