"""Phi-3: q, k and v in one projection, gate and up in one."""

from __future__ import annotations

from .base import Family, linear, norm

PHI3 = Family(
    name="phi3",
    model_types=("phi3",),
    attention={
        "input_layernorm": norm(),
        "self_attn.qkv_proj": linear(("q", "kv", "kv"), "hidden"),
        "self_attn.o_proj": linear("hidden", "q", bias=("attention_out_bias",)),
    },
    mlp={
        "post_attention_layernorm": norm(),
        "mlp.gate_up_proj": linear(("intermediate", "intermediate"), "hidden"),
        "mlp.down_proj": linear("hidden", "intermediate", bias=("mlp_out_bias",)),
    },
)
