"""Methods that zero single weights, block by block."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .allocate import kept_in_matrix, kept_in_rows, kept_n_of_m
from .criteria import WEIGHT_CRITERIA, wanda
from .cut import zero_weights_
from .hf import Target
from .job import Job, Outcome
from .keep import WeightMask
from .planning import Plan
from .solve import DAMP, admm, inverse_upper, sparsegpt
from .statistics import Moments, Statistics, collect, layer_moments, reading_points

_SEGMENTS = ("hidden", "q", "intermediate")
_OUTLIER, _SPREAD = 5.0, 0.08  # OWL's M and lambda


@torch.no_grad()
def run_(job: Job) -> Outcome:
    """Zero weights of the job's model; a sequential method's block sees the pruned blocks before it."""
    criterion = WEIGHT_CRITERIA[job.plan.method.criterion]
    anatomy, tensors = job.plan.anatomy, job.tensors
    count = anatomy.shape.num_hidden_layers
    masks = job.store.room()
    sweep = job.sweep() if criterion.wants else None
    wants = dict.fromkeys(_SEGMENTS, criterion.wants | ({"gram"} if job.plan.compensator in _UPDATES else set()))
    levels = outlier_levels(job) if job.plan.options.get("allocation") == "owl" else None
    for layer in range(count):
        named: Statistics = {}
        if sweep is not None:
            with job.timed("score"):
                named, modules = layer_moments(sweep, layer, wants)
                sweep.gather(layer, modules, onwards=not job.plan.sequential)
        sparsity = job.plan.sparsity if levels is None else levels[layer]
        with job.timed("cut"):
            for (sublayer, segment), matrices in reading_points(anatomy, layer).items():
                moments = named.get(f"layers.{layer}.{sublayer}.{segment}")
                if job.plan.compensator in _UPDATES:
                    assert moments is not None
                    level = None if job.plan.pattern is not None else sparsity
                    pruned = _UPDATES[job.plan.compensator](job, matrices, moments, level)
                    for name, (weight, kept) in zip(matrices, pruned, strict=True):
                        tensors[name].copy_(weight)
                        masks[name] = kept
                    continue
                for name in matrices:
                    kept = _kept(job.plan, criterion.score(tensors[name], moments), sparsity)
                    zero_weights_({name: tensors[name]}, WeightMask({name: kept}))
                    masks[name] = kept
        if sweep is not None and job.plan.sequential and layer + 1 < count:
            with job.timed("score"):
                sweep.run(layer)
        job.progress("score", layer + 1, count)
    target = Target(job.model.config, anatomy)
    mask, notes = WeightMask(masks), tuple(job.notes)
    return Outcome(job.plan, job.model, target, mask=mask, seconds=job.seconds, notes=notes, store=job.store)


def _kept(plan: Plan, scores: Tensor, sparsity: float | None) -> Tensor:
    if plan.pattern is not None:
        return kept_n_of_m(scores, *plan.pattern)
    assert sparsity is not None
    if plan.allocator == "per-row":
        return kept_in_rows(scores, sparsity)
    return kept_in_matrix(scores, sparsity)


Pruned = list[tuple[Tensor, Tensor]]  # weight and mask of every matrix


def _obs(job: Job, matrices: list[str], moments: Moments, sparsity: float | None) -> Pruned:
    """SparseGPT's masks and update, on all matrices that read one input."""
    inverse = inverse_upper(moments.gram_CC)
    if inverse.escalated:
        job.notes.append(f"{matrices[0]}: its Gram matrix took damping {inverse.damp:g} instead of {DAMP:g}")
    return sparsegpt([job.tensors[n] for n in matrices], inverse, sparsity=sparsity, pattern=job.plan.pattern)


def _admm(job: Job, matrices: list[str], moments: Moments, sparsity: float | None) -> Pruned:
    """Masks and weights that the alternating directions settle on."""
    return admm([job.tensors[n] for n in matrices], moments.gram_CC, sparsity=sparsity, pattern=job.plan.pattern)


_UPDATES: Mapping[str, Callable[[Job, list[str], Moments, float | None], Pruned]] = {"obs": _obs, "admm": _admm}


def outlier_levels(job: Job) -> list[float]:
    """OWL (arXiv 2310.05175): a sparsity for every layer, lower where more of |W| * ||X|| stands out.

    A layer's share D of entries above M = 5 times the matrix's mean, scaled over the layers to [0, 2 lambda], shifts what
    it keeps around 1 - s; the mean over layers is s. One dense pass.
    """
    plan = job.plan
    assert plan.sparsity is not None
    wants: dict[str, frozenset[str]] = dict.fromkeys(_SEGMENTS, frozenset({"sumsq"}))
    with job.timed("score"):
        seen = collect(job.sweep(), wants, lambda done, total: job.progress("outliers", done, total))
    shares = []
    for layer in range(plan.anatomy.shape.num_hidden_layers):
        above = total = 0
        for (sublayer, segment), matrices in reading_points(plan.anatomy, layer).items():
            for name in matrices:
                scores = wanda(job.tensors[name], seen[f"layers.{layer}.{sublayer}.{segment}"])
                above += int((scores > _OUTLIER * scores.mean()).sum())
                total += scores.numel()
        shares.append(above / total)
    share = torch.tensor(shares, dtype=torch.float64)
    width = min(_SPREAD, plan.sparsity, 1 - plan.sparsity)
    span = float(share.max() - share.min())
    scaled = (share - share.min()) / span * 2 * width if span > 0 else torch.zeros_like(share)
    return (plan.sparsity - (scaled - scaled.mean())).clamp(0, 1).tolist()
