"""Gemma 1, 2 and 3 (text): gain 1 + w, embeddings scaled by sqrt(hidden_size), sandwich norms from the second on."""

from __future__ import annotations

from .base import Family, norm
from .llama import attention, mlp

_BIAS = ("attention_bias",)
_SANDWICH_MLP = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
_BEHIND = ("post_attention_layernorm", "post_feedforward_layernorm")


def _attention(*, sandwich: bool, head_norm: bool = False) -> dict:
    table = attention(qkv=_BIAS, out=_BIAS, head_norm=head_norm)
    return table | {"post_attention_layernorm": norm()} if sandwich else table


GEMMA = Family(
    name="gemma",
    model_types=("gemma",),
    attention=_attention(sandwich=False),
    mlp=mlp(),
    gain="one_plus_weight",
    embedding_scaled=True,
    out_bias_flags={"attention": _BIAS},
    per_layer_lists=(),
)
GEMMA2 = Family(
    name="gemma2",
    model_types=("gemma2",),
    attention=_attention(sandwich=True),
    mlp=mlp(before=_SANDWICH_MLP),
    gain="one_plus_weight",
    norms_behind=_BEHIND,
    embedding_scaled=True,
    hidden_multiple_of_heads=True,
    out_bias_flags={"attention": _BIAS},
)
GEMMA3 = Family(
    name="gemma3",
    model_types=("gemma3_text",),
    attention=_attention(sandwich=True, head_norm=True),
    mlp=mlp(before=_SANDWICH_MLP),
    gain="one_plus_weight",
    norms_behind=_BEHIND,
    embedding_scaled=True,
    hidden_multiple_of_heads=True,
    out_bias_flags={"attention": _BIAS},
)
