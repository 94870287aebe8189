"""Our own method: cut what the rest can make up for, where that costs the loss least, and let the rest make up for it.

1. Every size that an axis could have is priced in nats (`curves.py`).
2. A dynamic programme takes the sizes with the least sum of errors that meet the target (`allocate.least_error`); an error
   of attention counts three times (see `_FROM_AFAR`).
3. Sub-layer by sub-layer, on what the cut sub-layers before give: the units that cost least go, to the size of step 2, and the
   matrix that reads the rest is refitted by affine least squares (which no metric changes).

Shapes: C channels of a matrix's input, D of its output.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .allocate import Curve, least_error
from .axes import Axis, kind_of
from .compensate import INPUT_OF, reader_moments
from .curves import WANTS, around, axes, centre, error_curves, output_gradients, root_of, unseen
from .cut import zero_
from .eliminate import eliminate
from .findings import Findings, wanted
from .job import Job, Outcome, finish_
from .keep import Keep
from .planning import Plan, biased_anatomy
from .sizes import Sizes, named
from .solve import refit
from .statistics import Moments, layer_moments

_LEVELS = 48  # sizes of an axis that the programme tells apart
# What a KV group's error counts more than a channel's. Attention brings things from far back, of which calibration windows
# show less than longer texts ask for (LOG.md has what it gains and costs).
_FROM_AFAR = 3.0


def _gathered(job: Job) -> Findings:
    gradients = output_gradients(job)
    return Findings(wanted(job.plan) or "", fisher=gradients.fisher, curves=error_curves(job, gradients))


def _metric(found: Findings) -> dict[str, Tensor]:
    return {name: root_of(fisher_DD) for name, fisher_DD in found.fisher.items()}


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


# -- 2: sizes -------------------------------------------------------------------------------------------------------------


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


# -- 3: the cut -----------------------------------------------------------------------------------------------------------


def cut_and_refit_(job: Job, sizes: Mapping[str, int], metric: Mapping[str, Tensor]) -> tuple[Keep, dict[str, Tensor]]:
    """Changes the job's weights and model: dropped units become zero, readers are refitted. Returns the decision and biases.

    The MLP's units are scored behind the block's own cut attention, and every block behind the cut blocks before it.
    """
    plan, sweep = job.plan, job.sweep(words(job))
    anatomy, count = plan.anatomy, len(sweep.blocks)
    kept: dict[str, tuple[int, ...]] = {}
    extra: dict[str, Tensor] = {}
    for layer in range(count):
        for axis in axes(plan, layer):
            with job.timed("score"):
                _, segment = INPUT_OF[kind_of(axis.name)]
                statistics, modules = layer_moments(sweep, layer, {segment: WANTS})
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
    weight, gram = tensors[reader.param], around([moments], centre(job.plan, [moments]))
    gone = eliminate(metric @ weight.double(), gram, reader.rows(range(axis.size)), size, damp=unseen(job.plan, gram)).order
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
