"""Named shapes for fresh weights: the nano ladder, and SmolLM2's own. Fields of a Hugging Face config."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..anatomy import Anatomy
from ..errors import UserError, unknown

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


def config_of(shape: str | dict[str, Any], vocab_size: int) -> PreTrainedConfig:
    """The config of a named shape, or of fields; UserError for what no family takes, or for a tokenizer that is too large."""
    from transformers import AutoConfig

    if isinstance(shape, str):
        if shape not in SHAPES:
            raise unknown("shape", shape, SHAPES)
        shape = SHAPES[shape]
    fields = dict(shape)
    kind = fields.pop("model_type", None)
    if not isinstance(kind, str):
        raise UserError("model.shape: it has no model_type; give for example model_type: llama")
    try:
        config = AutoConfig.for_model(kind, **fields)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"model.shape: {str(error).strip().splitlines()[-1]}") from error
    if config.vocab_size < vocab_size:
        raise UserError(
            f"model.shape: a vocabulary of {config.vocab_size:,} is too small for the tokenizer's {vocab_size:,} tokens"
        )
    Anatomy.of(config).checked()
    return config


def fresh(config: PreTrainedConfig, *, init: str, seed: int, dtype: torch.dtype) -> PreTrainedModel:
    """A model with fresh weights as its family draws them. ``depth-scaled``: what writes into the stream is divided by
    sqrt(2 L), so that its variance does not grow with depth (GPT-2).
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    anatomy = Anatomy.of(config)
    if init == "depth-scaled":
        scale = (2 * anatomy.shape.num_hidden_layers) ** -0.5
        with torch.no_grad():
            for name, tensor in anatomy.tensors.items():
                if tensor.is_matrix and tensor.layer is not None and tensor.param.dims[0] == ("hidden",):
                    model.get_parameter(name).mul_(scale)
    return model.to(dtype)
