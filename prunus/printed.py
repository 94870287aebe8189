"""What every printed result is made of."""

from __future__ import annotations

import os
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

ANY_WIDTH = 10_000  # columns; rich gives a table no more than it needs


def new_console() -> Console:
    """Standard output, as it is now; a pipe or a file has no edge at which names and figures would be folded.

    What is printed is text: no bracket or colon of a user's name is markup.
    """
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = ANY_WIDTH
    return console


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
