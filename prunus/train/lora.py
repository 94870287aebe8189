"""Low-rank adapters through `peft` (the extra `lora`): trained beside frozen weights, and merged into them at the end."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from ..anatomy import Anatomy
from ..errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .parts import LoraPart


def check_library() -> None:
    """UserError, before any work, if the extra is not there."""
    if find_spec("peft") is None:
        raise UserError("lora: adapters need peft; pip install 'prunus[lora]'")


def attach_(model: PreTrainedModel, anatomy: Anatomy, part: LoraPart, seed: int) -> Any:
    """Changes `model`: every matrix of its blocks gets an adapter, and nothing else is trained. Returns peft's wrapper."""
    import peft

    torch.manual_seed(seed)
    matrices = [name for name, t in anatomy.tensors.items() if t.is_matrix and t.layer is not None]
    targets = [name.removesuffix(".weight") for name in matrices]
    config = peft.LoraConfig(r=part.rank, lora_alpha=part.alpha, target_modules=targets, lora_dropout=0.0, bias="none")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of names that transformers has changed since
        return peft.get_peft_model(model, config)


def merged(wrapper: Any) -> PreTrainedModel:
    """The plain model with the adapters in its weights; the wrapper is used up."""
    return wrapper.merge_and_unload()
