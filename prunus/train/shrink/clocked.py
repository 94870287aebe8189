"""Milliseconds, as a price and as a target: what a model takes on this machine, from layers of some sizes that are measured once.

Along every axis that is cut three sizes are measured, its least, its whole and one between, with every size of the other axes;
straight lines between them. What was measured stays in the run's folder, so that a run that goes on decides by the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...anatomy import Anatomy
from ...errors import UserError
from ...hf import target_for
from ...keep import Keep
from ...latency import Table, Timing, filled, key, layer_part, missing_layers, outer_part, prompt_tokens, timed
from ...source import Source
from .goal import check_pace, cut_to, floors_of, size_of
from .part import TIMED, PrunePart

if TYPE_CHECKING:
    from .cutting import Cutting

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


def clocks_of(part: PrunePart, anatomy: Anatomy, table: Table) -> dict[str, Clocked]:
    """What counts the milliseconds that decide, from a table with every size that they need."""
    sizes = _grid(part, anatomy)
    shape = tuple(len(s) for s in sizes)
    out = {}
    for name in part.timed:
        layer, outer = np.zeros(shape), np.zeros(shape[0])
        for at in np.ndindex(shape):
            probe = _sized(anatomy, sizes, at).anatomy_after(anatomy)
            layer[at] = 1e6 * getattr(table.entries[layer_part(probe, 0)], name)
            outer[at[0]] = 1e6 * getattr(table.entries[outer_part(probe)], name)
        out[name] = Clocked.of(sizes, layer, outer)
    return out


def clocked(cutting: Cutting, table: Table) -> Cutting:
    """With the table's milliseconds; UserError for a target that they put out of reach."""
    made = replace(cutting, clocks=clocks_of(cutting.part, cutting.anatomy, table))
    check_pace(made.part, made.anatomy, made.goal, made.pace)
    return made


def check_clock(part: PrunePart, anatomy: Anatomy) -> None:
    """UserError where layers differ, so that a grid for one would not do for all."""
    if part.timed and (len(set(anatomy.shape.layers)) > 1 or anatomy.shape.is_ragged):
        field = f"per: {part.per}" if part.per in TIMED else f"target.{part.timed[0]}"
        raise UserError(f"prune.{field} needs a source whose layers are alike, to be measured as one; give params or flops")


def _grid(part: PrunePart, anatomy: Anatomy) -> tuple[tuple[int, ...], ...]:
    """The sizes of each axis that are measured; the whole alone of one that stays."""
    floors, out = floors_of(part, anatomy), []
    for kind in _AXES:
        size = size_of(anatomy, kind)
        least = floors[kind] if kind in part.axes else size
        out.append(tuple(sorted({least, (least + size + 1) // 2, size})))
    return tuple(out)


def _sized(anatomy: Anatomy, sizes: tuple[tuple[int, ...], ...], at: tuple[int, ...]) -> Keep:
    return cut_to(anatomy, {kind: own[i] for kind, own, i in zip(_AXES, sizes, at, strict=True)})


def table_of(part: PrunePart, config: Any, anatomy: Anatomy, dtype: str, out: Path) -> Table:
    """What the folder has; else what the user's table has, and what it lacks measured. It is not written into the folder yet."""
    there = Table.only(out / TABLE)
    if there is not None:
        return there
    found = known(part, config, anatomy, dtype, measure=True)
    assert found is not None
    return replace(found, path=out / TABLE)


def known(part: PrunePart, config: Any, anatomy: Anatomy, dtype: str, *, measure: bool) -> Table | None:
    """What is needed, from the user's table; what that lacks is measured, or None if that is not to be done."""
    table = Table.open(key(dtype, _prompt(config)))
    needed: dict[str, Timing] = {}
    sizes = _grid(part, anatomy)
    for at in np.ndindex(*(len(own) for own in sizes)):
        target = target_for(config, anatomy, _sized(anatomy, sizes, at), stock=False)  # one family for all sizes
        if measure:
            table = filled(table, target.config, target.anatomy)
        elif missing_layers(target.anatomy, table.entries):
            return None
        needed |= {name: table.entries[name] for name in (layer_part(target.anatomy, 0), outer_part(target.anatomy))}
    return replace(table, entries=needed)


def clock_of(folder: Path, dtype: str) -> Timing:
    """Milliseconds of a saved model as it is, measured now."""
    source = Source.open(str(folder))
    layer, rest = timed(source.load(dtype).eval(), source.anatomy, _prompt(source.config))
    return layer * source.anatomy.shape.num_hidden_layers + rest


def _prompt(config: Any) -> int:
    return prompt_tokens(getattr(config, "max_position_embeddings", None))
