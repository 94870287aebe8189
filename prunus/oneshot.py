"""One-shot pruning: score, allocate, compensate, slice. Composition only; each part is a pure function elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import hf
from .allocate import contiguous, global_budget, kept_in_matrix, kept_in_rows, kept_n_of_m, standardised, to_counts
from .anatomy import Anatomy
from .axes import kind_of
from .compensate import measured_gains, output_bias
from .criteria import UNIT_CRITERIA, WEIGHT_CRITERIA, Scores
from .cut import slice_plan, slice_tensors_, zero_weights_
from .data.windows import Windows
from .errors import UserError
from .evaluation import token_nll
from .hf import Target, target_for
from .keep import Keep, WeightMask
from .planning import Plan, biased_anatomy
from .statistics import Statistics, Sweep, collect, layer_moments, logits_from, reading_points

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[str, int, int], None]  # stage, done, total


def no_progress(stage: str, done: int, total: int) -> None:
    """Says nothing."""


@dataclass
class Outcome:
    """A cut model and how it came about."""

    plan: Plan
    model: PreTrainedModel
    target: Target
    keep: Keep | None = None
    mask: WeightMask | None = None
    scores: Scores | None = None
    statistics: Statistics | None = None
    losses: list[float] | None = None  # loss without layers i.. (minitron-depth), nats a token
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def ratios(self) -> dict[str, float]:
        """What was really removed, of all and of block parameters; for sparse results the share of zeros."""
        before, after = self.plan.anatomy, self.target.anatomy
        out = {
            "removed_of_all": 1 - after.num_params / before.num_params,
            "removed_of_block": 1 - after.block_params / before.block_params,
        }
        return out if self.mask is None else out | {"sparsity": self.mask.sparsity}


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


@torch.no_grad()
def one_shot_(
    plan: Plan,
    model: PreTrainedModel,
    windows: Windows | None,
    *,
    statistics: Statistics | None = None,
    batch_size: int = 4,
    progress: Progress = no_progress,
) -> Outcome:
    """Carry out a plan. Consumes `model`: its tensors are cut or zeroed, so that memory never holds two models.

    `statistics` of an earlier run on the same model and windows spare the pass of methods whose statistics are dense.
    """
    seconds: dict[str, float] = {}
    tensors = hf.weights(model, plan.anatomy)
    if plan.method.is_sparse:
        mask = _weight_mask_(plan, model, tensors, windows, batch_size, progress, seconds)
        return Outcome(plan, model, Target(model.config, plan.anatomy), mask=mask, seconds=seconds)
    assert windows is not None
    if plan.method.criterion == "loss-without":
        with _timed(seconds, "score"):
            losses = losses_without(plan, model, windows, batch_size, progress)
        assert plan.run is not None
        keep = contiguous(losses, plan.run, plan.anatomy.shape.num_hidden_layers)
        outcome = _slice_(plan, model, tensors, keep, seconds)
        outcome.losses = losses
        return outcome
    criterion = UNIT_CRITERIA[_criterion_name(plan)]
    if statistics is None:
        with _timed(seconds, "score"):
            sweep = Sweep(model, plan.anatomy, windows.ids_NT, batch_size)
            statistics = collect(sweep, criterion.wants, lambda done, total: progress("score", done, total))
            del sweep
    with _timed(seconds, "allocate"):
        scores = criterion.score(plan.anatomy, tensors, statistics)
        keep = _allocate(plan, scores)
    with _timed(seconds, "compensate"):
        extra = output_bias(plan.anatomy, tensors, statistics, keep) if plan.compensator == "bias" else {}
        gains = None
        if plan.compensator == "gain" and "hidden" in keep.units:
            sweep = Sweep(model, plan.anatomy, windows.ids_NT, batch_size)
            gains = measured_gains(sweep, keep, model.config.rms_norm_eps)
            del sweep
    outcome = _slice_(plan, model, tensors, keep, seconds, extra, gains)
    outcome.scores, outcome.statistics = scores, statistics
    return outcome


def _criterion_name(plan: Plan) -> str:
    return ":".join([plan.method.criterion, *plan.options.values()])


def wanted_statistics(plan: Plan) -> Mapping[str, frozenset[str]] | None:
    """What a dense method's pass collects; None for methods that must sweep again for every target."""
    criterion = UNIT_CRITERIA.get(_criterion_name(plan))
    return None if criterion is None else criterion.wants


# -- structured ---------------------------------------------------------------------------------------------------------


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

    groups = max(1, round(sum(size("kv_heads", i) for i in layers) / len(layers)))
    channel = sum(biased.unit_params(f"layers.{i}.intermediate") for i in layers)
    most = len(scores.values["layers.0.intermediate"])
    while True:
        counts = {f"layers.{i}.kv_heads": groups for i in layers}
        bare = Keep({n: tuple(range(c)) for n, c in counts.items()} | {f"layers.{i}.intermediate": (0,) for i in layers})
        rest = bare.anatomy_after(biased).block_params - channel
        width = min((plan.budget - rest) // channel // plan.multiple_of * plan.multiple_of, most)
        if width >= plan.multiple_of:
            break
        if groups == 1:
            raise UserError(f"ratio: {plan.request.ratio} leaves no uniform FFN channel; ask for a smaller ratio")
        groups -= 1
    return to_counts(scores, counts | {f"layers.{i}.intermediate": width for i in layers})


def _slice_(
    plan: Plan,
    model: PreTrainedModel,
    tensors: Mapping[str, Tensor],
    keep: Keep,
    seconds: dict[str, float],
    extra: Mapping[str, Tensor] | None = None,
    gains: Mapping[str, float] | None = None,
) -> Outcome:
    with _timed(seconds, "cut"):
        keep = keep.validated(plan.anatomy)
        cuts_stem = "hidden" in keep.units
        target = target_for(model.config, plan.anatomy, keep, fold=not cuts_stem, out_bias=plan.out_bias)
        generation = model.generation_config
        recipe = slice_plan(plan.anatomy, keep, fold=not cuts_stem, gains=gains)
        live = dict(tensors)
        dtype = next(iter(live.values())).dtype
        torch.nn.Module.to(model, device="meta")  # lets go of the weights; `live` now holds the only references
        sliced = slice_tensors_(live, recipe)
        for name, bias in (extra or {}).items():
            new_name = recipe.names.get(name.removesuffix("bias") + "weight", "").removesuffix("weight") + "bias"
            sliced[new_name] = bias.to(dtype)
        sliced |= hf.empty_weights(target, sliced)
        cut = hf.build(target.config, sliced, generation)
    return Outcome(plan, cut, target, keep=keep, seconds=seconds)


@torch.no_grad()
def losses_without(
    plan: Plan, model: PreTrainedModel, windows: Windows, batch_size: int, progress: Progress = no_progress
) -> list[float]:
    """Mean loss (nats a token) without layers i to i + run - 1, for every i.

    One batch at a time keeps the dense prefix of every candidate, so a candidate costs only the layers behind its gap.
    """
    assert plan.run is not None
    anatomy, run = plan.anatomy, plan.run
    count = anatomy.shape.num_hidden_layers
    candidates = count - run + 1
    totals = [0.0] * candidates
    batches = windows.ids_NT.split(batch_size)
    for b, ids_BT in enumerate(batches):
        sweep = Sweep(model, anatomy, ids_BT, batch_size)
        hidden = sweep.hidden[0]
        for i in range(candidates):
            stream = hidden
            for layer in range(i + run, count):
                stream = sweep.forward(layer, stream)
            for j, ids_T in enumerate(ids_BT):
                logits = logits_from(model, anatomy, stream[j : j + 1], ids_T[None])
                totals[i] += token_nll(logits[0], ids_T)
            progress("score", b * candidates + i + 1, len(batches) * candidates)
            if i + 1 < candidates:
                hidden = sweep.forward(i, hidden)
    return [total / (windows.num_windows * (windows.seq_len - 1)) for total in totals]


# -- single weights -----------------------------------------------------------------------------------------------------


def _weight_mask_(
    plan: Plan,
    model: PreTrainedModel,
    tensors: Mapping[str, Tensor],
    windows: Windows | None,
    batch_size: int,
    progress: Progress,
    seconds: dict[str, float],
) -> WeightMask:
    """Zero weights of `model` block by block; a sequential method's block sees the pruned blocks before it."""
    criterion = WEIGHT_CRITERIA[plan.method.criterion]
    anatomy, masks = plan.anatomy, {}
    count = anatomy.shape.num_hidden_layers
    sweep = None
    if criterion.wants:
        assert windows is not None
        sweep = Sweep(model, anatomy, windows.ids_NT, batch_size)
    wants = dict.fromkeys(("hidden", "q", "intermediate"), criterion.wants)
    for layer in range(count):
        points = reading_points(anatomy, layer)
        named: Statistics = {}
        if sweep is not None:
            with _timed(seconds, "score"):
                named, modules = layer_moments(anatomy, layer, wants)
                sweep.observe(layer, modules)
        with _timed(seconds, "cut"):
            for (sublayer, segment), matrices in points.items():
                moments = named.get(f"layers.{layer}.{sublayer}.{segment}")
                for name in matrices:
                    kept = _kept(plan, criterion.score(tensors[name], moments))
                    zero_weights_({name: tensors[name]}, WeightMask({name: kept}))
                    masks[name] = kept
        if sweep is not None and layer + 1 < count:
            with _timed(seconds, "score"):
                sweep.run(layer)
        progress("score", layer + 1, count)
    return WeightMask(masks)


def _kept(plan: Plan, scores: Tensor) -> Tensor:
    if plan.pattern is not None:
        return kept_n_of_m(scores, *plan.pattern)
    assert plan.sparsity is not None
    if plan.method.allocator == "per-row":
        return kept_in_rows(scores, plan.sparsity)
    return kept_in_matrix(scores, plan.sparsity)


def describe_keep(keep: Keep, anatomy: Anatomy) -> dict[str, Any]:
    """Kept units per axis kind and layer, for people."""
    out: dict[str, Any] = {}
    for name in anatomy.axes:
        if name in keep.units:
            out.setdefault(kind_of(name), []).append(len(keep.units[name]))
    return out
