"""Every query head gets a KV head of its own: for engines that know no layers whose query heads share KV heads unevenly."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from . import hf
from .anatomy import Anatomy
from .axes import kind_of
from .cut import SlicePlan, slice_tensors
from .errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def unshared(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same logits with as many KV heads as query heads: copies, and a KV cache of their size.

    Of a stock type where all layers have as many query heads. UserError where a norm runs over all KV heads at once.
    """
    anatomy = Anatomy.of(model.config)
    if "heads" in anatomy.refused:
        raise UserError(f"unshared: KV heads cannot be copied: {anatomy.refused['heads']}")
    rows: dict[str, dict[int, torch.Tensor]] = {}
    for axis in (axis for axis in anatomy.axes.values() if kind_of(axis.name) == "heads"):
        for param in dict.fromkeys(span.param for span in axis.spans if span.shared is not None):
            if anatomy.tensors[param].param.norm:
                raise UserError(
                    f"unshared: {param} runs over all KV heads at once, and copies would change what it divides by"
                )
            parts = [span.rows(range(axis.size)).reshape(-1) for span in axis.spans if span.param == param]
            rows[param] = {0: torch.cat(parts)}
    plan = SlicePlan({name: name for name in anatomy.tensors}, rows)
    tensors = slice_tensors(hf.weights(model, anatomy), plan)
    return hf.build(hf.unshared_target(model.config, anatomy).config, tensors, model.generation_config)
