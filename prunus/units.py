"""Methods that remove units (heads, channels, stem) from dense statistics, gathered in one pass."""

from __future__ import annotations

from collections.abc import Mapping

from .allocate import global_budget, standardised, to_counts
from .anatomy import Anatomy
from .compensate import measured_gains, output_bias
from .criteria import UNIT_CRITERIA, Scores
from .errors import UserError
from .job import Job, Outcome, finish_
from .keep import Keep
from .planning import Plan, biased_anatomy
from .statistics import collect


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
    with job.timed("compensate"):
        extra = output_bias(plan.anatomy, job.tensors, statistics, keep) if plan.compensator == "bias" else {}
        gains = None
        if plan.compensator == "gain" and "hidden" in keep.units:
            gains = measured_gains(job.sweep(), keep, job.model.config.rms_norm_eps)
    outcome = finish_(job, keep, extra, gains)
    outcome.scores, outcome.statistics = scores, statistics
    return outcome


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

    def size(kind: str, i: int) -> int:
        name = f"layers.{i}.{kind}"
        return len(keep.units.get(name, range(len(scores.values[name]))))

    mean = sum(size("kv_heads", i) for i in layers) / len(layers)
    channel = sum(biased.unit_params(f"layers.{i}.intermediate") for i in layers)
    most = min(len(scores.values[f"layers.{i}.intermediate"]) for i in layers)
    all_groups = min(len(scores.values[f"layers.{i}.kv_heads"]) for i in layers)
    fits = []
    for groups in sorted(range(1, all_groups + 1), key=lambda g: abs(g - mean)):
        bare = Keep(
            {f"layers.{i}.kv_heads": tuple(range(groups)) for i in layers}
            | {f"layers.{i}.intermediate": (0,) for i in layers}
        )
        rest = bare.anatomy_after(biased).block_params - channel
        room = (plan.budget - rest) // channel // plan.multiple_of * plan.multiple_of
        if room >= plan.multiple_of:
            fits.append((rest + min(room, most) * channel, groups, min(room, most)))
            if room <= most:  # the budget is met within one step; else more groups may fill it
                break
    if not fits:
        raise UserError(f"ratio: {plan.request.ratio} leaves no uniform FFN channel; ask for a smaller ratio")
    _, groups, width = max(fits)
    counts = {f"layers.{i}.kv_heads": groups for i in layers}
    return to_counts(scores, counts | {f"layers.{i}.intermediate": width for i in layers})
