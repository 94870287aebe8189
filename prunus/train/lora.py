"""Low-rank adapters through `peft` (the extra `lora`): trained beside frozen weights, and merged into them at the end."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from ..anatomy import Anatomy
from ..distributed import local, whole
from ..errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from .learner import Learner
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


@torch.no_grad()
def merge_(learner: Learner, wrapper: Any) -> dict[str, Tensor]:
    """Changes `learner`: its model is the plain one with the adapters in its weights, W + (B A) alpha / rank; those by name.

    The wrapper is used up. Of a model that is shared out, a process adds to its own rows of W, which want its own rows of B.
    """
    from peft.tuners.lora import LoraLayer

    adapted: list[Any] = [module for module in wrapper.modules() if isinstance(module, LoraLayer)]
    for module in adapted:
        (name,) = module.active_adapters
        inner, outer = module.lora_A[name].weight, module.lora_B[name].weight
        local(module.base_layer.weight).add_(local(outer) @ whole(inner) * module.scaling[name])
    learner.model = wrapper.unload()
    return {name: learner.held.get(name, p) for name, p in learner.model.named_parameters()}
