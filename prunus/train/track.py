"""Where what is logged goes besides `log.jsonl`: TensorBoard or trackio (the extras `track` and `trackio`), or any function.

A sink is called with every line of the log. Another service needs no more than a function of one dictionary::

    from prunus.train.opening import prepare
    from prunus.train.run import execute
    execute(prepare(recipe, out), say=lambda line: service.log(line))
"""

from __future__ import annotations

import atexit
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import UserError, unknown

Sink = Callable[[Mapping[str, Any]], None]


def scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line, flat: ``validation/loss``, ``mixing/web/weight``."""
    out: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, Mapping):
            out |= {f"{name}/{inner}": number for inner, number in scalars(value).items()}
        elif isinstance(value, int | float) and name not in ("step", "sequences"):
            out[name] = float(value)
    return out


def _tensorboard(out: Path, step: int) -> Sink:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(out / "tensorboard"), purge_step=step)  # what a killed process told of later steps is void

    def sink(line: Mapping[str, Any]) -> None:
        for name, value in scalars(line).items():
            writer.add_scalar(name, value, line["step"])
        writer.flush()

    return sink


def _trackio(out: Path, step: int) -> Sink:
    import trackio

    note = out / "trackio.txt"  # all runs lie in one store of trackio's, where two folders may be called the same
    if not note.exists():
        note.write_text(f"{out.resolve().name}-{datetime.now():%Y%m%d-%H%M%S}\n", encoding="utf-8")
    with redirect_stdout(sys.stderr):  # stdout is for what the command itself tells
        trackio.init(project="prunus", name=note.read_text(encoding="utf-8").strip(), resume="allow")

    @atexit.register
    def finish() -> None:
        with redirect_stdout(sys.stderr):
            trackio.finish()

    return lambda line: trackio.log(scalars(line), step=line["step"])


_SINKS: Mapping[str, Callable[[Path, int], Sink]] = {"tensorboard": _tensorboard, "trackio": _trackio}
_EXTRAS = {"tensorboard": "track", "trackio": "trackio"}


def check(kind: str) -> None:
    """UserError, before any work, for a sink that is not known or not installed."""
    if kind not in _SINKS:
        raise unknown("tracker", kind, _SINKS)
    if find_spec(kind) is None:
        raise UserError(f"track: {kind} is not installed; pip install 'prunus[{_EXTRAS[kind]}]'")


def sink(kind: str, out: Path) -> Sink:
    """A sink for the run in `out`. It opens at its first line: then the folder is a run's, and one process alone has lines.

    Lines of no step, words about the run as a whole, have no place in it.
    """
    check(kind)
    opened: list[Sink] = []

    def put(line: Mapping[str, Any]) -> None:
        if "step" not in line:
            return
        if not opened:
            opened.append(_SINKS[kind](out, line["step"]))
        opened[0](line)

    return put
