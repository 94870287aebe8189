"""Methods that remove units (heads, channels, stem) from dense statistics, gathered in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from .allocate import global_budget, standardised, to_counts
from .anatomy import Anatomy
from .axes import layer_of
from .compensate import measured_gains, output_bias, refit_readers_
from .criteria import UNIT_CRITERIA, Scores
from .cut import zero_
from .job import Job, Outcome, finish_
from .keep import Keep
from .planning import Plan, alike_counts, biased_anatomy
from .statistics import Statistics, collect, layer_moments


def run_(job: Job) -> Outcome:
    """Carry out a plan: score, allocate, compensate, slice."""
    plan = job.plan
    criterion = UNIT_CRITERIA[_criterion_name(plan)]
    statistics = job.statistics
    if statistics is None:
        with job.timed("score"):
            statistics = collect(job.sweep(), criterion.wants, lambda done, total: job.progress("score", done, total))
    with job.timed("allocate"):
        scores = criterion.score(plan.anatomy, job.tensors, statistics)
        keep = _allocate(plan, scores)
    if plan.compensator == "least-squares":
        with job.timed("compensate"):
            block_by_block_(job, lambda layer, _: _of_layer(keep, layer), {})
    with job.timed("compensate"):
        extra = output_bias(plan.anatomy, job.tensors, statistics, keep) if plan.compensator == "bias" else {}
        gains = None
        if plan.compensator == "gain" and "hidden" in keep.units:
            gains = measured_gains(job.sweep(), keep, job.model.config.rms_norm_eps)
    outcome = finish_(job, keep, extra, gains)
    outcome.scores, outcome.statistics = scores, statistics
    return outcome


def _of_layer(keep: Keep, layer: int) -> Keep:
    return Keep({name: units for name, units in keep.units.items() if layer_of(name) == layer})


def _criterion_name(plan: Plan) -> str:
    return ":".join([plan.method.criterion, *plan.options.values()])


def wanted_statistics(plan: Plan) -> Mapping[str, frozenset[str]] | None:
    """What a dense method's pass collects; None for methods that must sweep again for every target."""
    criterion = UNIT_CRITERIA.get(_criterion_name(plan))
    return None if criterion is None else criterion.wants


def _allocate(plan: Plan, scores: Scores) -> Keep:
    if plan.counts:
        return to_counts(scores, plan.counts)
    assert plan.budget is not None
    biased = biased_anatomy(plan)
    costs = {name: biased.unit_params(name) for name in scores.values}
    removable = sum(costs[name] * len(values) for name, values in scores.values.items())
    budget = plan.budget - (biased.block_params - removable)
    keep = global_budget(standardised(scores), costs, budget, multiple_of={"intermediate": plan.multiple_of})
    return _uniform(plan, biased, scores, keep) if plan.request.uniform else keep


def _uniform(plan: Plan, biased: Anatomy, scores: Scores, keep: Keep) -> Keep:
    """The same sizes in every layer: KV groups at their mean, channels to fit the budget, best units first in each."""
    layers = range(plan.anatomy.shape.num_hidden_layers)
    assert plan.budget is not None
    names = [f"layers.{i}.kv_heads" for i in layers]
    mean = sum(len(keep.units.get(name, range(len(scores.values[name])))) for name in names) / len(names)
    return to_counts(scores, alike_counts(biased, plan.budget, mean, plan.multiple_of))


# -- block by block -------------------------------------------------------------------------------------------------------


def run_sequential_(job: Job) -> Outcome:
    """Carry out a plan whose sizes are known: score each block on what the pruned blocks before it give, cut, go on."""
    plan, criterion = job.plan, UNIT_CRITERIA[_criterion_name(job.plan)]
    values: dict[str, Tensor] = {}

    def decide(layer: int, statistics: Statistics) -> Keep:
        scores = criterion.score_layer(plan.anatomy, job.tensors, statistics, layer)
        values.update(scores)
        counts = {name: plan.counts[name] for name in scores if name in plan.counts}
        return to_counts(Scores(scores), counts)

    if not criterion.wants and plan.compensator == "none":
        keep = _all(decide(layer, {}) for layer in range(plan.anatomy.shape.num_hidden_layers))
    else:
        keep = block_by_block_(job, decide, criterion.wants)
    outcome = finish_(job, keep)
    outcome.scores = Scores(values)
    return outcome


def _all(keeps: Iterable[Keep]) -> Keep:
    return Keep({name: units for keep in keeps for name, units in keep.units.items()})


@torch.no_grad()
def block_by_block_(job: Job, decide: Callable[[int, Statistics], Keep], wants: Mapping[str, frozenset[str]]) -> Keep:
    """Changes the job's weights: every block's dropped units become zero, and its readers are refitted if asked.

    `decide` gives the units of one layer from the statistics of its inputs, which come through the cut blocks before it.
    """
    anatomy, tensors = job.plan.anatomy, job.tensors
    refits = job.plan.compensator == "least-squares"
    gram: dict[str, frozenset[str]] = dict.fromkeys(("q", "intermediate"), frozenset({"gram"})) if refits else {}
    all_wants = {segment: wants.get(segment, frozenset()) | gram.get(segment, frozenset()) for segment in {**wants, **gram}}
    sweep = job.sweep()
    count = len(sweep.blocks)
    kept: list[Keep] = []
    for layer in range(count):
        with job.timed("score"):
            statistics, modules = layer_moments(sweep, layer, all_wants)
            sweep.observe(layer, modules)
        with job.timed("cut"):
            keep = decide(layer, statistics)
            if refits:
                refit_readers_(anatomy, tensors, statistics, keep)
            zero_(tensors, anatomy, keep)
            kept.append(keep)
        if layer + 1 < count:
            with job.timed("score"):
                sweep.run(layer)
        job.progress("score", layer + 1, count)
    return _all(kept)
