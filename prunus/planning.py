"""What a cut will be, worked out from the config alone: no weight is read here."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from . import hf
from .anatomy import Anatomy
from .axes import Axis
from .criteria import TAYLOR_RULES
from .errors import UserError, nearest, unknown
from .hf import Target, sliced_target, target_for
from .keep import Keep
from .methods import Method, method_named
from .shape import LayerShape
from .sizes import alike_counts

_TARGET_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers")


@dataclass(frozen=True)
class Request:
    """What a user asks for. Every field is checked against the method and the model by `Plan.make`."""

    method: str  # a row of the table, or several joined by + (see `combination.py`)
    ratio: float | None = None  # of block parameters; for sparse methods the sparsity of the block matrices
    pattern: str | None = None  # n:m, keep n of m
    target: Mapping[str, int] = field(default_factory=dict)  # sizes to reach instead of a ratio
    uniform: bool = False
    multiple_of: int | None = None
    compensate: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    sparsity: float | None = None  # of a combination's sparse part
    split: tuple[float, ...] = ()  # how a combination's other parts share what is removed

    def describe(self) -> dict[str, Any]:
        """The request as plain data, without what was not said."""
        data = {k: v for k, v in vars(self).items() if v not in (None, False, ()) and v != {}}
        plain = {Mapping: dict, tuple: list}
        return {k: next((to(v) for kind, to in plain.items() if isinstance(v, kind)), v) for k, v in data.items()}


@dataclass(frozen=True)
class Plan:
    """A checked request: exactly one of `budget`, `counts`, `run`, `sparsity` says where the cut falls.

    A combination has `parts` instead, the plans of its methods in their order; what else it says is of them all.
    """

    request: Request
    method: Method
    anatomy: Anatomy
    compensator: str
    options: Mapping[str, str]
    multiple_of: int
    budget: int | None = None  # block parameters that may stay, biases included
    counts: Mapping[str, int] = field(default_factory=dict)  # axis -> units kept
    run: int | None = None  # layers to remove
    sparsity: float | None = None
    pattern: tuple[int, int] | None = None
    target: Target | None = None  # None where the scores decide the sizes
    step: int = 0  # block parameters of the smallest lawful step
    notes: tuple[str, ...] = ()
    parts: tuple[Plan, ...] = ()
    on_example: bool = False  # made for sizes like those that the scores of the part before will decide

    @classmethod
    def make(cls, config: Any, anatomy: Anatomy, request: Request) -> Plan:
        """Check a request against the method and the model; UserError names the field, the value and the mend."""
        method = method_named(request.method)
        if anatomy.is_sliced:
            raise UserError(
                f"{method.name}: this model's stream is sliced already and changes its basis at every sub-layer, which no method "
                "cuts further; prune the model that it was made from"
            )
        compensator = _choice("compensate", request.compensate, method.compensators, method)
        for name in request.options:
            if name not in method.options:
                raise UserError(
                    f"option '{name}' does not exist for {method.name}{nearest(name, method.options)}; it has "
                    f"{', '.join(method.options) or 'none'}"
                )
        options = {n: _choice(n, request.options.get(n), values, method) for n, values in method.options.items()}
        multiple_of = method.multiple_of if request.multiple_of is None else request.multiple_of
        if multiple_of < 1:
            raise UserError(f"multiple_of: {multiple_of} is no multiple; it must be 1 or more")
        if request.uniform and method.uniform:
            raise UserError(f"uniform: {method.name} always leaves uniform layers; drop the option")
        notes = _refused_axes(method, anatomy)
        plan = cls(request, method, anatomy, compensator, options, multiple_of)
        build = {
            "per-matrix": _sparse,
            "per-row": _sparse,
            "global-standardised": _global,
            "adaptive": _adaptive,
            "least-error": _global,
            "target-shape": _width,
            "contiguous": _depth,
            "lowest-layers": _depth,
            "greedy-layers": _depth,
            "greedy-sublayers": _sublayers,
            "uniform": _uniform,
            "uniform-free": _uniform,
            "rotation": _rotation,
        }[method.allocator]
        made = build(plan, config)
        return replace(made, notes=(*notes, *made.notes))

    @property
    def out_bias(self) -> frozenset[str]:
        """Sub-layers whose output gains a bias."""
        return frozenset(hf.SUBLAYERS) if self.compensator in ("bias", "affine") else frozenset()

    @property
    def needs_text(self) -> bool:
        """Needs calibration text: to score, or to refit on."""
        return self.method.needs_text or self.compensator == "least-squares"

    @property
    def target_block_params(self) -> int | None:
        """Block parameters asked for; None for sparse methods, which keep the model's size."""
        if self.method.is_sparse:
            return None
        if self.budget is not None:
            return self.budget
        return None if self.target is None else self.target.anatomy.block_params

    @property
    def protected(self) -> tuple[int, int]:
        """How many layers at the front and at the back never go."""
        first, last = self.options.get("protect", "0,0").split(",")
        return int(first), int(last)

    @property
    def free_layers(self) -> range:
        """Layers that may go."""
        return range(self.protected[0], self.anatomy.shape.num_hidden_layers - self.protected[1])

    @property
    def scored_axes(self) -> list[Axis]:
        """The axes inside the free layers that the method cuts and the model has."""
        names = (f"layers.{i}.{kind}" for i in self.free_layers for kind in self.method.axes)
        return [self.anatomy.axes[name] for name in names if name in self.anatomy.axes]

    @cached_property
    def graded_tensors(self) -> frozenset[str]:
        """Tensors at which the scores need the loss's gradient; none for most methods."""
        tensors = self.anatomy.tensors
        if self.options.get("score") == "taylor":
            return frozenset(name for name, t in tensors.items() if t.layer is not None)
        if self.method.criterion in ("taylor-units", "cosine-taylor"):
            spans = (span for axis in self.scored_axes for span in axis.spans)
            return frozenset(span.param for span in spans if tensors[span.param].is_matrix)
        return frozenset()

    @property
    def graded_outputs(self) -> frozenset[str]:
        """Matrices at whose outputs the scores need the loss's gradient; none for most methods."""
        if self.method.criterion != "output-error":
            return frozenset()
        return frozenset(self.anatomy.reader(axis.name).param for axis in self.scored_axes)

    def gradient_bytes(self, windows: int, seq_len: int) -> int:
        """Memory that the way back takes beside the model, in float32, for batches of `windows`: 0 for most methods.

        What stays on it: the streams between blocks, and the sums of gradients whose absolute value waits for the last
        window. What comes and goes: one block's activations and gradients, and before them one window's logits.
        """
        if self.parts:
            return max(part.gradient_bytes(windows, seq_len) for part in self.parts)
        if not self.graded_tensors | self.graded_outputs:
            return 0
        tensors, shape = self.anatomy.tensors, self.anatomy.shape
        blocks: dict[int | None, int] = defaultdict(int)
        for name in self.graded_tensors:
            blocks[tensors[name].layer] += tensors[name].numel
        rule = TAYLOR_RULES.get(self.options.get("score", ""), TAYLOR_RULES["first"])
        sums = sum(blocks.values()) if rule.of_weights else 0
        tokens, widest = windows * seq_len, max(layer.intermediate_size for layer in shape.layers)
        streams = tokens * shape.hidden_size * (shape.num_hidden_layers + 1)
        largest = max(blocks.values(), default=0)
        activations = tokens * (6 * widest + 16 * shape.hidden_size)  # what autograd keeps, and the gradients of it
        logits = 4 * seq_len * shape.vocab_size  # themselves, their log-softmax, and the gradients of both
        return 4 * (sums + streams + max(activations + 3 * largest, logits))

    def scoring_flops(self, windows: int, seq_len: int) -> int:
        """FLOPs of the passes over the calibration windows."""
        if self.parts:
            return sum(part.scoring_flops(windows, seq_len) for part in self.parts)
        anatomy, count = self.anatomy, self.anatomy.shape.num_hidden_layers
        head = 2 * seq_len * anatomy.shape.vocab_size * anatomy.shape.hidden_size
        blocks = anatomy.flops(seq_len) - head
        if self.graded_tensors | self.graded_outputs:
            layers, heads = _taylor_passes(self)
        elif self.run is None and self.method.allocator != "greedy-sublayers":
            more = (
                (self.compensator == "gain")
                + 2 * (self.compensator == "least-squares" and not self.method.sequential)
                - (self.options.get("rotation") == "shared")
            )
            layers, heads = count * (self.method.sweeps + more), 0
        else:
            layers, heads = _depth_passes(self)
        return round(windows * (blocks * layers / count + head * heads))

    def describe(self, seq_len: int, bytes_per_element: int) -> dict[str, Any]:
        """The plan as plain data."""
        before = self.anatomy.counts(seq_len, bytes_per_element)
        last = self.parts[-1].anatomy if self.parts else self.anatomy
        out: dict[str, Any] = {
            "method": self.method.name,
            "citation": self.method.citation,
            "request": self.request.describe(),
            "cuts": [axis for axis in self.method.axes if axis not in self.anatomy.refused],
            "compensator": self.compensator,
            "before": {"shape": self.anatomy.shape.describe(), **before},
            "notes": list(self.notes),
        }
        if self.target is not None:
            after = self.target.anatomy
            out["after"] = {"shape": after.shape.describe(), **after.counts(seq_len, bytes_per_element)}
            out["model_type"] = self.target.config.model_type
        elif self.budget is not None:
            fixed = last.num_params - last.block_params
            out["after"] = {"block_params": self.budget, "params": self.budget + fixed, "at_most": True}
            if self.parts:  # scores may decide what is inside the layers, but not this
                known = last.shape.describe().items()
                out["after"]["shape"] = {name: size for name, size in known if name not in hf.LAYER_SIZES}
        if self.sparsity is not None:
            density = 1 - self.sparsity
            out["sparsity"] = self.sparsity
            out["flops_if_zeros_were_free"] = {
                "matrices": last.flops(seq_len, density=density),
                "all": last.flops(seq_len, density=density, convention="all"),
            }
        if self.parts:
            out["parts"] = [part.describe(seq_len, bytes_per_element) for part in self.parts]
        if self.on_example:
            out["on_example"] = True
        return out | ({"step_params": self.step} if self.step else {})


def _choice(name: str, value: str | None, allowed: tuple[str, ...], method: Method) -> str:
    if value is None:
        return allowed[0]
    if value not in allowed:
        raise unknown(f"value for {name} of {method.name}", value, allowed)
    return value


_PER_LAYER = ("global-standardised", "least-error", "adaptive", "uniform", "uniform-free")  # these do with channels alone


def _refused_axes(method: Method, anatomy: Anatomy) -> tuple[str, ...]:
    """Notes on the kinds of axes that the method cuts and this model does not offer; UserError if it cannot do without."""
    gone = [axis for axis in method.axes if axis in anatomy.refused]
    if gone and (method.allocator not in _PER_LAYER or len(gone) == len(method.axes)):
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


def _sparse(plan: Plan, config: Any) -> Plan:
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


def _global(plan: Plan, config: Any) -> Plan:
    _refuse(plan, "target", "pattern")
    anatomy, ratio = plan.anatomy, _ratio(plan)
    budget = math.floor((1 - ratio) * anatomy.block_params)
    channels = [name for name in anatomy.axes if name.endswith(".intermediate")]
    if not channels:
        raise UserError(f"{plan.method.name}: no layer of this model has FFN channels left to cut")
    biased = _with_out_bias(plan, anatomy)
    channel = biased.unit_params(channels[0])
    step = channel * plan.multiple_of * (anatomy.shape.num_hidden_layers if plan.request.uniform else 1)
    if biased.block_params - anatomy.block_params >= ratio * anatomy.block_params or ratio * anatomy.block_params < step:
        least = max(step, biased.block_params - anatomy.block_params) / anatomy.block_params
        raise UserError(f"ratio: {ratio} is below one unit of this model; ask for more than {least:.4f}")
    fewest = Keep(
        {name: tuple(range(min(plan.multiple_of, anatomy.axes[name].size))) for name in channels}
        | {name: (0,) for name in anatomy.axes if name.endswith(".kv_heads")}
    )
    stays = fewest.anatomy_after(biased).block_params
    if budget < stays:
        most = 1 - stays / anatomy.block_params
        if "kv_heads" in anatomy.refused:
            raise UserError(f"ratio: {ratio} is more than this model's FFN channels can give; ask for less than {most:.4f}")
        raise UserError(
            f"ratio: the least that can stay (one unit of every axis) takes {stays:,} block parameters, but the target leaves "
            f"{budget:,}; ask for a smaller ratio (less than {most:.4f})"
        )
    notes: tuple[str, ...] = ()
    if plan.request.uniform:
        if "kv_heads" in anatomy.refused:
            raise UserError(f"uniform: it gives up KV groups, but {anatomy.refused['kv_heads']}; drop --uniform")
        if any(layer.skipped for layer in anatomy.shape.layers):
            raise UserError("uniform: some layers of this model lack a sub-layer, so they cannot be alike; drop --uniform")
        alike = anatomy.with_shape(anatomy.shape.with_layers(anatomy.shape.layers[:1] * anatomy.shape.num_hidden_layers))
        probe = target_for(config, alike, Keep(), out_bias=plan.out_bias)  # may refuse: said now, not after scoring
        notes = probe.notes
        if not probe.is_stock:
            raise UserError(
                f"uniform: a stock {anatomy.family.name} config has no place for {plan.method.name}'s biases; add "
                f"--compensate {plan.method.compensators[1]}, or drop --uniform"
            )
    else:
        notes = (
            "the scores decide each layer's size; the checkpoint will be of type "
            f"pruned_{config.model_type.removeprefix('pruned_')}, which loads with prunus or trust_remote_code=True"
            + (" (--uniform makes all layers alike)" if plan.method.allocator != "adaptive" else ""),
        )
    return replace(plan, budget=budget, step=step, notes=notes)


def _adaptive(plan: Plan, config: Any) -> Plan:
    _refuse(plan, "uniform", why="every layer loses a share of its own")
    return _global(plan, config)


def _with_out_bias(plan: Plan, anatomy: Anatomy) -> Anatomy:
    """The anatomy with the flags that the compensator's biases will turn on."""
    if not plan.out_bias:
        return anatomy
    if plan.request.uniform:
        stock = {flag for s in plan.out_bias for flag in anatomy.family.out_bias_flags.get(s, (f"{s}_out_bias",))}
        return anatomy.with_flags(*stock)
    return anatomy.with_flags("attention_out_bias", "mlp_out_bias")


def biased_anatomy(plan: Plan) -> Anatomy:
    """What unit costs are counted on: the source's sizes with the biases that the result will have."""
    return _with_out_bias(plan, plan.anatomy)


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


def _uniform(plan: Plan, config: Any) -> Plan:
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


def _width(plan: Plan, config: Any) -> Plan:
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
    if plan.compensator == "gain" and anatomy.family.centred:
        raise UserError(
            f"compensate: gain mends RMSNorms, but the norms of {anatomy.family.name} subtract the mean, so no gain mends "
            "them; drop it"
        )
    if plan.compensator == "gain" and hidden == shape.hidden_size:
        raise UserError("compensate: gain repairs the norms of a cut stem, but this plan leaves the stem whole; drop it")
    if hidden == shape.hidden_size and all(layer.intermediate_size == width for layer in shape.layers):
        raise UserError("target: these are the source's own sizes, so nothing would be cut; give smaller ones")
    counts = {f"layers.{i}.intermediate": width for i in range(shape.num_hidden_layers)} | {"hidden": hidden}
    keep = Keep({name: tuple(range(n)) for name, n in counts.items() if n < anatomy.axes[name].size})
    target = target_for(config, anatomy, keep, fold=False)
    channels = [target.anatomy.unit_params(f"layers.{i}.intermediate") for i in range(shape.num_hidden_layers)]
    step = sum(channels) * plan.multiple_of
    return replace(plan, counts=counts, target=target, step=step, notes=target.notes)


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

    def params(hidden: int, ffn: int) -> int:
        layers = tuple(LayerShape(x.num_attention_heads, x.num_key_value_heads, ffn) for x in shape.layers)
        return anatomy.with_shape(replace(shape, hidden_size=hidden, layers=layers)).block_params

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


def _rotation(plan: Plan, config: Any) -> Plan:
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


def _depth(plan: Plan, config: Any) -> Plan:
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


def sublayer_costs(plan: Plan) -> dict[str, int]:
    """The sub-layers that may go, by axis name, with the block parameters that each owns."""
    kinds = hf.SUBLAYERS if plan.options["sublayers"] == "both" else (plan.options["sublayers"],)
    axes = (f"layers.{i}.{kind}" for i in range(plan.anatomy.shape.num_hidden_layers) for kind in kinds)
    return {name: plan.anatomy.unit_params(name) for name in axes if name in plan.anatomy.axes}


def sublayer_rounds(plan: Plan) -> int:
    """About how many sub-layers will go: the scores decide which, and so how many the budget takes."""
    costs = sublayer_costs(plan)
    assert plan.budget is not None
    return math.ceil((plan.anatomy.block_params - plan.budget) * len(costs) / sum(costs.values()))


def _sublayers(plan: Plan, config: Any) -> Plan:
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


def _taylor_passes(plan: Plan) -> tuple[float, float]:
    """As `_depth_passes`. Back through a block is its forward pass again, the stream's gradient, and the weights'."""
    graded = {plan.anatomy.tensors[name].layer for name in plan.graded_tensors}
    outputs = {plan.anatomy.tensors[name].layer for name in plan.graded_outputs}
    count = plan.anatomy.shape.num_hidden_layers
    first = min(layer for layer in graded | outputs if layer is not None)
    after = 4 * count if outputs else 0  # once for the error curves, and three times while blocks are cut
    # the head's weights need no gradient
    return count + sum(2 + (layer in graded) for layer in range(first, count)) + after, 2


def _depth_passes(plan: Plan) -> tuple[float, float]:
    """Passes through one block of mean size, and through the LM head, that scoring takes for each window.

    A candidate costs what lies behind it; the stream in front of the candidates is run once a round.
    """
    count = plan.anatomy.shape.num_hidden_layers
    blocks = heads = 0.0
    if plan.budget is not None:  # the two sub-layers of a block are two candidates: half of what is left behind each
        costs = sublayer_costs(plan)
        for i in range(sublayer_rounds(plan)):
            left = count * (1 - i * sum(costs.values()) / len(costs) / plan.anatomy.block_params)
            blocks, heads = blocks + left + (len(costs) - i) * left / 2, heads + len(costs) - i
        return blocks, heads
    if plan.method.criterion == "block-influence":
        return count, 0
    assert plan.run is not None
    gap = plan.run if plan.method.allocator == "contiguous" else 1
    rounds = plan.run if plan.method.allocator == "greedy-layers" else 1
    first, last = plan.protected
    for n in range(count, count - rounds, -1):
        starts = range(first, n - last - gap + 1)
        blocks, heads = blocks + sum(n - gap - i for i in starts) + starts[-1], heads + len(starts)
    return blocks, heads
