"""Shapes for fresh weights: the nano ladder and released models' by name, fields of a Hugging Face config, or a checkpoint's.

And what a plan goes by: a model, or where that is not here the shape that was published of it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from ..anatomy import Anatomy
from ..errors import UserError, unknown
from ..source import UNREADABLE, Source

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def _llama(vocab: int, hidden: int, layers: int, heads: int, groups: int, head_dim: int, ffn: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "intermediate_size": ffn,
        "tie_word_embeddings": True,
        "max_position_embeddings": 2048,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "nano": _llama(4096, 192, 6, 6, 2, 32, 512),  # 3.1 M parameters
    "nano-mha": _llama(4096, 192, 6, 6, 6, 32, 512),
    "micro": _llama(4096, 320, 8, 10, 2, 32, 864),  # 10 M
    "smollm2-135m": _llama(49152, 576, 30, 9, 3, 64, 1536)
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}},
}


@cache
def released() -> Mapping[str, dict[str, Any]]:
    """Released models by name: fields of their configs."""
    text = (resources.files("prunus") / "train" / "released.yaml").read_text(encoding="utf-8")
    made: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return made


@dataclass(frozen=True)
class Outline:
    """What a plan needs to know of a model."""

    config: PreTrainedConfig
    anatomy: Anatomy
    note: str | None = None  # where it is the published shape of a model that is not here

    @classmethod
    def of(cls, name: str) -> Outline:
        """Of a source, by its config and headers; UserError if it is not here and no shape of that name is known."""
        try:
            opened = Source.open(name)
            return cls(opened.config, opened.anatomy)
        except UserError:
            if name not in released() or Path(name).expanduser().exists():
                raise
        config = config_of(name, 0)
        return cls(config, Anatomy.of(config), f"the shape of {name} is as published; the model itself is not here")


def config_of(
    shape: str | dict[str, Any], vocab_size: int, target_params: int | None = None, enlarge: float | None = None
) -> PreTrainedConfig:
    """The config of a named shape, of a checkpoint's folder, or of fields; with `target_params` its widths are scaled.

    `enlarge` makes its FFN so many times as wide.

    UserError for what no family takes, and for a tokenizer that is too large.
    """
    if isinstance(shape, str) and is_folder(shape):
        config = Source.open(str(checkpoint_of(shape))).config
    else:
        config = _of_fields(shape)
    if config.vocab_size < vocab_size:
        raise UserError(
            f"model.shape: a vocabulary of {config.vocab_size:,} is too small for the tokenizer's {vocab_size:,} tokens"
        )
    Anatomy.of(config).checked()
    if target_params is not None:
        config = _scaled(config, target_params)
    return config if enlarge is None else enlarged(config, enlarge)


def is_folder(shape: str) -> bool:
    """Whether a shape is that of a checkpoint; one of ours goes before a folder that is called the same."""
    return shape not in SHAPES and Path(shape).expanduser().is_dir()


def checkpoint_of(folder: str) -> Path:
    """A checkpoint's folder: itself, or what a training run left in it. UserError for a run that is not at its end."""
    path = Path(folder).expanduser()
    if (path / "config.json").exists() or not (path / "recipe.json").exists():
        return path
    if not (path / "model" / "config.json").exists():
        raise UserError(f"{folder}: this run is not finished, so it has no model yet; go on with the command that began it")
    return path / "model"


def _of_fields(shape: str | dict[str, Any]) -> PreTrainedConfig:
    from transformers import AutoConfig

    if isinstance(shape, str):
        known = {**SHAPES, **released()}
        if shape not in known:
            raise unknown("shape", shape, known)
        shape = known[shape]
    fields = copy.deepcopy(shape)
    kind = fields.pop("model_type", None)
    if not isinstance(kind, str):
        raise UserError("model.shape: it has no model_type; give for example model_type: llama")
    try:
        return AutoConfig.for_model(kind, **fields)
    except UNREADABLE as error:
        raise UserError(f"model.shape: {str(error).strip().splitlines()[-1]}") from error


_STEP = 8  # scaled widths are multiples of it
_NEAR = 0.01  # of the parameters asked for


def _scaled(config: PreTrainedConfig, params: int) -> PreTrainedConfig:
    """The config with KV groups, query heads and stem in proportion, and the FFN that brings it to `params`.

    Of all numbers of groups the one whose FFN is nearest to the same multiple of the stem. UserError if none comes near.
    """
    shape = Anatomy.of(config).shape
    first = shape.layers[0]
    if not shape.is_uniform:
        raise UserError("model.target_params: only a shape whose layers are alike can be scaled; drop it")
    groups, per_group = first.num_key_value_heads, first.num_attention_heads // first.num_key_value_heads
    ratio = first.intermediate_size / shape.hidden_size

    def sized(count: int, ffn: int) -> PreTrainedConfig:
        out = copy.deepcopy(config)
        out.hidden_size = _STEP * max(1, round(shape.hidden_size * count / groups / _STEP))
        out.num_key_value_heads, out.num_attention_heads = count, count * per_group
        out.head_dim, out.intermediate_size = shape.head_dim, ffn
        return out

    def num_params(count: int, ffn: int) -> int:
        return Anatomy.of(sized(count, ffn)).num_params

    best: tuple[float, int, int] | None = None
    for count in range(1, 16 * groups + 1):
        least = num_params(count, _STEP)
        if least > params * (1 + _NEAR):
            break
        ffn = _STEP * (1 + max(0, round((params - least) / (num_params(count, 2 * _STEP) - least))))
        odd = abs(math.log(ffn / sized(count, ffn).hidden_size / ratio))
        if abs(num_params(count, ffn) / params - 1) <= _NEAR and (best is None or odd < best[0]):
            best = odd, count, ffn
    if best is None:
        raise UserError(
            f"model.target_params: no width of this shape comes within 1 % of {params:,} parameters; change the shape"
        )
    return sized(*best[1:])


def enlarged(config: PreTrainedConfig, factor: float) -> PreTrainedConfig:
    """The config with another FFN width, a whole multiple of `_STEP`."""
    widths = {layer.intermediate_size for layer in Anatomy.of(config).shape.layers}
    if len(widths) > 1 or 0 in widths:
        raise UserError("model.enlarge: only a shape whose layers are alike can be enlarged; drop it")
    out = copy.deepcopy(config)
    out.intermediate_size = _STEP * max(1, round(factor * widths.pop() / _STEP))
    return out


def fresh(config: PreTrainedConfig, *, init: str, seed: int, dtype: torch.dtype) -> PreTrainedModel:
    """A model with fresh weights as its family draws them. ``depth-scaled``: what writes into the stream is divided by
    sqrt(2 L), so that its variance does not grow with depth (GPT-2).
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if init == "depth-scaled":
        anatomy = Anatomy.of(config)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.mul_(depth_scale(anatomy, name))
    return model.to(dtype)


def depth_scale(anatomy: Anatomy, name: str) -> float:
    """What a tensor is multiplied by where weights are depth-scaled."""
    tensor = anatomy.tensors[name]
    writes = tensor.is_matrix and tensor.layer is not None and tensor.param.dims[0] == ("hidden",)
    return (2 * anatomy.shape.num_hidden_layers) ** -0.5 if writes else 1.0
