"""A family's table at given sizes: every parameter with its shape, every axis with its spans, every count.

FLOPs follow "Small LLMs: Pruning vs Training from Scratch" table 9: every matrix of the blocks and the LM head once,
QK^T and AV over the full T x T square, nothing for norms, softmax, RoPE, activations, biases and the embedding gather.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from .axes import Axis, Span, kind_of
from .errors import UserError
from .families import Family, Param, family_of
from .shape import LayerShape, Shape

Exactness = Literal["exact", "fold", "inexact"]


@dataclass(frozen=True)
class Tensor_:
    """One declared parameter of a model: its shape, its row in the family's table, and where it belongs."""

    shape: tuple[int, ...]
    param: Param
    layer: int | None = None
    sublayer: str | None = None  # None outside the blocks, and for what both sub-layers of a block share

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def is_matrix(self) -> bool:
        """A weight matrix of a block: what sparse methods may prune."""
        return len(self.shape) == 2 and self.layer is not None


# beside each sub-layer of a sliced model: what takes the stream from the basis that it reads to the one that it writes
SHORTCUTS: dict[str, tuple[str | None, Param]] = {
    f"{sublayer}_shortcut.weight": (sublayer, Param((("hidden",), ("hidden",)))) for sublayer in ("attention", "mlp")
}


def _in_stream(param: Param, *, reads_only: bool = False) -> Param:
    """The same parameter in a sliced stream: its ``hidden`` dimensions become ``stream``, what it writes unless excepted."""
    stays = 0 if reads_only and not param.norm else None
    dims = (segs if i == stays else tuple(_STREAM.get(s, s) for s in segs) for i, segs in enumerate(param.dims))
    return replace(param, dims=tuple(dims))


_STREAM = {"hidden": "stream"}
_RAGGED = "its query heads share KV heads unevenly, so that there are no groups of one size; cut heads"


@dataclass(frozen=True)
class Anatomy:
    """All parameters and axes of one model, from its config alone."""

    family: Family
    shape: Shape
    flags: frozenset[str] = frozenset()

    @classmethod
    def of(cls, config: Any) -> Anatomy:
        """Read a Hugging Face config; raises UserError for an unknown family or a size that cannot be."""
        family = family_of(config.model_type)
        flags = {flag for flag in family.flags if getattr(config, flag, False)}
        return cls(family, Shape.of(config), frozenset(flags)).checked()

    def checked(self) -> Anatomy:
        """Self, or UserError where query heads cannot share the KV heads evenly."""
        for i, layer in enumerate(self.shape.layers):
            if bool(layer.num_attention_heads) != bool(layer.num_key_value_heads):
                raise UserError(
                    f"config.json: layer {i} has {layer.num_attention_heads} query heads and {layer.num_key_value_heads} KV "
                    "heads; both or neither can be 0"
                )
            uneven = layer.num_key_value_heads and layer.num_attention_heads % layer.num_key_value_heads
            if uneven and layer.kv_index is None:
                raise UserError(
                    f"config.json: layer {i} has {layer.num_attention_heads} query heads for {layer.num_key_value_heads} "
                    "KV heads; the first must be a multiple of the second"
                )
        return self

    def with_flags(self, *flags: str) -> Anatomy:
        """The same sizes with more optional parameters (biases)."""
        return replace(self, flags=self.flags | set(flags))

    def with_shape(self, shape: Shape) -> Anatomy:
        """The same family and flags at other sizes."""
        return replace(self, shape=shape)

    # -- parameters ---------------------------------------------------------------------------------------------------

    @cached_property
    def tensors(self) -> dict[str, Tensor_]:
        """Every parameter by its name in the state dict, tied head excluded."""
        out: dict[str, Tensor_] = {}
        for module, params in self.family.outer.items():
            for leaf, declared in params.items():
                if self._exists(declared):
                    param = _in_stream(declared) if self.is_sliced and module == self.family.embedding else declared
                    out[f"{module}.{leaf}"] = Tensor_(self._dims(param, None), param)
        table = self.family.block_params() | (SHORTCUTS if self.is_sliced else {})
        for i, layer in enumerate(self.shape.layers):
            for name, (sublayer, declared) in table.items():
                ends = i + 1 == self.shape.num_hidden_layers and sublayer == "mlp"  # what leaves the last block is hidden
                param = _in_stream(declared, reads_only=ends) if self.is_sliced else declared
                if sublayer not in layer.skipped and self._exists(param):
                    out[self.block_name(i) + name] = Tensor_(self._dims(param, layer), param, i, sublayer)
        return out

    @property
    def is_sliced(self) -> bool:
        """Whether the blocks hand on a sliced stream, each sub-layer in a basis of its own (SliceGPT)."""
        return self.shape.stream_size is not None

    def block_name(self, layer: int) -> str:
        """Prefix of a block's parameters: ``model.layers.3.``"""
        return f"{self.family.blocks}.{layer}."

    def _exists(self, param: Param) -> bool:
        flags = self.flags | ({"untied"} if not self.shape.tie_word_embeddings else set())
        return not param.when or any(flag in flags for flag in param.when)

    def _dims(self, param: Param, layer: LayerShape | None) -> tuple[int, ...]:
        return tuple(sum(self._dim(segment, layer) for segment in segments) for segments in param.dims)

    def _dim(self, segment: str, layer: LayerShape | None) -> int:
        s = self.shape
        if segment in ("hidden", "vocab"):
            return s.hidden_size if segment == "hidden" else s.vocab_size
        if segment == "head_dim":
            return s.head_dim
        if segment == "stream":
            assert s.stream_size is not None
            return s.stream_size
        assert layer is not None, segment
        sizes = {
            "q": layer.num_attention_heads * s.head_dim,
            "kv": layer.num_key_value_heads * s.head_dim,
            "qkv": 3 * layer.num_attention_heads * s.head_dim,
            "intermediate": layer.intermediate_size,
        }
        return sizes[segment]

    # -- axes ---------------------------------------------------------------------------------------------------------

    @cached_property
    def axes(self) -> dict[str, Axis]:
        """Every axis by name: ``layers``, ``hidden``, ``vocab``, and per layer ``layers.<i>.<axis>``; none that is refused."""
        spans: dict[str, list[Span]] = defaultdict(list)
        sizes: dict[str, int] = {"layers": self.shape.num_hidden_layers, "hidden": self.shape.hidden_size}
        sizes["vocab"] = self.shape.vocab_size
        for name, tensor in self.tensors.items():
            for dim, segments in enumerate(tensor.param.dims):
                self._add_spans(spans, sizes, name, tensor, dim, segments)
            if tensor.layer is not None:
                spans["layers"].append(Span(name, 0, block=tensor.shape[0], only=tensor.layer))
            if tensor.sublayer is not None:
                sublayer = f"layers.{tensor.layer}.{tensor.sublayer}"
                spans[sublayer].append(Span(name, 0, block=tensor.shape[0]))
                sizes[sublayer] = 1
        refused = self.refused
        return {n: Axis(n, size, tuple(spans[n])) for n, size in sizes.items() if kind_of(n) not in refused}

    @property
    def refused(self) -> Mapping[str, str]:
        """Kinds of axes that this model does not have, because no config could say the cut, and why."""
        out = dict(self.family.refused)
        for flag in sorted(self.flags & set(self.family.refused_if)):
            out |= self.family.refused_if[flag]
        return (dict.fromkeys(("kv_heads", "q_heads"), _RAGGED) if self.shape.is_ragged else {}) | out

    def _add_spans(
        self,
        spans: dict[str, list[Span]],
        sizes: dict[str, int],
        name: str,
        t: Tensor_,
        dim: int,
        segments: tuple[str, ...],
    ) -> None:
        layer = None if t.layer is None else self.shape.layers[t.layer]
        offset = 0
        for segment in segments:
            if segment in ("hidden", "vocab"):
                spans[segment].append(Span(name, dim, offset=offset))
            elif layer is not None and segment not in ("head_dim", "stream"):
                for axis, size, span in self._inner(segment, layer, name, dim, offset):
                    spans[f"layers.{t.layer}.{axis}"].append(span)
                    sizes[f"layers.{t.layer}.{axis}"] = size
            offset += self._dim(segment, layer)

    def _inner(self, segment: str, layer: LayerShape, name: str, dim: int, offset: int) -> list[tuple[str, int, Span]]:
        """The spans that one segment of a block's tensor gives to the axes inside its layer."""
        if segment == "intermediate":
            return [("intermediate", layer.intermediate_size, Span(name, dim, offset=offset))]
        head, groups, heads = self.shape.head_dim, layer.num_key_value_heads, layer.num_attention_heads
        per_group = heads // groups
        if segment == "kv":
            each = Span(name, dim, block=head, offset=offset)
            return [("kv_heads", groups, each), ("heads", heads, replace(each, shared=layer.kv_heads_read))]
        if segment == "qkv":
            each = Span(name, dim, block=3 * head, offset=offset)
            return [("kv_heads", groups, each), ("heads", heads, each)]
        strided = Span(name, dim, block=head, offset=offset, repeat=groups, stride=per_group * head)
        return [
            ("kv_heads", groups, Span(name, dim, block=per_group * head, offset=offset)),
            ("q_heads", per_group, strided),
            ("heads", heads, Span(name, dim, block=head, offset=offset)),
        ]

    def exactness(self, axis: str) -> Exactness:
        """How a sliced model relates to a zeroed one: ``exact``, equal once the norm gains are folded (``fold``), or not
        equal (``inexact``: LayerNorm subtracts the mean of all channels, so a zeroed one comes out as minus the mean).
        """
        if axis == "hidden" and self.family.centred:
            return "inexact"
        normed = any(self.tensors[s.param].param.norm for s in self.axes[axis].spans)
        whole = axis == "layers" or axis.endswith((".attention", ".mlp"))
        return "fold" if normed and not whole else "exact"

    @property
    def eps_scalable(self) -> bool:
        """Whether every norm runs over the stem, so that scaling the one epsilon makes the stem's fold exact."""
        norms = [t for t in self.tensors.values() if t.param.norm]
        return not self.family.centred and all(t.param.dims == (("hidden",),) for t in norms)

    def reader(self, axis: str) -> Span:
        """The span of the matrix that reads an inner axis (o_proj for heads, down_proj for FFN channels)."""
        return next(s for s in self.axes[axis].spans if s.dim == 1)

    # -- counts -------------------------------------------------------------------------------------------------------

    @cached_property
    def num_params(self) -> int:
        """All parameters, a tied embedding once."""
        return sum(t.numel for t in self.tensors.values())

    @cached_property
    def block_params(self) -> int:
        """Parameters of the blocks: embeddings, head and final norm excluded. `--ratio` is a fraction of these."""
        return sum(t.numel for t in self.tensors.values() if t.layer is not None)

    @cached_property
    def matrix_params(self) -> int:
        """Parameters of the blocks' weight matrices alone."""
        return sum(t.numel for t in self.tensors.values() if t.is_matrix)

    def unit_params(self, axis: str) -> int:
        """Parameters that go with one unit of an axis at the present sizes (for ``layers`` and ``heads``: with the first)."""
        total = 0
        for span in self.axes[axis].spans:
            if span.only in (None, 0):
                shape = self.tensors[span.param].shape
                rows = span.rows_per_unit if span.shared is None else len(span.gone((0,)))
                total += rows * math.prod(shape) // shape[span.dim]
        return total

    def flops(self, seq_len: int, *, density: float = 1.0, convention: Literal["matrices", "all"] = "matrices") -> int:
        """Forward FLOPs of one sequence of `seq_len` tokens.

        A sparse model's zeros cost nothing in theory: ``matrices`` scales the pruned matrices by `density` (18.6 TF for
        Llama-3.1-8B at 50 %); ``all`` scales everything, as the study printed it (16.5 TF).
        """
        s = self.shape
        attention = 4 * seq_len**2 * s.head_dim * sum(layer.num_attention_heads for layer in s.layers)
        head = 2 * seq_len * s.vocab_size * s.hidden_size
        blocks = 2 * seq_len * self.matrix_params
        if convention == "all":
            return round((blocks + head + attention) * density)
        return round(blocks * density) + head + attention

    def kv_bytes_per_token(self, bytes_per_element: int = 2) -> int:
        """KV-cache bytes that one token adds."""
        return 2 * self.shape.head_dim * bytes_per_element * sum(x.num_key_value_heads for x in self.shape.layers)

    def weight_bytes(self, bytes_per_element: int = 2) -> int:
        """Bytes of the stored weights."""
        return self.num_params * bytes_per_element

    def counts(self, seq_len: int, bytes_per_element: int) -> Mapping[str, int]:
        """The figures a plan prints."""
        return {
            "params": self.num_params,
            "block_params": self.block_params,
            "flops": self.flops(seq_len),
            "weight_bytes": self.weight_bytes(bytes_per_element),
            "kv_bytes_per_token": self.kv_bytes_per_token(bytes_per_element),
        }
