"""What a run will take, from the recipe and the config alone: memory of each device, speed, hours. Reads no weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .. import heap, measure
from ..anatomy import Anatomy
from ..distributed import processes
from ..errors import UserError
from ..shape import LayerShape, Shape
from .cache import bytes_of
from .loss import CHUNK
from .opening import Run, cutting_of
from .recipe import Recipe
from .shapes import Outline, config_of
from .shrink.clocked import clocked, known
from .shrink.cutting import Cutting
from .shrink.forecast import ASSUMED, Forecast
from .shrink.masks import too_short
from .sweep import prefix, tried

# Of the matmul rate that training reaches, unless a rate is stated. The recorded run of `nano` (results/train.jsonl) made 8.96e13
# FLOPs in 998 seconds: 90 GFLOP/s, 55 % of what its log says the two cores, busy with other work, made of one product.
EFFICIENCY = 0.5
UNCLOCKED = (
    "not counted: how much goes is known once milliseconds are measured, by the run before its first update, or now "
    "with --latency"
)


def check_rate(rate: float | None) -> None:
    """UserError for a stated rate that is not above 0 and finite."""
    if rate is not None and not 0 < rate < math.inf:
        raise UserError(
            f"rate: {rate:g} is not above 0 and finite; give the FLOPs a second that training reaches, or leave it out"
        )


@dataclass(frozen=True)
class Estimate:
    """Bytes on each of `devices`; tokens a second and hours of all together. What a sweep of rates takes is in the hours."""

    weights: int
    gradients: int
    moments: int
    activations: int
    logits: int
    devices: int
    flops_per_token: float
    tokens_per_s: float
    hours: float

    @property
    def memory(self) -> int:
        """Of one device."""
        return self.weights + self.gradients + self.moments + self.activations + self.logits

    def describe(self, available: int | None) -> dict[str, Any]:
        """As plain data; with `available` bytes a device, whether it fits and what to lower if not."""
        out: dict[str, Any] = {**vars(self), "memory": self.memory}
        if available is not None:
            out |= {"available": available, "fits": self.memory <= available}
            if self.memory > available:
                held = self.activations + self.logits
                mend = (
                    "micro_batch, or set checkpoint_activations"
                    if held > self.memory - held
                    else "the shape, or take more devices"
                )
                out["mend"] = f"it needs {self.memory / 1e9:.1f} GB of {available / 1e9:.1f} GB a device; lower {mend}"
        return out


def estimate(
    recipe: Recipe,
    anatomy: Anatomy,
    *,
    teacher: Anatomy | None = None,
    devices: int = 1,
    rate: float | None = None,
    cuts: Forecast | None = None,
) -> Estimate:
    """Weights, gradients and moments are shared out over devices; a teacher and the activations of a micro-batch are not.

    A teacher whose words are read from a cache takes no memory and no time; a snapshot takes the source's, and its FLOPs are
    among those of `cuts`. `cuts` save time but no memory, which is asked for
    before the first of them; FLOPs and speed are means over the run then.
    `rate`: FLOPs a second of one device, as reached in training; else half the float32 matmul rate measured here now.
    """
    width = _stream(recipe.precision)
    shape, tokens = anatomy.shape, recipe.micro_batch * recipe.data.seq_len
    params = anatomy.num_params
    trained = params if recipe.lora is None else _adapter_params(anatomy, recipe.lora.rank)
    seq_len = recipe.data.seq_len
    flops = 3 * anatomy.flops(seq_len) / seq_len
    if cuts is not None:
        flops = cuts.flops / (recipe.steps * recipe.batch_tokens)
    snapshot = recipe.teacher is not None and recipe.teacher.snapshot
    taught = params * width if snapshot else 0 if teacher is None else teacher.num_params * width
    if teacher is not None:
        flops += teacher.flops(seq_len) / seq_len
    speed = devices * (rate or EFFICIENCY * measure.gemm_rate()) / flops
    return Estimate(
        weights=params * width // devices + taught,
        gradients=trained * width // devices,
        moments=2 * trained * width // devices,
        activations=kept(anatomy, recipe, tokens),
        logits=min(tokens, CHUNK) * shape.vocab_size * 4 * (2 if recipe.teacher is None else 4),
        devices=devices,
        flops_per_token=flops,
        tokens_per_s=speed,
        hours=(recipe.tokens + tried(recipe)) / speed / 3600,
    )


def kept(anatomy: Anatomy, recipe: Recipe, tokens: int) -> int:
    """Bytes that stay between the way forward and the way back, parameters left out.

    As torch's fused attention and transformers' Llama keep them, which the tests count. At the shape of `nano`, llama, smollm3,
    seed_oss, and mistral and qwen2 without windows are met within a percent, gemma and phi3 within 10 %. Others differ: qwen3 and
    olmo2 keep up to 25 % more (norms of queries and keys), gemma3 up to 60 % and gemma2 up to 100 % more (four norms a block, and
    attention that is not fused), olmo, phi and gpt_neox up to 25 % less. With adapters 10 % less is kept, but in
    bfloat16 40 % more: peft's are float32, and so are their inputs.
    """
    shape, precision = anatomy.shape, recipe.precision
    blocks = [_kept_by(layer, shape, recipe) for layer in shape.layers]
    copies = [0] * len(blocks)
    if precision == "bfloat16-autocast":  # of the matrices, beside the parameters
        for t in anatomy.tensors.values():
            if t.layer is not None and t.is_matrix:
                copies[t.layer] += 2 * t.numel
    stream = _stream(precision) * shape.hidden_size
    if recipe.checkpoint_activations:
        inside = tokens * (len(blocks) * stream + max(blocks)) + max(copies)
    else:
        inside = tokens * sum(blocks) + sum(copies)
    head = 4 * shape.vocab_size * shape.hidden_size  # gradients of the head are made on the way forward
    return inside + tokens * (_norm(shape, precision) + stream) + head


def _kept_by(layer: LayerShape, shape: Shape, recipe: Recipe) -> int:
    """Bytes a token that one block keeps: the inputs of norms and products, and what attention and the gate read again."""
    inside = 2 if recipe.precision.startswith("bfloat16") else 4
    each = recipe.precision == "bfloat16-autocast"  # products that read the same each cast it for themselves
    stream, norm = inside * shape.hidden_size, _norm(shape, recipe.precision)
    query, key, mask = layer.num_attention_heads, layer.num_key_value_heads, 0
    if recipe.data.separate_documents:  # with a mask, keys and values are repeated for every query head
        key, mask = query, inside * recipe.data.seq_len
    if layer.kv_index is not None:
        key = query
    out = 0
    if query:  # input of q, k, v; queries and output; keys and values; log of the sums in float32
        out += mask + norm + stream * (3 if each else 1) + inside * shape.head_dim * (2 * query + 2 * key) + 4 * query
    if layer.intermediate_size:  # input of gate, up; gate, its activation, up, their product
        out += norm + stream * (2 if each else 1) + inside * 4 * layer.intermediate_size
    return out


def _norm(shape: Shape, precision: str) -> int:
    """Of one norm: its input in float32, the same normalised, and what it was divided by."""
    return (4 + _stream(precision)) * shape.hidden_size + 4


def _stream(precision: str) -> int:
    """Bytes of a number in weights and residual stream."""
    return 2 if precision == "bfloat16" else 4


def planned(
    recipe: Recipe, *, devices: int = 1, rate: float | None = None, memory: float | None = None, latency: bool = False
) -> dict[str, Any]:
    """The estimate of a recipe as plain data; `memory` in GB of one device. UserError for what the recipe names wrongly.

    Milliseconds that decide what is cut are those that this machine's table has; `latency` measures what it lacks.
    """
    if devices < 1:
        raise UserError(f"devices: {devices} are too few; give at least 1")
    check_rate(rate)
    if memory is not None and not memory > 0:
        raise UserError(f"memory: {memory} is not above 0")
    source = None if recipe.model.source is None else Outline.of(recipe.model.source)
    asked = recipe.model
    config = config_of(asked.shape or "", 0, asked.target_params, asked.enlarge) if source is None else source.config
    anatomy = Anatomy.of(config)
    cutting = _clocked(cutting_of(recipe, config), recipe.dtype, latency)
    unknown = cutting is not None and cutting.part.clocked and not cutting.clocks
    cuts = None if cutting is None or unknown else Forecast(cutting, recipe)
    part = recipe.teacher
    taught = None if part is None or part.cache or part.snapshot else Outline.of(part.source or "")
    teacher = None if taught is None else taught.anatomy
    vocab_size, read = anatomy.shape.vocab_size, recipe.steps * recipe.batch_tokens
    found = estimate(recipe, anatomy, teacher=teacher, devices=devices, rate=rate, cuts=cuts)
    whole = found if cuts is None else estimate(recipe, anatomy, teacher=teacher, devices=devices, rate=rate or 1.0)
    basis = "stated rate" if rate is not None else f"{EFFICIENCY:.0%} of the float32 matmul rate measured now"
    plain = found.describe(None if memory is None else round(memory * 1e9))
    return {
        "recipe": recipe.name,
        "params": anatomy.num_params,
        "tokens": recipe.tokens,
        "steps": recipe.steps,
        "basis": basis,
        "notes": [
            *dict.fromkeys(filter(None, [source and source.note, taught and taught.note, too_short(recipe), _tries(recipe)]))
        ],
        "flops": round(found.flops_per_token * (recipe.tokens + tried(recipe))),
        "pruning": {"unknown": UNCLOCKED}
        if unknown
        else None
        if cuts is None
        else {
            "params": cuts.end.num_params,
            "groups": cuts.groups,
            "saved": 1 - found.flops_per_token / whole.flops_per_token,
            "assumed": ASSUMED,
        },
        "teacher_cache": None if part is None or part.cache is None else bytes_of(read, part.top_k or 0, vocab_size),
    } | plain


def too_large(run: Run) -> str | None:
    """A word of warning for a run that will not fit into the memory that is free now, with what to lower."""
    free = heap.free_bytes()
    if free is None:
        return None
    teacher = None if run.teacher is None else run.teacher.anatomy
    found = estimate(run.recipe, run.anatomy, teacher=teacher, devices=processes(), rate=1.0)
    return found.describe(free // processes()).get("mend")


def _tries(recipe: Recipe) -> str | None:
    if not recipe.optimizer.sweeps:
        return None
    return f"{len(recipe.optimizer.rates)} rates are tried on {prefix(recipe):,} updates each; FLOPs and hours have them in"


def _clocked(cutting: Cutting | None, dtype: str, measure: bool) -> Cutting | None:
    """With the milliseconds that decide, as far as they are known."""
    if cutting is None or not cutting.part.timed:
        return cutting
    table = known(cutting.part, cutting.config, cutting.anatomy, dtype, measure=measure)
    return cutting if table is None else clocked(cutting, table)


def _adapter_params(anatomy: Anatomy, rank: int) -> int:
    return sum(rank * sum(t.shape) for t in anatomy.tensors.values() if t.is_matrix and t.layer is not None)
