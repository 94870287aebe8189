"""A recipe's live parts made of a model: the learner, its optimizer, and what a checkpoint keeps of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import hf
from ..anatomy import Anatomy
from ..distributed import World, local
from ..source import DTYPES
from . import optim
from .drawn import Fill, Put, drawn
from .learner import Learner, recompute_
from .shapes import fresh

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from ..source import Source
    from .recipe import Recipe


def model_of(
    recipe: Recipe, source: Source | None, config: PreTrainedConfig, world: World
) -> tuple[PreTrainedModel, Fill | None]:
    """A source's weights, or fresh ones of a config; a model to be shared out has no memory, and comes with what fills it."""
    whole = world.alone or recipe.lora is not None or (source is not None and source.kind == "gguf")
    if source is None:
        known: dict[str, Any] = {"init": recipe.model.init, "seed": recipe.seed, "dtype": DTYPES[recipe.dtype]}
        return (fresh(config, **known), None) if whole else drawn(config, **known, part=world.part)
    if whole:
        return source.load(recipe.dtype), None
    model, stored = hf.unfilled(source.config, DTYPES[recipe.dtype]), source.stored(recipe.dtype)
    model.generation_config = source.generation_config()

    def read(put: Put) -> None:
        for parameter in stored:
            put(parameter, stored.rows(parameter, world.rows))

    return model, read


def learner_of(recipe: Recipe, model: PreTrainedModel, anatomy: Anatomy, world: World, fill: Fill | None = None) -> Learner:
    """The model as the recipe trains it; shared out, if there are several processes.

    Where `fill` puts its weights, it has no memory for them before it is shared out.
    """
    model.train()
    if recipe.checkpoint_activations:
        recompute_(model)
    learner = Learner(model, precision=recipe.precision, compiled=recipe.compile)
    world.shard_(learner, model.get_submodule(anatomy.family.blocks).children())
    if fill is not None:
        _fill_(learner, fill, world.device)
    learner.name_held_()
    return learner


@torch.no_grad()
def _fill_(learner: Learner, fill: Fill, device: str) -> None:
    """Changes `learner`: memory for this process's part of every parameter, and what is to be in it."""
    buffers = {name: value.clone() for name, value in learner.named_buffers(remove_duplicate=False)}
    learner.to_empty(device=device)
    for name, value in learner.named_buffers(remove_duplicate=False):
        value.copy_(buffers[name])
    named, came = dict(learner.model.named_parameters()), set()

    def put(name: str, values: Tensor) -> None:
        local(named[name]).copy_(values)
        came.add(name)

    fill(put)
    assert came == set(named), f"never came: {sorted(set(named) - came)}"


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
