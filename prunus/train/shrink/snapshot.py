"""A teacher for nothing: the model as it was before a cut teaches what is left of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import hf
from ...anatomy import Anatomy
from ...distributed import whole
from ...hf import Target, target_for
from ...keep import Keep
from ..learner import Learner, Teacher
from ..loop import Training

if TYPE_CHECKING:
    from ..recipe import Recipe


@dataclass
class Snapshot:
    """A copy of the weights from before a cut, without gradients and moments; every process holds it whole.

    One is taken before the first cut, and another before the first cut after each slice, so that paces which cut at every update
    copy no more often than they slice; it takes the older one's place.
    """

    recipe: Recipe
    kept: Keep | None = None  # what the model of the last one had of the source; none was taken yet
    step: int = 0  # after which it was taken
    spent: int = 0  # FLOPs of its forward passes

    def __post_init__(self) -> None:
        self.cost = 0  # of one sequence
        self.model: Any = None

    def take_(self, run: Training, target: Target, kept: Keep) -> None:
        """Changes the run: its model, which is `kept` of the source, teaches from here on, if it was sliced since the last one.

        A stop may be passed on the way of one event; its model is not one that trained.
        """
        if self.kept is not None and (kept == self.kept or run.step == self.step):
            return
        self.kept, self.step = kept, run.step
        self._teach_(run, target, {name: whole(p.detach()).clone() for name, p in run.learner.trained.items()})

    def count(self) -> None:
        """An update was made; it was asked about each of the update's sequences."""
        self.spent += self.cost * self.recipe.sequences

    def _teach_(self, run: Training, target: Target, tensors: dict[str, Tensor]) -> None:
        part = self.recipe.teacher
        assert part is not None
        self.cost = target.anatomy.flops(self.recipe.data.seq_len)
        self.model = hf.build(target.config, tensors).requires_grad_(False)
        learner = Learner(self.model, precision=self.recipe.precision)
        run.teacher = Teacher(learner, part.mix, part.temperature, part.top_k)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What a checkpoint says of it; the tensors of `tensors` belong to it."""
        return {"kept": None if self.kept is None else self.kept.to_json(), "step": self.step, "spent": self.spent}

    def tensors(self) -> dict[str, Tensor]:
        """Its weights, live."""
        return {} if self.model is None else {f"snapshot.{name}": p.detach() for name, p in self.model.named_parameters()}

    def shape_(self, run: Training, state: Mapping[str, Any], config: Any, anatomy: Anatomy) -> None:
        """Changes the run: a snapshot of the sizes that it had when `state` was told teaches; its weights are read afterwards.

        `config` and `anatomy` are the source's.
        """
        self.step, self.spent = state["step"], state["spent"]
        if state["kept"] is None:
            return
        self.kept = Keep.from_json(state["kept"], "state.json")
        target = target_for(config, anatomy, self.kept) if self.kept.units else Target(config, anatomy)
        dtype = run.learner.model.dtype
        self._teach_(run, target, {n: torch.zeros(t.shape, dtype=dtype) for n, t in target.anatomy.tensors.items()})
