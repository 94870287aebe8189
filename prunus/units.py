"""Methods that remove units (heads, channels, stem): scored on the dense model, or block by block on the cut one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .allocate import global_budget, standardised, to_counts
from .anatomy import Anatomy
from .axes import kind_of, layer_of
from .compensate import measured_gains, output_bias, reader_moments, refit_readers_, set_biases_
from .criteria import UNIT_CRITERIA, Scores
from .cut import zero_
from .eliminate import stay_after_swaps, stay_one_by_one
from .errors import UserError
from .evaluation import mean_loss
from .findings import Findings, wanted
from .job import Job, Outcome, finish_, trial
from .keep import Keep
from .planning import FEW_WINDOWS, LOSS_WINDOWS, Plan, biased_anatomy
from .search import Gene, evolve
from .sizes import adaptive, alike_counts
from .statistics import BlockCosine, Statistics, collect, layer_moments
from .taylor import unit_taylor


def run_(job: Job) -> Outcome:
    """Carry out a plan: gather scores, allocate, then cut and repair, all at once or block by block.

    Of a sequential plan whose sizes are known nothing is gathered on the dense model.
    """
    plan = job.plan
    if plan.method.criterion in _CHOICES:
        return finish_(job, *block_by_block_(job, partial(_chosen, job), _GRAM))
    findings: Findings | None = None
    measured: Mapping[str, Any] = {}
    counts: Mapping[str, int] = plan.counts
    if not (plan.sequential and counts):
        findings = job.gathered(lambda: _gathered(job))
        with job.timed("allocate"):
            keep, measured = _allocate(job, findings)
        counts = {name: len(units) for name, units in keep.units.items()}
    scores = findings.scores if findings else None
    gains, extra = None, dict[str, Tensor]()
    if plan.sequential:
        keep, extra, scores = _rescored_(job, counts)
    elif plan.compensator == "least-squares":
        gains, stem = _gains(job, keep), Keep({name: units for name, units in keep.units.items() if name == "hidden"})
        keep, extra = block_by_block_(job, lambda layer, _: _all([_of_layer(keep, layer), stem]), {})
    else:
        with job.timed("compensate"):
            extra = _bias(job, findings, keep)
            gains = _gains(job, keep) if plan.compensator == "gain" else None
    outcome = finish_(job, keep, extra, gains)
    outcome.scores, outcome.findings, outcome.measured = scores, findings, measured
    return outcome


def _gains(job: Job, keep: Keep) -> dict[str, float] | None:
    """Factors for the norms over a cut stem; None where it is whole."""
    return measured_gains(job.sweep(), keep, job.model.config.rms_norm_eps) if "hidden" in keep.units else None


def _bias(job: Job, findings: Findings | None, keep: Keep) -> dict[str, Tensor]:
    if job.plan.compensator != "bias" or findings is None:
        return {}
    return output_bias(job.plan.anatomy, job.tensors, findings.statistics, keep)


# -- how scores are gathered ----------------------------------------------------------------------------------------------


def _gathered(job: Job) -> Findings:
    """What the passes over the dense model give."""
    what, criterion = wanted(job.plan) or "", job.plan.method.criterion
    if criterion in _BY_GRADIENT:
        with job.timed("score"):
            return Findings(what, _BY_GRADIENT[criterion](job))
    row, statistics = UNIT_CRITERIA[job.plan.criterion], Statistics()
    if row.wants:
        with job.timed("score"):
            statistics = collect(job.sweep(), row.wants, lambda done, total: job.progress("score", done, total))
    with job.timed("allocate"):
        return Findings(what, row.score(job.plan.anatomy, job.tensors, statistics), statistics)


def _gradients_and_cosines(job: Job) -> Scores:
    """Adapt-Pruner: Taylor scores of units, and for ``layers`` how far each block turns the stream, on the same way."""
    cosines = [BlockCosine() for _ in job.plan.anatomy.shape.layers]
    scores = unit_taylor(job, lambda layer, before, after: cosines[layer](before, after))
    for cosine in cosines:
        cosine.settle(job.world)
    turned = torch.tensor([1.0 - cosine.mean for cosine in cosines], dtype=torch.float64)
    return Scores({**scores.values, "layers": turned})


_BY_GRADIENT: Mapping[str, Callable[[Job], Scores]] = {"taylor-units": unit_taylor, "cosine-taylor": _gradients_and_cosines}


def _of_layer(keep: Keep, layer: int) -> Keep:
    return Keep({name: units for name, units in keep.units.items() if layer_of(name) == layer})


# -- where the cut falls --------------------------------------------------------------------------------------------------


def _allocate(job: Job, findings: Findings) -> tuple[Keep, Mapping[str, Any]]:
    """The decision, and what is saved beside the model of how it came about."""
    plan, scores = job.plan, findings.scores
    assert scores is not None
    if plan.candidates:
        return _best_candidate(job, findings, scores)
    if plan.allocator == "search":
        return _searched(job, findings, scores)
    return decided(plan, scores)


def decided(plan: Plan, scores: Scores) -> tuple[Keep, Mapping[str, Any]]:
    """As `_allocate`, by allocators that need no loss, and so no model."""
    if plan.counts:
        return to_counts(scores, plan.counts), {}
    if plan.allocator == "adaptive":
        return _adaptive(plan, scores)
    keep = _global(plan, scores, by_cost=plan.allocator == "global")
    return (_uniform(plan, biased_anatomy(plan), scores, keep) if plan.request.uniform else keep), {}


def _global(plan: Plan, scores: Scores, *, by_cost: bool) -> Keep:
    """All units ranked together: by their score for what they cost if the plan names a cost, or as FLAP standardises them."""
    prices, budget = plan.prices, plan.budget
    assert prices is not None and budget is not None
    values = {name: value for name, value in scores.values.items() if name in prices.of}
    costs = {name: prices.unit(name) for name in values}
    if not by_cost:
        ranked = standardised(Scores(values, scores.spread))
    elif plan.request.cost is None:
        ranked = {name: value.double() for name, value in values.items()}
    else:  # what costs nothing never goes
        ranked = {
            n: v.double() / c if (c := costs[n]) else torch.full_like(v, torch.inf).double() for n, v in values.items()
        }
    return global_budget(ranked, prices.of, budget - prices.fixed(values), multiple_of={"intermediate": plan.multiple_of})


# -- by the loss ----------------------------------------------------------------------------------------------------------


def _loss_of(job: Job, findings: Findings) -> Callable[[Keep, int], float]:
    """`loss(keep, windows)`: nats a token, on the first calibration windows, of the model that `keep` would leave."""

    def loss(keep: Keep, windows: int) -> float:
        assert job.windows is not None
        return mean_loss(trial(job, keep, _bias(job, findings, keep)), job.windows.ids_NT[:windows], job.world)

    return loss


def _most_windows(job: Job) -> int:
    assert job.windows is not None
    return min(LOSS_WINDOWS, job.windows.num_windows)


_SECONDS = 1800.0  # after which a search stops


def _best_candidate(job: Job, findings: Findings, scores: Scores) -> tuple[Keep, Mapping[str, Any]]:
    """The candidate shape with the least loss, each with its best units."""
    plan, loss = job.plan, _loss_of(job, findings)
    keeps = [to_counts(scores, counts) for counts in plan.candidates]
    losses = []
    for done, keep in enumerate(keeps):
        job.progress("try", done, len(keeps))
        losses.append(loss(keep, _most_windows(job)))
    job.progress("try", len(keeps), len(keeps))
    best = min(range(len(keeps)), key=lambda i: losses[i] if math.isfinite(losses[i]) else math.inf)
    rows = [
        {**plan.candidate_sizes(counts), "loss": value if math.isfinite(value) else None}
        for counts, value in zip(plan.candidates, losses, strict=True)
    ]
    return keeps[best], {"candidates": {"tried": rows, "windows": _most_windows(job)}}


def _searched(job: Job, findings: Findings, scores: Scores) -> tuple[Keep, Mapping[str, Any]]:
    """Evolution of per-layer sizes, from the better of the two global rankings; the best units of every axis stay."""
    plan, loss = job.plan, _loss_of(job, findings)
    prices, budget = plan.prices, plan.budget
    assert prices is not None and budget is not None
    names = [name for name in scores.values if name in prices.of]
    left = budget - prices.fixed(names)
    genes = {name: _gene(plan, name) for name in names}
    generations, offspring = int(plan.options["generations"]), int(plan.options["offspring"])

    def sized(keep: Keep) -> dict[str, int]:
        return {name: len(keep.units.get(name, scores.values[name])) for name in names}

    def fits(sizes: Mapping[str, int]) -> bool:
        return sum(prices.of[name][size] for name, size in sizes.items()) <= left

    def loss_at(sizes: Mapping[str, int], whole: bool) -> float:
        return loss(to_counts(scores, sizes), _most_windows(job) if whole else min(FEW_WINDOWS, _most_windows(job)))

    started = time.perf_counter()

    def go_on(generation: int) -> bool:
        job.progress("search", generation, generations)
        if job.world.agree(time.perf_counter() - started < _SECONDS):
            return True
        job.notes.append(
            f"the search stopped at {_SECONDS / 60:.0f} minutes, after {generation} of {generations} generations"
        )
        return False

    starts = [sized(_global(plan, scores, by_cost=by_cost)) for by_cost in (False, True)]
    start = min(starts, key=lambda sizes: loss_at(sizes, True))
    found = evolve(start, genes, loss_at, generations=generations, offspring=offspring, seed=_SEED, go_on=go_on, fits=fits)
    job.progress("search", generations, generations)
    history = [value if math.isfinite(value) else None for value in found.history]
    return to_counts(scores, found.sizes), {"search": {"loss": history, "windows": _most_windows(job), "seed": _SEED}}


_SEED = 0  # of the search's draws


def _gene(plan: Plan, name: str) -> Gene:
    """What an axis may have. Axes whose units cost alike exchange them."""
    size, kind = plan.anatomy.axes[name].size, kind_of(name)
    chunk = plan.multiple_of if kind == "intermediate" else 1
    step = chunk * max(1, round(size / chunk / _STEPS))
    assert plan.prices is not None
    return Gene(min(chunk, size), size, step, (kind, tuple(plan.prices.of[name][1:2]), plan.prices.unit(name)))


_STEPS = 48  # of an axis, that a search tells apart


def _adaptive(plan: Plan, scores: Scores) -> tuple[Keep, Mapping[str, Any]]:
    """A share of its own for every layer, less where the layer does more, and in each layer the best units."""
    anatomy, ratio = plan.anatomy, plan.request.ratio
    assert plan.budget is not None and ratio is not None
    importance = scores.values["layers"]
    if not bool(torch.isfinite(importance).all()):
        raise UserError("scores: some layers' cosines are no numbers; try another --dtype or other calibration text")
    amplitude = float(plan.options["amplitude"]) * ratio
    ratios, counts = adaptive(anatomy, importance, plan.budget, amplitude, plan.multiple_of)
    keep = to_counts(scores, counts)
    return keep, {"scores": {"block-influence": importance.tolist(), "share": ratios}}


def _uniform(plan: Plan, biased: Anatomy, scores: Scores, keep: Keep) -> Keep:
    """The same sizes in every layer: KV groups at their mean, channels to fit the budget, best units first in each."""
    layers = range(plan.anatomy.shape.num_hidden_layers)
    assert plan.budget is not None
    names = [f"layers.{i}.kv_heads" for i in layers]
    mean = sum(len(keep.units.get(name, range(len(scores.values[name])))) for name in names) / len(names)
    return to_counts(scores, alike_counts(biased, plan.budget, mean, plan.multiple_of))


# -- block by block -------------------------------------------------------------------------------------------------------


def _rescored_(job: Job, counts: Mapping[str, int]) -> tuple[Keep, dict[str, Tensor], Scores]:
    """Cut each block to `counts` by scores taken behind the cut blocks before it."""
    plan, criterion = job.plan, UNIT_CRITERIA[job.plan.criterion]
    assert criterion.score_layer is not None
    values: dict[str, Tensor] = {}

    def decide(layer: int, statistics: Statistics) -> Keep:
        assert criterion.score_layer is not None
        scores = criterion.score_layer(plan.anatomy, job.tensors, statistics, layer)
        values.update(scores.values)
        return to_counts(scores, {name: counts[name] for name in scores.values if name in counts})

    keep, extra = block_by_block_(job, decide, criterion.wants)
    return keep, extra, Scores(values)


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


_GRAM: Mapping[str, frozenset[str]] = dict.fromkeys(("q", "intermediate"), frozenset({"gram"}))


@torch.no_grad()
def block_by_block_(
    job: Job, decide: Callable[[int, Statistics], Keep], wants: Mapping[str, frozenset[str]]
) -> tuple[Keep, dict[str, Tensor]]:
    """Changes the job's weights and model: every block's dropped units become zero, and what reads them is repaired.

    `decide` gives the units of one layer from the statistics of its inputs, which come through the cut blocks before it if
    the plan is sequential or repairs by least squares; where the stem is cut, through the whole ones, whose stream is the
    one that the norms' gains restore. Returns the decision and the biases that repair it.
    """
    plan, anatomy, tensors = job.plan, job.plan.anatomy, job.tensors
    refits = plan.compensator == "least-squares"
    more = _GRAM if refits else {}
    stem = "hidden" in plan.method.axes
    if refits and stem:
        more = {"intermediate": _GRAM["intermediate"], "hidden": _GRAM["intermediate"]}
    all_wants = {segment: wants.get(segment, frozenset()) | more.get(segment, frozenset()) for segment in {**wants, **more}}
    behind = plan.sequential or (refits and plan.request.order is None and not stem)
    sweep = job.sweep()
    count = len(sweep.blocks)
    kept: list[Keep] = []
    extra: dict[str, Tensor] = {}
    for layer in range(count):
        with job.timed("score"):
            statistics, modules = layer_moments(sweep, layer, all_wants)
            sweep.gather(layer, modules, onwards=not behind)
        with job.timed("cut"):
            keep = decide(layer, statistics)
            if refits:
                refit_readers_(anatomy, tensors, statistics, keep, layer)
            if plan.compensator == "bias":
                biases = output_bias(anatomy, tensors, statistics, keep, layer)
                set_biases_(job.model, biases)
                extra |= biases
            zero_(tensors, anatomy, _of_layer(keep, layer))
            kept.append(keep)
        if behind and layer + 1 < count:
            with job.timed("score"):
                sweep.run(layer)
        job.progress("score", layer + 1, count)
    return _all(kept), extra
