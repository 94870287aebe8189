"""Adapt-Pruner's shares: at every cut each layer gives up its own, less where its block turns the stream more."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...anatomy import Anatomy
from ...axes import kind_of
from ...distributed import World
from ...errors import UserError
from ...sizes import adaptive_onward
from ...statistics import BlockCosine
from ..learner import Learner
from ..loss import IGNORED
from .groups import Group, Standing
from .saliency import Table


class Cosines:
    """How far every block turns the stream, from forward passes that training makes anyway, while it is asked to look."""

    def __init__(self, learner: Learner, anatomy: Anatomy, known_L: Tensor | None = None) -> None:
        self.looking, self._new, self._inside, self.known_L = False, False, False, known_L
        self.seen = [BlockCosine() for _ in anatomy.shape.layers]
        learner.register_forward_pre_hook(self._enter)
        learner.register_forward_hook(self._leave)
        blocks: Any = learner.model.get_submodule(anatomy.family.blocks)
        for block, cosine in zip(blocks.children(), self.seen, strict=True):
            block.register_forward_hook(self._hook(cosine), with_kwargs=True)

    def _enter(self, _: nn.Module, args: Any) -> None:
        """Updates alone are looked at: neither validation nor the passes of a process that only keeps others company."""
        self._inside = self.looking and bool((args[1] != IGNORED).any())
        if self._inside and self._new:
            for cosine in self.seen:
                cosine.total, cosine.count = 0.0, 0
            self.known_L, self._new = None, False

    def _leave(self, *_: Any) -> None:
        self._inside = False  # activations that are computed again on the way back were seen

    def _hook(self, cosine: BlockCosine) -> Any:
        @torch.no_grad()
        def look(block: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            if self._inside:
                before = args[0] if args else kwargs["hidden_states"]
                cosine(before.detach(), (out[0] if isinstance(out, tuple) else out).detach())

        return look

    def look(self, looking: bool) -> None:
        """Whether the next update is looked at; what was seen before counts until it begins."""
        self.looking = self._new = looking

    def importance(self, world: World) -> Tensor:
        """One minus the mean cosine of every block, float64 [L], of all processes."""
        if self.known_L is None:
            for cosine in self.seen:
                cosine.settle(world)
            self.known_L = torch.tensor([1.0 - cosine.mean for cosine in self.seen], dtype=torch.float64)
        if not bool(torch.isfinite(self.known_L).all()):
            raise UserError("prune: some blocks' cosines are no numbers; the checkpoint before stands: lower optimizer.lr")
        return self.known_L


def shares(
    standing: Standing, source: Anatomy, table: Table, importance_L: Tensor, budget: int, amplitude: float
) -> list[Group]:
    """What goes so that the blocks fit `budget` parameters: of each axis its least salient units.

    `amplitude`: in shares of what goes now. Layers' shares add up over cuts, and are of the source.
    """
    now = standing.now
    removed = (now.block_params - budget) / source.block_params
    kinds = {kind_of(name) for name in table.values}
    _, counts = adaptive_onward(now, source, importance_L, budget, amplitude * removed, kinds)
    out = []
    for name, count in counts.items():
        gone = standing.size(name) - count
        if gone > 0:
            units = table.least(name, gone)
            out.append(Group(kind_of(name), {name: units}, float(table.values[name][list(units)].sum())))
    return out
