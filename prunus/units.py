"""Methods that remove units (heads, channels, stem): scored on the dense model, or block by block on the cut one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .allocate import adaptive_ratios, global_budget, standardised, to_counts
from .anatomy import Anatomy
from .axes import layer_of
from .compensate import measured_gains, output_bias, reader_moments, refit_readers_
from .criteria import UNIT_CRITERIA, Scores
from .cut import zero_
from .errors import UserError
from .job import Job, Outcome, finish_
from .keep import Keep
from .planning import Plan, biased_anatomy
from .sizes import Sizes, adaptive_counts, alike_counts
from .solve import stay_after_swaps, stay_one_by_one
from .statistics import BlockCosine, Statistics, collect, layer_moments
from .taylor import unit_taylor


def run_(job: Job) -> Outcome:
    """Carry out a plan whose units are scored on the dense model: score, allocate, compensate, slice."""
    plan = job.plan
    scores, statistics = _GATHERED.get(plan.method.criterion, _from_statistics)(job)
    with job.timed("allocate"):
        keep, measured = _allocate(plan, scores)
    if plan.compensator == "least-squares":
        with job.timed("compensate"):
            block_by_block_(job, lambda layer, _: _of_layer(keep, layer), {})
    with job.timed("compensate"):
        extra = output_bias(plan.anatomy, job.tensors, statistics or {}, keep) if plan.compensator == "bias" else {}
        gains = None
        if plan.compensator == "gain" and "hidden" in keep.units:
            gains = measured_gains(job.sweep(), keep, job.model.config.rms_norm_eps)
    outcome = finish_(job, keep, extra, gains)
    outcome.scores, outcome.statistics, outcome.measured = scores, statistics, measured
    return outcome


# -- how scores are gathered ----------------------------------------------------------------------------------------------


def _from_statistics(job: Job) -> tuple[Scores, Statistics | None]:
    """By a criterion of the inputs' statistics, from one sweep or an earlier run."""
    criterion, statistics = UNIT_CRITERIA[_criterion_name(job.plan)], job.statistics
    if statistics is None:
        with job.timed("score"):
            statistics = collect(job.sweep(), criterion.wants, lambda done, total: job.progress("score", done, total))
    with job.timed("allocate"):
        return criterion.score(job.plan.anatomy, job.tensors, statistics), statistics


def _from_gradients(job: Job) -> tuple[Scores, Statistics | None]:
    """LLM-Pruner: Taylor scores."""
    with job.timed("score"):
        return unit_taylor(job), None


def _from_gradients_and_cosines(job: Job) -> tuple[Scores, Statistics | None]:
    """Adapt-Pruner: Taylor scores of units, and for ``layers`` how far each block turns the stream, on the same way."""
    cosines = [BlockCosine() for _ in job.plan.anatomy.shape.layers]
    with job.timed("score"):
        scores = unit_taylor(job, lambda layer, before, after: cosines[layer](before, after))
    turned = torch.tensor([1.0 - cosine.mean for cosine in cosines], dtype=torch.float64)
    return Scores({**scores.values, "layers": turned}), None


_GATHERED: Mapping[str, Callable[[Job], tuple[Scores, Statistics | None]]] = {
    "taylor-units": _from_gradients,
    "cosine-taylor": _from_gradients_and_cosines,
}


def _of_layer(keep: Keep, layer: int) -> Keep:
    return Keep({name: units for name, units in keep.units.items() if layer_of(name) == layer})


def _criterion_name(plan: Plan) -> str:
    return ":".join([plan.method.criterion, *plan.options.values()])


def wanted_statistics(plan: Plan) -> Mapping[str, frozenset[str]] | None:
    """What a dense method's pass collects; None for methods that must sweep again for every target."""
    criterion = UNIT_CRITERIA.get(_criterion_name(plan))
    return None if criterion is None else criterion.wants


# -- where the cut falls --------------------------------------------------------------------------------------------------


def _allocate(plan: Plan, scores: Scores) -> tuple[Keep, Mapping[str, Any]]:
    """The decision, and what is saved beside the model of how it came about."""
    if plan.counts:
        return to_counts(scores, plan.counts), {}
    if plan.method.allocator == "adaptive":
        return _adaptive(plan, scores)
    assert plan.budget is not None
    biased = biased_anatomy(plan)
    costs = {name: biased.unit_params(name) for name in scores.values}
    removable = sum(costs[name] * len(values) for name, values in scores.values.items())
    budget = plan.budget - (biased.block_params - removable)
    keep = global_budget(standardised(scores), costs, budget, multiple_of={"intermediate": plan.multiple_of})
    return (_uniform(plan, biased, scores, keep) if plan.request.uniform else keep), {}


def _adaptive(plan: Plan, scores: Scores) -> tuple[Keep, Mapping[str, Any]]:
    """A share of its own for every layer, less where the layer does more, and in each layer the best units."""
    anatomy, ratio = plan.anatomy, plan.request.ratio
    assert plan.budget is not None and ratio is not None
    sizes = [Sizes.of(anatomy, [i], plan.multiple_of) for i in range(anatomy.shape.num_hidden_layers)]
    whole, least = [s.params(*s.whole) for s in sizes], [s.params(*s.fewest) for s in sizes]
    most = [1 - few / all_ for few, all_ in zip(least, whole, strict=True)]
    importance = scores.values["layers"]
    if not bool(torch.isfinite(importance).all()):
        raise UserError("scores: some layers' cosines are no numbers; try another --dtype or other calibration text")
    amplitude = float(plan.options["amplitude"]) * ratio
    ratios = adaptive_ratios(importance, whole, most, sum(whole) - plan.budget, amplitude)
    keep = to_counts(scores, adaptive_counts(anatomy, ratios, plan.budget, plan.multiple_of))
    return keep, {"scores": {"block-influence": importance.tolist(), "share": ratios}}


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
    if job.plan.method.criterion in _CHOICES:
        return finish_(job, block_by_block_(job, partial(_chosen, job), {}))
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


_CHOICES: Mapping[str, Callable[[Tensor, Tensor, Tensor, int], tuple[int, ...]]] = {
    "obs-units": stay_one_by_one,
    "least-squares-error": stay_after_swaps,
}


def _chosen(job: Job, layer: int, statistics: Statistics) -> Keep:
    """Units of one layer that are not worth a number each: those that together give the output best, once refitted."""
    plan, kept = job.plan, {}
    for axis in plan.scored_axes:
        if axis.layer == layer:
            reader = plan.anatomy.reader(axis.name)
            gram = reader_moments(statistics, axis).gram_CC
            choose = _CHOICES[plan.method.criterion]
            kept[axis.name] = choose(job.tensors[reader.param], gram, reader.rows(range(axis.size)), plan.counts[axis.name])
    return Keep({name: units for name, units in kept.items() if len(units) < plan.anatomy.axes[name].size})


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
