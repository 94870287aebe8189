"""One-shot pruning: each kind of method carries out a plan in a module of its own."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from . import combination, depth, hf, products, rotation, surgeon, units, weights
from .anatomy import Anatomy
from .axes import kind_of
from .data.windows import Windows
from .distributed import ALONE, World
from .errors import UserError
from .findings import Findings
from .job import InMemory, Job, Outcome, Progress, no_progress
from .keep import Keep
from .planning import Plan
from .spent import Flops

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .streaming import Files


@torch.no_grad()
@products.fast()
def one_shot_(
    plan: Plan,
    model: PreTrainedModel,
    windows: Windows | None,
    *,
    findings: Findings | None = None,
    batch_size: int = 4,
    progress: Progress = no_progress,
    store: Files | None = None,
    world: World = ALONE,
) -> Outcome:
    """Carry out a plan. Consumes `model`: its tensors are cut or zeroed, so that memory never holds two models.

    `findings` of an earlier run on the same model and windows spare the passes over the dense model (see `findings.wanted`).
    `world` are the processes that share the windows out; each of them ends with the same outcome, that of one process to the
    rounding of sums. `store` is what `streaming.open_` gave with the model, if its weights are in files.
    """
    if plan.parts:
        outcomes: list[Outcome] = []
        for index, part in enumerate(plan.parts):
            if outcomes:
                part = combination.part_plan(plan.request, plan.anatomy, index, outcomes[-1].target)
                model, findings = outcomes[-1].model, None
            outcomes.append(
                one_shot_(
                    part,
                    model,
                    windows,
                    findings=findings,
                    batch_size=batch_size,
                    progress=partial(_named, progress, part.method.name),
                    store=store,
                    world=world,
                )
            )
        return combination.joined(plan, outcomes)
    tensors = hf.weights(model, plan.anatomy) if store is None else store.weights
    job = Job(plan, model, tensors, windows, batch_size, progress, findings, store=store or InMemory(), world=world)
    with Flops() as spent:
        outcome = _run_(job)
    return replace(outcome, flops=round(world.total(spent.total)) + job.shared)


def _run_(job: Job) -> Outcome:
    plan = job.plan
    if plan.method.is_sparse:
        return weights.run_(job)
    if plan.method.criterion == "output-error":
        return surgeon.run_(job)
    if set(plan.method.axes) <= {"layers", *hf.SUBLAYERS}:
        return depth.run_(job)
    return rotation.run_(job) if plan.allocator == "rotation" else units.run_(job)


def _named(progress: Progress, part: str, stage: str, done: int, total: int) -> None:
    progress(f"{part}: {stage}", done, total)


def decided(plan: Plan, config: Any, findings: Findings) -> Plan:
    """The plan with its target, where findings settle it without a model; UserError where the loss must be asked."""
    if plan.parts or plan.target is not None:
        return plan
    if findings.curves:
        keep = Keep({name: tuple(range(n)) for name, n in surgeon.decided(plan, findings.curves).items()})
    elif findings.scores is not None and not plan.candidates and plan.allocator != "search" and plan.run is None:
        keep, _ = units.decided(plan, findings.scores)
    else:
        raise UserError(
            f"statistics: {plan.method.name} settles its sizes by losses that only the model can tell; drop them"
        )
    stock = plan.request.uniform or not plan.out_bias
    target = hf.target_for(config, plan.anatomy, keep.validated(plan.anatomy), out_bias=plan.out_bias, stock=stock)
    return replace(plan, target=target, notes=target.notes)


def describe_keep(keep: Keep, anatomy: Anatomy) -> dict[str, Any]:
    """Kept units per axis kind and layer, for people."""
    out: dict[str, Any] = {}
    for name in anatomy.axes:
        if name in keep.units:
            out.setdefault(kind_of(name), []).append(len(keep.units[name]))
    return out
