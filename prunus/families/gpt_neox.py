"""GPT-NeoX (Pythia): q, k and v of each head side by side in one projection, LayerNorms, an MLP without a gate.

With `use_parallel_residual` the MLP reads the block's input, without it the stream behind attention. Either way each of
the two norms is read by one sub-layer.
"""

from __future__ import annotations

from .base import Family, linear, norm

_BIAS = ("attention_bias",)
_WHY = "a gpt_neox config makes the size of a head from hidden_size and num_attention_heads, so heads and stem stay"

GPT_NEOX = Family(
    name="gpt_neox",
    model_types=("gpt_neox",),
    attention={
        "input_layernorm": norm(kind="layer"),
        "attention.query_key_value": linear("qkv", "hidden", bias=_BIAS),
        "attention.dense": linear("hidden", "q", bias=(*_BIAS, "attention_out_bias")),
    },
    mlp={
        "post_attention_layernorm": norm(kind="layer"),
        "mlp.dense_h_to_4h": linear("intermediate", "hidden", bias=True),
        "mlp.dense_4h_to_h": linear("hidden", "intermediate", bias=True),
    },
    norm="layer",
    out_bias_flags={"attention": _BIAS, "mlp": ()},  # the MLP's is always there
    per_layer_lists=(),
    config_lacks=("num_key_value_heads", "head_dim"),
    refused=dict.fromkeys(("hidden", "kv_heads", "q_heads", "heads"), _WHY),
    saved_as={"lm_head.weight": "embed_out.weight"},
    blocks="gpt_neox.layers",
    embedding="gpt_neox.embed_in",
    final_norm="gpt_neox.final_layer_norm",
)
