"""Where what is logged goes besides `log.jsonl`: TensorBoard or trackio (the extra `track`), or any function.

A sink is called with every line of the log. Another service needs no more than a function of one dictionary::

    from prunus.train.opening import prepare
    from prunus.train.run import execute
    execute(prepare(recipe, out), say=lambda line: service.log(line))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


def _tensorboard(out: Path) -> Sink:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(out / "tensorboard"))

    def sink(line: Mapping[str, Any]) -> None:
        for name, value in scalars(line).items():
            writer.add_scalar(name, value, line["step"])
        writer.flush()

    return sink


def _trackio(out: Path) -> Sink:
    import trackio

    trackio.init(project="prunus", name=out.name)
    return lambda line: trackio.log(scalars(line), step=line["step"])


_SINKS: Mapping[str, tuple[str, Callable[[Path], Sink]]] = {
    "tensorboard": ("tensorboard", _tensorboard),
    "trackio": ("trackio", _trackio),
}


def check(kind: str) -> None:
    """UserError, before any work, for a sink that is not known or not installed."""
    if kind not in _SINKS:
        raise unknown("tracker", kind, _SINKS)
    if find_spec(_SINKS[kind][0]) is None:
        raise UserError(f"track: {kind} is not installed; pip install 'prunus[track]'")


def sink(kind: str, out: Path) -> Sink:
    """Open a sink for the run in `out`."""
    check(kind)
    return _SINKS[kind][1](out)
