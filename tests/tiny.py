"""Tiny random models, one config a family, with weights large enough that every unit matters."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor

VOCAB, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 61, 32, 3, 8, 4, 8, 24
# Tests that look at folded gains want an epsilon that is nothing next to the stem's mean square (about 1 here): where
# norms over other sizes share the config's one epsilon it cannot be scaled with the stem, and the fold misses by eps.
NO_EPS = 1e-12

_LLAMA_LIKE = {"head_dim": HEAD_DIM}
_SEED = _LLAMA_LIKE | {"attention_bias": True, "residual_dropout": 0.0}
_GEMMA = {"head_dim": HEAD_DIM, "sliding_window": 4, "query_pre_attn_scalar": 8}
_PARTIAL = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
_SEQUENTIAL = _PARTIAL | {"use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True}


@dataclass(frozen=True)
class Case:
    """One family variant: the config class's stem and the fields that are not `BASE`."""

    stem: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    lacks: tuple[str, ...] = ()  # fields of `BASE` that the config class does not know


BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 64,
    "attention_dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]

CASES: dict[str, Case] = {
    "llama": Case("Llama", _LLAMA_LIKE | {"tie_word_embeddings": False}),
    "llama_tied": Case("Llama", _LLAMA_LIKE | {"tie_word_embeddings": True}),
    "llama_bias": Case("Llama", _LLAMA_LIKE | {"attention_bias": True, "mlp_bias": True}),
    "llama_mha": Case("Llama", _LLAMA_LIKE | {"num_key_value_heads": HEADS}),
    "llama_gqa4": Case("Llama", _LLAMA_LIKE | {"num_key_value_heads": 2}),
    "llama_mqa": Case("Llama", _LLAMA_LIKE | {"num_key_value_heads": 1}),
    "mistral": Case("Mistral", _LLAMA_LIKE | {"sliding_window": 4}),
    "qwen2": Case("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "layer_types": MIXED}),
    "qwen3": Case("Qwen3", _LLAMA_LIKE | {"rms_norm_eps": NO_EPS}),
    "smollm3": Case("SmolLM3", {"no_rope_layers": [1, 0, 1], "tie_word_embeddings": True}),
    "gemma": Case("Gemma", _LLAMA_LIKE | {"tie_word_embeddings": True}),
    "gemma_untied": Case("Gemma", _LLAMA_LIKE | {"tie_word_embeddings": False}),
    "gemma2": Case("Gemma2", _GEMMA | {"layer_types": MIXED, "tie_word_embeddings": True}),
    "gemma3": Case("Gemma3Text", _GEMMA | {"layer_types": MIXED, "tie_word_embeddings": True, "rms_norm_eps": NO_EPS}),
    "olmo": Case("Olmo", _LLAMA_LIKE | {"clip_qkv": 2.0}),
    "olmo2": Case("Olmo2", {"rms_norm_eps": NO_EPS}),
    "phi": Case("Phi", _LLAMA_LIKE | _PARTIAL),
    "phi_tied": Case("Phi", _LLAMA_LIKE | _PARTIAL | {"tie_word_embeddings": True}),
    "phi_qk": Case("Phi", _PARTIAL | {"qk_layernorm": True}),  # takes the size of a head from hidden_size: 4
    "phi3": Case("Phi3"),
    "seed_oss": Case("SeedOss", _SEED | {"attention_out_bias": False, "mlp_bias": False}),  # as released
    "seed_oss_bias": Case("SeedOss", _SEED | {"attention_out_bias": True, "mlp_bias": True}),
    "gpt_neox": Case("GPTNeoX", _PARTIAL, ("num_key_value_heads",)),
    "gpt_neox_sequential": Case("GPTNeoX", _SEQUENTIAL, ("num_key_value_heads",)),
}


def tiny_config(name: str, **changes: Any) -> Any:
    """The Hugging Face config of `CASES[name]` with `changes`."""
    case = CASES[name]
    fields = {name: value for name, value in BASE.items() if name not in case.lacks} | dict(case.fields) | changes
    for listed in ("layer_types", "no_rope_layers"):  # lists have one entry a layer
        if fields.get(listed) is not None:
            fields[listed] = fields[listed][: fields["num_hidden_layers"]]
    return getattr(transformers, f"{case.stem}Config")(**fields)


def grown(config: Any, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """A random model of `config` whose every parameter matters.

    Matrices have unit gain (std 1 / sqrt(inputs) times 1.2), the embedding is of size 1, gains and biases are random.
    transformers' own initialisation has std 0.02, gains of 1 and biases of 0: the blocks would hardly move the logits.
    """
    from transformers import AutoModelForCausalLM

    import prunus.modeling_pruned  # noqa: F401  (registers the pruned types)

    # built in its dtype: `.to(float64)` would keep float32's sqrt(hidden_size) in Gemma's embedding scale
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=dtype)
            if "norm" in name:
                p.add_(noise * 0.3)
            elif p.dim() == 1:
                p.copy_(noise * 0.5)
            elif "embed_" in name:
                p.copy_(noise / (config.hidden_size**0.5 if "gemma" in config.model_type else 1.0))
            else:
                p.copy_(noise * (1.2 / p.shape[1] ** 0.5))
    return model


def tokens(*shape: int, seed: int = 0, vocab: int = VOCAB) -> Tensor:
    """Random token ids without the three special ones."""
    return torch.randint(3, vocab, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(model: Any, ids: Tensor) -> Tensor:
    """Logits without a cache."""
    return model(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def greedy_by_hand(model: Any, ids: Tensor, new: int) -> Tensor:
    """Greedy continuation by full forwards, without any cache."""
    for _ in range(new):
        ids = torch.cat([ids, logits_of(model, ids)[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids


@torch.no_grad()
def greedy_stepwise(model: Any, ids: Tensor, new: int) -> Tensor:
    """Greedy continuation token by token; the model finds positions from the cache alone, which `generate` tells it."""
    cache, last = None, ids
    for _ in range(new):
        out = model(input_ids=last, past_key_values=cache, use_cache=True)
        cache, last = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, last], dim=1)
    return ids


def greedy_cached(model: Any, ids: Tensor, new: int) -> Tensor:
    """Greedy continuation by `generate`, with the KV cache, always `new` tokens long."""
    model.generation_config.eos_token_id = None
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, use_cache=True, pad_token_id=0
    )


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference, as a fraction of the largest value of `b`."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


def spans_rows(span: Any, units: Iterable[int]) -> list[int]:
    """Rows of units by the definition in `Span`'s docstring, with loops."""
    out = []
    for u in units:
        if span.only is not None:
            if u != span.only:
                continue
            u = 0
        u = u if span.shared is None else span.shared[u]
        for r in range(span.repeat):
            for j in range(span.block):
                out.append(span.offset + r * span.stride + u * span.block + j)
    return out


def gone_rows(span: Any, size: int, units: Iterable[int]) -> list[int]:
    """Rows of units that go, less those that a unit that stays has a part in."""
    stays = {row for u in range(size) if u not in units for row in spans_rows(span, [u])} if span.only is None else set()
    return sorted(set(spans_rows(span, units)) - stays)


def clone(model: Any) -> Any:
    """A deep copy."""
    return copy.deepcopy(model)
