"""What units cost: parameters, FLOPs, bytes of KV cache, or milliseconds measured on this machine; in whole numbers.

A price list says for every axis what keeping n units costs. Parameters, FLOPs and bytes are linear in n; milliseconds are
what `latency.py` measured at some sizes, with straight lines between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from .anatomy import Anatomy
from .axes import Axis, kind_of
from .errors import UserError
from .hf import target_for
from .keep import Keep
from .latency import Table, Timing, filled, layer_part

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SEQ_LEN = 1024  # of the sequence whose FLOPs are counted: attention's share grows with it
_KINDS = ("kv_heads", "intermediate")
_RUNGS = 8  # sizes of an axis that are measured
_NANO = 1_000_000  # nanoseconds in a millisecond

_COUNTED: Mapping[str, Callable[[Anatomy], int]] = {
    "params": lambda anatomy: anatomy.block_params,
    "flops": lambda anatomy: anatomy.flops(SEQ_LEN) - 2 * SEQ_LEN * anatomy.shape.vocab_size * anatomy.shape.hidden_size,
    "kv-bytes": lambda anatomy: anatomy.kv_bytes_per_token(),
}
_TIMED: Mapping[str, Callable[[Timing], float]] = {
    "prefill-ms": lambda timing: timing.prefill_ms,
    "decode-ms": lambda timing: timing.decode_ms,
}
COSTS = (*_COUNTED, *_TIMED)


@dataclass(frozen=True)
class Prices:
    """What the blocks cost as they are (`source`), as they will be counted (`whole`, added biases included), and by axis."""

    source: int
    whole: int
    of: Mapping[str, Sequence[int]]  # axis -> what n units cost, n = 0, 1, ..., size; it never falls

    def fixed(self, axes: Iterable[str]) -> int:
        """What is left of the whole without these axes."""
        return self.whole - sum(self.of[name][-1] for name in axes)

    def unit(self, axis: str) -> int:
        """What one unit costs, on average."""
        return self.of[axis][-1] // max(len(self.of[axis]) - 1, 1)


def is_timed(cost: str | None) -> bool:
    """Whether a cost must be measured."""
    return cost in _TIMED


def prices_of(source: Anatomy, counted: Anatomy, cost: str, times: Mapping[str, Timing]) -> Prices:
    """The list of every axis of heads and channels. `counted` is the source with the biases that the result will have.

    UserError if `times` lack a part that the cost needs.
    """
    axes = [axis for axis in counted.axes.values() if kind_of(axis.name) in _KINDS]
    if cost in _COUNTED:
        measure = _COUNTED[cost]
        whole = measure(counted)
        unit: dict[object, int] = {}  # layers alike cost alike
        of = {}
        for axis in axes:
            like = kind_of(axis.name), counted.shape.layers[axis.layer or 0]
            if like not in unit:
                unit[like] = _unit(counted, axis, measure, whole)
            of[axis.name] = [n * unit[like] for n in range(axis.size + 1)]
        return Prices(measure(source), whole, of)
    whole = round(_NANO * sum(_time(counted, i, cost, times) for i in range(counted.shape.num_hidden_layers)))
    return Prices(whole, whole, {axis.name: _timed_prices(counted, axis, cost, times) for axis in axes})


def _unit(anatomy: Anatomy, axis: Axis, measure: Callable[[Anatomy], int], whole: int) -> int:
    """What one unit more costs; 0 on an axis that has but one, which stays."""
    return whole - measure(_with(anatomy, axis, axis.size - 1)) if axis.size > 1 else 0


def _with(anatomy: Anatomy, axis: Axis, size: int) -> Anatomy:
    return Keep({axis.name: tuple(range(size))}).anatomy_after(anatomy) if size < axis.size else anatomy


# -- milliseconds ---------------------------------------------------------------------------------------------------------


def rungs(size: int) -> list[int]:
    """Sizes of an axis that are measured, from the least to the whole."""
    return sorted({1, *(max(1, round(size * step / _RUNGS)) for step in range(1, _RUNGS + 1))})


def _time(anatomy: Anatomy, layer: int, cost: str, times: Mapping[str, Timing]) -> float:
    part = layer_part(anatomy, layer)
    if part not in times:
        raise UserError(
            f"cost: {cost} needs what a layer of these sizes takes here, and the latency table lacks '{part}'; add --latency"
        )
    return _TIMED[cost](times[part])


def _timed_prices(anatomy: Anatomy, axis: Axis, cost: str, times: Mapping[str, Timing]) -> list[int]:
    """Nanoseconds of n units: measured at the rungs, straight between them, never falling (a clock's noise may)."""
    assert axis.layer is not None
    steps = rungs(axis.size)
    found = [_NANO * _time(_with(anatomy, axis, size), axis.layer, cost, times) for size in steps]
    known = [(0, 0.0), *((size, value - found[0]) for size, value in zip(steps, found, strict=True))]
    prices = [0]
    for (size, value), (next_size, next_value) in pairwise(known):
        for n in range(size + 1, next_size + 1):
            here = value + (next_value - value) * (n - size) / (next_size - size)
            prices.append(max(prices[-1], round(here)))
    return prices


def measured(
    table: Table,
    config: PreTrainedConfig,
    anatomy: Anatomy,
    out_bias: frozenset[str],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Table:
    """The table with every part that prices in milliseconds need; one layer of every size in the model is probed."""
    first: dict[object, int] = {}
    for i, sizes in enumerate(anatomy.shape.layers):
        first.setdefault(sizes, i)
    probes = [Keep()]
    for layer in first.values():
        axes = [anatomy.axes[name] for kind in _KINDS if (name := f"layers.{layer}.{kind}") in anatomy.axes]
        probes += [Keep({a.name: tuple(range(n))}) for a in axes for n in rungs(a.size) if n < a.size]
    for done, keep in enumerate(probes):
        progress(done, len(probes))
        target = target_for(config, anatomy, keep, out_bias=out_bias, stock=False)
        table = filled(table, target.config, target.anatomy)
    progress(len(probes), len(probes))
    return table
