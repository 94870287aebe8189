"""What a cut will be, worked out from the config alone: no weight is read here."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from . import hf
from .anatomy import Anatomy
from .axes import Axis
from .costs import Prices, is_timed
from .criteria import TAYLOR_RULES
from .hf import Target
from .keep import Keep
from .methods import Method
from .search import SURVIVORS

BATCH = 4  # windows at a time, unless --batch-size says otherwise
LOSS_WINDOWS, FEW_WINDOWS = 8, 2  # calibration windows that a loss is measured on, and a search's first look


@dataclass(frozen=True)
class Request:
    """What a user asks for. Every field is checked against the method and the model by `builders.make_plan`."""

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
    allocate: str | None = None  # where the cut falls, of the method's allocators
    cost: str | None = None  # what the ratio is of, and what a unit's score is divided by
    order: str | None = None  # sequential or dense: what statistics of a block see of the blocks before it

    def describe(self) -> dict[str, Any]:
        """The request as plain data, without what was not said."""
        data = {k: v for k, v in vars(self).items() if v not in (None, False, ()) and v != {}}
        plain = {Mapping: dict, tuple: list}
        return {k: next((to(v) for kind, to in plain.items() if isinstance(v, kind)), v) for k, v in data.items()}


@dataclass(frozen=True)
class Plan:
    """A checked request: exactly one of `budget`, `counts`, `candidates`, `run`, `sparsity` says where the cut falls.

    A combination has `parts` instead, the plans of its methods in their order; what else it says is of them all.
    """

    request: Request
    method: Method
    anatomy: Anatomy
    compensator: str
    options: Mapping[str, str]
    multiple_of: int
    allocator: str = ""
    sequential: bool = False
    budget: int | None = None  # what may stay of the plan's cost: block parameters (biases included) unless said
    prices: Prices | None = None  # what units cost, where a budget is shared out among them
    candidates: tuple[Mapping[str, int], ...] = ()  # counts to choose from by the loss
    counts: Mapping[str, int] = field(default_factory=dict)  # axis -> units kept
    run: int | None = None  # layers to remove
    sparsity: float | None = None
    pattern: tuple[int, int] | None = None
    target: Target | None = None  # None where the scores decide the sizes
    step: int = 0  # block parameters of the smallest lawful step
    notes: tuple[str, ...] = ()
    parts: tuple[Plan, ...] = ()
    on_example: bool = False  # made for sizes like those that the scores of the part before will decide

    @property
    def cost(self) -> str:
        """What `budget` counts."""
        return self.request.cost or "params"

    @property
    def criterion(self) -> str:
        """The method's criterion, with the reduction that it is used with."""
        reduction = self.options.get("reduction")
        return self.method.criterion if reduction is None else f"{self.method.criterion}:{reduction}"

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
            return self.budget if self.cost == "params" else None
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

    def candidate_sizes(self, counts: Mapping[str, int]) -> dict[str, Any]:
        """A candidate's sizes and block parameters; its layers are alike."""
        after = Keep({name: tuple(range(n)) for name, n in counts.items()}).anatomy_after(biased_anatomy(self))
        layer = after.shape.layers[0]
        sizes = {"hidden_size": after.shape.hidden_size, "num_key_value_heads": layer.num_key_value_heads}
        return {**sizes, "intermediate_size": layer.intermediate_size, "block_params": after.block_params}

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

    def memory_bytes(self, windows: int, seq_len: int, bytes_per_element: int) -> int:
        """Memory of the cut: the weights, what scores of so many windows take, and masks."""
        anatomy, shape = self.anatomy, self.anatomy.shape
        widest = max(layer.intermediate_size for layer in shape.layers)
        activations = BATCH * seq_len * (4 * widest + 8 * shape.hidden_size) * 4
        sweep = (windows * seq_len * shape.hidden_size * 4 + activations) * self.needs_text
        memory = anatomy.weight_bytes(bytes_per_element) + (self.gradient_bytes(BATCH, seq_len) or sweep)
        return memory + (anatomy.matrix_params if "weights" in self.method.axes else 0)  # a bool a weight

    def scoring_flops(self, windows: int, seq_len: int) -> int:
        """FLOPs of the passes over the calibration windows."""
        if self.parts:
            return sum(part.scoring_flops(windows, seq_len) for part in self.parts)
        anatomy, count = self.anatomy, self.anatomy.shape.num_hidden_layers
        head = 2 * seq_len * anatomy.shape.vocab_size * anatomy.shape.hidden_size
        blocks = anatomy.flops(seq_len) - head
        if self.graded_tensors | self.graded_outputs:
            layers, heads = _taylor_passes(self)
        elif self.run is None and self.allocator != "greedy-sublayers":
            more = (
                (self.compensator == "gain")
                + 2 * (self.compensator == "least-squares" and not self.sequential)
                - (self.options.get("rotation") == "shared")
            )
            layers, heads = count * (self.method.sweeps + more), 0
        else:
            layers, heads = _depth_passes(self)
        tried = sum(share * windows for share in self._tried(windows))
        return round(windows * (blocks * layers / count + head * heads) + tried * (blocks + head))

    def _tried(self, windows: int) -> list[float]:
        """Of every whole model whose loss is asked, the share of `windows` that it is asked on."""
        whole, few = min(LOSS_WINDOWS, windows) / windows, min(FEW_WINDOWS, windows) / windows
        if self.allocator != "search":
            return [whole] * len(self.candidates)
        children = int(self.options["generations"]) * int(self.options["offspring"])
        return [whole] * (2 + children // SURVIVORS) + [few] * children

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
            **({"allocator": self.allocator} if self.allocator else {}),
            **({"order": "sequential" if self.sequential else "dense"} if self.method.either_order else {}),
            "before": {"shape": self.anatomy.shape.describe(), **before},
            "notes": list(self.notes),
        }
        if self.target is not None:
            after = self.target.anatomy
            out["after"] = {"shape": after.shape.describe(), **after.counts(seq_len, bytes_per_element)}
            out["model_type"] = self.target.config.model_type
        elif self.cost != "params":
            assert self.prices is not None
            unit = " ns" if is_timed(self.cost) else ""
            out["budget"] = {"cost": self.cost, "at_most": self.budget, "of": self.prices.source, "unit": unit}
        elif self.budget is not None:
            fixed = last.num_params - last.block_params
            out["after"] = {"block_params": self.budget, "params": self.budget + fixed, "at_most": True}
            if self.parts:  # scores may decide what is inside the layers, but not this
                known = last.shape.describe().items()
                out["after"]["shape"] = {name: size for name, size in known if name not in hf.LAYER_SIZES}
        if self.candidates:
            out["candidates"] = [self.candidate_sizes(counts) for counts in self.candidates]
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


def _taylor_passes(plan: Plan) -> tuple[float, float]:
    """As `_depth_passes`. Back through a block is its forward pass again, the stream's gradient, and the weights'."""
    graded = {plan.anatomy.tensors[name].layer for name in plan.graded_tensors}
    outputs = {plan.anatomy.tensors[name].layer for name in plan.graded_outputs}
    count = plan.anatomy.shape.num_hidden_layers
    first = min(layer for layer in graded | outputs if layer is not None)
    more = float(plan.options.get("words", 0))  # windows of the vocabulary, for each of text
    after = count * (1 + 3 * (1 + more)) if outputs else 0  # once for the error curves, and three times while blocks are cut
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
    gap = plan.run if plan.allocator == "contiguous" else 1
    rounds = plan.run if plan.allocator == "greedy-layers" else 1
    first, last = plan.protected
    for n in range(count, count - rounds, -1):
        starts = range(first, n - last - gap + 1)
        blocks, heads = blocks + sum(n - gap - i for i in starts) + starts[-1], heads + len(starts)
    return blocks, heads
