"""What a model family is: a table that names, for every parameter, the axis of each of its dimensions.

Dimension names: ``hidden`` (the residual stem), ``q`` (query heads x head_dim), ``kv`` (KV heads x head_dim),
``intermediate`` (FFN channels), ``vocab``, ``head_dim``. A fused projection concatenates several: ``("q", "kv", "kv")``;
``qkv`` is one that has, head after head, its query, key and value (as many KV heads as query heads).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

DIMS = ("hidden", "q", "kv", "qkv", "intermediate", "vocab", "head_dim")
AXES = ("layers", "attention", "mlp", "kv_heads", "q_heads", "heads", "intermediate", "hidden", "vocab")
NormKind = Literal["rms", "layer", "bare layer"]  # RMSNorm; LayerNorm with gain and bias; LayerNorm without parameters


@dataclass(frozen=True)
class Param:
    """One parameter: for each dimension the names of the segments laid end to end along it."""

    dims: tuple[tuple[str, ...], ...]
    when: tuple[str, ...] = ()  # exists if any of these config flags is true; always, if empty
    norm: bool = False  # the gain of a normalisation over its only dimension


def _segments(dim: str | tuple[str, ...]) -> tuple[str, ...]:
    return (dim,) if isinstance(dim, str) else dim


def linear(out: str | tuple[str, ...], inp: str, *, bias: tuple[str, ...] | bool = False) -> dict[str, Param]:
    """Weight [out, in] and, when the config flags named by `bias` (or True) say so, a bias [out]."""
    params = {"weight": Param((_segments(out), _segments(inp)))}
    if bias:
        params["bias"] = Param((_segments(out),), when=bias if isinstance(bias, tuple) else ())
    return params


def norm(dim: str = "hidden", kind: NormKind = "rms") -> dict[str, Param]:
    """The parameters of a norm over `dim`: a gain, and for LayerNorm a bias, or nothing."""
    gain = {"weight": Param((_segments(dim),), norm=True)}
    return {"rms": gain, "layer": gain | {"bias": Param((_segments(dim),))}, "bare layer": {}}[kind]


@dataclass(frozen=True)
class Family:
    """One declarative row: which tensors a decoder has, and what its configuration can and cannot say."""

    name: str
    model_types: tuple[str, ...]
    attention: Mapping[str, Mapping[str, Param]]  # module inside a block -> its parameters; norms belong to a sub-layer
    mlp: Mapping[str, Mapping[str, Param]]
    shared: Mapping[str, Mapping[str, Param]] = field(default_factory=dict)  # what both sub-layers read: stays with a block
    norm: NormKind = "rms"  # of the norms over the stem; LayerNorm subtracts the mean, so cutting the stem is inexact
    gain: Literal["weight", "one_plus_weight"] = "weight"  # RMSNorm multiplies by w, or by 1 + w (Gemma)
    norms_behind: tuple[str, ...] = ()  # modules of norms over the stem that read what a sub-layer writes (Gemma 2, OLMo 2)
    embedding_scaled: bool = False  # embeddings are multiplied by sqrt(hidden_size) (Gemma)
    hidden_multiple_of_heads: bool = False  # the config refuses hidden_size % num_attention_heads != 0
    alternatives: tuple[str, ...] = ()  # stock types that run the same weights where this one refuses sizes or biases
    out_bias_flags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # sub-layer -> flags of a stock bias
    per_layer_lists: tuple[str, ...] = ("layer_types",)  # config lists with one entry a layer
    config_lacks: tuple[str, ...] = ()  # sizes that the config has no field for (GPT-NeoX)
    refused: Mapping[str, str] = field(default_factory=dict)  # kind of axis -> why no config can say a cut of it
    refused_if: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # the same under a config flag
    saved_as: Mapping[str, str] = field(default_factory=dict)  # name in the model -> name in the stock type's files
    head_bias: bool = False
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"

    @property
    def outer(self) -> dict[str, dict[str, Param]]:
        """Parameters outside the blocks; the head's matrix exists only if it is not tied to the embedding."""
        head = {"weight": Param((("vocab",), ("hidden",)), when=("untied",))}
        return {
            self.embedding: {"weight": Param((("vocab",), ("hidden",)))},
            self.final_norm: norm(kind=self.norm),
            self.head: head | ({"bias": Param((("vocab",),))} if self.head_bias else {}),
        }

    @property
    def centred(self) -> bool:
        """Whether the norms over the stem subtract the mean (LayerNorm): then no fold makes a cut of the stem exact."""
        return self.norm != "rms"

    @property
    def unrotatable(self) -> str | None:
        """Why the stream cannot be turned into another basis; None if every norm over it is an RMSNorm that reads it."""
        if self.centred:
            return f"the norms of {self.name} subtract the mean over the channels, which depends on their basis"
        if self.norms_behind:
            return f"{self.norms_behind[0]} of {self.name} multiplies what goes into the stream channel by channel"
        return None

    @property
    def flags(self) -> frozenset[str]:
        """Every config flag that a parameter of this family depends on."""
        tables = (self.attention, self.mlp, self.shared, self.outer)
        return frozenset(f for t in tables for module in t.values() for p in module.values() for f in p.when)

    def block_params(self) -> dict[str, tuple[str | None, Param]]:
        """Name inside a block -> (sub-layer or None, Param)."""
        out: dict[str, tuple[str | None, Param]] = {}
        for sublayer, table in (("attention", self.attention), ("mlp", self.mlp), (None, self.shared)):
            for module, params in table.items():
                for leaf, param in params.items():
                    out[f"{module}.{leaf}"] = (sublayer, param)
        return out
