"""Several methods in a row under one budget: ``shortgpt+flap+wanda``.

A combination is a list of ordinary requests. It goes from coarse to fine: whole layers, sub-layers, units, single weights. A
layer is a coarse step, so what one part's steps miss of its share the next part makes up: the ratio of each follows from what
the parts before it really left. Nothing here knows what a method does; each part is planned and carried out as if alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .anatomy import Anatomy
from .asked import checked_share, parse_pattern
from .axes import Axis, kind_of
from .builders import make_plan
from .criteria import Scores
from .errors import UserError, unknown
from .hf import Target, target_for
from .job import Outcome
from .keep import Keep
from .latency import Timing
from .methods import Method, method_named
from .planning import Plan, Request, biased_anatomy, sublayer_costs
from .sizes import Sizes, named

SEPARATOR = "+"
_STEPS = {  # from coarse to fine: what a part cuts, by its axes
    "whole layers": {"layers"},
    "sub-layers": {"attention", "mlp"},
    "heads, channels or the stem": {"kv_heads", "intermediate", "hidden"},
    "single weights": {"weights"},
}


def planned(config: Any, anatomy: Anatomy, request: Request, times: Mapping[str, Timing] | None = None) -> Plan:
    """The plan of one method, or of a combination; UserError names the field, the value and the mend, and the part.

    `times` are entries of a latency table, for a cost in milliseconds.
    """
    if SEPARATOR not in request.method:
        for name, mend in (("sparsity", "give --ratio"), ("split", "drop the option")):
            if getattr(request, name) not in (None, ()):
                raise UserError(f"{name}: {request.method} is one method and no combination; {mend}")
        return make_plan(config, anatomy, request, times)
    for name in ("allocate", "cost", "order"):
        if getattr(request, name) is not None:
            raise UserError(f"{name}: parts of a combination allocate as is their way; drop --{name}")
    methods = _methods(request)
    parts: list[Plan] = []
    at, on_example = Target(config, anatomy), False
    for index in range(len(methods)):
        part = replace(part_plan(request, anatomy, index, at), on_example=on_example)
        parts.append(part)
        if index + 1 < len(methods):
            if part.target is None and _cuts_units(part.method):
                _check_open(part, methods[index + 1], request)
            on_example = on_example or part.target is None
            at = part.target or example(part, at.config)
    last = parts[len(_structured(methods)) - 1]
    repaired = {part.method.name: part.compensator for part in parts if part.compensator != "none"}
    options = {f"{part.method.name}.{name}": value for part in parts for name, value in part.options.items()}
    return Plan(
        request,
        _row(methods),
        anatomy,
        ",".join(f"{name}={value}" for name, value in repaired.items()) or "none",
        options,
        request.multiple_of or 1,
        budget=last.budget,
        sparsity=parts[-1].sparsity,
        pattern=parts[-1].pattern,
        target=None if on_example else parts[-1].target,
        step=last.step,
        notes=tuple(f"{part.method.name}: {note}" for part in parts for note in part.notes) + _example_notes(parts),
        parts=tuple(parts),
    )


def _example_notes(parts: Iterable[Plan]) -> tuple[str, ...]:
    names = [part.method.name for part in parts if part.on_example]
    what = "is planned on an example of such sizes" if len(names) == 1 else "are planned on an example of such sizes"
    return (f"{' and '.join(names)} {what}, and again once the scores have decided them",) if names else ()


# -- which parts ----------------------------------------------------------------------------------------------------------


def _methods(request: Request) -> list[Method]:
    """The rows of all parts; UserError for an order or a pair that cannot be."""
    methods = [method_named(name.strip()) for name in request.method.split(SEPARATOR)]
    names = [method.name for method in methods]
    for method in methods:
        if method.trains:
            raise UserError(f"method: {method.name} trains, so it is no part of a combination; give it alone, with --tokens")
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"method: {name} stands twice in {request.method}; a combination has each part once")
    for first, then in pairwise(methods):
        if _step(then) < _step(first):
            lawful = SEPARATOR.join(method.name for method in sorted(methods, key=_step))
            raise UserError(
                f"method: {then.name} cuts {_words(then)} and {first.name} {_words(first)}, but a combination goes from coarse "
                f"to fine, so that a part can make up for what coarse steps miss; write {lawful}"
            )
        if first.is_sparse and then.is_sparse:
            raise UserError(f"method: {first.name} and {then.name} both zero single weights; keep one of them")
    return methods


def _step(method: Method) -> int:
    return next(i for i, kinds in enumerate(_STEPS.values()) if kinds & set(method.axes))


def _words(method: Method) -> str:
    return list(_STEPS)[_step(method)]


def _cuts_units(method: Method) -> bool:
    return "hidden" in list(_STEPS.values())[_step(method)]


def _structured(methods: Iterable[Method]) -> list[Method]:
    """The parts that share the ratio: all that make the model smaller."""
    return [method for method in methods if not method.is_sparse]


def _check_open(part: Plan, then: Method, request: Request) -> None:
    """UserError where what follows a part whose scores decide the size of every layer must know these sizes."""
    name = part.method.name
    if _cuts_units(then):
        raise UserError(
            f"method: the scores of {name} decide the size of every layer, so {then.name}, which sets sizes too, cannot be "
            f"planned behind it; put {name} last of the two, or drop one"
        )
    if request.pattern is not None:
        _, m = parse_pattern(request.pattern)
        rows = {axis.name: part.anatomy.reader(axis.name).rows_per_unit * _chunk(part, axis) for axis in part.scored_axes}
        if any(inputs % m for inputs in rows.values()):
            raise UserError(
                f"pattern: {request.pattern} needs sizes that are multiples of {m}, but the scores of {name} decide them; add "
                f"--multiple-of {m}"
            )


def _chunk(part: Plan, axis: Axis) -> int:
    """Units of an axis that stay or go together."""
    return part.multiple_of if kind_of(axis.name) == "intermediate" else 1


def _row(methods: Sequence[Method]) -> Method:
    """What a combination is as a whole, in the words of the table."""
    return Method(
        name=SEPARATOR.join(method.name for method in methods),
        summary="; then ".join(method.summary for method in methods),
        axes=_unique(axis for method in methods for axis in method.axes),
        criterion="combination",
        allocators=("combination",),
        citation="; ".join(_unique(method.citation for method in methods)),
        sequential=True,
        sweeps=sum(method.sweeps for method in methods),
        streams=all(method.streams for method in methods),
        uniform=all(method.uniform for method in methods),
        deviations=_unique(f"{method.name}: {text}" for method in methods for text in method.deviations),
    )


def _unique(items: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(items))


# -- what each is asked for -----------------------------------------------------------------------------------------------


def part_requests(request: Request) -> list[Request]:
    """An ordinary request for each part. The ratio of those that make the model smaller is not known yet."""
    methods = _methods(request)
    name, sparse = request.method, methods[-1] if methods[-1].is_sparse else None
    if request.target:
        raise UserError("target: a combination shares out one ratio; give --ratio instead")
    asked = request.sparsity is not None or request.pattern is not None
    if asked and sparse is None:
        field = "pattern" if request.sparsity is None else "sparsity"
        raise UserError(
            f"{field}: {name} has no part that zeroes single weights; drop the option, or add for example +wanda"
        )
    if sparse is not None and not asked:
        raise UserError(f"sparsity: {sparse.name} needs to know how many weights to zero; give --sparsity or --pattern")
    if request.sparsity is not None:
        checked_share("sparsity", request.sparsity)
    uniform = [m.name for m in methods if request.uniform and not m.uniform]
    if request.uniform and not uniform:
        raise UserError(f"uniform: {name} always leaves uniform layers; drop the option")
    chunked = [m.name for m in methods if request.multiple_of is not None and _cuts_units(m)]
    if request.multiple_of is not None and not chunked:
        raise UserError(f"multiple_of: no part of {name} takes it; drop the option")
    options, repairs = _own_options(request, methods), _own_repairs(request, methods)
    return [
        Request(
            m.name,
            request.sparsity if m.is_sparse else None,
            request.pattern if m.is_sparse else None,
            uniform=m.name in uniform,
            multiple_of=request.multiple_of if m.name in chunked else None,
            compensate=repairs.get(m.name),
            options=options.get(m.name, {}),
        )
        for m in methods
    ]


def _own_options(request: Request, methods: Sequence[Method]) -> dict[str, dict[str, str]]:
    """``{"shortened-llama.protect": "1,1"}`` -> part -> its options."""
    out: dict[str, dict[str, str]] = {}
    for key, value in request.options.items():
        part, dot, name = key.partition(".")
        if not dot:
            raise UserError(f"option '{key}': say which part of {request.method} it is for, as in {methods[0].name}.{key}")
        out.setdefault(_part_name(part, request, methods), {})[name] = value
    return out


def _own_repairs(request: Request, methods: Sequence[Method]) -> dict[str, str]:
    """``flap=none,minitron-width=gain`` -> part -> compensator."""
    out = {}
    for item in (request.compensate or "").split(",") if request.compensate is not None else ():
        part, equals, value = item.strip().partition("=")
        if not equals:
            example = f"{methods[-1].name}={item.strip() or 'none'}"
            raise UserError(f"compensate '{item}': say which part of {request.method} it is for, as in {example}")
        out[_part_name(part, request, methods)] = value
    return out


def _part_name(part: str, request: Request, methods: Sequence[Method]) -> str:
    names = [method.name for method in methods]
    if part not in names:
        raise unknown(f"part of {request.method}", part, names)
    return part


# -- who removes how much -------------------------------------------------------------------------------------------------


def goal(request: Request, source: Anatomy, index: int) -> int:
    """Block parameters that may stay once part `index` is done, of one that makes the model smaller."""
    methods = _structured(_methods(request))
    if request.ratio is None:
        raise UserError(f"ratio: {request.method} needs to know how much to cut; give --ratio")
    ratio = checked_share("ratio", request.ratio)
    split = request.split or (1 / len(methods),) * len(methods)
    if len(split) != len(methods):
        names = ", ".join(method.name for method in methods)
        raise UserError(f"split: {len(split)} shares for {len(methods)} parts ({names}); give one for each")
    if not all(share > 0 for share in split) or not math.isclose(math.fsum(split), 1, abs_tol=1e-6):
        raise UserError(
            f"split: {','.join(f'{share:g}' for share in split)} are no shares of a whole; they must add up to 1"
        )
    share = math.fsum(split[: index + 1]) / math.fsum(split)  # exactly 1 for the last
    return math.floor((1 - ratio * share) * source.block_params)


def ratio_to(stays: int, left: int) -> float:
    """The ratio of `left` that lets exactly `stays` parameters stay, as plans round it."""
    ratio = 1 - stays / left
    while math.floor((1 - ratio) * left) < stays:
        ratio = math.nextafter(ratio, 0)
    return ratio


def part_plan(request: Request, source: Anatomy, index: int, at: Target) -> Plan:
    """The plan of part `index` of a combination that began with `source`, on the model `at` which the parts before it left."""
    own, left = part_requests(request)[index], at.anatomy.block_params
    where = f"{own.method}, part {index + 1} of {request.method}"
    if not method_named(own.method).is_sparse:
        stays = goal(request, source, index)
        if stays >= left:
            raise UserError(
                f"split: {1 - stays / source.block_params:.2%} of the block parameters are to go up to {where}, but what stands "
                f"before it takes {1 - left / source.block_params:.2%} already; ask for a larger ratio, or another --split"
            )
        own = replace(own, ratio=ratio_to(stays, left))
    try:
        return make_plan(at.config, at.anatomy, own)
    except UserError as error:
        raise UserError(f"{where}: {str(error).removeprefix(f'{own.method}: ')}") from error


# -- where the scores decide the sizes ------------------------------------------------------------------------------------


def example(plan: Plan, config: Any) -> Target:
    """A model that `plan` may leave, where its scores decide the sizes: about as large, and its layers differ."""
    if plan.run is not None:
        gone = plan.free_layers[: plan.run]
        units = {"layers": tuple(i for i in range(plan.anatomy.shape.num_hidden_layers) if i not in gone)}
    else:
        units = _fewer_units(plan) if _cuts_units(plan.method) else _without_sublayers(plan)
    return target_for(config, plan.anatomy, Keep(units), out_bias=plan.out_bias, stock=not plan.out_bias)


def _without_sublayers(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Attention and MLP of layers in turn, until the budget is met."""
    costs, stays = sublayer_costs(plan), plan.anatomy.block_params
    assert plan.budget is not None
    units: dict[str, tuple[int, ...]] = {}
    for name in sorted(costs, key=lambda name: (plan.anatomy.axes[name].layer or 0) % 2 == (kind_of(name) == "attention")):
        if stays > plan.budget:
            units[name], stays = (), stays - costs[name]
    return units


def _fewer_units(plan: Plan) -> dict[str, tuple[int, ...]]:
    """The budget's share of every layer, and one chunk of channels less in every other one."""
    biased, units = biased_anatomy(plan), dict[str, tuple[int, ...]]()
    assert plan.budget is not None
    share = plan.budget / biased.block_params
    for layer in range(plan.anatomy.shape.num_hidden_layers):
        sizes = Sizes.of(biased, [layer], plan.multiple_of)
        near, room = share * sizes.whole[0], math.floor(share * sizes.params(*sizes.whole))
        groups, channels = sizes.within(room, near) or sizes.fewest
        channels = max(channels - layer % 2 * plan.multiple_of, sizes.fewest[1])
        units |= {name: tuple(range(n)) for name, n in named(plan.anatomy, layer, groups, channels).items()}
    return units


# -- what came out --------------------------------------------------------------------------------------------------------


def joined(plan: Plan, outcomes: Sequence[Outcome]) -> Outcome:
    """One outcome of all parts' outcomes: the decision speaks of the source, the mask of the model that came out."""
    keep, scores, last = Keep(), dict[str, Tensor](), outcomes[-1]
    notes: list[str] = []
    measured: dict[str, Any] = {}
    for index, outcome in enumerate(outcomes):
        name = outcome.plan.method.name
        if outcome.scores is not None:
            scores |= _of_source(outcome.scores, keep, plan.anatomy)
        if outcome.keep is not None:
            keep = keep.then(outcome.keep, plan.anatomy)
        said = (outcome.plan.notes if outcome.mask is not None else outcome.target.notes, outcome.notes)
        notes += [f"{name}: {note}" for notes_ in said for note in notes_]
        measured |= {(f"{name}-{file}" if index else file): data for file, data in outcome.measured.items()}
    parts = tuple(outcome.plan for outcome in outcomes)
    return Outcome(
        replace(plan, parts=parts, target=last.target),
        last.model,
        replace(last.target, notes=tuple(notes)),
        keep=keep,
        mask=last.mask,
        scores=Scores(scores) if scores else None,
        findings=outcomes[0].findings,  # later ones are of no model that is in any file
        measured=measured,
        seconds={f"{o.plan.method.name}: {stage}": s for o in outcomes for stage, s in o.seconds.items()},
        flops=sum(outcome.flops for outcome in outcomes),
        store=last.store,
    )


def _of_source(scores: Scores, keep: Keep, source: Anatomy) -> dict[str, Tensor]:
    """Scores of what `keep` leaves under the source's names and units. Units that had gone before have none (NaN)."""
    out = {}
    for name, value_U in scores.values.items():
        original = keep.original(name, source)
        size = source.axes[original].size
        out[original] = torch.full((size,), torch.nan, dtype=value_U.dtype)
        out[original][list(keep.units.get(original, range(size)))] = value_U
    return out
