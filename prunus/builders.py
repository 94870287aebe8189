"""How a checked request becomes a plan, for every kind of allocation. Reads a config and no weight."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from .anatomy import Anatomy
from .costs import COSTS, prices_of
from .errors import UserError, nearest, unknown
from .hf import Target, sliced_target, target_for
from .keep import Keep
from .latency import Timing
from .methods import SEARCH_OPTIONS, Method, method_named
from .planning import Plan, Request, biased_anatomy, sublayer_costs
from .shape import LayerShape
from .sizes import Sizes, alike_counts, candidate_pairs, named


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
        n: _choice(n, request.options.get(n), values, method)
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


def _refuse(plan: Plan, *fields: str, why: str | None = None) -> None:
    for name in fields:
        if getattr(plan.request, name):
            raise UserError(f"{name}: {why or f'{plan.method.name} does not take it'}; drop the option")


def _ratio(plan: Plan, allow_target: bool = False) -> float:
    """The ratio asked for, inside (0, 1)."""
    ratio = plan.request.ratio
    if ratio is None:
        mend = "give --ratio or --target" if allow_target else "give --ratio"
        raise UserError(f"ratio: {plan.method.name} needs to know how much to cut; {mend}")
    return checked_share("ratio", ratio)


def checked_share(name: str, value: float) -> float:
    """The value of a field, or UserError if it is outside (0, 1)."""
    if not (isinstance(value, (int, float)) and 0.0 < value < 1.0):
        raise UserError(f"{name}: {value} is not between 0 and 1 (0.2 removes a fifth)")
    return value


def parse_pattern(text: str) -> tuple[int, int]:
    """``2:4`` -> (2, 4): keep 2 of every 4 consecutive weights."""
    match = re.fullmatch(r"(\d{1,3}):(\d{1,3})", text)
    if not match or not 0 < int(match[1]) < int(match[2]):
        raise UserError(f"pattern: '{text}' is no n:m; write for example 2:4 (keep 2 of every 4)")
    return int(match[1]), int(match[2])


def _sparse(plan: Plan, config: Any, times: Mapping[str, Timing]) -> Plan:
    _refuse(plan, "target", "uniform", "multiple_of")
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
    ratio = _ratio(plan)
    least = min(t.shape[1] for t in anatomy.tensors.values() if t.is_matrix)
    if ratio * least < 1:
        raise UserError(f"ratio: {ratio} is less than one weight in a row of {least}; ask for at least {1 / least:.4f}")
    return replace(plan, sparsity=ratio, target=target, notes=_SPARSE_NOTES)


_SPARSE_NOTES = ("zeros are stored densely: the file keeps its size and no stock engine runs it faster",)


def _global(plan: Plan, config: Any, times: Mapping[str, Timing]) -> Plan:
    _refuse(plan, "target", "pattern")
    anatomy, ratio = plan.anatomy, _ratio(plan)
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
    notes = _stock_when_alike(plan, config) if plan.request.uniform else _of_our_type(plan, config)
    return replace(plan, budget=budget, prices=prices, step=step if plan.cost == "params" else 0, notes=notes)


def _of_our_type(plan: Plan, config: Any) -> tuple[str, ...]:
    return (
        "the scores decide each layer's size; the checkpoint will be of type "
        f"pruned_{config.model_type.removeprefix('pruned_')}, which loads with prunus or trust_remote_code=True"
        + (" (--uniform makes all layers alike)" if plan.allocator in ("global-standardised", "least-error") else ""),
    )


def _stock_when_alike(plan: Plan, config: Any) -> tuple[str, ...]:
    """Notes on the type of a model whose layers come out alike; UserError if they cannot, or if no stock type says it."""
    anatomy = plan.anatomy
    if "kv_heads" in anatomy.refused:
        raise UserError(f"uniform: it gives up KV groups, but {anatomy.refused['kv_heads']}; drop --uniform")
    if any(layer.skipped for layer in anatomy.shape.layers):
        raise UserError("uniform: some layers of this model lack a sub-layer, so they cannot be alike; drop --uniform")
    alike = anatomy.with_shape(anatomy.shape.with_layers(anatomy.shape.layers[:1] * anatomy.shape.num_hidden_layers))
    probe = target_for(config, alike, Keep(), out_bias=plan.out_bias)  # may refuse: said now, not after scoring
    if not probe.is_stock:
        raise UserError(
            f"uniform: a stock {anatomy.family.name} config has no place for {plan.method.name}'s biases; add "
            f"--compensate {plan.method.compensators[1]}, or drop --uniform"
        )
    return probe.notes


_NEAR = 0.01  # of the target, within which candidate shapes must lie
_CANDIDATES = 12  # at most, evenly taken from those that there are


def _candidates(plan: Plan, config: Any, times: Mapping[str, Timing]) -> Plan:
    """Shapes of layers alike, all within 1 % of the target: stem x FFN, or KV groups x FFN."""
    _refuse(plan, "target", "pattern")
    anatomy, ratio = plan.anatomy, _ratio(plan)
    if len(set(anatomy.shape.layers)) > 1:
        raise UserError("allocate: the source's layers differ in size, so no one shape fits them; drop --allocate")
    goal, layers = (1 - ratio) * anatomy.block_params, range(anatomy.shape.num_hidden_layers)
    notes: tuple[str, ...] = ()
    if "hidden" in plan.method.axes:
        stem, width = anatomy.shape.hidden_size, anatomy.shape.layers[0].intermediate_size
        lawful = math.lcm(
            plan.multiple_of, anatomy.shape.layers[0].num_attention_heads if anatomy.family.hidden_multiple_of_heads else 1
        )
        stems = range(lawful, stem + 1, lawful)
        pairs = candidate_pairs(
            partial(_block_params, anatomy), goal, stems, range(plan.multiple_of, width + 1, plan.multiple_of), _NEAR
        )
        pairs = [(d, f) for d, f in pairs if 2 * d <= f <= 4 * d] or pairs
        found = [{"hidden": d} | {f"layers.{i}.intermediate": f for i in layers} for d, f in pairs]
    else:
        if not plan.request.uniform:
            raise UserError("allocate: candidates are shapes of layers alike; add --uniform")
        notes = _stock_when_alike(plan, config)
        sizes = Sizes.of(biased_anatomy(plan), layers, plan.multiple_of)
        widths = range(plan.multiple_of, sizes.channels + 1, plan.multiple_of)
        pairs = candidate_pairs(sizes.params, goal, sizes.groups, widths, _NEAR)
        found = [{name: n for i in layers for name, n in named(anatomy, i, g, f).items()} for g, f in pairs]
    if not found:
        raise UserError(
            f"ratio: no shape comes within {_NEAR:.0%} of a ratio of {ratio} in multiples of {plan.multiple_of}; ask for another"
        )
    spaced = (
        [found[round(i * (len(found) - 1) / (_CANDIDATES - 1))] for i in range(_CANDIDATES)]
        if len(found) > _CANDIDATES
        else found
    )
    return replace(plan, candidates=tuple(spaced), notes=notes)


def _adaptive(plan: Plan, config: Any, times: Mapping[str, Timing]) -> Plan:
    _refuse(plan, "uniform", why="every layer loses a share of its own")
    return _global(plan, config, times)


def _target_sizes(plan: Plan, allowed: tuple[str, ...]) -> dict[str, int]:
    sizes = dict(plan.request.target)
    if plan.request.ratio is not None:
        raise UserError("target: sizes and --ratio contradict each other; give one of them")
    for name in sizes:
        if name not in allowed:
            raise unknown(f"size for {plan.method.name}'s target", name, allowed)
    return sizes


def _check_size(name: str, size: int, most: int) -> None:
    if not 0 < size <= most:
        raise UserError(f"target: {name}={size} is outside 1 to {most} (the source's size)")


def _uniform(plan: Plan, config: Any, times: Mapping[str, Timing]) -> Plan:
    _refuse(plan, "target", "pattern")
    _refuse(plan, "uniform", why="protected layers stay whole (--option protect=0,0 makes all alike)")
    anatomy, ratio, free = plan.anatomy, _ratio(plan), plan.free_layers
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


def _width(plan: Plan, config: Any, times: Mapping[str, Timing]) -> Plan:
    _refuse(plan, "pattern")
    anatomy = plan.anatomy
    shape = anatomy.shape
    if any(layer.skipped for layer in shape.layers):
        raise UserError("minitron-width: a model with removed sub-layers has no single FFN width; use flap instead")
    widest = min(layer.intermediate_size for layer in shape.layers)
    if plan.request.target:
        _refuse(plan, "multiple_of", why="--target says the sizes themselves")
        sizes = _target_sizes(plan, ("hidden_size", "intermediate_size"))
        hidden, width = sizes.get("hidden_size", shape.hidden_size), sizes.get("intermediate_size", widest)
        _check_size("hidden_size", hidden, shape.hidden_size)
        _check_size("intermediate_size", width, widest)
    else:
        hidden, width = proportional_width(anatomy, _ratio(plan, allow_target=True), plan.multiple_of)
    cut_stem = hidden < shape.hidden_size
    if plan.compensator in ("gain", "least-squares") and cut_stem and anatomy.family.centred:
        raise UserError(
            f"compensate: {plan.compensator} mends RMSNorms, but the norms of {anatomy.family.name} subtract the mean, so no "
            "gain mends them; drop it"
        )
    if plan.compensator == "gain" and not cut_stem:
        raise UserError("compensate: gain repairs the norms of a cut stem, but this plan leaves the stem whole; drop it")
    if hidden == shape.hidden_size and all(layer.intermediate_size == width for layer in shape.layers):
        raise UserError("target: these are the source's own sizes, so nothing would be cut; give smaller ones")
    counts = {f"layers.{i}.intermediate": width for i in range(shape.num_hidden_layers)} | {"hidden": hidden}
    keep = Keep({name: tuple(range(n)) for name, n in counts.items() if n < anatomy.axes[name].size})
    target = target_for(config, anatomy, keep, fold=False)
    channels = [target.anatomy.unit_params(f"layers.{i}.intermediate") for i in range(shape.num_hidden_layers)]
    step = sum(channels) * plan.multiple_of
    return replace(plan, counts=counts, target=target, step=step, notes=target.notes)


def _block_params(anatomy: Anatomy, hidden: int, ffn: int) -> int:
    """With another stem and FFN width."""
    layers = tuple(LayerShape(x.num_attention_heads, x.num_key_value_heads, ffn) for x in anatomy.shape.layers)
    return anatomy.with_shape(replace(anatomy.shape, hidden_size=hidden, layers=layers)).block_params


def proportional_width(anatomy: Anatomy, ratio: float, multiple_of: int) -> tuple[int, int]:
    """Stem and FFN width that remove `ratio` of the block parameters, shrinking by (nearly) the same factor.

    The stem is the lawful multiple nearest to the common factor, the FFN width the largest that meets the target.
    """
    shape = anatomy.shape
    budget = (1 - ratio) * anatomy.block_params
    width = min(layer.intermediate_size for layer in shape.layers)
    lawful = multiple_of
    if anatomy.family.hidden_multiple_of_heads:  # stay with the family's own stock type where that is possible
        lawful = math.lcm(multiple_of, shape.layers[0].num_attention_heads)

    params = partial(_block_params, anatomy)
    best: tuple[float, int, int] | None = None
    for hidden in range(lawful, shape.hidden_size + 1, lawful):
        channel = params(hidden, 2) - params(hidden, 1)
        rest = params(hidden, 1) - channel
        ffn = min(math.floor((budget - rest) / (channel * multiple_of)) * multiple_of, width)
        if ffn < multiple_of:
            continue
        if ffn == width and params(hidden, width) < budget - channel * multiple_of and hidden < shape.hidden_size:
            continue  # the stem alone removes more than was asked
        skew = abs(math.log(hidden / shape.hidden_size) - math.log(ffn / width))
        if best is None or skew < best[0]:
            best = (skew, hidden, ffn)
    if best is None:
        raise UserError(
            f"ratio: {ratio} cannot be reached by stem and FFN in multiples of {multiple_of} (stem: {lawful}); ask for less "
            "or give --target"
        )
    return best[1], best[2]


def _rotation(plan: Plan, config: Any, times: Mapping[str, Timing]) -> Plan:
    _refuse(plan, "pattern")
    anatomy, shape, multiple = plan.anatomy, plan.anatomy.shape, plan.multiple_of
    per_block = plan.options["rotation"] == "per-block"
    if why := anatomy.family.unrotatable:
        raise UserError(f"slicegpt: it turns the stream, but {why}; use flap or minitron-width instead")
    if per_block and any(layer.skipped for layer in shape.layers):
        raise UserError("slicegpt: some layers of this model lack a sub-layer to turn; add --option rotation=shared")

    def params(size: int) -> int:
        cut = replace(shape, stream_size=size) if per_block else replace(shape, hidden_size=size)
        return anatomy.with_shape(cut).block_params

    if plan.request.target:
        _refuse(plan, "multiple_of", why="--target says the sizes themselves")
        size = _target_sizes(plan, ("hidden_size",))["hidden_size"]
        _check_size("hidden_size", size, shape.hidden_size)
        if params(size) >= anatomy.block_params:
            with_what = " with the shortcut matrices" if per_block else ""
            raise UserError(
                f"target: {size} of {shape.hidden_size} directions{with_what} take {params(size):,} block parameters, no fewer "
                f"than the {anatomy.block_params:,} of the source; give a smaller hidden_size"
            )
    else:
        ratio = _ratio(plan, allow_target=True)
        sizes = range(multiple, shape.hidden_size + 1, multiple)
        found = bisect_right(sizes, (1 - ratio) * anatomy.block_params, key=params)
        if not found:
            raise UserError(
                f"ratio: {ratio} leaves no room for {multiple} directions of the stream; ask for a smaller ratio or another "
                "--multiple-of"
            )
        size = sizes[found - 1]
    keep = Keep({"hidden": tuple(range(size))})
    untied = anatomy.with_shape(replace(shape, tie_word_embeddings=False))
    target = sliced_target(config, anatomy, size) if per_block else target_for(config, untied, keep)
    if shape.tie_word_embeddings:
        note = f"the embedding and the head need different matrices, so they are untied: {shape.vocab_size:,} rows more are stored"
        target = replace(target, notes=(*target.notes, note))
    step = params(size) - params(size - multiple) if size > multiple else params(size)
    return replace(plan, counts={"hidden": size}, target=target, step=step, notes=target.notes)


def _depth(plan: Plan, config: Any, times: Mapping[str, Timing]) -> Plan:
    _refuse(plan, "pattern", "multiple_of")
    anatomy, count = plan.anatomy, plan.anatomy.shape.num_hidden_layers
    if plan.request.target:
        kept = _target_sizes(plan, ("num_hidden_layers",))["num_hidden_layers"]
        _check_size("num_hidden_layers", kept, count - 1)
        run = count - kept
    else:
        ratio = _ratio(plan, allow_target=True)
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
    _refuse(plan, "target", "pattern", "multiple_of")
    _refuse(plan, "uniform", why="the sub-layers that go make layers differ")
    total, ratio, costs = plan.anatomy.block_params, _ratio(plan), sublayer_costs(plan)
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
    "global-standardised": _global,
    "global": _global,
    "search": _global,
    "least-error": _global,
    "candidates": _candidates,
    "adaptive": _adaptive,
    "target-shape": _width,
    "contiguous": _depth,
    "lowest-layers": _depth,
    "greedy-layers": _depth,
    "greedy-sublayers": _sublayers,
    "uniform": _uniform,
    "uniform-free": _uniform,
    "rotation": _rotation,
}
