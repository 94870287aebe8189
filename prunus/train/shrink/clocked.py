"""Milliseconds as a price: what a model of any sizes takes on this machine, from layers of some sizes that are measured once.

Along every axis that is cut three sizes are measured, its least, its whole and one between, with every size of the other axes;
straight lines between them. What was measured stays in the run's folder, so that a run that goes on decides by the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...anatomy import Anatomy
from ...distributed import World
from ...errors import UserError
from ...hf import target_for
from ...keep import Keep
from ...latency import Table, Timing, filled, key, layer_part, outer_part, prompt_tokens
from .goal import Goal, cut_to, size_of
from .part import TIMED, PrunePart

TABLE = "latency.json"  # in the run's folder
_AXES = ("hidden", "kv_heads", "intermediate")
_RISES = 1.001  # at least, from one size to the next: a clock's noise makes nothing free


@dataclass(frozen=True)
class Clocked:
    """Nanoseconds of a model: of its layers by (hidden, KV heads, channels), and of all else by hidden."""

    sizes: tuple[tuple[int, ...], ...]  # of each axis, ascending
    layer: np.ndarray
    outer: np.ndarray
    known: dict[tuple[int, ...], float] = field(default_factory=dict)

    def __call__(self, anatomy: Anatomy) -> float:
        """Of all layers and the rest."""
        hidden = anatomy.shape.hidden_size
        layers = (self._layer((hidden, x.num_key_value_heads, x.intermediate_size)) for x in anatomy.shape.layers)
        return float(np.interp(hidden, self.sizes[0], self.outer)) + sum(layers)

    def _layer(self, at: tuple[int, ...]) -> float:
        if at not in self.known:
            values = self.layer
            for sizes, size in zip(reversed(self.sizes), reversed(at), strict=True):
                lines = values.reshape(-1, len(sizes))
                values = np.array([np.interp(size, sizes, line) for line in lines]).reshape(values.shape[:-1])
            self.known[at] = float(values)
        return self.known[at]

    @classmethod
    def of(cls, sizes: tuple[tuple[int, ...], ...], layer: np.ndarray, outer: np.ndarray) -> Clocked:
        """Of measured times, which rise with every size from here on."""
        for axis in range(layer.ndim):
            layer = _rising(layer, axis)
        return cls(sizes, layer, _rising(outer, 0))


def _rising(values: np.ndarray, axis: int) -> np.ndarray:
    out = np.moveaxis(values.copy(), axis, 0)
    for i in range(1, len(out)):
        out[i] = np.maximum(out[i], _RISES * out[i - 1])
    return np.moveaxis(out, 0, axis)


def price_of(
    part: PrunePart, goal: Goal, config: Any, anatomy: Anatomy, out: Path, dtype: str, world: World
) -> Clocked | None:
    """What units cost by the clock, measured in one process for all; None where nobody asks for it."""
    if part.per not in TIMED:
        return None
    sizes = _grid(part, goal, anatomy)
    times = world.agree(_times(sizes, config, anatomy, out / TABLE, dtype) if world.first else {})
    shape = tuple(len(s) for s in sizes)
    layer, outer = np.zeros(shape), np.zeros(shape[0])
    for at in np.ndindex(shape):
        probe = _sized(anatomy, sizes, at).anatomy_after(anatomy)
        layer[at] = 1e6 * getattr(times[layer_part(probe, 0)], part.per)
        outer[at[0]] = 1e6 * getattr(times[outer_part(probe)], part.per)
    return Clocked.of(sizes, layer, outer)


def check_clock(part: PrunePart, anatomy: Anatomy) -> None:
    """UserError where layers differ, so that a grid for one would not do for all."""
    if part.per in TIMED and len(set(anatomy.shape.layers)) > 1:
        raise UserError(
            f"prune.per: {part.per} needs a source whose layers are alike, to be measured as one; give params or flops"
        )


def _grid(part: PrunePart, goal: Goal, anatomy: Anatomy) -> tuple[tuple[int, ...], ...]:
    """The sizes of each axis that are measured; the whole alone of one that stays."""
    out = []
    for kind in _AXES:
        size = size_of(anatomy, kind)
        least = goal.floors[kind] if kind in part.axes else size
        out.append(tuple(sorted({least, (least + size + 1) // 2, size})))
    return tuple(out)


def _sized(anatomy: Anatomy, sizes: tuple[tuple[int, ...], ...], at: tuple[int, ...]) -> Keep:
    return cut_to(anatomy, {kind: own[i] for kind, own, i in zip(_AXES, sizes, at, strict=True)})


def _times(sizes: tuple[tuple[int, ...], ...], config: Any, anatomy: Anatomy, path: Path, dtype: str) -> dict[str, Timing]:
    """What the run's folder has; else what the user's table has, what it lacks measured, and all of it written down."""
    if (there := Table.only(path)) is not None:
        return there.entries
    table = Table.open(key(dtype, prompt_tokens(getattr(config, "max_position_embeddings", None))))
    needed: dict[str, Timing] = {}
    for at in np.ndindex(*(len(own) for own in sizes)):
        target = target_for(config, anatomy, _sized(anatomy, sizes, at), stock=False)  # one family for all sizes
        table = filled(table, target.config, target.anatomy)
        needed |= {name: table.entries[name] for name in (layer_part(target.anatomy, 0), outer_part(target.anatomy))}
    return Table(path, table.key, {}).saved(needed).entries
