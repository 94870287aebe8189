"""Phi: attention and MLP side by side behind one LayerNorm, all matrices with biases. Phi-3: q, k and v in one projection,
gate and up in one.
"""

from __future__ import annotations

from .base import Family, Param, linear, norm

_QK = ("qk_layernorm",)
_QK_WHY = "with qk_layernorm the config makes the size of a head from hidden_size and num_attention_heads"


def _head_norm() -> dict[str, Param]:
    return {leaf: Param(param.dims, when=_QK, norm=param.norm) for leaf, param in norm("head_dim", "layer").items()}


PHI = Family(
    name="phi",
    model_types=("phi",),
    attention={
        "self_attn.q_proj": linear("q", "hidden", bias=True),
        "self_attn.k_proj": linear("kv", "hidden", bias=True),
        "self_attn.v_proj": linear("kv", "hidden", bias=True),
        "self_attn.dense": linear("hidden", "q", bias=True),
        "self_attn.q_layernorm": _head_norm(),
        "self_attn.k_layernorm": _head_norm(),
    },
    mlp={
        "mlp.fc1": linear("intermediate", "hidden", bias=True),
        "mlp.fc2": linear("hidden", "intermediate", bias=True),
    },
    shared={"input_layernorm": norm(kind="layer")},
    norm="layer",
    out_bias_flags={"attention": (), "mlp": ()},  # the biases are always there
    per_layer_lists=(),
    refused_if={"qk_layernorm": dict.fromkeys(("hidden", "kv_heads", "q_heads", "heads"), _QK_WHY)},
    final_norm="model.final_layernorm",
    head_bias=True,
)

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
