"""What may go next: minimal groups of units, and which of them is the least salient for what it frees."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ...anatomy import Anatomy
from ...axes import kind_of
from ...keep import Keep
from .goal import INNER, NO_CLOCKS, Clocks, Goal, measure_of
from .part import TIMED, PrunePart

if TYPE_CHECKING:
    from .saliency import Table

Units = Mapping[str, tuple[int, ...]]  # axis -> units


@dataclass(frozen=True)
class Group:
    """Units that go together: of one axis, or the same number of every layer's."""

    kind: str
    units: Units
    saliency: float


@dataclass
class Standing:
    """Which units of a model are still alive."""

    anatomy: Anatomy  # as its tensors are
    alive: dict[str, np.ndarray]  # axis -> bool

    @classmethod
    def of(cls, anatomy: Anatomy) -> Standing:
        """All of them."""
        return cls(anatomy, {name: np.ones(axis.size, dtype=bool) for name, axis in anatomy.axes.items() if name != "vocab"})

    @property
    def keep(self) -> Keep:
        """The decision so far."""
        return Keep({name: tuple(np.flatnonzero(alive).tolist()) for name, alive in self.alive.items() if not alive.all()})

    @cached_property
    def _layers(self) -> dict[int, list[str]]:
        out: dict[int, list[str]] = {}
        for name in self.alive:
            layer = self.anatomy.axes[name].layer
            if layer is not None and kind_of(name) in INNER:
                out.setdefault(layer, []).append(name)
        return out

    def inner(self, kind: str) -> list[str]:
        """Axes of a kind in the layers that are alive."""
        return [
            name
            for layer, names in self._layers.items()
            if self.alive["layers"][layer]
            for name in names
            if kind_of(name) == kind
        ]

    def size(self, name: str) -> int:
        """Units alive."""
        return int(self.alive[name].sum())

    def drop(self, units: Units) -> None:
        """Changes which are alive."""
        for name, gone in units.items():
            self.alive[name][list(gone)] = False

    def without(self, units: Units) -> Anatomy:
        """The anatomy once these went, too."""
        keep = dict(self.keep.units)
        for name, gone in units.items():
            left = self.alive[name].copy()
            left[list(gone)] = False
            keep[name] = tuple(np.flatnonzero(left).tolist())
        return Keep(keep).anatomy_after(self.anatomy)

    @property
    def now(self) -> Anatomy:
        """The anatomy of what is alive."""
        return self.without({})

    @property
    def with_layers(self) -> Anatomy:
        """As `now`, but layers that are dead stay, and so does every layer's number."""
        return Keep({name: kept for name, kept in self.keep.units.items() if name != "layers"}).anatomy_after(self.anatomy)


class Chooser:
    """Names the next group to go. Deterministic: ties go to the axis named first, and to the lower index."""

    def __init__(self, part: PrunePart, goal: Goal, seq_len: int, clocks: Clocks = NO_CLOCKS) -> None:
        self.part, self.goal = part, goal
        self.together: Mapping[str, int] = {kind: part.units.get(kind, 1) for kind in part.axes}
        self.price: Callable[[Anatomy], float] | None = None
        if part.per not in ("none", "elements"):
            self.price = clocks[part.per] if part.per in TIMED else measure_of(part.per, seq_len)

    def next(self, standing: Standing, table: Table, least: int) -> tuple[Group, dict[str, float]] | None:
        """(the group, every kind's saliency over its price); None if nothing is left. The measure does not fall below `least`,
        but by less than the smallest group, where no other fits.
        """
        now = standing.now
        if self.goal.measure(now) <= least:
            return None
        fitting: list[tuple[float, Group]] = []
        last: list[tuple[int, Group]] = []  # what goes beyond `least`, by what it frees
        told: dict[str, float] = {}
        for group, after in self._groups(standing, table, least):
            left = self.goal.measure(after)
            price = self._price(standing, group, table, now, after)
            if price <= 0 or left == self.goal.measure(now):
                continue
            worth = group.saliency / price
            told[group.kind] = min(worth, told.get(group.kind, np.inf))
            if left >= least:
                fitting.append((worth, group))
            else:
                last.append((-left, group))
        if fitting:
            return min(fitting, key=lambda found: found[0])[1], told
        return (min(last, key=lambda found: found[0])[1], told) if last else None

    def _price(self, standing: Standing, group: Group, table: Table, now: Anatomy, after: Anatomy) -> float:
        if self.price is not None:
            return self.price(now) - self.price(after)
        return 1.0 if self.part.per == "none" else table.elements(group.units, standing.with_layers)

    def _kinds(self, standing: Standing) -> Iterable[str]:
        """Axes that compete, or of a fixed order the first that is not at its size."""
        if not self.part.order:
            return self.part.axes
        return [k for k in self.part.order if any(self._room(standing, name, k) for name in self._names(standing, k))][:1]

    def _names(self, standing: Standing, kind: str) -> list[str]:
        if kind in INNER:
            return standing.inner(kind)
        return [kind] if kind in standing.alive else []

    def _room(self, standing: Standing, name: str, kind: str) -> int:
        return max(0, standing.size(name) - self.goal.floors[kind])

    def _groups(self, standing: Standing, table: Table, least: int) -> Iterator[tuple[Group, Anatomy]]:
        for kind in self._kinds(standing):
            names = self._names(standing, kind)
            together = [names] if self.part.alike and kind in INNER else [[name] for name in names]
            for axes in together:
                count = min((self._room(standing, name, kind) for name in axes), default=0)
                count = min(count, self.together[kind])
                while count:
                    group = self._least(kind, axes, table, count)
                    after = standing.without(group.units)
                    left = self.goal.measure(after)
                    if left >= least or count == 1:
                        yield group, after
                        break
                    freed = (self.goal.measure(standing.now) - left) / count
                    count = min(count - 1, max(1, int((self.goal.measure(standing.now) - least) // max(freed, 1e-9))))

    def _least(self, kind: str, axes: list[str], table: Table, count: int) -> Group:
        units, total = {}, 0.0
        for name in axes:
            units[name] = table.least(name, count)
            total += float(table.values[name][list(units[name])].sum())
        return Group(kind, units, total)
