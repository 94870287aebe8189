"""What cuts will save, before anything is known of saliency: FLOPs along the pace, if every axis gave way alike."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ...anatomy import Anatomy
from .cutting import Cutting
from .goal import INNER, reachable, shrunk, size_of

if TYPE_CHECKING:
    from ..recipe import Recipe

ASSUMED = "as if every axis gave way alike, from the source's size towards its floor"
_POINTS = 64  # sizes between source and floors that are counted; between them lines are drawn
_FINE = 1024  # steps in which the end is looked for
_LOOKS = 4096  # updates that are looked at; of a longer run every so many-th


@dataclass(frozen=True)
class Forecast:
    """A recipe's cuts as if every axis gave way alike; of sizes that a target names, that is how it ends."""

    cutting: Cutting
    recipe: Recipe

    @cached_property
    def _floors(self) -> Mapping[str, int]:
        return reachable(self.cutting.part, self.cutting.anatomy, self.cutting.goal.floors, self.recipe.data.seq_len)

    def sizes(self, way: float) -> dict[str, int]:
        """Sizes of the axes some way (0 to 1) from the source to the floors."""
        found = {kind: (size_of(self.cutting.anatomy, kind), floor) for kind, floor in self._floors.items()}
        return {kind: size - round(way * (size - floor)) for kind, (size, floor) in found.items()}

    @cached_property
    def _table(self) -> np.ndarray:
        """[3, points]: what the goal measures, forward FLOPs of a sequence, and parameters; smallest first."""
        seq_len, rows = self.recipe.data.seq_len, []
        for way in np.linspace(1, 0, _POINTS + 1):
            anatomy = shrunk(self.cutting.anatomy, self.sizes(way))
            rows.append((self.cutting.goal.measure(anatomy), anatomy.flops(seq_len), anatomy.num_params))
        return np.array(rows, dtype=float).T

    @cached_property
    def end(self) -> Anatomy:
        """Where the target is first met."""
        goal, anatomy = self.cutting.goal, self.cutting.anatomy
        ways = [i / _FINE for i in range(_FINE + 1)]
        met = bisect_left(ways, True, key=lambda way: goal.measure(shrunk(anatomy, self.sizes(way))) <= goal.value)
        return shrunk(anatomy, self.sizes(ways[min(met, _FINE)]))

    @cached_property
    def groups(self) -> int:
        """How many go until the target is met."""
        part, anatomy = self.cutting.part, self.cutting.anatomy
        together: Mapping[str, int] = {str(kind): count for kind, count in part.units.items()}
        out = 0
        for kind in self._floors:
            times = 1 if part.alike or kind not in INNER else anatomy.shape.num_hidden_layers
            out += times * -(-(size_of(anatomy, kind) - size_of(self.end, kind)) // together.get(kind, 1))
        return max(1, out)

    def _measured(self, tokens: int) -> int:
        """What the goal measures of what is alive after so many tokens."""
        pace, goal = self.cutting.pace, self.cutting.goal
        gone = pace.groups(tokens)
        return goal.allowed(pace.share(tokens) if gone is None else min(1.0, gone / self.groups))

    @cached_property
    def flops(self) -> int:
        """Of all updates, of scoring, and of a snapshot that teaches. What is zeroed costs until it is sliced, as in the run."""
        recipe, part = self.recipe, self.cutting.part
        counted = [self._table[1, -1], self._table[2, -1]]  # FLOPs and parameters of the tensors as they are
        taught = recipe.teacher is not None and recipe.teacher.snapshot
        teacher, sliced, before = (
            0.0,
            True,
            self.cutting.goal.source,
        )  # FLOPs of the snapshot; whether the next cut takes one
        total, every = 0.0, -(-recipe.steps // _LOOKS)
        for step in range(0, recipe.steps, every):
            measured = self._measured(step * recipe.batch_tokens)
            flops, params = (float(np.interp(measured, self._table[0], row)) for row in self._table[1:])
            if taught and sliced and measured < before:
                teacher, sliced = counted[0], False
            before = measured
            if measured <= self.cutting.goal.value or counted[1] - params >= part.slice_at * counted[1]:
                sliced = sliced or params < counted[1]
                counted = [flops, params]
            total += (3 * counted[0] + teacher) * recipe.sequences * min(every, recipe.steps - step)
        if part.pace.kind == "once":
            total += 3 * self.cutting.anatomy.flops(recipe.data.seq_len) * part.pace.samples
        return round(total)
