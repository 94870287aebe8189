"""Plans whose sizes are a shape: a target, one of several candidates, or so many directions of the stream."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from .anatomy import Anatomy
from .asked import check_size, ratio_of, refuse, target_sizes
from .axes import kind_of
from .errors import UserError
from .hf import sliced_target, target_for
from .keep import Keep
from .latency import Timing
from .planning import Plan, biased_anatomy
from .shape import LayerShape
from .sizes import Sizes, candidate_pairs, named

_NEAR = 0.01  # of the target, within which candidate shapes must lie
_CANDIDATES = 12  # at most, evenly taken from those that there are


def stock_when_alike(plan: Plan, config: Any) -> tuple[str, ...]:
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


def alike(plan: Plan, config: Any) -> Plan:
    """Every layer with a target's KV groups and FFN channels."""
    refuse(plan, "pattern")
    refuse(plan, "multiple_of", why="--target says the sizes themselves")
    if not plan.request.uniform:
        raise UserError(f"target: it gives every layer of {plan.method.name}'s the same sizes; add --uniform")
    stock_when_alike(plan, config)
    anatomy = plan.anatomy
    if len(set(anatomy.shape.layers)) > 1:
        raise UserError("target: the source's layers differ in size, so no one shape fits them; give --ratio instead")
    layer = anatomy.shape.layers[0]
    own = {"num_key_value_heads": layer.num_key_value_heads, "intermediate_size": layer.intermediate_size}
    sizes = own | target_sizes(plan, tuple(own))
    for name, size in sizes.items():
        check_size(name, size, own[name])
    if sizes == own:
        raise UserError("target: these are the source's own sizes, so nothing would be cut; give smaller ones")
    layers = range(anatomy.shape.num_hidden_layers)
    counts = {name: n for i in layers for name, n in named(anatomy, i, *sizes.values()).items()}
    keep = Keep({name: tuple(range(n)) for name, n in counts.items() if n < anatomy.axes[name].size})
    step = sum(anatomy.unit_params(f"layers.{i}.intermediate") for i in layers)
    target = target_for(config, anatomy, keep, out_bias=plan.out_bias)
    return replace(plan, counts=counts, target=target, step=step, notes=target.notes)


def candidates(plan: Plan, config: Any, times: Mapping[str, Timing]) -> Plan:
    """Shapes of layers alike, all within 1 % of the target: stem x FFN, or KV groups x FFN."""
    refuse(plan, "target", "pattern")
    anatomy, ratio = plan.anatomy, ratio_of(plan)
    if len(set(anatomy.shape.layers)) > 1:
        raise UserError("allocate: the source's layers differ in size, so no one shape fits them; drop --allocate")
    goal, layers = (1 - ratio) * anatomy.block_params, range(anatomy.shape.num_hidden_layers)
    notes: tuple[str, ...] = ()
    if "hidden" in plan.method.axes:
        _check_gains(plan)
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
        notes = stock_when_alike(plan, config)
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


def width(plan: Plan, config: Any, times: Mapping[str, Timing]) -> Plan:
    """Stem and FFN to a target, or by one factor to a ratio."""
    refuse(plan, "pattern")
    anatomy = plan.anatomy
    shape = anatomy.shape
    if any(layer.skipped for layer in shape.layers):
        raise UserError("minitron-width: a model with removed sub-layers has no single FFN width; use flap instead")
    widest = min(layer.intermediate_size for layer in shape.layers)
    if plan.request.target:
        refuse(plan, "multiple_of", why="--target says the sizes themselves")
        sizes = target_sizes(plan, ("hidden_size", "intermediate_size"))
        hidden, width = sizes.get("hidden_size", shape.hidden_size), sizes.get("intermediate_size", widest)
        check_size("hidden_size", hidden, shape.hidden_size)
        check_size("intermediate_size", width, widest)
    else:
        hidden, width = proportional_width(anatomy, ratio_of(plan, allow_target=True), plan.multiple_of)
    cut_stem = hidden < shape.hidden_size
    if cut_stem:
        _check_gains(plan)
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


def _check_gains(plan: Plan) -> None:
    """UserError if the norms of a cut stem are to be mended by gains that they cannot have."""
    if plan.compensator in ("gain", "least-squares") and plan.anatomy.family.centred:
        raise UserError(
            f"compensate: {plan.compensator} mends RMSNorms, but the norms of {plan.anatomy.family.name} subtract the mean, so no "
            "gain mends them; drop it"
        )


def gated(plan: Plan, config: Any, times: Mapping[str, Timing]) -> Plan:
    """The sizes that gates are to learn, of layers alike: a target's, or stem and FFN by one factor to a ratio."""
    refuse(plan, "pattern")
    anatomy, shape = plan.anatomy, plan.anatomy.shape
    if len(set(shape.layers)) > 1 or shape.layers[0].skipped:
        raise UserError(
            f"{plan.method.name}: the source's layers differ in size, so no one shape fits them; use flap instead"
        )
    layer = shape.layers[0]
    own = {
        "hidden_size": ("hidden", shape.hidden_size),
        "intermediate_size": ("intermediate", layer.intermediate_size),
        "num_key_value_heads": ("kv_heads", layer.num_key_value_heads),
        "num_hidden_layers": ("layers", shape.num_hidden_layers),
    }
    if plan.request.target:
        refuse(plan, "multiple_of", why="--target says the sizes themselves")
        sizes = target_sizes(plan, tuple(own))
    else:
        stem, width = proportional_width(anatomy, ratio_of(plan, allow_target=True), plan.multiple_of)
        sizes = {"hidden_size": stem, "intermediate_size": width}
    for name, size in sizes.items():
        check_size(name, size, own[name][1])
        if size < own[name][1] and own[name][0] in anatomy.refused:
            raise UserError(f"target: {name} stays, because {anatomy.refused[own[name][0]]}; drop it")
    kinds = {own[name][0]: size for name, size in sizes.items() if size < own[name][1]}
    if not kinds:
        raise UserError("target: these are the source's own sizes, so nothing would be cut; give smaller ones")
    if "hidden" in kinds and anatomy.exactness("hidden") == "inexact":
        raise UserError(
            f"{plan.method.name}: the norms of {anatomy.family.name} subtract the mean, so no gate on its stem is exact; give "
            "--target without hidden_size"
        )
    left = range(kinds.get("layers", shape.num_hidden_layers))
    counts = {
        axis.name: kinds[kind_of(axis.name)]
        for axis in anatomy.axes.values()
        if kind_of(axis.name) in kinds and (axis.layer is None or axis.layer in left)
    }
    target = target_for(config, anatomy, Keep({name: tuple(range(n)) for name, n in counts.items()}))
    return replace(plan, counts=counts, target=target, notes=(*target.notes, _TRAINS))


_TRAINS = "it trains on --tokens of text: prunus plan sheared-llama --train says what a run of that recipe takes"


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


def rotation(plan: Plan, config: Any, times: Mapping[str, Timing]) -> Plan:
    """So many directions of the stream that the blocks, shortcut matrices included, meet the target."""
    refuse(plan, "pattern")
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
        refuse(plan, "multiple_of", why="--target says the sizes themselves")
        size = target_sizes(plan, ("hidden_size",))["hidden_size"]
        check_size("hidden_size", size, shape.hidden_size)
        if params(size) >= anatomy.block_params:
            with_what = " with the shortcut matrices" if per_block else ""
            raise UserError(
                f"target: {size} of {shape.hidden_size} directions{with_what} take {params(size):,} block parameters, no fewer "
                f"than the {anatomy.block_params:,} of the source; give a smaller hidden_size"
            )
    else:
        ratio = ratio_of(plan, allow_target=True)
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
