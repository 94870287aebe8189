"""Methods that zero single weights, block by block."""

from __future__ import annotations

import torch
from torch import Tensor

from .allocate import kept_in_matrix, kept_in_rows, kept_n_of_m
from .criteria import WEIGHT_CRITERIA
from .cut import zero_weights_
from .hf import Target
from .job import Job, Outcome
from .keep import WeightMask
from .planning import Plan
from .statistics import Statistics, layer_moments, reading_points


@torch.no_grad()
def run_(job: Job) -> Outcome:
    """Zero weights of the job's model; a sequential method's block sees the pruned blocks before it."""
    criterion = WEIGHT_CRITERIA[job.plan.method.criterion]
    anatomy, tensors = job.plan.anatomy, job.tensors
    count, masks = anatomy.shape.num_hidden_layers, {}
    sweep = job.sweep() if criterion.wants else None
    wants = dict.fromkeys(("hidden", "q", "intermediate"), criterion.wants)
    for layer in range(count):
        named: Statistics = {}
        if sweep is not None:
            with job.timed("score"):
                named, modules = layer_moments(anatomy, layer, wants)
                sweep.observe(layer, modules)
        with job.timed("cut"):
            for (sublayer, segment), matrices in reading_points(anatomy, layer).items():
                moments = named.get(f"layers.{layer}.{sublayer}.{segment}")
                for name in matrices:
                    kept = _kept(job.plan, criterion.score(tensors[name], moments))
                    zero_weights_({name: tensors[name]}, WeightMask({name: kept}))
                    masks[name] = kept
        if sweep is not None and layer + 1 < count:
            with job.timed("score"):
                sweep.run(layer)
        job.progress("score", layer + 1, count)
    target = Target(job.model.config, anatomy)
    return Outcome(job.plan, job.model, target, mask=WeightMask(masks), seconds=job.seconds, notes=tuple(job.notes))


def _kept(plan: Plan, scores: Tensor) -> Tensor:
    if plan.pattern is not None:
        return kept_n_of_m(scores, *plan.pattern)
    assert plan.sparsity is not None
    if plan.method.allocator == "per-row":
        return kept_in_rows(scores, plan.sparsity)
    return kept_in_matrix(scores, plan.sparsity)
