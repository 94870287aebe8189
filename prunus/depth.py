"""Methods that remove whole layers or sub-layers: scored by what the model loses without them, or by what they do to it.

Shapes: B windows in a batch, T tokens, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .allocate import contiguous
from .anatomy import Anatomy
from .axes import kind_of, layer_of
from .criteria import Scores
from .errors import UserError
from .evaluation import token_nll
from .findings import Findings, wanted
from .hf import SUBLAYERS
from .job import Job, Outcome, finish_
from .keep import Keep
from .modeling_pruned import NoMLP, Skipped
from .planning import sublayer_costs, sublayer_rounds
from .statistics import BlockCosine, Sweep, logits_from
from .taylor import layer_taylor

T = TypeVar("T")


def run_(job: Job) -> Outcome:
    """Carry out a plan that removes layers or sub-layers."""
    return _RUNS[job.plan.allocator](job)


# -- what goes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """What one candidate takes away: the named sub-layers of `count` layers from `first` on; both make a whole layer."""

    first: int
    count: int = 1
    sublayers: tuple[str, ...] = SUBLAYERS


def lacking(anatomy: Anatomy, parts: Iterable[Part]) -> list[frozenset[str]]:
    """For every layer the sub-layers it lacks once `parts` are gone. A layer that lacks both passes its input on."""
    out = [frozenset(layer.skipped) for layer in anatomy.shape.layers]
    for part in parts:
        for layer in range(part.first, part.first + part.count):
            out[layer] |= set(part.sublayers)
    return out


def keep_without(anatomy: Anatomy, parts: Iterable[Part]) -> Keep:
    """The decision that removes `parts`. A layer that loses all it has goes whole: it would pass its input on."""
    parts = list(parts)
    lacks = lacking(anatomy, parts)
    touched = {i for part in parts for i in range(part.first, part.first + part.count)}
    layers = tuple(i for i, gone in enumerate(lacks) if i not in touched or gone != set(SUBLAYERS))
    units: dict[str, tuple[int, ...]] = {} if len(layers) == len(lacks) else {"layers": layers}
    for i in layers:
        for sublayer in sorted(lacks[i] - set(anatomy.shape.layers[i].skipped)):
            units[f"layers.{i}.{sublayer}"] = ()
    return Keep(units)


# -- searches: pure, they see numbers and no model ------------------------------------------------------------------------


def lowest(values: Sequence[float], count: int) -> list[int]:
    """Indices of the `count` lowest values, lowest first. Ties go to the lower index; what is no number is never taken."""
    order = sorted((i for i, value in enumerate(values) if not math.isnan(value)), key=lambda i: values[i])
    if len(order) < count:
        raise UserError(
            f"scores: {count} must go, but only {len(order)} of {len(values)} candidates have a score that is a number; try "
            "another --dtype or other calibration text"
        )
    return order[:count]


@dataclass(frozen=True)
class Round:
    """One step of a greedy search: the candidates, the loss without each of them, and the one that went."""

    candidates: Sequence[Any]
    losses: Sequence[float]
    chosen: int

    @property
    def gone(self) -> Any:
        """The candidate that went."""
        return self.candidates[self.chosen]


def greedy(
    candidates: Callable[[Sequence[T]], Sequence[T]], losses: Callable[[Sequence[T], Sequence[T]], Sequence[float]]
) -> list[Round]:
    """Remove one candidate after another, each time the one that leaves the least loss given those already gone.

    `candidates(gone)` says what may go next, and nothing once enough is gone; `losses(candidates, gone)` what each costs.
    """
    rounds: list[Round] = []
    while ready := candidates(gone := [r.gone for r in rounds]):
        found = losses(ready, gone)
        rounds.append(Round(ready, found, lowest(found, 1)[0]))
    return rounds


# -- losses ---------------------------------------------------------------------------------------------------------------


@dataclass
class _Ticks:
    """Counts tries for the progress bar; `total` is what is expected, and grows if there are more."""

    job: Job
    total: int
    done: int = 0

    def __call__(self) -> None:
        self.done += 1
        self.total = max(self.total, self.done)
        self.job.progress("score", self.done, self.total)


@torch.no_grad()
def losses_without(
    job: Job, parts: Sequence[Part], gone: Sequence[Part] = (), tick: Callable[[], None] | None = None
) -> list[float]:
    """Mean loss (nats a token) of the model that lacks `gone`, without each of `parts`. `parts` are sorted by layer.

    One batch at a time keeps the stream of the model without `gone` in front of the next candidate, so a candidate costs
    only what lies behind it, and memory holds two streams of one batch.
    """
    windows = job.windows
    assert windows is not None
    totals = [0.0] * len(parts)
    stand_ins = _StandIns(job.plan.anatomy)
    now = lacking(job.plan.anatomy, gone)
    tick = tick or _Ticks(job, len(parts) * -(-len(job.ids_NT) // job.batch_size))
    for ids_BT in job.ids_NT.split(job.batch_size):
        sweep = Sweep(job.model, job.plan.anatomy, ids_BT, job.batch_size)
        hidden, at = sweep.hidden[0], 0
        for p, part in enumerate(parts):
            assert part.first >= at, "parts must be sorted by layer"
            for layer in range(at, part.first):
                hidden = stand_ins.forward(sweep, layer, hidden, now[layer])
            at = part.first
            without = lacking(job.plan.anatomy, [*gone, part])
            totals[p] += _loss_behind(sweep, stand_ins, hidden, at, without, ids_BT)
            tick()
    whole = job.world.sum_(torch.tensor(totals, dtype=torch.float64)).tolist()
    return [total / (windows.num_windows * (windows.seq_len - 1)) for total in whole]


def _loss_behind(
    sweep: Sweep, stand_ins: _StandIns, hidden_BTD: Tensor, first: int, lacks: Sequence[frozenset[str]], ids_BT: Tensor
) -> float:
    """Total loss of one batch from the stream before layer `first` on; logits of one window at a time are held."""
    for layer in range(first, len(lacks)):
        hidden_BTD = stand_ins.forward(sweep, layer, hidden_BTD, lacks[layer])
    total = 0.0
    for j, ids_T in enumerate(ids_BT):
        logits = logits_from(sweep.model, sweep.anatomy, hidden_BTD[j : j + 1], ids_T[None])
        total += token_nll(logits[0], ids_T)
    return total


class _StandIns:
    """Runs blocks without some of their sub-layers, as the saved model will: by the modules that will stand in for them."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.modules: dict[tuple[int, str], dict[str, nn.Module]] = {}  # (layer, sub-layer) -> child -> its stand-in
        for name, tensor in anatomy.tensors.items():
            if tensor.layer is None or tensor.sublayer is None:
                continue
            child = name.removeprefix(anatomy.block_name(tensor.layer)).partition(".")[0]
            found = self.modules.setdefault((tensor.layer, tensor.sublayer), {})
            if tensor.is_matrix:
                found[child] = Skipped(tensor.layer) if tensor.sublayer == "attention" else NoMLP()
            else:
                found.setdefault(child, nn.Identity())  # a norm

    def forward(self, sweep: Sweep, layer: int, hidden_BTD: Tensor, lacks: frozenset[str]) -> Tensor:
        """One batch through one block without the sub-layers it lacks."""
        if lacks == set(SUBLAYERS):
            return hidden_BTD
        with self._standing_in(sweep.blocks[layer], layer, lacks):
            return sweep.forward(layer, hidden_BTD)

    @contextmanager
    def _standing_in(self, block: nn.Module, layer: int, lacks: frozenset[str]) -> Iterator[None]:
        originals: dict[str, nn.Module] = {}
        for sublayer in lacks:
            for child, module in self.modules.get((layer, sublayer), {}).items():
                originals[child] = getattr(block, child)
                setattr(block, child, module)
        try:
            yield
        finally:
            for child, module in originals.items():
                setattr(block, child, module)


# -- methods --------------------------------------------------------------------------------------------------------------


def _finished_(
    job: Job,
    parts: Sequence[Part],
    measured: Mapping[str, Any],
    *,
    losses: list[float] | None = None,
    scores: Scores | None = None,
) -> Outcome:
    """Cut `parts` away; `measured` is saved beside the model: the name of a file -> plain data."""
    outcome = finish_(job, keep_without(job.plan.anatomy, parts))
    outcome.losses, outcome.scores, outcome.measured = losses, scores, measured
    return outcome


def _contiguous_(job: Job) -> Outcome:
    """Minitron: every place for one run of layers."""
    run, count = job.plan.run, job.plan.anatomy.shape.num_hidden_layers
    assert run is not None
    with job.timed("score"):
        losses = losses_without(job, [Part(i, run) for i in range(count - run + 1)])
    outcome = finish_(job, contiguous(losses, run, count))
    outcome.losses, outcome.measured = losses, {"losses": {"loss_without_run_at": list(map(plain, losses))}}
    return outcome


def _lowest_(job: Job) -> Outcome:
    """One score a layer, and the lowest go together."""
    plan, free = job.plan, [Part(i) for i in job.plan.free_layers]
    assert plan.run is not None
    score = plan.options.get("score", plan.method.criterion)

    def gather() -> Findings:
        with job.timed("score"):
            values_L = torch.tensor(_LAYER_SCORES[score](job), dtype=torch.float64)
        return Findings(wanted(plan) or "", Scores({"layers": values_L}))

    found = job.gathered(gather)
    assert found.scores is not None
    values = found.scores.values["layers"].tolist()
    of_free = [values[part.first] for part in free]
    gone = [free[i] for i in lowest(of_free, plan.run)]
    if score == "perplexity":
        outcome = _finished_(job, gone, {"losses": {"loss_without_layer": _named(free, of_free)}}, losses=of_free)
    else:
        scores = Scores({"layers": torch.tensor(values, dtype=torch.float32)})
        outcome = _finished_(job, gone, {"scores": {score: list(map(plain, values))}}, scores=scores)
    outcome.findings = found
    return outcome


def _loss_without_each(job: Job) -> list[float]:
    """Of every layer that may go; NaN for the others."""
    out = [math.nan] * job.plan.anatomy.shape.num_hidden_layers
    free = [Part(i) for i in job.plan.free_layers]
    for part, loss in zip(free, losses_without(job, free), strict=True):
        out[part.first] = loss
    return out


def block_influence(job: Job) -> list[float]:
    """ShortGPT eq. 1: 1 - mean over tokens of cos(h_in, h_out), for every layer, in one dense sweep."""
    sweep, out = job.sweep(), []
    for layer in range(len(sweep.blocks)):
        cosine = BlockCosine()
        sweep.run(layer, each=cosine)
        cosine.settle(sweep.world)
        out.append(1.0 - cosine.mean)
        job.progress("score", layer + 1, len(sweep.blocks))
    return out


_LAYER_SCORES: Mapping[str, Callable[[Job], list[float]]] = {
    "perplexity": _loss_without_each,
    "taylor": layer_taylor,
    "block-influence": block_influence,
}


def _greedy_layers_(job: Job) -> Outcome:
    """SLEB: as many rounds as layers must go."""
    run, free = job.plan.run, [Part(i) for i in job.plan.free_layers]
    assert run is not None
    batches = -(-len(job.ids_NT) // job.batch_size)
    ticks = _Ticks(job, batches * sum(len(free) - i for i in range(run)))

    def candidates(gone: Sequence[Part]) -> list[Part]:
        return [part for part in free if part not in gone] if len(gone) < run else []

    with job.timed("score"):
        rounds = greedy(candidates, _known_or(job, lambda ready, gone: losses_without(job, ready, gone, ticks)))
    return _after_(job, rounds)


def _greedy_sublayers_(job: Job) -> Outcome:
    """BlockPruner: rounds until no more block parameters stay than the budget."""
    plan = job.plan
    assert plan.budget is not None
    budget = plan.budget
    free = [Part(int(layer_of(name) or 0), 1, (kind_of(name),)) for name in sublayer_costs(plan)]
    tries = sum(max(0, len(free) - i) for i in range(sublayer_rounds(plan)))
    ticks = _Ticks(job, tries * -(-len(job.ids_NT) // job.batch_size))
    with job.timed("score"):
        rounds = greedy(
            lambda gone: within_budget(plan.anatomy, free, gone, budget),
            _known_or(job, lambda ready, gone: losses_without(job, ready, gone, ticks)),
        )
    if ticks.done < ticks.total:
        job.progress("score", ticks.done, ticks.done)
    return _after_(job, rounds)


_Losses = Callable[[Sequence[Part], Sequence[Part]], Sequence[float]]


def _known_or(job: Job, measure: _Losses) -> _Losses:
    """Losses of a round from an earlier search, as long as that went the same way; else measured."""
    known = list(job.findings.rounds) if job.findings else []

    def losses(ready: Sequence[Part], gone: Sequence[Part]) -> Sequence[float]:
        at = len(gone)
        if at < len(known) and list(known[at]) == [_name(part) for part in ready]:
            return [math.nan if value is None else value for value in known[at].values()]
        del known[at:]
        return measure(ready, gone)

    return losses


def within_budget(anatomy: Anatomy, parts: Sequence[Part], gone: Sequence[Part], budget: int) -> list[Part]:
    """The parts that may go next: none once `budget` is met, and none that overshoots it by the smallest part's size.

    So what stays is at most the budget, and short of it by less than the smallest sub-layer that was left to remove.
    """

    def stays(*more: Part) -> int:
        return keep_without(anatomy, [*gone, *more]).anatomy_after(anatomy).block_params

    now = stays()
    if now <= budget:
        return []
    costs = {part: now - stays(part) for part in parts if part not in gone}
    return [part for part, cost in costs.items() if cost - (now - budget) < min(costs.values())]


def _after_(job: Job, rounds: Sequence[Round]) -> Outcome:
    losses = [r.losses[r.chosen] for r in rounds]
    rows = [
        {"removed": _name(r.gone), "loss": plain(loss), "losses": _named(r.candidates, r.losses)}
        for r, loss in zip(rounds, losses, strict=True)
    ]
    outcome = _finished_(job, [r.gone for r in rounds], {"losses": {"rounds": rows}}, losses=losses)
    known = job.findings.rounds if job.findings else []
    found = [_named(r.candidates, r.losses) for r in rounds]
    longer = known[len(found) :] if known[: len(found)] == found else []
    outcome.findings = Findings(wanted(job.plan) or "", rounds=found + longer)
    return outcome


def _named(parts: Sequence[Part], values: Sequence[float]) -> dict[str, float | None]:
    return {_name(part): plain(value) for part, value in zip(parts, values, strict=True)}


def _name(part: Part) -> str:
    return f"layers.{part.first}" + ("" if part.sublayers == SUBLAYERS else f".{part.sublayers[0]}")


def plain(value: float) -> float | None:
    """A number that JSON can say, or None."""
    return value if math.isfinite(value) else None


_RUNS: Mapping[str, Callable[[Job], Outcome]] = {
    "contiguous": _contiguous_,
    "lowest-layers": _lowest_,
    "greedy-layers": _greedy_layers_,
    "greedy-sublayers": _greedy_sublayers_,
}
