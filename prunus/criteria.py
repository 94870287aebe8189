"""What a unit or a weight is worth. Higher = keep. Pure functions of weights and saved statistics.

Shapes: W [out, in] as in torch.nn.Linear; C channels of a matrix's input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .anatomy import Anatomy
from .axes import Axis
from .statistics import Moments, Statistics


@dataclass(frozen=True)
class Scores:
    """Axis name -> one number a unit, float32 or wider. `spread`: mean and deviation of the channel scores under an axis."""

    values: Mapping[str, Tensor]
    spread: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class WeightCriterion:
    """Scores single weights of one matrix; `wants` names the statistics of its input that it needs."""

    score: Callable[[Tensor, Moments | None], Tensor]
    wants: frozenset[str] = frozenset()


@dataclass(frozen=True)
class UnitCriterion:
    """Scores units from statistics: of the whole dense model (`score`), and where it can of one layer (`score_layer`).

    `wants` names, by input segment, the statistics that it needs.
    """

    wants: Mapping[str, frozenset[str]]
    score_layer: Callable[[Anatomy, Mapping[str, Tensor], Statistics, int], Scores] | None = None
    score_all: Callable[[Anatomy, Mapping[str, Tensor], Statistics], Scores] | None = None

    def score(self, anatomy: Anatomy, tensors: Mapping[str, Tensor], statistics: Statistics) -> Scores:
        """Of all layers."""
        if self.score_all is not None:
            return self.score_all(anatomy, tensors, statistics)
        assert self.score_layer is not None
        layers = range(anatomy.shape.num_hidden_layers)
        found = [self.score_layer(anatomy, tensors, statistics, layer) for layer in layers]
        return Scores({n: v for s in found for n, v in s.values.items()}, {n: v for s in found for n, v in s.spread.items()})


def magnitude(weight: Tensor, _: Moments | None) -> Tensor:
    """|W|, float32."""
    return weight.float().abs()


def wanda(weight: Tensor, inputs: Moments | None) -> Tensor:
    """|W_ij| * ||X_j||_2 over all calibration tokens, float32 (Wanda eq. 1)."""
    assert inputs is not None
    return weight.float().abs() * inputs.norm_C().float()


_READS = {"kv_heads": ("attention", "q"), "intermediate": ("mlp", "intermediate")}


def fluctuation(anatomy: Anatomy, tensors: Mapping[str, Tensor], statistics: Statistics, layer: int) -> Scores:
    """FLAP's WIFV: var(x_c) * ||W_:c||^2 for each input channel of o_proj and down_proj (FLAP eq. 5).

    A KV group's score is the mean over its r * head_dim channels; standardised over the layer's channels later.
    """
    values: dict[str, Tensor] = {}
    spread: dict[str, tuple[float, float]] = {}
    for axis, sublayer, segment in _inner_axes(anatomy, layer):
        reader = anatomy.reader(axis.name)
        weight = tensors[reader.param].float()
        channel_C = statistics[f"layers.{layer}.{sublayer}.{segment}"].var_C * (weight * weight).sum(0).double()
        values[axis.name] = (axis.unit_sums(reader, channel_C) / reader.rows_per_unit).float()
        spread[axis.name] = (float(channel_C.mean()), float(channel_C.std()))
    return Scores(values, spread)


def _inner_axes(anatomy: Anatomy, layer: int) -> list[tuple[Axis, str, str]]:
    """The cuttable axes of one layer with the sub-layer and segment that their reader reads."""
    named = ((f"layers.{layer}.{kind}", *where) for kind, where in _READS.items())
    return [(anatomy.axes[name], sublayer, segment) for name, sublayer, segment in named if name in anatomy.axes]


@dataclass(frozen=True)
class TaylorRule:
    """A weight's share in what the loss would change were its unit zero, from the weight w and the loss's gradient g.

    `share` is summed over windows. The absolute value is then taken `of_weights` one by one, for which the sum of every
    weight is needed, or of a unit's total, for which it is not. `per_window`: g is one window's, because the share is not
    linear in it.
    """

    share: Callable[[Tensor, Tensor], Tensor]
    of_weights: bool
    per_window: bool


TAYLOR_RULES: dict[str, TaylorRule] = {  # F is the mean over windows of g^2, so w^2 F is the mean of (w g)^2
    "first": TaylorRule(lambda w, g: w * g, of_weights=True, per_window=False),
    "second": TaylorRule(lambda w, g: (w * g).square(), of_weights=False, per_window=True),
    "mix": TaylorRule(lambda w, g: w * g - 0.5 * (w * g).square(), of_weights=True, per_window=True),
    "vector": TaylorRule(lambda w, g: w * g, of_weights=False, per_window=False),
}
AGGREGATES: dict[str, Callable[[Tensor], Tensor]] = {  # scores of one axis by matrix [M, units] -> [units]
    "sum": lambda by_matrix: by_matrix.sum(0),
    "prod": lambda by_matrix: by_matrix.prod(0),
    "max": lambda by_matrix: by_matrix.amax(0),
    "first": lambda by_matrix: by_matrix[0],
}


def wanda_units(anatomy: Anatomy, tensors: Mapping[str, Tensor], statistics: Statistics, layer: int) -> Scores:
    """Wanda-sp: mean over outputs of |W_oc| * ||x_c||, summed over the channels of a KV group."""
    out = {}
    for axis, sublayer, segment in _inner_axes(anatomy, layer):
        reader = anatomy.reader(axis.name)
        norm_C = statistics[f"layers.{layer}.{sublayer}.{segment}"].norm_C()
        channel_C = tensors[reader.param].float().abs().mean(0).double() * norm_C
        out[axis.name] = axis.unit_sums(reader, channel_C).float()
    return Scores(out)


def magnitude_units(anatomy: Anatomy, tensors: Mapping[str, Tensor], statistics: Statistics, layer: int) -> Scores:
    """Magnitude-sp: the L2 norm of all weights that a unit owns, in every matrix of its axis."""
    out = {}
    for axis, _, _ in _inner_axes(anatomy, layer):
        total = torch.zeros(axis.size, dtype=torch.float64)
        for span in axis.spans:
            square = tensors[span.param].double().square()
            total += axis.unit_sums(span, square.sum(1 - span.dim) if square.dim() == 2 else square)
        out[axis.name] = total.sqrt().float()
    return Scores(out)


def activation_norm(reduction: str) -> Callable[[Anatomy, Mapping[str, Tensor], Statistics], Scores]:
    """Minitron's width scores: the stem from what q and gate read, summed over all blocks; channels from down's input.

    ``mean-l2``: mean over tokens of |x|, then L2 over windows (Minitron's best, ModelOpt). ``l2``: L2 over all tokens
    (the comparison study's eq. 4).
    """

    def channel(moments: Moments) -> Tensor:
        return moments.sums["window_abs"].sqrt() if reduction == "mean-l2" else moments.norm_C()

    def score(anatomy: Anatomy, tensors: Mapping[str, Tensor], statistics: Statistics) -> Scores:
        values: dict[str, Tensor] = {}
        stem = torch.zeros(anatomy.shape.hidden_size, dtype=torch.float64)
        for name, moments in statistics.items():
            layer, _, segment = name.removeprefix("layers.").split(".")
            if segment == "hidden":
                stem += channel(moments)
            elif segment == "intermediate":
                values[f"layers.{layer}.intermediate"] = channel(moments).float()
        return Scores(values | {"hidden": stem.float()})

    return score


def _activation_norm(reduction: str) -> UnitCriterion:
    want = frozenset({"window_abs" if reduction == "mean-l2" else "sumsq"})
    return UnitCriterion({"hidden": want, "intermediate": want}, score_all=activation_norm(reduction))


WEIGHT_CRITERIA: dict[str, WeightCriterion] = {
    "magnitude": WeightCriterion(magnitude),
    "wanda": WeightCriterion(wanda, frozenset({"sumsq"})),
    "obs": WeightCriterion(magnitude, frozenset({"gram"})),  # scored inside the update, at the current weights
}
UNIT_CRITERIA: dict[str, UnitCriterion] = {
    "fluctuation": UnitCriterion(dict.fromkeys(("q", "intermediate"), frozenset({"mean", "var"})), fluctuation),
    "wanda-units": UnitCriterion(dict.fromkeys(("q", "intermediate"), frozenset({"sumsq"})), wanda_units),
    "magnitude-units": UnitCriterion({}, magnitude_units),
    "activation-norm:mean-l2": _activation_norm("mean-l2"),
    "activation-norm:l2": _activation_norm("l2"),
}
