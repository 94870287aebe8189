"""OLMo 2: norms after each sub-layer, and q/k norms over all heads at once (so cutting heads needs the gain fold)."""

from __future__ import annotations

from .base import Family, norm
from .llama import attention, mlp

_BIAS = ("attention_bias",)


def _attention() -> dict:
    table = attention(qkv=_BIAS, out=_BIAS)
    del table["input_layernorm"]
    return table | {"self_attn.q_norm": norm("q"), "self_attn.k_norm": norm("kv"), "post_attention_layernorm": norm()}


OLMO2 = Family(
    name="olmo2",
    model_types=("olmo2",),
    attention=_attention(),
    mlp=mlp(before=("post_feedforward_layernorm",)),
    out_bias_flags={"attention": _BIAS},
)
