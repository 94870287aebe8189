"""Being asked to stop: by Ctrl-C, or by a scheduler's SIGTERM."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class StoppedError(Exception):
    """The run, or a study after so many steps, was asked to stop, and has saved where it stands. `code` is the exit code."""

    def __init__(self, code: int, step: int, of: str = "run") -> None:
        after = f"after step {step}" if of == "run" else f"with {step} steps done"
        super().__init__(f"stopped {after}; the same command goes on from there")
        self.code = code


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], int]]:
    """What tells whether Ctrl-C (130) or SIGTERM (143) came; 0 if none did. A second Ctrl-C stops at once."""
    asked = 0

    def note(signum: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = 128 + signum

    kinds = (signal.SIGINT, signal.SIGTERM)
    before = (
        {kind: signal.signal(kind, note) for kind in kinds} if threading.current_thread() is threading.main_thread() else {}
    )
    try:
        yield lambda: asked
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
