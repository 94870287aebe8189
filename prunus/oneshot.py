"""One-shot pruning: each kind of method carries out a plan in a module of its own."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from . import combination, depth, hf, rotation, surgeon, units, weights
from .anatomy import Anatomy
from .axes import kind_of
from .data.windows import Windows
from .job import InMemory, Job, Outcome, Progress, no_progress
from .keep import Keep
from .planning import Plan
from .statistics import Statistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .streaming import Files


@torch.no_grad()
def one_shot_(
    plan: Plan,
    model: PreTrainedModel,
    windows: Windows | None,
    *,
    statistics: Statistics | None = None,
    batch_size: int = 4,
    progress: Progress = no_progress,
    store: Files | None = None,
) -> Outcome:
    """Carry out a plan. Consumes `model`: its tensors are cut or zeroed, so that memory never holds two models.

    `statistics` of an earlier run on the same model and windows spare the pass of methods whose statistics are dense.
    `store` is what `streaming.open_` gave with the model, if its weights are in files.
    """
    if plan.parts:
        outcomes: list[Outcome] = []
        for index, part in enumerate(plan.parts):
            if outcomes:
                part = combination.part_plan(plan.request, plan.anatomy, index, outcomes[-1].target)
                model, statistics = outcomes[-1].model, None
            outcomes.append(
                one_shot_(
                    part,
                    model,
                    windows,
                    statistics=statistics,
                    batch_size=batch_size,
                    progress=partial(_named, progress, part.method.name),
                    store=store,
                )
            )
        return combination.joined(plan, outcomes)
    tensors = hf.weights(model, plan.anatomy) if store is None else store.weights
    job = Job(plan, model, tensors, windows, batch_size, progress, statistics, store=store or InMemory())
    if plan.method.is_sparse:
        return weights.run_(job)
    if plan.method.criterion == "output-error":
        return surgeon.run_(job)
    if set(plan.method.axes) <= {"layers", *hf.SUBLAYERS}:
        return depth.run_(job)
    if plan.method.allocator == "rotation":
        return rotation.run_(job)
    return units.run_sequential_(job) if plan.method.allocator == "uniform" else units.run_(job)


def _named(progress: Progress, part: str, stage: str, done: int, total: int) -> None:
    progress(f"{part}: {stage}", done, total)


def wanted_statistics(plan: Plan) -> Mapping[str, frozenset[str]] | None:
    """What a dense method's pass collects; None for methods that must sweep again for every target.

    Of a combination the first part's: only this one sees the source.
    """
    return units.wanted_statistics(plan.parts[0] if plan.parts else plan)


def describe_keep(keep: Keep, anatomy: Anatomy) -> dict[str, Any]:
    """Kept units per axis kind and layer, for people."""
    out: dict[str, Any] = {}
    for name in anatomy.axes:
        if name in keep.units:
            out.setdefault(kind_of(name), []).append(len(keep.units[name]))
    return out
