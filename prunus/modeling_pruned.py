"""Decoders whose layers differ in size, for checkpoints of type ``pruned_<family>``.

This file travels with every per-layer checkpoint. It needs torch and transformers and nothing of prunus: import it (or
pass ``trust_remote_code=True``) and ``AutoModelForCausalLM.from_pretrained`` loads such a folder.

The sizes stand in the config under Hugging Face's own ``per_layer_config`` schema (PR 45333); transformers 5.15 to 5.23
read that schema but build every layer from the global sizes, so the classes below rebuild each layer from its own entry.
An entry's ``kv_index`` says for every query head which KV head it reads, where they are not shared evenly and in order; the
KV cache holds each KV head once.
``attention_out_bias`` and ``mlp_out_bias`` add a bias to the projection that leaves a sub-layer (FLAP's compensation).
``stream_size`` says that the blocks hand on a stream of that size, in another basis at every sub-layer (SliceGPT).
"""

import copy
import sys

import torch
import transformers
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# transformers' names, and the norms of each sub-layer, which go when the whole sub-layer goes
_LLAMA_NORMS = {"attention": ("input_layernorm",), "mlp": ("post_attention_layernorm",)}
_SANDWICH_NORMS = {
    "attention": ("input_layernorm", "post_attention_layernorm"),
    "mlp": ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
}
BASES = {
    "llama": ("Llama", _LLAMA_NORMS),
    "mistral": ("Mistral", _LLAMA_NORMS),
    "qwen2": ("Qwen2", _LLAMA_NORMS),
    "qwen3": ("Qwen3", _LLAMA_NORMS),
    "smollm3": ("SmolLM3", _LLAMA_NORMS),
    "seed_oss": ("SeedOss", _LLAMA_NORMS),
    "phi3": ("Phi3", _LLAMA_NORMS),
    "gemma": ("Gemma", _LLAMA_NORMS),
    "gemma2": ("Gemma2", _SANDWICH_NORMS),
    "gemma3_text": ("Gemma3", _SANDWICH_NORMS),
    "olmo": ("Olmo", _LLAMA_NORMS),
    "olmo2": ("Olmo2", {"attention": ("post_attention_layernorm",), "mlp": ("post_feedforward_layernorm",)}),
    "phi": ("Phi", {"attention": (), "mlp": ()}),  # one norm for both, which stays
    "gpt_neox": ("GPTNeoX", _LLAMA_NORMS),
}
# what the modules are called; the decoder stands in the model, the rest in a layer, output projections in their sub-layer
_LLAMA_NAMES = {
    "decoder": "model",
    "attention": "self_attn",
    "attention_out": "o_proj",
    "mlp": "mlp",
    "mlp_out": "down_proj",
}
_OTHER_NAMES = {
    "phi": {"attention_out": "dense", "mlp_out": "fc2"},
    "gpt_neox": {"decoder": "gpt_neox", "attention": "attention", "attention_out": "dense", "mlp_out": "dense_4h_to_h"},
}
NAMES = {model_type: _LLAMA_NAMES | _OTHER_NAMES.get(model_type, {}) for model_type in BASES}


class Skipped(nn.Module):  # no "Attention" in its name: transformers searches the source for such classes
    """In place of an attention that was removed: adds nothing to the stream."""

    def __init__(self, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states, *args, past_key_values=None, layer_past=None, **kwargs):
        """Zeros of the input's shape. The cache gets one number a token, because its length is read off its layers."""
        cache = layer_past if past_key_values is None else past_key_values  # GPT-NeoX's name for it is the second
        if cache is not None:
            marker = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            cache.update(marker, marker, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class NoMLP(nn.Module):
    """In place of an MLP that was removed: adds nothing to the stream."""

    def forward(self, hidden_states):
        """Zeros of the input's shape."""
        return torch.zeros_like(hidden_states)


BY_KV_INDEX = "prunus_kv_index"  # what the attention backend of a layer with a `kv_index` is called


def attend_by_kv_index(module, query, key, value, attention_mask, **kwargs):
    """The model's own backend, given for every query head [batch, heads, tokens, head_dim] the KV head that it reads."""
    eager = sys.modules[type(module).__module__].eager_attention_forward
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(module.config.backend, eager)
    key, value = (torch.stack([heads[:, kv] for kv in module.config.kv_index], dim=1) for heads in (key, value))
    return attend(module, query, key, value, attention_mask, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(BY_KV_INDEX, attend_by_kv_index)


def _with_bias(linear):
    if linear.bias is not None:
        return linear
    return nn.Linear(linear.in_features, linear.out_features, device=linear.weight.device, dtype=linear.weight.dtype)


class Shortcuts:
    """Mixed into a block of a sliced model: what passes a sub-layer by changes its basis in a shortcut matrix."""

    def forward(self, hidden_states, **kwargs):
        """As any block with a norm in front of each sub-layer. Phi-3's dropout on the stream is left out."""
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = self.attention_shortcut(hidden_states) + attended
        return self.mlp_shortcut(hidden_states) + self.mlp(self.post_attention_layernorm(hidden_states))


def _add_shortcuts_(layer, out_size, eps_scale, norms):
    """Changes a block that was built at the stream's size; what leaves it has `out_size` channels.

    Its norms divide by the stream's size where the whole stem's is meant: their gains say so, and here their epsilons.
    """
    old = layer.mlp.down_proj
    size, like = old.out_features, {"device": old.weight.device, "dtype": old.weight.dtype}
    layer.__class__ = type(type(layer).__name__, (Shortcuts, type(layer)), {})
    layer.attention_shortcut = nn.Linear(size, size, bias=False, **like)
    layer.mlp_shortcut = nn.Linear(size, out_size, bias=False, **like)
    layer.mlp.down_proj = nn.Linear(old.in_features, out_size, bias=old.bias is not None, **like)
    for name in (*norms["attention"], *norms["mlp"]):
        norm = getattr(layer, name)
        for epsilon in {"variance_epsilon", "eps"} & set(vars(norm)):  # Llama's name for it, and Gemma's
            setattr(norm, epsilon, getattr(norm, epsilon) * eps_scale)


def _layer_view_class(base, config):
    """Configs of single layers with the whole model's attention backend, so that a later switch reaches the layers."""
    backend = property(lambda self: config._attn_implementation)
    own = property(lambda self: self.backend if self.kv_index is None else BY_KV_INDEX)
    return type("LayerView", (base,), {"backend": backend, "_attn_implementation": own})


def _rebuild_layers_(model, config, norms, names):
    """Replace every layer by one of its own sizes. `model` is the decoder, built from the global sizes."""
    layers = model.layers
    view_class = _layer_view_class(type(config), config)
    stream_size = getattr(config, "stream_size", None)
    if stream_size is not None:
        table = model.embed_tokens
        table.weight, table.embedding_dim = nn.Parameter(table.weight[:, :stream_size].detach().clone()), stream_size
    for i in range(len(layers)):
        own = config.per_layer_config[i] if config.is_heterogeneous else config
        if stream_size is not None:
            own = copy.copy(own)
            own.hidden_size = stream_size
        layer = type(layers[i])(own, i) if config.is_heterogeneous else layers[i]
        if stream_size is not None:
            out_size = config.hidden_size if i + 1 == len(layers) else stream_size
            _add_shortcuts_(layer, out_size, config.hidden_size / stream_size, norms)
        for sublayer in ("attention", "mlp"):
            if getattr(config, f"{sublayer}_out_bias", False):
                module, out = getattr(layer, names[sublayer]), names[f"{sublayer}_out"]
                setattr(module, out, _with_bias(getattr(module, out)))
        for sublayer in getattr(own, "skip", None) or ():
            setattr(layer, names[sublayer], Skipped(i) if sublayer == "attention" else NoMLP())
            for norm in norms[sublayer]:
                setattr(layer, norm, nn.Identity())
        if own.kv_index is not None:
            getattr(layer, names["attention"]).num_key_value_groups = 1  # as `attend_by_kv_index` hands them on
        if own is not config:
            own.__class__ = view_class
        for module in layer.modules():
            if hasattr(module, "config"):
                module.config = own
        layers[i] = layer


class _PrunedConfigMixin:
    kv_index = None  # of a layer whose query heads share its KV heads evenly

    def validate_rope(self):
        """transformers' own check alone: Phi-3 derives the rotary size from the global head count, which binds no layer.

        It is asked of the global sizes, because LongRoPE's reads a head count, which layers that differ have none of.
        """
        view = copy.copy(self)
        view.__dict__.pop("_heterogeneity_spec", None)
        PreTrainedConfig.validate_rope(view)

    def validate_architecture(self):
        """The global sizes bind no layer; each layer's query heads must share its KV heads evenly, or say how they do."""
        if not self.is_heterogeneous:
            return
        for i, own in enumerate(self.per_layer_config):
            groups = getattr(own, "num_key_value_heads", None) or own.num_attention_heads
            if "attention" not in own.skip and own.kv_index is None and own.num_attention_heads % groups:
                raise ValueError(f"layer {i}: {own.num_attention_heads} query heads cannot share {groups} KV heads")


def _make(model_type, stem, norms, names):
    config_base = getattr(transformers, f"{stem}TextConfig" if stem == "Gemma3" else f"{stem}Config")
    model_base = getattr(transformers, f"{stem}ForCausalLM")
    name = f"Pruned{stem}"
    config_class = strict(
        type(
            f"{name}Config",
            (_PrunedConfigMixin, config_base),
            {"model_type": f"pruned_{model_type}", "__module__": __name__, "__doc__": f"{stem} with per-layer sizes."},
        )
    )

    class PrunedForCausalLM(model_base):
        def __init__(self, config):
            view = copy.copy(config)
            view.__dict__.pop("_heterogeneity_spec", None)
            super().__init__(view)
            # transformers resolved the attention backend on the copy; without it no causal mask would be applied
            config._attn_implementation = view._attn_implementation
            self.config = config
            decoder = getattr(self, names["decoder"])
            decoder.config = config
            _rebuild_layers_(decoder, config, norms, names)
            self.post_init()

    PrunedForCausalLM.config_class = config_class
    PrunedForCausalLM.__name__ = PrunedForCausalLM.__qualname__ = f"{name}ForCausalLM"
    PrunedForCausalLM.__doc__ = f"{stem} with per-layer sizes and an LM head."
    AutoConfig.register(f"pruned_{model_type}", config_class, exist_ok=True)
    AutoModelForCausalLM.register(config_class, PrunedForCausalLM, exist_ok=True)
    return config_class, PrunedForCausalLM


for _model_type, (_stem, _norms) in BASES.items():
    _config, _model = _make(_model_type, _stem, _norms, NAMES[_model_type])
    globals()[_config.__name__], globals()[_model.__name__] = _config, _model
