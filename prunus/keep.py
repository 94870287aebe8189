"""The decision: which units (`Keep`) or which single weights (`WeightMask`) stay. Pure data."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .anatomy import Anatomy
from .axes import kind_of, layer_of
from .errors import UserError, unknown
from .shape import LayerShape

FORMAT = 1
_MOST_UNITS = 10_000_000  # a range longer than any axis is a mistake, not an allocation
_AXIS = re.compile(r"(?:layers\.[0-9]{1,9}\.)?[a-z_]+")


@dataclass(frozen=True)
class Keep:
    """Axis name -> kept units, sorted. An axis that is not named keeps everything.

    Axes inside a layer are named by the layer's index *before* the cut, also when `layers` itself is cut.
    """

    units: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def validated(self, anatomy: Anatomy) -> Keep:
        """Self, or UserError naming the axis and value that does not fit the model."""
        for name, kept in self.units.items():
            axis = anatomy.axes.get(name)
            if axis is None and kind_of(name) in anatomy.refused:
                raise UserError(f"keep: '{name}' cannot be cut: {anatomy.refused[kind_of(name)]}")
            if axis is None:
                raise unknown("axis", name, anatomy.axes)
            if list(kept) != sorted(set(kept)):
                raise UserError(f"keep: the units of '{name}' must be sorted and unique, got {list(kept)[:8]}")
            if kept and not (0 <= kept[0] and kept[-1] < axis.size):
                bad = kept[0] if kept[0] < 0 else kept[-1]
                raise UserError(f"keep: '{name}' has units 0 to {axis.size - 1}, got {bad}")
            if not kept and kind_of(name) not in ("attention", "mlp"):
                raise UserError(f"keep: '{name}' would keep no unit; remove the sub-layer or the layer instead")
            if kind_of(name) == "heads" and (other := self._of_groups(name)):
                raise UserError(f"keep: '{name}' and '{other}' both cut the layer's query heads; name one of them")
        return self

    def _of_groups(self, name: str) -> str | None:
        """An axis of the same layer that cuts its query heads by groups."""
        others = (name.removesuffix("heads") + kind for kind in ("kv_heads", "q_heads"))
        return next((other for other in others if other in self.units), None)

    def dropped(self, name: str, size: int) -> list[int]:
        """Units of an axis that go."""
        kept = set(self.units.get(name, range(size)))
        return [u for u in range(size) if u not in kept]

    def then(self, later: Keep, anatomy: Anatomy) -> Keep:
        """One decision for two cuts in a row: `later` speaks of the model that this one leaves of `anatomy`."""
        out = dict(self.units)
        for name, kept in later.units.items():
            original = self.original(name, anatomy)
            first = self.units.get(original)
            out[original] = tuple(kept) if first is None else tuple(first[u] for u in kept)
        return Keep(out)

    def original(self, name: str, anatomy: Anatomy) -> str:
        """The name in `anatomy` of an axis of the model that this leaves of it."""
        layer = layer_of(name)
        survivors = self.units.get("layers", range(anatomy.shape.num_hidden_layers))
        return name if layer is None else f"layers.{survivors[layer]}.{kind_of(name)}"

    def anatomy_after(self, anatomy: Anatomy) -> Anatomy:
        """The model's anatomy once this is cut."""
        shape = anatomy.shape

        def size(name: str, default: int) -> int:
            return len(self.units[name]) if name in self.units else default

        def layer(i: int, old: LayerShape) -> LayerShape:
            channels = size(f"layers.{i}.intermediate", old.intermediate_size) * size(f"layers.{i}.mlp", 1)
            if not size(f"layers.{i}.attention", 1) or not old.num_key_value_heads:
                return LayerShape(0, 0, channels)
            heads = self.units.get(f"layers.{i}.heads")
            if heads is not None:
                return LayerShape.mapped([old.kv_heads_read[q] for q in heads], channels)
            if old.kv_index is not None:
                return replace(old, intermediate_size=channels)
            groups = size(f"layers.{i}.kv_heads", old.num_key_value_heads)
            per_group = size(f"layers.{i}.q_heads", old.num_attention_heads // old.num_key_value_heads)
            return LayerShape(groups * per_group, groups, channels)

        layers = [layer(i, shape.layers[i]) for i in self.units.get("layers", range(shape.num_hidden_layers))]
        cut = type(shape)(
            size("hidden", shape.hidden_size),
            shape.head_dim,
            size("vocab", shape.vocab_size),
            shape.tie_word_embeddings,
            tuple(layers),
            shape.stream_size,
        )
        return anatomy.with_shape(cut)

    def to_json(self) -> dict[str, Any]:
        """Plain data with kept units as ranges: ``"0-5,7"``."""
        return {"format": FORMAT, "keep": {name: _ranges(kept) for name, kept in self.units.items()}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str = "keep.json") -> Keep:
        """Read `to_json`'s form; UserError names the entry that does not parse."""
        entries = data.get("keep")
        if data.get("format") != FORMAT or not isinstance(entries, Mapping):
            raise UserError(f"{where}: expected format {FORMAT} with a 'keep' table, got keys {sorted(map(str, data))}")
        if (wrong := next((name for name in entries if not _AXIS.fullmatch(str(name))), None)) is not None:
            raise UserError(
                f"{where}: keep of '{wrong}', which is called like no axis; names are such as layers.0.intermediate"
            )
        return cls({str(name): _units(text, f"{where}: keep of '{name}'") for name, text in entries.items()})


def _ranges(units: tuple[int, ...]) -> str:
    parts: list[list[int]] = []
    for u in units:
        if parts and parts[-1][1] == u - 1:
            parts[-1][1] = u
        else:
            parts.append([u, u])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def _units(text: object, where: str) -> tuple[int, ...]:
    if not isinstance(text, str):
        raise UserError(f"{where} must be text such as '0-5,7', got {text!r}")
    units: list[int] = []
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first or last - first > _MOST_UNITS:
            raise UserError(f"{where} must be ranges such as '0-5,7', got {part!r}")
        units.extend(range(first, last + 1))
    return tuple(units)


@dataclass(frozen=True)
class WeightMask:
    """Parameter name -> bool tensor of its shape, True where the weight stays (unstructured or n:m)."""

    kept: Mapping[str, Tensor]

    @cached_property
    def sparsity(self) -> float:
        """Fraction of zeros over all masked matrices."""
        total = alive = 0
        for mask in self.kept.values():
            total += mask.numel()
            alive += int(mask.sum())
        return 1.0 - alive / total

    def packed(self) -> Iterator[tuple[str, Tensor]]:
        """One uint8 tensor a parameter, eight weights a byte (numpy's big-endian bit order)."""
        for name, mask in self.kept.items():
            yield name, torch.from_numpy(np.packbits(mask.numpy().reshape(-1)))

    def to_packed(self) -> dict[str, Tensor]:
        """All of `packed` at once."""
        return dict(self.packed())

    @classmethod
    def from_packed(cls, packed: Mapping[str, Tensor], anatomy: Anatomy) -> WeightMask:
        """Undo `to_packed`; shapes come from the anatomy."""
        out = {}
        for name, bits in packed.items():
            spec = anatomy.tensors.get(name)
            if spec is None or bits.numel() != (spec.numel + 7) // 8:
                raise UserError(f"mask: '{name}' does not fit the model's parameters; was it made for another model?")
            flat = np.unpackbits(bits.numpy(), count=spec.numel).astype(bool)
            out[name] = torch.from_numpy(flat).reshape(spec.shape)
        return cls(out)

    def describe(self) -> str:
        """One line for people."""
        return json.dumps({"matrices": len(self.kept), "sparsity": round(self.sparsity, 6)})
