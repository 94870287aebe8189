"""Sizes that fit a budget of block parameters: how many KV groups and FFN channels a layer keeps, or several layers alike."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from .allocate import adaptive_ratios
from .anatomy import Anatomy
from .axes import kind_of
from .errors import UserError

KINDS = ("kv_heads", "intermediate")
_ROUNDING = 1e-6  # of sums of shares, in parameters


@dataclass(frozen=True)
class Sizes:
    """The KV groups and FFN channels that layers can have, and what one more in each of them costs in block parameters."""

    fixed: int  # what no unit owns
    groups: range  # lawful numbers of KV groups
    group: int
    channels: int
    channel: int
    multiple_of: int

    @classmethod
    def of(cls, anatomy: Anatomy, layers: Sequence[int], multiple_of: int, kinds: Collection[str] = KINDS) -> Sizes:
        """Of `layers` alike, up to the smallest of them. An axis that the model or `kinds` lacks leaves nothing to choose."""
        most, cost, owned = {}, {}, 0
        for kind in KINDS:
            names = [f"layers.{i}.{kind}" for i in layers if kind in kinds]
            axes = [anatomy.axes[name] for name in names if name in anatomy.axes]
            most[kind] = min((axis.size for axis in axes), default=0)
            cost[kind] = sum(anatomy.unit_params(axis.name) for axis in axes)
            owned += sum(axis.size * anatomy.unit_params(axis.name) for axis in axes)
        whole = sum(t.numel for t in anatomy.tensors.values() if t.layer in set(layers))
        groups = most["kv_heads"]
        return cls(
            fixed=whole - owned,
            groups=range(min(groups, 1), groups + 1),
            group=cost["kv_heads"],
            channels=most["intermediate"],
            channel=cost["intermediate"],
            multiple_of=multiple_of,
        )

    def params(self, groups: int, channels: int) -> int:
        """Block parameters of all the layers together."""
        return self.fixed + groups * self.group + channels * self.channel

    @property
    def fewest(self) -> tuple[int, int]:
        """One KV group and one chunk of channels, where there are any."""
        return self.groups[0], min(self.multiple_of, self.channels)

    @property
    def whole(self) -> tuple[int, int]:
        """All of them."""
        return self.groups[-1], self.channels

    def within(self, budget: int, near: float) -> tuple[int, int] | None:
        """KV groups, as close to `near` as it goes, and the channels that fill `budget` beside them; None if none fit."""
        fits: list[tuple[int, int, int]] = []
        for groups in sorted(self.groups, key=lambda g: abs(g - near)):
            width = self.beside(groups, budget)
            if width is not None:
                fits.append((self.params(groups, width), groups, width))
                if self.fills(groups, budget):
                    break
        return max(fits)[1:] if fits else None

    def beside(self, groups: int, budget: int) -> int | None:
        """The most channels that fit `budget` beside so many KV groups; None if not even one chunk does."""
        left = budget - self.params(groups, 0)
        room = left // self.channel if self.channel else left
        width = self.channels if room >= self.channels else room // self.multiple_of * self.multiple_of
        return width if left >= 0 and width >= min(self.multiple_of, self.channels) else None

    def fills(self, groups: int, budget: int) -> bool:
        """Whether so many KV groups meet `budget` within one step; else there are too few channels, and more groups may."""
        left = budget - self.params(groups, 0)
        return (left // self.channel if self.channel else left) <= self.channels


def named(anatomy: Anatomy, layer: int, groups: int, channels: int) -> dict[str, int]:
    """Axis name -> units kept, for the axes that this layer has."""
    counts = {f"layers.{layer}.kv_heads": groups, f"layers.{layer}.intermediate": channels}
    return {name: count for name, count in counts.items() if name in anatomy.axes}


def alike_counts(
    anatomy: Anatomy, budget: int, near: float, multiple_of: int, layers: Sequence[int] | None = None
) -> dict[str, int]:
    """KV groups and FFN channels of `layers` (all, if not said) alike: groups close to `near`, channels to fit the budget.

    `budget` counts all blocks; layers that are not named stay whole. UserError if not even one chunk of channels fits.
    """
    layers = range(anatomy.shape.num_hidden_layers) if layers is None else layers
    sizes = Sizes.of(anatomy, layers, multiple_of)
    others = sum(t.numel for t in anatomy.tensors.values() if t.layer is not None and t.layer not in set(layers))
    found = sizes.within(budget - others, near)
    if found is None:
        raise UserError(
            f"ratio: {budget:,} block parameters leave no room for one FFN channel in each of {len(layers)} layers; ask for a "
            "smaller ratio"
        )
    return {name: count for i in layers for name, count in named(anatomy, i, *found).items()}


def adaptive(
    anatomy: Anatomy, importance_L: Tensor, budget: int, amplitude: float, multiple_of: int
) -> tuple[list[float], dict[str, int]]:
    """(the share of every layer that goes, units kept of every axis), less where a layer is more important (Adapt-Pruner).

    All blocks together fit `budget`.
    """
    sizes = [Sizes.of(anatomy, [i], multiple_of) for i in range(anatomy.shape.num_hidden_layers)]
    whole, least = [s.params(*s.whole) for s in sizes], [s.params(*s.fewest) for s in sizes]
    most = [1 - few / all_ for few, all_ in zip(least, whole, strict=True)]
    ratios = adaptive_ratios(importance_L, whole, most, sum(whole) - budget, amplitude)
    return ratios, adaptive_counts(anatomy, ratios, budget, multiple_of)


def adaptive_counts(anatomy: Anatomy, ratios: Sequence[float], budget: int, multiple_of: int) -> dict[str, int]:
    """KV groups and FFN channels of every layer, of which `ratios[l]` goes; all blocks together fit `budget`.

    Each layer takes its groups to the nearest and rounds its channels down; the chunks this leaves over go to the largest
    remainders. So what stays is at most the budget, and short of it by less than a chunk of one layer.
    """
    sizes = [Sizes.of(anatomy, [layer], multiple_of) for layer in range(len(ratios))]
    wanted = [(1 - ratio) * s.params(*s.whole) for s, ratio in zip(sizes, ratios, strict=True)]
    kept = [
        s.within(math.floor(most + _ROUNDING), (1 - ratio) * s.whole[0]) or s.fewest
        for s, most, ratio in zip(sizes, wanted, ratios, strict=True)
    ]
    return _filled(anatomy, sizes, kept, wanted, budget)


def adaptive_onward(
    now: Anatomy, source: Anatomy, importance_L: Tensor, budget: int, amplitude: float, kinds: Collection[str] = KINDS
) -> tuple[list[float], dict[str, int]]:
    """`adaptive` for a model that was cut from `source` before: (the share of the source's layers that goes now, units kept).

    `kinds`: the axes that may go; no others are told of, and the budget is met without them.
    Groups go when the layer's parameters come nearer to one group less of the source's, even where that is more than its share
    of this cut: else small cuts would never come to half a group, and take channels alone. Then others give up less.
    """
    layers = range(now.shape.num_hidden_layers)
    sizes, before = ([Sizes.of(anatomy, [i], 1, kinds) for i in layers] for anatomy in (now, source))
    whole, here = ([s.params(*s.whole) for s in some] for some in (before, sizes))
    most = [(h - s.params(*s.fewest)) / w for h, s, w in zip(here, sizes, whole, strict=True)]
    shares = adaptive_ratios(importance_L, whole, most, sum(here) - budget, amplitude)
    wanted = [h - share * w for h, share, w in zip(here, shares, whole, strict=True)]
    near = [s.whole[0] * most_ / w for s, most_, w in zip(before, wanted, whole, strict=True)]
    kept = [s.within(math.floor(w + _ROUNDING), n) or s.fewest for s, w, n in zip(sizes, wanted, near, strict=True)]
    for i, s in enumerate(sizes):
        groups = min(s.groups, key=partial(_distance, near[i]))
        if groups < kept[i][0]:
            kept[i] = groups, s.channels
    counts = _filled(now, sizes, kept, wanted, budget)
    return shares, {name: count for name, count in counts.items() if kind_of(name) in kinds}


def _filled(
    anatomy: Anatomy, sizes: Sequence[Sizes], kept: list[tuple[int, int]], wanted: Sequence[float], budget: int
) -> dict[str, int]:
    """Units kept, with the chunks that `budget` leaves over given to the layers that are furthest below what they want.

    Where no chunk is left to give, a group comes back, and channels make room for it.
    """
    left = budget - sum(s.params(*k) for s, k in zip(sizes, kept, strict=True))
    assert left >= 0, "the shares take less than the budget allows"
    while True:
        more = {i: (k[0], k[1] + chunk) for i, k in enumerate(kept) if 0 < (chunk := _chunk(sizes[i], k))}
        more = {i: k for i, k in more.items() if sizes[i].params(*k) - sizes[i].params(*kept[i]) <= left}
        more = more or _group_back(sizes, kept, left)
        if not more:
            return {name: n for i, k in enumerate(kept) for name, n in named(anatomy, i, *k).items()}
        layer = max(more, key=lambda i: wanted[i] - sizes[i].params(*kept[i]))
        left -= sizes[layer].params(*more[layer]) - sizes[layer].params(*kept[layer])
        kept[layer] = more[layer]


def _group_back(sizes: Sequence[Sizes], kept: Sequence[tuple[int, int]], left: int) -> dict[int, tuple[int, int]]:
    """Layers that could have one group more for at most `left` parameters, and more parameters than now; with what channels."""
    out = {}
    for i, (s, (groups, channels)) in enumerate(zip(sizes, kept, strict=True)):
        now = s.params(groups, channels)
        width = s.beside(groups + 1, now + left) if groups < s.whole[0] else None
        if width is not None and s.params(groups + 1, width) > now:
            out[i] = groups + 1, width
    return out


def _distance(near: float, groups: int) -> float:
    return abs(groups - near)


def _chunk(sizes: Sizes, kept: tuple[int, int]) -> int:
    """The next chunk of channels; 0 if there is none."""
    return min(sizes.multiple_of, sizes.channels - kept[1])


def candidate_pairs(
    params: Callable[[int, int], int], goal: float, firsts: Iterable[int], seconds: Sequence[int], near: float
) -> list[tuple[int, int]]:
    """For every first size the second that comes nearest to `goal` parameters, if that is within a share `near` of it.

    `params` grows with the second size; `seconds` ascend. The comparison study takes its shapes so (table of candidates).
    """
    out = []
    for first in firsts:
        counted = partial(params, first)
        at = bisect_left(seconds, goal, key=counted)
        tried = {abs(counted(second) / goal - 1): second for second in reversed(seconds[max(at - 1, 0) : at + 1])}
        if tried and min(tried) <= near:
            out.append((first, tried[min(tried)]))
    return out
