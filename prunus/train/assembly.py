"""A recipe's live parts made of a model: the learner, its optimizer, and what a checkpoint keeps of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..anatomy import Anatomy
from ..distributed import World
from . import optim
from .learner import Learner, recompute_

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from .recipe import Recipe


def learner_of(recipe: Recipe, model: PreTrainedModel, anatomy: Anatomy, world: World) -> Learner:
    """The model as the recipe trains it; shared out, if there are several processes."""
    model.train()
    if recipe.checkpoint_activations:
        recompute_(model)
    learner = Learner(model, precision=recipe.precision, compiled=recipe.compile)
    world.shard_(learner, model.get_submodule(anatomy.family.blocks).children())
    learner.name_trained_()
    return learner


def optimizer_of(recipe: Recipe, learner: Learner, lr: float, steps: int = 0) -> torch.optim.AdamW:
    """AdamW with moments of zero, as if it had made so many updates."""
    chosen = recipe.optimizer
    named = learner.trained
    made = optim.adamw(named.items(), lr=lr, betas=chosen.betas, eps=chosen.eps, weight_decay=chosen.weight_decay)
    optim.start_slots_(made, steps)
    return made


def tensors_of(learner: Learner, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and moments, live, by the names that checkpoints give them."""
    named = learner.trained
    tensors: dict[str, Tensor] = {f"model.{name}": p for name, p in named.items()}
    for slot, moments in optim.slots(optimizer, named).items():
        tensors |= {f"{slot}.{name}": moment for name, moment in moments.items()}
    return tensors
