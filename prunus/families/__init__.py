"""The table of model families. To add one: a row here, and `docs/add-a-family.md`."""

from __future__ import annotations

from ..errors import UserError, nearest
from .base import AXES, DIMS, Family, Param
from .gemma import GEMMA, GEMMA2, GEMMA3
from .gpt_neox import GPT_NEOX
from .llama import LLAMA, MISTRAL, QWEN2, QWEN3, SEED_OSS, SMOLLM3
from .olmo import OLMO, OLMO2
from .phi import PHI, PHI3

FAMILIES: tuple[Family, ...] = (
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    SMOLLM3,
    GEMMA,
    GEMMA2,
    GEMMA3,
    OLMO,
    OLMO2,
    PHI,
    PHI3,
    SEED_OSS,
    GPT_NEOX,
)
BY_MODEL_TYPE: dict[str, Family] = {t: family for family in FAMILIES for t in family.model_types}
PRUNED_PREFIX = "pruned_"  # our registered per-layer types: pruned_llama, ...


def family_of(model_type: str) -> Family:
    """The family of a config's `model_type` (also of our own `pruned_<type>`); UserError if it has no row."""
    family = BY_MODEL_TYPE.get(model_type.removeprefix(PRUNED_PREFIX))
    if family is None:
        known = ", ".join(sorted(BY_MODEL_TYPE))
        raise UserError(
            f"unknown model family '{model_type}'{nearest(model_type, BY_MODEL_TYPE)}: prunus knows {known}; "
            "docs/add-a-family.md shows how to add a row"
        )
    return family


__all__ = ["AXES", "BY_MODEL_TYPE", "DIMS", "FAMILIES", "PRUNED_PREFIX", "Family", "Param", "family_of"]
