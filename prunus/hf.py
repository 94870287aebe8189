"""Between a decision and transformers: the config that says the cut sizes, and the model built from it.

Stock types are written only for what they can say: uniform layers, sizes their validators accept, biases they have.
Everything else becomes a `pruned_<type>` (see `modeling_pruned.py`).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .anatomy import Anatomy
from .errors import UserError
from .families import PRUNED_PREFIX, family_of
from .keep import Keep

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedConfig, PreTrainedModel

SUBLAYERS = ("attention", "mlp")
LAYER_SIZES = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and warnings around a call whose outcome we check ourselves."""
    from transformers.utils import logging as hf_logging

    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity(logging.ERROR)
    hf_logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    hf_logging.set_verbosity(level)


@dataclass(frozen=True)
class Target:
    """What a cut model will be: its config, its anatomy (biases included), and what to tell the user about it."""

    config: PreTrainedConfig
    anatomy: Anatomy
    notes: tuple[str, ...] = ()

    @property
    def is_stock(self) -> bool:
        """Whether stock transformers loads the checkpoint without anything of ours."""
        return not self.config.model_type.startswith(PRUNED_PREFIX)


def target_for(
    config: PreTrainedConfig, anatomy: Anatomy, keep: Keep, *, fold: bool = True, out_bias: frozenset[str] = frozenset()
) -> Target:
    """The config of the model that `keep` leaves. `out_bias` names sub-layers whose output gains a bias.

    Raises UserError where neither a stock type nor ours can say it.
    """
    after = keep.anatomy_after(anatomy).checked()
    fields = _fields(config, anatomy, keep, after, fold)
    model_type = config.model_type.removeprefix(PRUNED_PREFIX)
    notes: list[str] = []
    if after.shape.is_uniform:
        fields |= uniform_fields(after)
        stock = _stock_flags(after, out_bias)
        lawful = _lawful_type(model_type, after, stock)
        if stock is not None and lawful is not None:
            if lawful != model_type:
                notes.append(_relabel_note(model_type, lawful, after))
            return Target(_stock_config(lawful, fields, stock), _as_family(after, lawful, stock), tuple(notes))
        why = "a bias that it has no place for" if stock is None else f"hidden size {after.shape.hidden_size}"
        notes.append(f"a stock {model_type} config cannot say {why}, so the checkpoint is of type pruned_{model_type}")
    flags = {f"{sublayer}_out_bias" for sublayer in out_bias}
    pruned = _pruned_config(model_type, fields, after, flags)
    if not after.shape.is_uniform:
        notes.append(
            f"layers differ in size: the checkpoint is of type pruned_{model_type} and loads with prunus, or with "
            "trust_remote_code=True; no stock engine can serve it (--uniform makes all layers alike)"
        )
    return Target(pruned, after.with_flags(*flags), tuple(notes))


_NOT_OURS = (
    "model_type architectures transformers_version per_layer_config auto_map _name_or_path _model_name_or_path"
).split()


def _fields(config: PreTrainedConfig, anatomy: Anatomy, keep: Keep, after: Anatomy, fold: bool) -> dict[str, Any]:
    fields = config.to_dict()
    for name in (
        "model_type",
        "architectures",
        "transformers_version",
        "per_layer_config",
        "auto_map",
        "_name_or_path",
    ):
        fields.pop(name, None)
    fields.pop("allow_global_per_layer_attribute_access", None)
    shape = after.shape
    fields |= {
        "hidden_size": shape.hidden_size,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "num_hidden_layers": shape.num_hidden_layers,
    }
    kept_layers = keep.units.get("layers", range(anatomy.shape.num_hidden_layers))
    for name in anatomy.family.per_layer_lists:
        if isinstance(fields.get(name), list):
            fields[name] = [fields[name][i] for i in kept_layers]
    if fold and shape.hidden_size != anatomy.shape.hidden_size and anatomy.eps_scalable:
        fields["rms_norm_eps"] = fields["rms_norm_eps"] * anatomy.shape.hidden_size / shape.hidden_size
    return fields


def _stock_flags(after: Anatomy, out_bias: frozenset[str]) -> frozenset[str] | None:
    """Config flags of a stock type that has the wanted output biases; None if the family has no such flags."""
    flags = set(after.flags)
    for sublayer in out_bias:
        wanted = after.family.out_bias_flags.get(sublayer)
        if wanted is None:
            return None
        flags.update(wanted)
    return frozenset(flags)


def _lawful_type(model_type: str, after: Anatomy, flags: frozenset[str] | None) -> str | None:
    """The stock type that may carry these sizes: the model's own, else the first alternative without its refusal."""
    family = after.family
    if not family.hidden_multiple_of_heads or after.shape.hidden_size % after.shape.layers[0].num_attention_heads == 0:
        return model_type
    for alternative in family.hidden_alternatives:
        if alternative != "mistral" or not flags:
            return alternative
    return None


def _relabel_note(model_type: str, lawful: str, after: Anatomy) -> str:
    heads = after.shape.layers[0].num_attention_heads
    return (
        f"a {model_type} config refuses hidden size {after.shape.hidden_size} with {heads} heads, so the checkpoint is "
        f"written as {lawful}, which runs the same weights"
    )


_COMMON = (  # what llama, mistral and seed_oss configs all say
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "hidden_act max_position_embeddings initializer_range rms_norm_eps use_cache pad_token_id bos_token_id eos_token_id "
    "tie_word_embeddings rope_parameters attention_dropout dtype"
).split()


def _config_class(model_type: str) -> type[PreTrainedConfig]:
    from transformers import AutoConfig

    from . import modeling_pruned  # noqa: F401  (registers the pruned types)

    return type(AutoConfig.for_model(model_type))


def _stock_config(model_type: str, fields: dict[str, Any], flags: frozenset[str]) -> PreTrainedConfig:
    cls = _config_class(model_type)
    if model_type in ("mistral", "seed_oss") and "sliding_window" not in fields:
        fields = {name: fields[name] for name in _COMMON if name in fields}
        fields |= {"sliding_window": None} if model_type == "mistral" else {"residual_dropout": 0.0}
        if model_type == "seed_oss":
            fields |= {
                "attention_bias": "attention_bias" in flags,
                "attention_out_bias": "attention_bias" in flags,
                "mlp_bias": "mlp_bias" in flags,
            }
            return cls(**fields)
    return cls(**(fields | dict.fromkeys(flags, True)))


def _as_family(after: Anatomy, model_type: str, flags: frozenset[str]) -> Anatomy:
    if model_type == "seed_oss" and after.family.name != "seed_oss" and "attention_bias" in flags:
        flags = flags | {"attention_out_bias"}
    return replace(after, family=family_of(model_type), flags=flags)


def uniform_fields(after: Anatomy) -> dict[str, int]:
    """The three sizes of a uniform shape's blocks."""
    return {name: getattr(after.shape.layers[0], name) for name in LAYER_SIZES}


def _pruned_config(model_type: str, fields: dict[str, Any], after: Anatomy, flags: set[str]) -> PreTrainedConfig:
    per_layer: dict[int, dict[str, Any]] = {}
    for name in LAYER_SIZES:  # globals bind no layer of ours; the largest is what a reader of the config would expect
        fields[name] = max(getattr(layer, name) for layer in after.shape.layers)
    for i, layer in enumerate(after.shape.layers):
        own: dict[str, Any] = {"skip": list(layer.skipped)} if layer.skipped else {}
        if layer.num_attention_heads:
            own |= {"num_attention_heads": layer.num_attention_heads, "num_key_value_heads": layer.num_key_value_heads}
        if layer.intermediate_size:
            own["intermediate_size"] = layer.intermediate_size
        per_layer[i] = own
    all_fields: dict[str, Any] = fields | dict.fromkeys(flags, True) | {"per_layer_config": per_layer}
    return _config_class(PRUNED_PREFIX + model_type)(**all_fields)


def empty_weights(target: Target, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zero biases that the target declares and the sliced tensors lack (FLAP turns a config's bias flags on)."""
    dtype = next(iter(like.values())).dtype
    return {
        name: torch.zeros(spec.shape, dtype=dtype)
        for name, spec in target.anatomy.tensors.items()
        if name not in like and name.endswith(".bias")
    }


def build(config: PreTrainedConfig, tensors: dict[str, Tensor], generation: Any = None) -> PreTrainedModel:
    """A model of `config` that holds `tensors`; programmers' error if a tensor is missing or left over."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    from . import modeling_pruned  # noqa: F401

    cls: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    dtype = next(iter(tensors.values())).dtype
    with quiet():
        model, info = cls.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True)
    missing = [k for k in info["missing_keys"] if not (config.tie_word_embeddings and k == "lm_head.weight")]
    assert not missing and not info["unexpected_keys"] and not info["mismatched_keys"], info
    if generation is not None:
        model.generation_config = generation
    return model.eval()


def weights(model: PreTrainedModel, anatomy: Anatomy) -> dict[str, Tensor]:
    """The model's live tensors by their declared names; UserError if the model does not hold what its family declares."""
    state = dict(model.named_parameters())
    declared = anatomy.tensors
    extra = sorted(set(state) - set(declared))
    missing = sorted(set(declared) - set(state))
    wrong = [n for n in declared if n in state and tuple(state[n].shape) != declared[n].shape]
    if extra or missing or wrong:
        name = (extra or missing or wrong)[0]
        what = "holds" if extra else "lacks" if missing else "has another shape for"
        raise UserError(
            f"the model {what} '{name}', which is not what family '{anatomy.family.name}' declares; see docs/add-a-family.md"
        )
    return {name: state[name].detach() for name in declared}
