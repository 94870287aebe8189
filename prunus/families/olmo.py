"""OLMo: LayerNorms without parameters. OLMo 2: norms after each sub-layer, and q/k norms over all heads at once."""

from __future__ import annotations

from .base import Family, norm
from .llama import attention, mlp

_BIAS = ("attention_bias",)
_BARE = norm(kind="bare layer")

OLMO = Family(
    name="olmo",
    model_types=("olmo",),
    attention=attention(qkv=_BIAS, out=_BIAS) | {"input_layernorm": _BARE},
    mlp=mlp() | {"post_attention_layernorm": _BARE},
    norm="bare layer",
    out_bias_flags={"attention": _BIAS},
    per_layer_lists=(),
)


def _attention() -> dict:
    """Norms behind the sub-layer; q and k norms span all heads, so cutting heads needs the gain fold."""
    table = attention(qkv=_BIAS, out=_BIAS)
    del table["input_layernorm"]
    return table | {"self_attn.q_norm": norm("q"), "self_attn.k_norm": norm("kv"), "post_attention_layernorm": norm()}


OLMO2 = Family(
    name="olmo2",
    model_types=("olmo2",),
    attention=_attention(),
    mlp=mlp(before=("post_feedforward_layernorm",)),
    norms_behind=("post_attention_layernorm", "post_feedforward_layernorm"),
    out_bias_flags={"attention": _BIAS},
)
