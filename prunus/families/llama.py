"""Decoders with separate projections and RMSNorm on the stem: Llama, Mistral, Qwen2, Qwen3, SmolLM3, Seed-OSS."""

from __future__ import annotations

from .base import Family, Param, linear, norm

# A per-layer checkpoint of ours may add output biases alone; see `modeling_pruned.py`.
_ATTENTION_OUT = ("attention_out_bias",)
_MLP_OUT = ("mlp_out_bias",)


def attention(
    *, qkv: tuple[str, ...] | bool = False, out: tuple[str, ...] = (), head_norm: bool = False
) -> dict[str, dict[str, Param]]:
    """Input norm, q, k, v, o; `qkv` and `out` name the config flags of their biases."""
    table = {
        "input_layernorm": norm(),
        "self_attn.q_proj": linear("q", "hidden", bias=qkv),
        "self_attn.k_proj": linear("kv", "hidden", bias=qkv),
        "self_attn.v_proj": linear("kv", "hidden", bias=qkv),
        "self_attn.o_proj": linear("hidden", "q", bias=(*out, *_ATTENTION_OUT)),
    }
    if head_norm:  # over head_dim, shared by all heads: no axis runs through it
        table |= {"self_attn.q_norm": norm("head_dim"), "self_attn.k_norm": norm("head_dim")}
    return table


def mlp(*, bias: tuple[str, ...] = (), before: tuple[str, ...] = ("post_attention_layernorm",)) -> dict:
    """The norms of the sub-layer, then gate, up, down."""
    return {
        **{name: norm() for name in before},
        "mlp.gate_proj": linear("intermediate", "hidden", bias=bias),
        "mlp.up_proj": linear("intermediate", "hidden", bias=bias),
        "mlp.down_proj": linear("hidden", "intermediate", bias=(*bias, *_MLP_OUT)),
    }


LLAMA = Family(
    name="llama",
    model_types=("llama",),
    attention=attention(qkv=("attention_bias",), out=("attention_bias",)),
    mlp=mlp(bias=("mlp_bias",)),
    hidden_multiple_of_heads=True,
    alternatives=("mistral", "seed_oss"),
    out_bias_flags={"attention": ("attention_bias",), "mlp": ("mlp_bias",)},
    per_layer_lists=(),
)
MISTRAL = Family(name="mistral", model_types=("mistral",), attention=attention(), mlp=mlp(), alternatives=("seed_oss",))
QWEN2 = Family(name="qwen2", model_types=("qwen2",), attention=attention(qkv=True), mlp=mlp())
QWEN3 = Family(
    name="qwen3",
    model_types=("qwen3",),
    attention=attention(qkv=("attention_bias",), out=("attention_bias",), head_norm=True),
    mlp=mlp(),
    out_bias_flags={"attention": ("attention_bias",)},
)
SMOLLM3 = Family(
    name="smollm3",
    model_types=("smollm3",),
    attention=attention(qkv=("attention_bias",), out=("attention_bias",)),
    mlp=mlp(bias=("mlp_bias",)),
    out_bias_flags={"attention": ("attention_bias",), "mlp": ("mlp_bias",)},
    per_layer_lists=("layer_types", "no_rope_layers"),
)
SEED_OSS = Family(
    name="seed_oss",
    model_types=("seed_oss",),
    attention=attention(qkv=("attention_bias",)),  # its stock flag for o is named attention_out_bias, like ours
    mlp=mlp(bias=("mlp_bias",)),
    out_bias_flags={"attention": ("attention_out_bias",), "mlp": ("mlp_bias",)},
    per_layer_lists=(),
)
