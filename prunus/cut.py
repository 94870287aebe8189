"""The two realisations of one decision: `zero_` the dropped units, or `slice_tensors` them away.

A zeroed KV group, FFN channel or stem channel is a fixed point of training (all its gradients vanish, Adam's moments are
zero, decoupled decay keeps zero at zero), so a zeroed and a sliced model stay equal. Not so a zeroed query head whose KV
head lives on (its output is the mean of V, so o_proj's columns get gradients), nor a whole sub-layer whose output has a
bias: there `zero_` the gradients too, before they are clipped. Where an axis runs through RMSNorm gains the sliced norm
divides by d' where the zeroed one divides by d; multiplying the gains by sqrt(d / d') makes them equal again (the fold).
LayerNorm knows no such factor: there a cut of the stem is not the zeroed model, and the gains stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .anatomy import Anatomy
from .axes import kind_of, layer_of
from .keep import Keep, WeightMask


@dataclass(frozen=True)
class SlicePlan:
    """What slicing does to every tensor: its new name, the rows kept along each dimension, its gain factor."""

    names: Mapping[str, str]  # old name -> new name; a tensor that is not here goes
    rows: Mapping[str, Mapping[int, Tensor]] = field(default_factory=dict)
    scale: Mapping[str, float] = field(default_factory=dict)
    offset: float = 0.0  # gains multiply by w + offset
    gains: frozenset[str] = frozenset()  # tensors whose factor applies to w + offset

    def apply(self, name: str, tensor: Tensor, power: int = 1) -> Tensor:
        """Slice one tensor (or an optimizer slot of it): weights have power 1, exp_avg -1, exp_avg_sq -2."""
        for dim, kept in self.rows.get(name, {}).items():
            tensor = tensor.index_select(dim, kept.to(tensor.device))
        factor = self.scale.get(name, 1.0) ** power
        if factor == 1.0:
            return tensor.clone() if name not in self.rows else tensor
        offset = self.offset if power == 1 and name in self.gains else 0.0
        return ((tensor + offset) * factor - offset) if offset else tensor * factor


def slice_plan(anatomy: Anatomy, keep: Keep, *, fold: bool = True, gains: Mapping[str, float] | None = None) -> SlicePlan:
    """Work out, from the anatomy alone, what `keep` does to every tensor.

    `fold` multiplies the norm gains that a cut shortens by sqrt(d / d'), so that the sliced model equals the zeroed one.
    Without it they are left as they are (R0: Minitron, EfficientLLM; the surviving stream is then amplified by
    rms_all / rms_kept), or multiplied by the factors in `gains` (R2, `compensate.measured_gains`).
    """
    gone: dict[tuple[str, int], list[Tensor]] = {}
    for name in keep.units:
        axis = anatomy.axes[name]
        dropped = keep.dropped(name, axis.size)
        for span in axis.spans if dropped else ():
            gone.setdefault((span.param, span.dim), []).append(span.gone(dropped))
    rows: dict[str, dict[int, Tensor]] = {}
    for (param, dim), indices in gone.items():
        stays = torch.ones(anatomy.tensors[param].shape[dim], dtype=torch.bool)
        stays[torch.cat(indices)] = False
        if not bool(stays.all()):
            rows.setdefault(param, {})[dim] = stays.nonzero().squeeze(1)
    removed = {param for param, dims in rows.items() if any(kept.numel() == 0 for kept in dims.values())}
    rows = {param: dims for param, dims in rows.items() if param not in removed}
    position = {old: new for new, old in enumerate(keep.units.get("layers", range(anatomy.shape.num_hidden_layers)))}
    names = {}
    for name, tensor in anatomy.tensors.items():
        if name not in removed:
            prefix = "" if tensor.layer is None else anatomy.block_name(tensor.layer)
            kept_prefix = "" if tensor.layer is None else anatomy.block_name(position[tensor.layer])
            names[name] = kept_prefix + name[len(prefix) :]
    scale = _scales(anatomy, rows, fold, gains or {})
    offset = 1.0 if anatomy.family.gain == "one_plus_weight" else 0.0
    return SlicePlan(names, rows, scale, offset, frozenset(n for n in scale if anatomy.tensors[n].param.norm))


def _scales(
    anatomy: Anatomy, rows: Mapping[str, Mapping[int, Tensor]], fold: bool, gains: Mapping[str, float]
) -> dict[str, float]:
    """Factors of the shortened norm gains, and of embeddings that the model scales by sqrt(hidden_size)."""
    scale: dict[str, float] = {}
    family = anatomy.family
    for name, dims in rows.items():
        tensor = anatomy.tensors[name]
        if tensor.param.norm:
            folded = fold and not family.centred
            scale[name] = math.sqrt(tensor.shape[0] / dims[0].numel()) if folded else gains.get(name, 1.0)
    embedding = f"{family.embedding}.weight"
    if family.embedding_scaled and 1 in rows.get(embedding, {}):
        # the config's sqrt(hidden_size) shrinks with the stem; a tied head then grows, and the final gain pays it back
        scale[embedding] = math.sqrt(anatomy.shape.hidden_size / rows[embedding][1].numel())
        if anatomy.shape.tie_word_embeddings:
            scale[f"{family.final_norm}.weight"] /= scale[embedding]
    return {name: factor for name, factor in scale.items() if factor != 1.0}


def slice_tensors(tensors: Mapping[str, Tensor], plan: SlicePlan, *, power: int = 1) -> dict[str, Tensor]:
    """Pure: new tensors under their new names. Works on weights, on optimizer slots of the same shape, on EMA copies."""
    return {plan.names[name]: plan.apply(name, t, power) for name, t in tensors.items() if name in plan.names}


def slice_tensors_(tensors: MutableMapping[str, Tensor], plan: SlicePlan) -> dict[str, Tensor]:
    """As `slice_tensors`, but takes each tensor out of `tensors` as it goes: peak memory one tensor more."""
    out = {}
    for name in list(tensors):
        tensor = tensors.pop(name)
        if name in plan.names:  # what is not cut is handed on as it is
            whole = name not in plan.rows and name not in plan.scale
            out[plan.names[name]] = tensor if whole else plan.apply(name, tensor)
    return out


SLOT_POWER = {"exp_avg": -1, "exp_avg_sq": -2, "max_exp_avg_sq": -2}


def slice_slots(slots: Mapping[str, Mapping[str, Tensor]], plan: SlicePlan) -> dict[str, dict[str, Tensor]]:
    """AdamW state by parameter name -> the same for the sliced model.

    Moments of surviving weights survive; where a gain was folded by c its gradient is 1 / c of what it was, so its first
    moment is divided by c and its second by c^2. Scalars (`step`) are copied, never shared.
    """
    out = {}
    for name, state in slots.items():
        if name in plan.names:
            out[plan.names[name]] = {
                key: plan.apply(name, value, SLOT_POWER.get(key, 1)) if value.dim() else value.clone()
                for key, value in state.items()
            }
    return out


@torch.no_grad()
def zero_(tensors: Mapping[str, Tensor], anatomy: Anatomy, keep: Keep) -> None:
    """Changes `tensors` in place: every row of a dropped unit becomes zero, in weights or in optimizer slots."""
    for name in keep.units:
        axis = anatomy.axes[name]
        dropped = keep.dropped(name, axis.size)
        for span in axis.spans if dropped else ():
            if span.param in tensors:
                target = tensors[span.param]
                target.index_fill_(span.dim, span.gone(dropped).to(target.device), 0)


@torch.no_grad()
def zero_weights_(tensors: Mapping[str, Tensor], mask: WeightMask) -> None:
    """Changes `tensors` in place: weights outside the mask become exactly zero."""
    for name, kept in mask.kept.items():
        tensors[name].masked_fill_(~kept.to(tensors[name].device), 0)


def config_axes(keep: Keep) -> set[str]:
    """The kinds of axes a decision cuts."""
    return {kind_of(name) if layer_of(name) is not None else name for name in keep.units}
