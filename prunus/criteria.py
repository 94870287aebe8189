"""What a unit or a weight is worth. Higher = keep. Pure functions of weights and saved statistics.

Shapes: W [out, in] as in torch.nn.Linear; C channels of a matrix's input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .anatomy import Anatomy
from .statistics import Moments, Statistics


@dataclass(frozen=True)
class Scores:
    """Axis name -> one float32 a unit. `spread` holds the mean and deviation of the channel scores under an axis."""

    values: Mapping[str, Tensor]
    spread: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class WeightCriterion:
    """Scores single weights of one matrix; `wants` names the statistics of its input that it needs."""

    score: Callable[[Tensor, Moments | None], Tensor]
    wants: frozenset[str] = frozenset()


@dataclass(frozen=True)
class UnitCriterion:
    """Scores units from dense statistics; `wants` names, by input segment, the statistics that it needs."""

    score: Callable[[Anatomy, Mapping[str, Tensor], Statistics], Scores]
    wants: Mapping[str, frozenset[str]]


def magnitude(weight: Tensor, _: Moments | None) -> Tensor:
    """|W|, float32."""
    return weight.float().abs()


def wanda(weight: Tensor, inputs: Moments | None) -> Tensor:
    """|W_ij| * ||X_j||_2 over all calibration tokens, float32 (Wanda eq. 1)."""
    assert inputs is not None
    return weight.float().abs() * inputs.norm_C().float()


_READS = {"kv_heads": ("attention", "q"), "intermediate": ("mlp", "intermediate")}


def fluctuation(anatomy: Anatomy, tensors: Mapping[str, Tensor], statistics: Statistics) -> Scores:
    """FLAP's WIFV: var(x_c) * ||W_:c||^2 for each input channel of o_proj and down_proj (FLAP eq. 5).

    A KV group's score is the mean over its r * head_dim channels; standardised over the layer's channels later.
    """
    values: dict[str, Tensor] = {}
    spread: dict[str, tuple[float, float]] = {}
    for layer in range(anatomy.shape.num_hidden_layers):
        for kind, (sublayer, segment) in _READS.items():
            axis = anatomy.axes.get(f"layers.{layer}.{kind}")
            if axis is None:
                continue
            reader = anatomy.reader(axis.name)
            weight = tensors[reader.param].float()
            moments = statistics[f"layers.{layer}.{sublayer}.{segment}"]
            channel_C = moments.var_C * (weight * weight).sum(0).double()
            values[axis.name] = (axis.unit_sums(reader, channel_C) / reader.rows_per_unit).float()
            spread[axis.name] = (float(channel_C.mean()), float(channel_C.std()))
    return Scores(values, spread)


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
    return UnitCriterion(activation_norm(reduction), {"hidden": want, "intermediate": want})


WEIGHT_CRITERIA: dict[str, WeightCriterion] = {
    "magnitude": WeightCriterion(magnitude),
    "wanda": WeightCriterion(wanda, frozenset({"sumsq"})),
}
_MEAN_VAR = frozenset({"mean", "var"})
UNIT_CRITERIA: dict[str, UnitCriterion] = {
    "fluctuation": UnitCriterion(fluctuation, {"q": _MEAN_VAR, "intermediate": _MEAN_VAR}),
    "activation-norm:mean-l2": _activation_norm("mean-l2"),
    "activation-norm:l2": _activation_norm("l2"),
}
