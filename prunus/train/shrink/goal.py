"""What a model is cut down to: a measure of the whole, checked against what its family can say before any weight is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from types import MappingProxyType

from ...anatomy import Anatomy
from ...axes import Axis, kind_of
from ...errors import UserError
from ...keep import Keep
from .pace import Pace
from .part import SIZES, TIMED, PrunePart

Measure = Callable[[Anatomy], int]
Clocks = Mapping[str, Callable[[Anatomy], float]]  # which milliseconds -> nanoseconds of a model
NO_CLOCKS: Clocks = MappingProxyType({})
_MS = 10**9  # picoseconds, in which milliseconds are measured: so fine that no unit of a small model is free
_FLOOR = 16  # an axis keeps at least this fraction of its units, unless `floor` says otherwise
INNER = ("kv_heads", "heads", "intermediate")  # axes that every layer has its own of


def _block_params(anatomy: Anatomy) -> int:
    return anatomy.block_params


def _kv_bytes(anatomy: Anatomy) -> int:
    return anatomy.kv_bytes_per_token()


def _params(anatomy: Anatomy) -> int:
    return anatomy.num_params


def measure_of(name: str, seq_len: int, clocks: Clocks = NO_CLOCKS) -> Measure:
    """params, ratio (the blocks' parameters), flops (of a token, forward), kv_bytes (of a token), or picoseconds by a clock."""
    if name in TIMED:
        clock = clocks[name]
        return lambda anatomy: round(1000 * clock(anatomy))
    known: Mapping[str, Measure] = {
        "params": _params,
        "ratio": _block_params,
        "flops": lambda anatomy: anatomy.flops(seq_len) // seq_len,
        "kv_bytes": _kv_bytes,
    }
    return known[name]


@dataclass(frozen=True)
class Goal:
    """`measure` of the model is to fall from `source` to `value`, passing `stops`; axes end at their floors at the latest."""

    name: str  # of the measure
    measure: Measure
    source: int
    value: int
    stops: tuple[int, ...]
    floors: Mapping[str, int]  # kind of axis -> least size

    @classmethod
    def of(cls, part: PrunePart, anatomy: Anatomy, seq_len: int, clocks: Clocks = NO_CLOCKS) -> Goal:
        """UserError for an axis that the family cannot cut exactly, and for a target above the source or below the least shape."""
        floors = floors_of(part, anatomy)
        assert part.target is not None, "a recipe without one names what it enlarges"
        name = part.target.measure or "params"
        measure = measure_of(name, seq_len, clocks)
        source = measure(anatomy)
        if part.target.sizes:
            value = measure(shrunk(anatomy, floors))
        else:
            asked = getattr(part.target, name)
            value = round((1 - asked) * source) if name == "ratio" else round(asked * _MS) if name in TIMED else asked
        least = measure(shrunk(anatomy, reachable(part, anatomy, floors, seq_len)))
        if value >= source:
            raise UserError(
                f"prune.target: {said(name, value)} is not below the {said(name, source)} of the source; ask for less, or drop "
                "prune"
            )
        if value < least:
            raise UserError(
                f"prune.target: {said(name, value)} is below the least shape's {said(name, least)} (every axis that costs anything "
                f"by per: {part.per} at its floor: {', '.join(f'{kind} {n}' for kind, n in floors.items())}); ask for more, name "
                "more axes, or lower floors"
            )
        stops = tuple(round(share * source) for share in part.stops)
        if stops and stops[-1] < value:
            raise UserError(
                f"prune.stops: {part.stops[-1]} of the source lies below the target of {said(name, value)} ({value / source:.3f}); "
                "drop it"
            )
        return cls(name, measure, source, value, stops, floors)

    def allowed(self, share: float) -> int:
        """What the measure may be at most once this share of the way is to be done."""
        return round(self.source - (self.source - self.value) * share)

    def plain(self, value: int) -> int | float:
        """As the recipe would have it: a count, or milliseconds."""
        return value / _MS if self.name in TIMED else value


def said(name: str, value: int) -> str:
    """A measure's value, for people."""
    return f"{value / _MS:.4g} ms" if name in TIMED else f"{value:,}"


def floors_of(part: PrunePart, anatomy: Anatomy) -> dict[str, int]:
    """Kind of axis -> least size: what the target names, else `floor`; UserError for what this model cannot have."""
    check_axes(part, anatomy)
    sizes = {} if part.target is None else part.target.sizes
    for name, kind in SIZES.items():
        if kind in sizes:
            _check_size(name, sizes[kind], size_of(anatomy, kind))
    if sizes:
        return {kind: size_of(anatomy, kind) for kind in part.axes} | sizes
    floors: dict[str, int] = {kind: max(1, -(-size_of(anatomy, kind) // _FLOOR)) for kind in part.axes}
    for axis, count in part.floor.items():
        if count > size_of(anatomy, axis):
            raise UserError(
                f"prune.floor: {axis} {count:,} is above the source's {size_of(anatomy, axis):,}; give at most that, or take "
                "it out of axes to keep it whole"
            )
        floors[axis] = count
    return floors


def check_axes(part: PrunePart, anatomy: Anatomy) -> None:
    """UserError for an axis that this model lacks, or whose cut cannot be told from zeroes while it trains."""
    for kind in part.axes:
        if kind in anatomy.refused:
            raise UserError(f"prune.axes: '{kind}' cannot be cut: {anatomy.refused[kind]}; drop it")
        if kind == "hidden" and anatomy.exactness("hidden") == "inexact":
            raise UserError(
                f"prune.axes: 'hidden' of {anatomy.family.name} cannot be cut exactly, because its norms subtract the mean; drop it"
            )
    heads = "num_attention_heads" if "heads" in part.axes else "num_key_value_heads"
    sizes = {(getattr(layer, heads), layer.intermediate_size) for layer in anatomy.shape.layers}
    if part.alike and len(sizes) > 1 and set(part.axes) & set(INNER):
        raise UserError("prune.alike: the source's layers differ in size, so they cannot lose the same; set it to false")
    if anatomy.is_sliced:
        raise UserError("model.source: its stream changes basis in every sub-layer (slicegpt); give another")


def size_of(anatomy: Anatomy, kind: str) -> int:
    """Units of an axis; the most that a layer has, where each has its own."""
    return max(axis.size for axis in anatomy.axes.values() if kind_of(axis.name) == kind)


def cut_to(anatomy: Anatomy, sizes: Mapping[str, int], *, apart: bool = True) -> Keep:
    """What leaves every axis at most so large: its first units; of `heads` those that read the most KV heads, or the fewest."""
    return Keep(
        {
            axis.name: _first(anatomy, axis, sizes[kind_of(axis.name)], apart)
            for axis in anatomy.axes.values()
            if sizes.get(kind_of(axis.name), axis.size) < axis.size
        }
    )


@lru_cache(maxsize=16)
def _units(size: int) -> tuple[int, ...]:
    """The same for all layers, of which each may have thousands, in hundreds of shapes that a forecast looks at."""
    return tuple(range(size))


def _first(anatomy: Anatomy, axis: Axis, size: int, apart: bool) -> tuple[int, ...]:
    if kind_of(axis.name) != "heads" or not apart or axis.layer is None:
        return _units(size)
    read = anatomy.shape.layers[axis.layer].kv_heads_read
    turns = [read[:q].count(kv) for q, kv in enumerate(read)]  # the first of every KV head, then the second of every one
    return tuple(sorted(sorted(range(axis.size), key=lambda q: (turns[q], q))[:size]))


def shrunk(anatomy: Anatomy, sizes: Mapping[str, int], *, apart: bool = True) -> Anatomy:
    """With every axis at most so large; see `cut_to`."""
    return cut_to(anatomy, sizes, apart=apart).anatomy_after(anatomy)


def reachable(part: PrunePart, anatomy: Anatomy, floors: Mapping[str, int], seq_len: int) -> dict[str, int]:
    """Floors of the axes whose units cost anything; what frees nothing never goes."""
    if part.per in ("none", "elements", *TIMED):
        return dict(floors)
    price = measure_of(part.per, seq_len)
    return {kind: n for kind, n in floors.items() if price(shrunk(anatomy, {kind: n})) < price(anatomy)}


def _check_size(name: str, asked: int, size: int) -> None:
    if asked > size:
        raise UserError(f"prune.target: {name} {asked:,} is above the source's {size:,}; give at most that")


def check_pace(part: PrunePart, anatomy: Anatomy, goal: Goal, pace: Pace) -> None:
    """UserError for so many groups after so many updates that the target is out of reach even if the largest go first."""
    most = pace.most_groups
    if most is None:
        return
    if most > _COARSE and _largest_first(part, anatomy, goal, most, most // _COARSE) <= goal.value:
        return  # any order that arrives will do, and thousands of groups one by one take long
    reached = _largest_first(part, anatomy, goal, most)
    if reached > goal.value:
        raise UserError(
            f"prune.pace: {most:,} groups go by the end of the run, which takes the model to {said(goal.name, reached)} at "
            f"best, not to {said(goal.name, goal.value)}; raise pace.prune, units or tokens (pace kind curve always arrives)"
        )


_COARSE = 128  # steps in which a pace is looked at first


def _largest_first(part: PrunePart, anatomy: Anatomy, goal: Goal, groups: int, at_once: int = 1) -> int:
    """What so many groups leave if those that free most go first, so many of a kind `at_once`, each axis down to its floor."""
    sizes: dict[str, int] = {kind: size_of(anatomy, kind) for kind in part.axes}
    gone, now = 0, goal.measure(anatomy)
    measured = partial(_after, goal.measure, anatomy)
    while gone < groups and now > goal.value:
        tried: dict[str, tuple[float, int, int]] = {}  # freed by a group, units, groups
        for kind in part.axes:
            units, times = part.units.get(kind, 1), 1
            if not part.alike and kind in INNER:
                times = anatomy.shape.num_hidden_layers  # one group a layer
            step = min(max(1, min(at_once, (groups - gone) // times)) * units, sizes[kind] - goal.floors[kind])
            if step > 0:
                count = -(-step // units)
                tried[kind] = (now - measured(sizes | {kind: sizes[kind] - step})) / count, step, count * times
        if not tried:
            break
        most_freed = max(tried, key=lambda k: tried[k][0])
        _, step, count = tried[most_freed]
        sizes[most_freed] -= step
        gone, now = gone + count, measured(sizes)
    return now


def _after(measure: Measure, anatomy: Anatomy, sizes: Mapping[str, int]) -> int:
    return measure(shrunk(anatomy, sizes, apart=False))
