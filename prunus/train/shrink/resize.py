"""A model that trains is cut: units are zeroed in weights and moments, and sliced away later, moments and all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ... import hf
from ...anatomy import Anatomy
from ...cut import SLOT_POWER, SlicePlan, slice_plan
from ...distributed import World, local, whole
from ...hf import Target
from ...keep import Keep
from .. import optim
from ..assembly import learner_of, optimizer_of, tensors_of
from ..loop import Training
from .groups import Units

if TYPE_CHECKING:
    from ..recipe import Recipe


@torch.no_grad()
def zero_units_(training: Training, anatomy: Anatomy, units: Units) -> None:
    """Changes weights and moments: nothing of these units is left in them. What is zero stays zero (see `prunus.cut`)."""
    named = training.learner.trained
    places: list[Mapping[str, Tensor]] = [named, *optim.slots(training.optimizer, named).values()]
    for name, gone in units.items():
        for span in anatomy.axes[name].spans:
            rows = span.gone(gone)
            if not len(rows):
                continue
            for tensors in places:
                zero_rows_(tensors[span.param], span.dim, rows, training.world)


def zero_rows_(tensor: Tensor, dim: int, rows: Tensor, world: World) -> None:
    """Changes a tensor that may be shared out by rows."""
    own = local(tensor)
    if dim == 0 and own.shape != tensor.shape:
        first = world.first_row(tensor.shape[0])
        rows = rows[(rows >= first) & (rows < first + len(own))] - first
    own.index_fill_(dim, rows.to(own.device), 0)


@torch.no_grad()
def slice_(training: Training, recipe: Recipe, anatomy: Anatomy, keep: Keep, target: Target) -> SlicePlan:
    """Changes `training`: the model is one of the target's sizes, with the weights and moments of what `keep` leaves.

    The gains of cut norms are folded, so that the sliced model is the zeroed one. A tensor goes as soon as its part is taken;
    under torchrun every process holds the whole small model until it is shared out again.
    """
    plan = slice_plan(anatomy, keep)
    parts: dict[str, dict[str, Tensor]] = {}
    steps = optim.steps_done(training.optimizer)
    for name, tensor in tensors_of(training.learner, training.optimizer).items():
        kind, _, own = name.partition(".")
        if own in plan.names:
            sliced = plan.apply(own, whole(tensor.detach()), SLOT_POWER.get(kind, 1))
            parts.setdefault(kind, {})[plan.names[own]] = sliced
        if training.world.alone:
            tensor.data = tensor.new_empty(0)  # its memory is free from here on
    before = training.learner.model
    model = hf.build(target.config, parts["model"], before.generation_config)
    model.requires_grad_(True)
    rate = training.optimizer.param_groups[0]["lr"]
    training.learner = learner_of(recipe, model, target.anatomy, training.world)
    training.optimizer = optimizer_of(recipe, training.learner, rate, steps)
    for slot, live in optim.slots(training.optimizer, training.learner.trained).items():
        for name, moment in live.items():
            shared = local(moment).shape != moment.shape
            local(moment).copy_(training.world.part(parts[slot][name]) if shared else parts[slot][name])
    return plan
