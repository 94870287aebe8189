"""What a model is cut down to: a measure of the whole, checked against what its family can say before any weight is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from ...anatomy import Anatomy
from ...axes import kind_of
from ...errors import UserError
from ...keep import Keep
from .pace import Pace
from .part import SIZES, TIMED, PrunePart

Measure = Callable[[Anatomy], int]
_FLOOR = 16  # an axis keeps at least this fraction of its units, unless `floor` says otherwise
INNER = ("kv_heads", "intermediate")  # axes that every layer has its own of


def _block_params(anatomy: Anatomy) -> int:
    return anatomy.block_params


def _kv_bytes(anatomy: Anatomy) -> int:
    return anatomy.kv_bytes_per_token()


def _params(anatomy: Anatomy) -> int:
    return anatomy.num_params


def measure_of(name: str, seq_len: int) -> Measure:
    """params, ratio (the blocks' parameters), flops (of a token, forward) or kv_bytes (of a token)."""
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

    measure: Measure
    source: int
    value: int
    stops: tuple[int, ...]
    floors: Mapping[str, int]  # kind of axis -> least size

    @classmethod
    def of(cls, part: PrunePart, anatomy: Anatomy, seq_len: int) -> Goal:
        """UserError for an axis that the family cannot cut exactly, and for a target above the source or below the least shape."""
        check_axes(part, anatomy)
        floors: dict[str, int] = {kind: max(1, -(-size_of(anatomy, kind) // _FLOOR)) for kind in part.axes}
        for axis, count in part.floor.items():
            if count > size_of(anatomy, axis):
                raise UserError(
                    f"prune.floor: {axis} {count:,} is above the source's {size_of(anatomy, axis):,}; give at most that, or take "
                    "it out of axes to keep it whole"
                )
            floors[axis] = count
        assert part.target is not None, "a recipe without one names what it enlarges"
        sizes = part.target.sizes
        for name, kind in SIZES.items():
            if kind in sizes:
                _check_size(name, sizes[kind], size_of(anatomy, kind))
        if sizes:
            floors = {kind: size_of(anatomy, kind) for kind in part.axes}
            floors.update(sizes)
            measure, value = measure_of("params", seq_len), shrunk(anatomy, floors).num_params
        else:
            name, asked = next((n, v) for n, v in vars(part.target).items() if v is not None)
            measure = measure_of(name, seq_len)
            value = round((1 - asked) * measure(anatomy)) if name == "ratio" else asked
        source = measure(anatomy)
        least = measure(shrunk(anatomy, reachable(part, anatomy, floors, seq_len)))
        if value >= source:
            raise UserError(
                f"prune.target: {value:,} is not below the {source:,} of the source; ask for less, or drop prune"
            )
        if value < least:
            raise UserError(
                f"prune.target: {value:,} is below the least shape's {least:,} (every axis that costs anything "
                f"by per: {part.per} at its floor: {', '.join(f'{kind} {n}' for kind, n in floors.items())}); ask for more, name "
                "more axes, or lower floors"
            )
        stops = tuple(round(share * source) for share in part.stops)
        if stops and stops[-1] < value:
            raise UserError(
                f"prune.stops: {part.stops[-1]} of the source lies below the target of {value:,} ({value / source:.3f}); drop it"
            )
        return cls(measure, source, value, stops, floors)

    def allowed(self, share: float) -> int:
        """What the measure may be at most once this share of the way is to be done."""
        return round(self.source - (self.source - self.value) * share)


def check_axes(part: PrunePart, anatomy: Anatomy) -> None:
    """UserError for an axis that this model lacks, or whose cut cannot be told from zeroes while it trains."""
    for kind in part.axes:
        if kind in anatomy.refused:
            raise UserError(f"prune.axes: '{kind}' cannot be cut: {anatomy.refused[kind]}; drop it")
        if kind == "hidden" and anatomy.exactness("hidden") == "inexact":
            raise UserError(
                f"prune.axes: 'hidden' of {anatomy.family.name} cannot be cut exactly, because its norms subtract the mean; drop it"
            )
    sizes = {(layer.num_key_value_heads, layer.intermediate_size) for layer in anatomy.shape.layers}
    if part.alike and len(sizes) > 1 and set(part.axes) & set(INNER):
        raise UserError("prune.alike: the source's layers differ in size, so they cannot lose the same; set it to false")
    if anatomy.is_sliced:
        raise UserError("model.source: its stream changes basis in every sub-layer (slicegpt); give another")


def size_of(anatomy: Anatomy, kind: str) -> int:
    """Units of an axis; the most that a layer has, where each has its own."""
    return max(axis.size for axis in anatomy.axes.values() if kind_of(axis.name) == kind)


def cut_to(anatomy: Anatomy, sizes: Mapping[str, int]) -> Keep:
    """What leaves every axis at most so large: its first units."""
    return Keep(
        {
            axis.name: tuple(range(sizes[kind_of(axis.name)]))
            for axis in anatomy.axes.values()
            if sizes.get(kind_of(axis.name), axis.size) < axis.size
        }
    )


def shrunk(anatomy: Anatomy, sizes: Mapping[str, int]) -> Anatomy:
    """With every axis at most so large."""
    return cut_to(anatomy, sizes).anatomy_after(anatomy)


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
    reached = _largest_first(part, anatomy, goal, most)
    if reached > goal.value:
        raise UserError(
            f"prune.pace: {most:,} groups go by the end of the run, which takes the model to {reached:,} at best, not to "
            f"{goal.value:,}; raise pace.prune, units or tokens (pace kind curve always arrives)"
        )


def _largest_first(part: PrunePart, anatomy: Anatomy, goal: Goal, groups: int) -> int:
    """What so many groups leave if those that free most go first, each axis down to its floor."""
    sizes: dict[str, int] = {kind: size_of(anatomy, kind) for kind in part.axes}
    gone, now = 0, goal.measure(anatomy)
    measured = partial(_after, goal.measure, anatomy)
    while gone < groups and now > goal.value:
        tried: dict[str, tuple[int, int]] = {}
        for kind in part.axes:
            step = min(part.units.get(kind, 1), sizes[kind] - goal.floors[kind])
            if step > 0:
                tried[kind] = (now - measured(sizes | {kind: sizes[kind] - step}), step)
        if not tried:
            break
        most_freed = max(tried, key=lambda k: tried[k][0])
        times = 1
        if not part.alike and most_freed in INNER:
            times = anatomy.shape.num_hidden_layers  # one group a layer
        sizes[most_freed] -= tried[most_freed][1]
        gone, now = gone + times, measured(sizes)
    return now


def _after(measure: Measure, anatomy: Anatomy, sizes: Mapping[str, int]) -> int:
    return measure(shrunk(anatomy, sizes))
