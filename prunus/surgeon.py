"""Our own method: cut what the rest can make up for, where that costs the loss least, and let the rest make up for it.

1. One pass forward and back gives F = E[g g^T] at what every o_proj and down_proj puts out: g is the gradient there of the loss
   of a token that the model itself draws, so an output error e costs about e^T F e / 2 nats (the Fisher information: how far
   the cut model's words come to lie from the dense one's). The text's own next tokens would weigh by where the model errs.
2. One dense sweep gives for every sub-layer the error, in nats, of all sizes that it could have: units go the cheapest first,
   and after each the weights that read the rest are solved again (optimal brain surgery on Gram matrices, `eliminate.py`).
3. A dynamic programme takes the sizes with the least sum of errors that meet the target (`allocate.least_error`); an error
   of attention counts three times (see `_FROM_AFAR`).
4. Sub-layer by sub-layer, on what the cut sub-layers before give: units go as in step 2, to the size of step 3, and the
   matrix that reads the rest is refitted by affine least squares (which no metric changes).

Shapes: B windows in a batch, T tokens, D hidden size, C channels of a matrix's input.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .allocate import Curve, least_error
from .axes import Axis, kind_of
from .compensate import INPUT_OF, reader_moments
from .cut import zero_
from .eliminate import eliminate
from .findings import Findings, wanted
from .job import Job, Outcome, finish_
from .keep import Keep
from .planning import Plan, biased_anatomy
from .sizes import Sizes, named
from .solve import refit
from .statistics import Moments, layer_moments
from .taylor import drawn, walk_back

_LEVELS = 48  # sizes of an axis that the programme tells apart
# What a KV group's error counts more than a channel's. Attention brings things from far back, of which calibration windows
# show less than longer texts ask for (LOG.md has what it gains and costs).
_FROM_AFAR = 3.0


def _gathered(job: Job) -> Findings:
    found = Findings(wanted(job.plan) or "", fisher=output_fisher(job))
    found.curves = error_curves(job, _metric(found))
    return found


def _metric(found: Findings) -> dict[str, Tensor]:
    return {name: _root(fisher_DD) for name, fisher_DD in found.fisher.items()}


@torch.no_grad()
def run_(job: Job) -> Outcome:
    """Carry out a plan: curves, sizes, then cut and refit sub-layer by sub-layer."""
    with job.timed("score"):
        findings = job.gathered(lambda: _gathered(job))
        metric, curves = _metric(findings), findings.curves
    with job.timed("allocate"):
        sizes = decided(job.plan, curves)
    keep, extra = cut_and_refit_(job, sizes, metric)
    outcome = finish_(job, keep, extra)
    outcome.findings = findings
    thinned = {name: _levels(curve.sizes[-1], 1) for name, curve in curves.items()}
    outcome.measured = {
        "curves": {
            n: {"sizes": sizes, "nats": [curves[n].error[size - 1] for size in sizes]} for n, sizes in thinned.items()
        }
    }
    return outcome


def decided(plan: Plan, curves: Mapping[str, Curve]) -> dict[str, int]:
    """Sizes of every axis that the plan may cut; needs no model."""
    levels = {name: _at_levels(plan, name, curve) for name, curve in curves.items()}
    return _alike(plan, levels) if plan.request.uniform else _each(plan, levels)


def words(job: Job) -> Tensor | None:
    """Windows of the vocabulary's tokens in a fixed random order, int64 [M, T]: `--option words` as many as there are of text.

    Text for calibration is short and of one kind. Units that fire for words that it lacks would look free, and what is refitted
    would know nothing of them (LOG.md). What an error costs, and the sizes, go by text alone: these words have no neighbours.
    """
    assert job.windows is not None
    count, length = round(float(job.plan.options["words"]) * job.windows.num_windows), job.windows.seq_len
    if not count:
        return None
    generator, size = torch.Generator().manual_seed(0), job.plan.anatomy.shape.vocab_size
    rounds = -(-count * length // size)  # once through the vocabulary after another
    order = torch.cat([torch.randperm(size, generator=generator) for _ in range(rounds)])
    return order[: count * length].view(count, length)


# -- 1: what an error costs -----------------------------------------------------------------------------------------------


def output_fisher(job: Job) -> dict[str, Tensor]:
    """Matrix name -> E[g g^T] [D, D] over tokens, float64; g is the gradient of a drawn token's loss at the matrix's output."""
    windows = job.windows
    assert windows is not None
    tokens = windows.num_windows * (windows.seq_len - 1)
    out: dict[str, Tensor] = {}

    def take(name: str, gradient_BTD: Tensor, share: float) -> None:
        g_ND = gradient_BTD.flatten(0, 1)
        losses = share * tokens  # the gradient is of the batch's mean loss
        value = (g_ND.T @ g_ND).double() * (losses * losses / tokens)
        out[name] = out[name] + value if name in out else value

    walk_back(job, take, labels=drawn)
    return {name: job.world.sum_(value) for name, value in out.items()}


# -- 2: what each size costs ----------------------------------------------------------------------------------------------


def error_curves(job: Job, metric: Mapping[str, Tensor]) -> dict[str, Curve]:
    """Axis name -> nats a token that each size from 1 to the whole costs, by itself, once what reads it is refitted.

    `metric`: matrix name -> R [D, D] with R^T R = F.
    """
    anatomy, sweep = job.plan.anatomy, job.sweep()
    count = len(sweep.blocks)
    curves: dict[str, Curve] = {}
    for layer in range(count):
        statistics, modules = layer_moments(sweep, layer, _WANTS)
        sweep.gather(layer, modules, onwards=True)
        for axis in _axes(job.plan, layer):
            reader = anatomy.reader(axis.name)
            moments = reader_moments(statistics, axis)
            weight = metric[reader.param] @ job.tensors[reader.param].double()
            found = eliminate(weight, _gram(job.plan, moments), reader.rows(range(axis.size)), 1, damp=_unseen(job.plan))
            added = torch.cat([torch.zeros(1, dtype=torch.float64), found.added.cumsum(0)]) / (2 * moments.count)
            curves[axis.name] = Curve(tuple(range(1, axis.size + 1)), tuple(added.flip(0).tolist()))
        job.progress("score", layer + 1, count)
    return curves


_WANTS = dict.fromkeys(("q", "intermediate"), frozenset({"mean", "gram"}))


def _axes(plan: Plan, layer: int) -> list[Axis]:
    """The axes of one layer that may be cut, attention before the MLP."""
    return [axis for axis in plan.scored_axes if axis.layer == layer]


def _gram(plan: Plan, moments: Moments) -> Tensor:
    """What least squares minimises under [C, C]: a bias takes up the mean, so with one only what is around it counts."""
    return moments.covariance_CC if plan.compensator == "affine" else moments.gram_CC


def _unseen(plan: Plan) -> float:
    """What an input's variance is taken to be more than it was seen to be where units are priced, in shares of the mean variance.

    Channels of the last blocks fire for a few words each; those whose words the calibration windows lack would look free
    (LOG.md). Refits go by what was seen.
    """
    return float(plan.options["unseen"])


def _root(fisher_DD: Tensor) -> Tensor:
    """R with R^T R = F: in R y the squared error is the loss."""
    values, vectors = torch.linalg.eigh(fisher_DD)
    return (vectors * values.clamp_min(0).sqrt()).T


def _levels(size: int, multiple_of: int) -> list[int]:
    """Sizes from one chunk to the whole, `_LEVELS` at most, in chunks of `multiple_of`."""
    chunks = -(-size // multiple_of)
    step = multiple_of * -(-chunks // _LEVELS)
    return sorted({min(n, size) for n in range(step, size + step, step)} | {min(multiple_of, size)})


def _at_levels(plan: Plan, name: str, curve: Curve) -> Curve:
    """A curve at the sizes that the plan tells apart, with its errors as the programme sees them."""
    channels = kind_of(name) == "intermediate"
    levels = _levels(curve.sizes[-1], plan.multiple_of if channels else 1)
    weight = 1.0 if channels else _FROM_AFAR
    return Curve(tuple(levels), tuple(weight * curve.error[level - 1] for level in levels))


# -- 3: sizes -------------------------------------------------------------------------------------------------------------


def _each(plan: Plan, curves: Mapping[str, Curve]) -> dict[str, int]:
    """Sizes of every axis; what the programme's levels leave of the budget buys chunks where they help most."""
    prices, budget = plan.prices, plan.budget
    assert prices is not None and budget is not None
    room = budget - prices.fixed(curves)
    sizes = least_error(curves, prices.of, room)
    left = room - sum(prices.of[name][sizes[name]] for name in curves)
    while True:
        gains = {name: gain for name in curves if (gain := _next_gain(plan, curves[name], name, sizes[name], left)) > 0}
        if not gains:
            return sizes
        name = max(gains, key=lambda n: gains[n])
        before = sizes[name]
        sizes[name] += _next(plan, curves[name], name, before)
        left -= prices.of[name][sizes[name]] - prices.of[name][before]


def _next(plan: Plan, curve: Curve, name: str, size: int) -> int:
    """Units of the next chunk of an axis; 0 if there is none."""
    return min(plan.multiple_of if kind_of(name) == "intermediate" else 1, curve.sizes[-1] - size)


def _next_gain(plan: Plan, curve: Curve, name: str, size: int, left: int) -> float:
    """Error saved per cost of the next chunk of an axis; 0 if there is none or it costs more than `left`."""
    assert plan.prices is not None
    more, prices = _next(plan, curve, name, size), plan.prices.of[name]
    cost = prices[size + more] - prices[size]
    if not more or cost > left:
        return 0.0
    return max(_at(curve, size) - _at(curve, size + more), 1e-30) / max(cost, 1e-9)


def _at(curve: Curve, size: int) -> float:
    """The curve at a size between its levels, by straight lines."""
    i = next(i for i, level in enumerate(curve.sizes) if level >= size)
    if curve.sizes[i] == size or i == 0:
        return curve.error[i]
    share = (size - curve.sizes[i - 1]) / (curve.sizes[i] - curve.sizes[i - 1])
    return curve.error[i - 1] + share * (curve.error[i] - curve.error[i - 1])


def _alike(plan: Plan, curves: Mapping[str, Curve]) -> dict[str, int]:
    """The same sizes in every layer: of all pairs that fill the budget the one with the least sum of errors."""
    biased, layers = biased_anatomy(plan), range(plan.anatomy.shape.num_hidden_layers)
    assert plan.budget is not None
    sizes = Sizes.of(biased, layers, plan.multiple_of)
    best: tuple[bool, float, dict[str, int]] | None = None
    for groups in sizes.groups:
        channels = sizes.beside(groups, plan.budget)
        if channels is None:
            continue
        counts = {name: n for i in layers for name, n in named(plan.anatomy, i, groups, channels).items()}
        error = sum(_at(curve, counts[name]) for name, curve in curves.items())
        found = (not sizes.fills(groups, plan.budget), error, counts)
        if best is None or found[:2] < best[:2]:
            best = found
    assert best is not None, "the plan has refused what cannot be reached"
    return best[2]


# -- 4: the cut -----------------------------------------------------------------------------------------------------------


def cut_and_refit_(job: Job, sizes: Mapping[str, int], metric: Mapping[str, Tensor]) -> tuple[Keep, dict[str, Tensor]]:
    """Changes the job's weights and model: dropped units become zero, readers are refitted. Returns the decision and biases.

    The MLP's units are scored behind the block's own cut attention, and every block behind the cut blocks before it.
    """
    plan, sweep = job.plan, job.sweep(words(job))
    anatomy, count = plan.anatomy, len(sweep.blocks)
    kept: dict[str, tuple[int, ...]] = {}
    extra: dict[str, Tensor] = {}
    for layer in range(count):
        for axis in _axes(plan, layer):
            with job.timed("score"):
                _, segment = INPUT_OF[kind_of(axis.name)]
                statistics, modules = layer_moments(sweep, layer, {segment: _WANTS[segment]})
                sweep.observe(layer, modules)
            with job.timed("cut"):
                root = metric[anatomy.reader(axis.name).param]
                kept[axis.name] = _cut_(job, axis, sizes[axis.name], reader_moments(statistics, axis), root, extra)
        if layer + 1 < count:
            with job.timed("score"):
                sweep.run(layer)
        job.progress("cut", layer + 1, count)
    return Keep({name: units for name, units in kept.items() if len(units) < anatomy.axes[name].size}), extra


def _cut_(job: Job, axis: Axis, size: int, moments: Moments, metric: Tensor, extra: dict[str, Tensor]) -> tuple[int, ...]:
    """Choose the units of one axis, zero the others, and refit what reads them; adds the bias to `extra`."""
    anatomy, tensors = job.plan.anatomy, job.tensors
    reader = anatomy.reader(axis.name)
    weight, gram = tensors[reader.param], _gram(job.plan, moments)
    gone = eliminate(metric @ weight.double(), gram, reader.rows(range(axis.size)), size, damp=_unseen(job.plan)).order
    stays = torch.ones(axis.size, dtype=torch.bool)
    stays[gone] = False
    units = tuple(stays.nonzero().squeeze(1).tolist())
    before = weight.double() @ moments.mean_C
    if len(gone):
        rows = reader.rows(units).reshape(-1)
        refitted = refit(weight, gram, rows)
        zero_(tensors, anatomy, Keep({axis.name: units}))
        weight[:, rows] = refitted.to(weight.dtype)
    if job.plan.compensator == "affine":
        _add_bias_(job, reader.param, before - weight.double() @ moments.mean_C, extra)
    return units


def _add_bias_(job: Job, param: str, shift: Tensor, extra: dict[str, Tensor]) -> None:
    """Changes the live module: what it puts out moves by `shift`."""
    name = param.removesuffix("weight") + "bias"
    module = job.model.get_submodule(param.removesuffix(".weight"))
    assert isinstance(module, torch.nn.Linear)
    if module.bias is not None:
        shift = shift + module.bias.double()
    extra[name] = shift.float()
    module.bias = torch.nn.Parameter(shift.to(module.weight.dtype), requires_grad=False)
