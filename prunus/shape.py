"""Sizes of a decoder, one entry a layer. "Uniform" is a property of a shape, not a mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .errors import UserError


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one block. A sub-layer that was removed has zero heads or zero channels."""

    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    kv_index: tuple[int, ...] | None = None  # query head -> KV head, where they are not shared evenly and in order

    @classmethod
    def mapped(cls, kv_index: Sequence[int], intermediate_size: int) -> LayerShape:
        """Of a map from query heads to KV heads, numbered anew: those that no query head reads are gone."""
        number = {kv: new for new, kv in enumerate(sorted(set(kv_index)))}
        even = cls(len(kv_index), len(number), intermediate_size)
        index = tuple(number[kv] for kv in kv_index)
        return even if index == even.kv_heads_read and len(index) % len(number) == 0 else replace(even, kv_index=index)

    @property
    def kv_heads_read(self) -> tuple[int, ...]:
        """Query head -> the KV head that it reads."""
        if self.kv_index is not None:
            return self.kv_index
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        return tuple(q * groups // heads for q in range(heads))

    @property
    def skipped(self) -> tuple[str, ...]:
        """The sub-layers this block lacks."""
        gone = (("attention", self.num_attention_heads), ("mlp", self.intermediate_size))
        return tuple(name for name, size in gone if size == 0)


@dataclass(frozen=True)
class Shape:
    """All sizes of a decoder: what a config says, and nothing else."""

    hidden_size: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    layers: tuple[LayerShape, ...]
    stream_size: int | None = None  # of a sliced stream, whose basis shortcut matrices change at every sub-layer (SliceGPT)

    @classmethod
    def of(cls, config: Any) -> Shape:
        """Read the sizes of a Hugging Face config (also one with `per_layer_config`); reads no weight."""
        heterogeneous = getattr(config, "is_heterogeneous", False)
        count = _size(config, "num_hidden_layers")
        if not count:
            raise UserError("config.json: num_hidden_layers is 0; a model has at least one layer")
        layers = tuple(_layer(config.per_layer_config[i] if heterogeneous else config) for i in range(count))
        hidden = _size(config, "hidden_size")
        head_dim = getattr(config, "head_dim", None)
        if head_dim is None:
            heads = _size(config.per_layer_config[0] if heterogeneous else config, "num_attention_heads")
            head_dim = hidden // heads
        stream = None if getattr(config, "stream_size", None) is None else _size(config, "stream_size")
        return cls(hidden, head_dim, _size(config, "vocab_size"), bool(config.tie_word_embeddings), layers, stream)

    @classmethod
    def uniform(
        cls,
        *,
        num_hidden_layers: int,
        hidden_size: int,
        intermediate_size: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        vocab_size: int,
        tie_word_embeddings: bool,
    ) -> Shape:
        """A shape whose layers are all alike."""
        layer = LayerShape(num_attention_heads, num_key_value_heads, intermediate_size)
        return cls(hidden_size, head_dim, vocab_size, tie_word_embeddings, (layer,) * num_hidden_layers)

    @property
    def num_hidden_layers(self) -> int:
        """Number of blocks."""
        return len(self.layers)

    @property
    def is_uniform(self) -> bool:
        """All blocks alike and complete: what a stock config can say."""
        return len(set(self.layers)) == 1 and not self.layers[0].skipped and not self.is_ragged

    @property
    def is_ragged(self) -> bool:
        """Some block's query heads do not share its KV heads evenly and in order."""
        return any(layer.kv_index is not None for layer in self.layers)

    def with_layers(self, layers: tuple[LayerShape, ...]) -> Shape:
        """The same stem with other blocks."""
        return replace(self, layers=layers)

    def describe(self) -> dict[str, Any]:
        """Sizes as plain data; a size that differs between layers is the list of its values."""
        out: dict[str, Any] = {"num_hidden_layers": self.num_hidden_layers, "hidden_size": self.hidden_size}
        if self.stream_size is not None:
            out["stream_size"] = self.stream_size
        for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
            values = [getattr(layer, name) for layer in self.layers]
            out[name] = values[0] if len(set(values)) == 1 else values
        return out | {"head_dim": self.head_dim, "vocab_size": self.vocab_size, "tied": self.tie_word_embeddings}


def _size(config: Any, name: str) -> int:
    value = getattr(config, name, None)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UserError(f"config.json: {name} is {value!r}, but a whole number is needed; is this a decoder's config?")
    return value


def _layer(config: Any) -> LayerShape:
    heads = _size(config, "num_attention_heads")
    kv_heads = getattr(config, "num_key_value_heads", None)
    skip = getattr(config, "skip", None) or ()
    attention, mlp = "attention" not in skip, "mlp" not in skip
    index = getattr(config, "kv_index", None)
    if attention and index is not None:
        if (
            not isinstance(index, list)
            or len(index) != heads
            or set(index) != set(range(_size(config, "num_key_value_heads")))
        ):
            raise UserError(
                f"config.json: kv_index is {index!r}, but it must name for each of {heads} query heads one of {kv_heads} KV "
                "heads, and each of these for some query head"
            )
        return LayerShape.mapped(index, _size(config, "intermediate_size") * mlp)
    return LayerShape(
        heads * attention,
        (heads if kv_heads is None else kv_heads) * attention,
        _size(config, "intermediate_size") * mlp,
    )
