"""Between a decision and transformers: the config that says the cut sizes, and the model built from it.

Stock types are written only for what they can say: uniform layers, sizes their validators accept, biases they have.
Everything else becomes a `pruned_<type>` (see `modeling_pruned.py`).
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Collection, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from .anatomy import Anatomy
from .errors import UserError
from .families import PRUNED_PREFIX, family_of
from .keep import Keep
from .shape import LayerShape

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
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
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
    config: PreTrainedConfig,
    anatomy: Anatomy,
    keep: Keep,
    *,
    fold: bool = True,
    out_bias: frozenset[str] = frozenset(),
    stock: bool = True,
) -> Target:
    """The config of the model that `keep` leaves. `out_bias` names sub-layers whose output gains a bias.

    Without `stock` it is of our own type also where a stock one could say it (at the price of more biases).

    Raises UserError where neither a stock type nor ours can say it.
    """
    return _target(config, anatomy, keep, keep.anatomy_after(anatomy).checked(), fold, out_bias, stock)


def unshared_target(config: PreTrainedConfig, anatomy: Anatomy) -> Target:
    """The config of the model whose query heads have a KV head each."""
    layers = (LayerShape(x.num_attention_heads, x.num_attention_heads, x.intermediate_size) for x in anatomy.shape.layers)
    after = anatomy.with_shape(anatomy.shape.with_layers(tuple(layers)))
    return _target(config, anatomy, Keep(), after, False, frozenset(), True)


def _target(
    config: PreTrainedConfig, anatomy: Anatomy, keep: Keep, after: Anatomy, fold: bool, out_bias: frozenset[str], stock: bool
) -> Target:
    fields = _fields(config, anatomy, keep, after, fold)
    model_type = config.model_type.removeprefix(PRUNED_PREFIX)
    notes: list[str] = []
    if after.shape.is_uniform and stock and not after.is_sliced:
        fields |= uniform_fields(after)
        biased = _biased(after, out_bias)
        own = _stock_flags(after, biased)
        why = "a bias that it has no place for" if own is None else f"hidden size {after.shape.hidden_size}"
        try:
            if own is not None and _hidden_fits(after):
                return _stock(model_type, fields, after, own)
            for other in after.family.alternatives:
                flags = _alternative_flags(other, after, biased)
                if flags is not None and not fields.get("sliding_window"):
                    return _stock(other, _relabelled(other, fields), after, flags, _relabel_note(model_type, other, why))
        except StrictDataclassError as error:  # a validator of the family that the table does not know of
            why = f"these sizes ({str(error.__cause__ or error).strip().splitlines()[-1].strip()})"
        notes.append(f"a stock {model_type} config cannot say {why}, so the checkpoint is of type pruned_{model_type}")
    ours = {f"{sublayer}_out_bias" for sublayer in out_bias} & after.family.flags  # no flag where the bias is always there
    ours |= {f for f in after.flags if f.endswith("_out_bias")}
    pruned = _pruned_config(model_type, fields, after, ours)
    if not after.shape.is_uniform:
        why = "query heads share KV heads unevenly" if after.shape.is_ragged else "layers differ in size"
        notes.append(
            f"{why}: the checkpoint is of type pruned_{model_type} and loads with prunus, or with "
            "trust_remote_code=True; prunus export --check says who can serve it"
        )
    return Target(pruned, after.with_flags(*ours), tuple(notes))


def sliced_target(config: PreTrainedConfig, anatomy: Anatomy, size: int) -> Target:
    """The config of the model whose blocks hand on `size` directions of the stream, changed by shortcut matrices."""
    after = anatomy.with_shape(replace(anatomy.shape, stream_size=size, tie_word_embeddings=False))
    model_type = config.model_type.removeprefix(PRUNED_PREFIX)
    fields = _fields(config, anatomy, Keep(), after, fold=False) | {"stream_size": size}
    ours = {flag for flag in after.flags if flag.endswith("_out_bias")}
    note = (
        f"the stream changes its basis at every sub-layer: the checkpoint is of type pruned_{model_type} and loads with prunus, "
        "or with trust_remote_code=True; prunus export --check says who can serve it (--option rotation=shared gives a stock type)"
    )
    return Target(_pruned_config(model_type, fields, after, ours), after, (note,))


def rotary_types(config: PreTrainedConfig) -> set[str]:
    """What kinds of rotary angles a config asks for: one, or in families with several kinds of layers one each."""
    told = getattr(config, "rope_parameters", None) or {}
    each = [one for one in told.values() if isinstance(one, Mapping)] or [told]
    return {one.get("rope_type", "default") for one in each}


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
        "tie_word_embeddings": shape.tie_word_embeddings,
    }
    for name in anatomy.family.config_lacks:
        fields.pop(name, None)
    kept_layers = keep.units.get("layers", range(anatomy.shape.num_hidden_layers))
    for name in anatomy.family.per_layer_lists:
        if isinstance(fields.get(name), list):
            fields[name] = [fields[name][i] for i in kept_layers]
    if fold and shape.hidden_size != anatomy.shape.hidden_size and anatomy.eps_scalable:
        fields["rms_norm_eps"] = fields["rms_norm_eps"] * anatomy.shape.hidden_size / shape.hidden_size
    return fields


def _biased(after: Anatomy, out_bias: frozenset[str]) -> frozenset[str]:
    """Sub-layers whose output needs a bias: those asked for, and those that a checkpoint of ours already has."""
    native = {flag for flags in after.family.out_bias_flags.values() for flag in flags}
    ours = {s for s in SUBLAYERS if f"{s}_out_bias" in after.flags - native}
    return out_bias | ours


def _stock_flags(after: Anatomy, biased: frozenset[str]) -> frozenset[str] | None:
    """Config flags of the family's own stock type with the wanted output biases; None if it has no such flags."""
    native = {flag for flags in after.family.out_bias_flags.values() for flag in flags}
    flags = {flag for flag in after.flags if flag in native or not flag.endswith("_out_bias")}
    for sublayer in biased:
        wanted = after.family.out_bias_flags.get(sublayer)
        if wanted is None:
            return None
        flags.update(wanted)
    return frozenset(flags)


def _hidden_fits(after: Anatomy) -> bool:
    heads = after.shape.layers[0].num_attention_heads
    return not after.family.hidden_multiple_of_heads or after.shape.hidden_size % heads == 0


def _alternative_flags(alternative: str, after: Anatomy, biased: frozenset[str]) -> frozenset[str] | None:
    """Flags under which another stock type runs the same weights; None if it cannot hold their biases."""
    llama_attention, llama_mlp = "attention_bias" in after.flags, "mlp_bias" in after.flags
    needed = {
        "attention_bias": llama_attention,
        "attention_out_bias": llama_attention or "attention" in biased,
        "mlp_bias": llama_mlp or "mlp" in biased,
    }
    flags = frozenset(flag for flag, wanted in needed.items() if wanted)
    return flags if alternative == "seed_oss" or not flags else None


def _relabel_note(model_type: str, alternative: str, why: str) -> str:
    return f"a stock {model_type} config cannot say {why}, so it is written as {alternative}, which runs the same weights"


_COMMON = (  # what llama, mistral and seed_oss configs all say
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "hidden_act max_position_embeddings initializer_range rms_norm_eps use_cache pad_token_id bos_token_id eos_token_id "
    "tie_word_embeddings rope_parameters attention_dropout dtype"
).split()


def _relabelled(alternative: str, fields: dict[str, Any]) -> dict[str, Any]:
    common = {name: fields[name] for name in _COMMON if name in fields}
    return common | ({"sliding_window": None} if alternative == "mistral" else {"residual_dropout": 0.0})


def _config_class(model_type: str) -> type[PreTrainedConfig]:
    from transformers import AutoConfig

    from . import modeling_pruned  # noqa: F401  (registers the pruned types)

    return type(AutoConfig.for_model(model_type))


def _stock(model_type: str, fields: dict[str, Any], after: Anatomy, flags: frozenset[str], *notes: str) -> Target:
    family = family_of(model_type)
    said: dict[str, Any] = {flag: flag in flags for flag in family.flags if not flag.startswith(("untied", "mlp_out"))}
    if family.name != "seed_oss":
        said.pop("attention_out_bias", None)
    config = _config_class(model_type)(**(fields | said))
    return Target(config, replace(after, family=family, flags=flags), notes)


def uniform_fields(after: Anatomy) -> dict[str, int]:
    """The sizes of a uniform shape's blocks, as far as the family's config has fields for them."""
    sizes = (name for name in LAYER_SIZES if name not in after.family.config_lacks)
    return {name: getattr(after.shape.layers[0], name) for name in sizes}


def _pruned_config(model_type: str, fields: dict[str, Any], after: Anatomy, flags: set[str]) -> PreTrainedConfig:
    per_layer: dict[int, dict[str, Any]] = {}
    lacks = after.family.config_lacks
    for name in LAYER_SIZES:  # globals bind no layer of ours; the largest is what a reader of the config would expect
        if name not in lacks:
            fields[name] = max(1, *(getattr(layer, name) for layer in after.shape.layers))
    if "head_dim" in lacks:  # then the heads say it, also where no layer has attention left
        fields["num_attention_heads"] = after.shape.hidden_size // after.shape.head_dim
    for i, layer in enumerate(after.shape.layers):
        own: dict[str, Any] = {"skip": list(layer.skipped)} if layer.skipped else {}
        if layer.num_attention_heads:
            own |= {"num_attention_heads": layer.num_attention_heads, "num_key_value_heads": layer.num_key_value_heads}
        if layer.kv_index is not None:
            own["kv_index"] = list(layer.kv_index)
        if layer.intermediate_size:
            own["intermediate_size"] = layer.intermediate_size
        per_layer[i] = {name: value for name, value in own.items() if name not in lacks}
    all_fields: dict[str, Any] = fields | dict.fromkeys(flags, True) | {"per_layer_config": per_layer}
    return _config_class(PRUNED_PREFIX + model_type)(**all_fields)


def empty_weights(target: Target, sliced: Collection[str], dtype: torch.dtype) -> dict[str, Tensor]:
    """Zero biases that the target declares and the sliced tensors lack (FLAP turns a config's bias flags on)."""
    return {
        name: torch.zeros(spec.shape, dtype=dtype)
        for name, spec in target.anatomy.tensors.items()
        if name not in sliced and name.endswith(".bias")
    }


def build(config: PreTrainedConfig, tensors: dict[str, Tensor], generation: Any = None) -> PreTrainedModel:
    """A model of `config` that holds `tensors`; programmers' error if a tensor is missing or left over."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    from . import modeling_pruned  # noqa: F401

    cls: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    dtype = next(iter(tensors.values())).dtype
    family = family_of(config.model_type)
    names = names_in_files(config)
    state = {names.get(name, name): tensor for name, tensor in tensors.items()}
    with quiet():
        model, info = cls.from_pretrained(None, config=config, state_dict=state, dtype=dtype, output_loading_info=True)
    tied = f"{family.head}.weight" if config.tie_word_embeddings else None
    missing = [k for k in info["missing_keys"] if k != tied]
    assert not missing and not info["unexpected_keys"] and not info["mismatched_keys"], info
    if generation is not None:
        model.generation_config = generation
    return model.eval()


def unfilled(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model of `config` whose parameters are on the meta device; its buffers (rotary angles) are real."""
    from accelerate import init_empty_weights
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    from . import modeling_pruned  # noqa: F401

    cls: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with quiet(), init_empty_weights(include_buffers=False):
        model = cls._from_config(copy.deepcopy(config), dtype=dtype)
    model.tie_weights()  # again: accelerate made two parameters of one
    return model.eval()


def names_in_files(config: PreTrainedConfig) -> Mapping[str, str]:
    """Declared name -> name in the files of the stock type, where that is another: transformers saves as it loads."""
    return {} if config.model_type.startswith(PRUNED_PREFIX) else family_of(config.model_type).saved_as


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
