"""Progress on standard error, with the time left: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

_EVERY_S = 5.0


class Progress:
    """Call it with (stage, done, total). Use as a context manager; silent if `quiet`."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.stage: str | None = None
        self.started = self.printed = 0.0
        self.bar: Any = None
        self.task: Any = None

    def __enter__(self) -> Progress:
        if not self.quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description:<12}", markup=False),  # names of models and texts
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            # Standard error as it is now: libraries may be silenced meanwhile.
            console = Console(file=sys.stderr, highlight=False, markup=False, emoji=False)
            self.bar = Bar(*columns, console=console)
            self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that `done` of `total` steps of `stage` are over."""
        if self.quiet:
            return
        now = time.monotonic()
        if stage != self.stage:
            self.stage, self.started, self.printed = stage, now, now
            if self.bar is not None:
                self.task = self.bar.add_task(stage, total=total)
        if self.bar is not None:
            self.bar.update(self.task, completed=done, total=total)
        elif done and (done == total or now - self.printed >= _EVERY_S):
            left = (now - self.started) / done * (total - done)
            print(f"{stage}: {done}/{total}, {left:.0f} s left", file=sys.stderr, flush=True)
            self.printed = now

    def say(self, text: str) -> None:
        """A line above the bar."""
        if not self.quiet:
            (self.bar.console.print if self.bar is not None else lambda t: print(t, file=sys.stderr, flush=True))(text)
