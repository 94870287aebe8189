"""How a checked request becomes a plan, for every kind of allocation. Reads a config and no weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from . import shaping
from .anatomy import Anatomy
from .asked import check_size, parse_pattern, ratio_of, refuse, target_sizes
from .costs import COSTS, prices_of
from .errors import UserError, nearest, unknown
from .hf import Target, target_for
from .keep import Keep
from .latency import Timing
from .methods import SEARCH_OPTIONS, Method, method_named
from .planning import Plan, Request, biased_anatomy, sublayer_costs
from .sizes import alike_counts


def make_plan(config: Any, anatomy: Anatomy, request: Request, times: Mapping[str, Timing] | None = None) -> Plan:
    """Check a request against the method and the model; UserError names the field, the value and the mend.

    `times`: entries of a latency table, for costs in milliseconds.
    """
    method = method_named(request.method)
    if anatomy.is_sliced:
        raise UserError(
            f"{method.name}: this model's stream is sliced already and changes its basis at every sub-layer, which no method "
            "cuts further; prune the model that it was made from"
        )
    compensator = _choice("compensate", request.compensate, method.compensators, method)
    allocator = _choice("allocate", request.allocate, method.allocators, method)
    for name in request.options:
        if name in SEARCH_OPTIONS and name in method.options and allocator != "search":
            raise UserError(f"option '{name}': it is of the allocator search; add --allocate search, or drop it")
        if name not in method.options:
            raise UserError(
                f"option '{name}' does not exist for {method.name}{nearest(name, method.options)}; it has "
                f"{', '.join(method.options) or 'none'}"
            )
    options = {
        n: _whole(n, request.options.get(n, values[0]))
        if n in SEARCH_OPTIONS
        else _choice(n, request.options.get(n), values, method)
        for n, values in method.options.items()
        if allocator == "search" or n not in SEARCH_OPTIONS
    }
    multiple_of = method.multiple_of if request.multiple_of is None else request.multiple_of
    if multiple_of < 1:
        raise UserError(f"multiple_of: {multiple_of} is no multiple; it must be 1 or more")
    if request.uniform and method.uniform:
        raise UserError(f"uniform: {method.name} always leaves uniform layers; drop the option")
    if request.cost is not None and allocator not in _BY_COST:
        able = [name for name in method.allocators if name in _BY_COST]
        mend = f"add --allocate {able[0]}" if able else "drop --cost"
        raise UserError(f"cost: {method.name}'s allocation '{allocator}' weighs no costs; {mend}")
    if request.cost is not None and request.cost not in COSTS:
        raise unknown("cost", request.cost, COSTS)
    plan = Plan(
        request, method, anatomy, compensator, options, multiple_of, allocator, sequential=_order(method, request, allocator)
    )
    notes = _refused_axes(plan)
    made = _BUILDERS[allocator](plan, config, times or {})
    return replace(made, notes=(*notes, *made.notes))


def _order(method: Method, request: Request, allocator: str) -> bool:
    """Whether statistics of a block see the cut blocks before it."""
    if request.order is None:
        return method.sequential
    if request.order not in ("sequential", "dense"):
        raise unknown("order", request.order, ("sequential", "dense"))
    if not method.either_order:
        what = "sequential" if method.sequential else "dense"
        raise UserError(f"order: {method.name} is always {what}; drop --{request.order}")
    return request.order == "sequential"


def _whole(name: str, value: str) -> str:
    if not (value.isascii() and value.isdigit() and int(value) > 0):
        raise UserError(f"{name}: '{value}' is no whole number above 0")
    return value


def _choice(name: str, value: str | None, allowed: tuple[str, ...], method: Method) -> str:
    if value is None:
        return allowed[0]
    if value not in allowed:
        raise unknown(f"value for {name} of {method.name}", value, allowed)
    return value


_BY_COST = ("global", "search", "least-error")  # these can weigh a unit's score, or error, against any cost
_PER_LAYER = (
    "global-standardised",
    "global",
    "search",
    "least-error",
    "adaptive",
    "uniform",
    "uniform-free",
    "gates",
)  # these do with channels alone


def _refused_axes(plan: Plan) -> tuple[str, ...]:
    """Notes on the kinds of axes that the method cuts and this model does not offer; UserError if it cannot do without."""
    method, anatomy = plan.method, plan.anatomy
    gone = [axis for axis in method.axes if axis in anatomy.refused]
    if gone and (plan.allocator not in _PER_LAYER or len(gone) == len(method.axes)):
        raise UserError(
            f"{method.name}: it cuts {gone[0]}, but {anatomy.refused[gone[0]]}; use flap or minitron-depth instead"
        )
    return tuple(f"{method.name} leaves {axis} alone: {anatomy.refused[axis]}" for axis in gone)


def _sparse(plan: Plan, config: Any, times: Mapping[str, Timing]) -> Plan:
    refuse(plan, "target", "uniform", "multiple_of")
    anatomy = plan.anatomy
    target = Target(config, anatomy)
    if plan.request.pattern is not None:
        if plan.options.get("allocation") == "owl":
            raise UserError("allocation: owl gives layers different sparsities, which n:m does not have; drop one of them")
        n, m = parse_pattern(plan.request.pattern)
        if plan.request.ratio is not None and not math.isclose(plan.request.ratio, 1 - n / m):
            raise UserError(f"ratio: {plan.request.ratio} contradicts pattern {n}:{m}, which is {1 - n / m:g}; drop one")
        for name, tensor in anatomy.tensors.items():
            if tensor.is_matrix and tensor.shape[1] % m:
                raise UserError(
                    f"pattern: {n}:{m} does not fit '{name}', whose {tensor.shape[1]} inputs are no multiple of {m}"
                )
        return replace(plan, pattern=(n, m), sparsity=1 - n / m, target=target, notes=_SPARSE_NOTES)
    ratio = ratio_of(plan)
    least = min(t.shape[1] for t in anatomy.tensors.values() if t.is_matrix)
    if ratio * least < 1:
        raise UserError(f"ratio: {ratio} is less than one weight in a row of {least}; ask for at least {1 / least:.4f}")
    return replace(plan, sparsity=ratio, target=target, notes=_SPARSE_NOTES)


_SPARSE_NOTES = ("zeros are stored densely: the file keeps its size and no stock engine runs it faster",)


def _standardised(plan: Plan, config: Any, times: Mapping[str, Timing]) -> Plan:
    return shaping.alike(plan, config) if plan.request.target else _global(plan, config, times)


def _global(plan: Plan, config: Any, times: Mapping[str, Timing]) -> Plan:
    refuse(plan, "target", "pattern")
    anatomy, ratio = plan.anatomy, ratio_of(plan)
    if plan.request.uniform and (plan.cost != "params" or plan.allocator == "search"):
        raise UserError(
            "uniform: layers alike are made to fit a number of parameters; drop --uniform, or --cost and --allocate"
        )
    if not any(name.endswith(".intermediate") for name in anatomy.axes):
        raise UserError(f"{plan.method.name}: no layer of this model has FFN channels left to cut")
    prices = prices_of(anatomy, biased_anatomy(plan), plan.cost, times)
    scored = [axis for axis in plan.scored_axes if axis.name in prices.of]
    chunk = {axis.name: min(plan.multiple_of if axis.name.endswith(".intermediate") else 1, axis.size) for axis in scored}
    freed = [prices.of[name][-1] - prices.of[name][-1 - size] for name, size in chunk.items()]
    step = min((price for price in freed if price > 0), default=0)
    if not step:
        raise UserError(f"cost: none of the units that {plan.method.name} cuts costs any {plan.cost}; give another --cost")
    step *= anatomy.shape.num_hidden_layers if plan.request.uniform else 1
    added, total = prices.whole - prices.source, prices.source
    if added >= ratio * total or ratio * total < step:
        raise UserError(f"ratio: {ratio} is below one unit of this model; ask for more than {max(step, added) / total:.4f}")
    budget = math.floor((1 - ratio) * total)
    stays = prices.fixed(chunk) + sum(prices.of[name][size] for name, size in chunk.items())
    if budget < stays:
        most, what = 1 - stays / total, "block parameters" if plan.cost == "params" else plan.cost
        if "kv_heads" in anatomy.refused:
            raise UserError(f"ratio: {ratio} is more than this model's FFN channels can give; ask for less than {most:.4f}")
        raise UserError(
            f"ratio: the least that can stay (one unit of every axis) takes {stays:,} {what}, but the target leaves "
            f"{budget:,}; ask for a smaller ratio (less than {most:.4f})"
        )
    notes = shaping.stock_when_alike(plan, config) if plan.request.uniform else _of_our_type(plan, config)
    return replace(plan, budget=budget, prices=prices, step=step if plan.cost == "params" else 0, notes=notes)


def _of_our_type(plan: Plan, config: Any) -> tuple[str, ...]:
    return (
        "the scores decide each layer's size; the checkpoint will be of type "
        f"pruned_{config.model_type.removeprefix('pruned_')}, which loads with prunus or trust_remote_code=True"
        + (" (--uniform makes all layers alike)" if plan.allocator in ("global-standardised", "least-error") else ""),
    )


def _adaptive(plan: Plan, config: Any, times: Mapping[str, Timing]) -> Plan:
    refuse(plan, "uniform", why="every layer loses a share of its own")
    return _global(plan, config, times)


def _uniform(plan: Plan, config: Any, times: Mapping[str, Timing]) -> Plan:
    refuse(plan, "target", "pattern")
    refuse(plan, "uniform", why="protected layers stay whole (--option protect=0,0 makes all alike)")
    anatomy, ratio, free = plan.anatomy, ratio_of(plan), plan.free_layers
    if not free:
        raise UserError(f"protect: {_kept_whole(plan)}, so none can be cut; give --option protect=0,0")
    if len({anatomy.shape.layers[i] for i in free}) > 1 or anatomy.shape.layers[free[0]].skipped:
        raise UserError(
            f"{plan.method.name}: the source's layers differ in size, so no one size fits them; use flap instead"
        )
    step = sum(anatomy.unit_params(f"layers.{i}.intermediate") for i in free) * plan.multiple_of
    if ratio * anatomy.block_params < step:
        raise UserError(
            f"ratio: {ratio} is below one unit of this model; ask for at least {step / anatomy.block_params:.4f}"
        )
    budget = math.floor((1 - ratio) * anatomy.block_params)
    scored = sum(t.numel for t in anatomy.tensors.values() if t.layer is not None and t.layer in free)
    share = ratio * (anatomy.block_params / scored)  # of the free layers, which bear it all
    groups = (1 - share) * anatomy.shape.layers[free[0]].num_key_value_heads
    counts = alike_counts(anatomy, budget, groups, plan.multiple_of, free)
    keep = Keep({name: tuple(range(n)) for name, n in counts.items() if n < anatomy.axes[name].size})
    target = target_for(config, anatomy, keep)
    hint = ("with --option protect=0,0 all layers come out alike",) if any(plan.protected) else ()
    return replace(plan, counts=counts, target=target, step=step, notes=(*target.notes, *hint))


def _depth(plan: Plan, config: Any, times: Mapping[str, Timing]) -> Plan:
    refuse(plan, "pattern", "multiple_of")
    anatomy, count = plan.anatomy, plan.anatomy.shape.num_hidden_layers
    if plan.request.target:
        kept = target_sizes(plan, ("num_hidden_layers",))["num_hidden_layers"]
        check_size("num_hidden_layers", kept, count - 1)
        run = count - kept
    else:
        ratio = ratio_of(plan, allow_target=True)
        run = round(ratio * count)
        if run < 1:
            raise UserError(f"ratio: {ratio} of {count} layers is less than one layer; ask for at least {1 / count:.4f}")
        if run >= count:
            raise UserError(f"ratio: {ratio} would remove all {count} layers; ask for at most {(count - 1) / count:.4f}")
    if run > (free := len(plan.free_layers)):
        raise UserError(
            f"protect: {_kept_whole(plan)}, so at most {free} can go, not {run}; {'ask for fewer, or ' if free else ''}give "
            "--option protect=0,0"
        )
    step = anatomy.unit_params("layers")
    if len(set(anatomy.shape.layers)) > 1:
        return replace(plan, run=run, step=step, notes=("layers differ in size, so the counts depend on which of them go",))
    keep = Keep({"layers": tuple(range(count - run))})
    target = target_for(config, anatomy, keep)
    return replace(plan, run=run, target=target, step=anatomy.unit_params("layers"), notes=target.notes)


def _kept_whole(plan: Plan) -> str:
    first, last = plan.protected
    return f"{plan.method.name} keeps the first {first} and the last {last} of {plan.anatomy.shape.num_hidden_layers} layers"


def _sublayers(plan: Plan, config: Any, times: Mapping[str, Timing]) -> Plan:
    refuse(plan, "target", "pattern", "multiple_of")
    refuse(plan, "uniform", why="the sub-layers that go make layers differ")
    total, ratio, costs = plan.anatomy.block_params, ratio_of(plan), sublayer_costs(plan)
    what = {"both": "sub-layers", "attention": "attention sub-layers", "mlp": "MLPs"}[plan.options["sublayers"]]
    if len(costs) < 2:
        raise UserError(f"sublayers: this model has {len(costs)} {what}, too few to choose from")
    step, most = min(costs.values()), sum(costs.values()) - max(costs.values())  # one of them stays
    if ratio * total < step:
        raise UserError(f"ratio: {ratio} is below one sub-layer of this model; ask for at least {step / total:.4f}")
    if ratio * total > most:
        raise UserError(f"ratio: {ratio} is more than this model's {what} can give; ask for at most {most / total:.4f}")
    ours = f"pruned_{config.model_type.removeprefix('pruned_')}"
    note = (
        f"the losses decide which sub-layers go; unless these make up whole layers the checkpoint will be of type {ours}, "
        "which loads with prunus or trust_remote_code=True"
    )
    return replace(plan, budget=math.floor((1 - ratio) * total), step=step, notes=(note,))


_BUILDERS: Mapping[str, Callable[[Plan, Any, Mapping[str, Timing]], Plan]] = {
    "per-matrix": _sparse,
    "per-row": _sparse,
    "global-standardised": _standardised,
    "global": _global,
    "search": _global,
    "least-error": _global,
    "candidates": shaping.candidates,
    "adaptive": _adaptive,
    "target-shape": shaping.width,
    "gates": shaping.gated,
    "contiguous": _depth,
    "lowest-layers": _depth,
    "greedy-layers": _depth,
    "greedy-sublayers": _sublayers,
    "uniform": _uniform,
    "uniform-free": _uniform,
    "rotation": shaping.rotation,
}
