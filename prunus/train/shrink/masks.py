"""What rides on the loop and learns its cut: gates on units, trained with the weights to a given shape (Sheared LLaMA)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...anatomy import Anatomy
from ...axes import kind_of
from ...cut import SLOT_POWER
from ...gates import Gates, Rates, Z, least_updates
from ...keep import Keep
from ...scaling import attach_, fold_, places
from .. import optim
from ..loop import Training
from .goal import size_of
from .groups import Group
from .part import MasksPart, PrunePart
from .pruner import Pruner

if TYPE_CHECKING:
    from ..recipe import Recipe


_DOUBT = 2 / 3  # of gates that are all alike: above it they have not sorted units


class Masks(Pruner):
    """A `Pruner` that scores nothing: gates tell by their log alphas what goes, all of it when their phase ends."""

    gates: Gates | None = None  # until they are folded
    drawn: Z | None = None  # gates of the update that comes
    settled: Z | None = None  # and those of validation
    ended: Mapping[str, Any] | None = None  # sizes that were expected when the phase ended

    @property
    def last(self) -> int:
        """The update after which the model is cut."""
        part = self.asked.part.masks
        assert part is not None
        return updates_of(part, self.recipe)

    # -- what the loop calls -----------------------------------------------------------------------------------------

    def begin(self, run: Training) -> None:
        """Before the first update: gates act."""
        if self.gates is None and not self.done:
            self._start(run)
        self._draw(run)

    def after_step(self, run: Training) -> None:
        """Weights are new: gates follow, or it is time to cut."""
        self._told_(run, run.last["loss"])
        if self.gates is None:
            return
        if not run.last["skipped"]:
            self._learn(run, self.gates)
        if run.step >= self.last:
            self._settle(run, self.gates)
        self._draw(run)

    def _watch(self, run: Training) -> None:
        """No units are scored."""

    # -- gates -------------------------------------------------------------------------------------------------------

    def _start(self, run: Training) -> None:
        part, anatomy = self.asked.part.masks, self.asked.anatomy
        assert part is not None
        self.gates = gates_of(self.asked.part, anatomy, Rates(part.lr, part.multiplier_lr, part.stiffness), self.recipe.seed)
        self.where = places(anatomy, self.gates.sizes)
        attach_(run.learner.model, self.where, self._acting)

    def _draw(self, run: Training) -> None:
        self.settled, self.drawn = None, None if self.gates is None else self.gates.draw(run.step)

    def _acting(self, trains: bool) -> Z:
        """The gates of a forward pass: as drawn, or in validation without noise."""
        assert self.gates is not None and self.drawn is not None
        if trains:
            return self.drawn
        if self.settled is None:
            self.settled = self.gates.settled(exactly=False)
        return self.settled

    def _learn(self, run: Training, gates: Gates) -> None:
        """Changes gates, by the gradients of an update's loss."""
        part = self.asked.part.masks
        assert part is not None and self.drawn is not None
        found = {kind: torch.zeros_like(z) if z.grad is None else z.grad for kind, z in self.drawn.items()}
        for gradient in found.values():
            run.world.sum_(gradient)
        share = 1.0 if not part.warmup else min(1.0, run.step / (part.warmup * self.last))
        cost = gates.learn_(run.step - 1, found, share)
        run.last["masks"] = {
            "expected": gates.expected(),
            "asked": {kind: n * (1 - share * gates.asked(kind)) for kind, (_, n) in gates.sizes.items()},
            "multipliers": {kind: pair.tolist() for kind, pair in gates.multipliers.items()},
            "penalty": cost,
        }

    # -- the cut -----------------------------------------------------------------------------------------------------

    def _settle(self, run: Training, gates: Gates) -> None:
        """Changes the run: gates are folded into weights and moments, and all but the target's units are sliced away."""
        anatomy, kept = self.asked.anatomy, gates.kept()
        z, named = gates.settled(exactly=True), run.learner.trained
        fold_(named, anatomy, self.where, z, run.world)
        for slot, moments in optim.slots(run.optimizer, named).items():
            fold_(moments, anatomy, self.where, z, run.world, SLOT_POWER[slot])
        self.ended = {"expected": gates.expected(), "target": gates.targets, "undecided": gates.undecided()}
        if note := missed(gates):
            self.ended = {**self.ended, "note": note}
            self.tell({"step": run.step, "tokens": run.tokens, "note": note})
        self.gates = None
        gone = [group for kind in gates.sizes for group in groups_of(anatomy, kind, kept)]
        for group in gone:
            self.standing.drop(group.units)
        self.groups += len(gone)
        self._apply(run, [(group, {}) for group in gone])
        self._slice(run)

    def told(self) -> dict[str, Any]:
        """What became of it, for the record."""
        return {**super().told(), "masks": self.ended}

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What a checkpoint says of the cutting; the tensors of `tensors` belong to it."""
        return {
            "kept": self.kept.to_json(),
            "groups": self.groups,
            "waiting": self.waiting,
            "ended": self.ended,
            "steps": None if self.gates is None else self.gates.steps,
        }

    def tensors(self) -> dict[str, Tensor]:
        """Log alphas, multipliers and their moments, while they are learned."""
        return {} if self.gates is None else {name: t.clone() for name, t in self.gates.tensors().items()}

    def shape_(self, run: Training, state: Mapping[str, Any]) -> None:
        """Changes the run: its model has the sizes that it had when `state` was told; weights are read afterwards."""
        kept = Keep.from_json(state["kept"], "state.json")
        self.groups, self.waiting, self.ended = state["groups"], state["waiting"], state["ended"]
        if kept.units:
            self.resize(run, kept, kept)
        else:
            self._start(run)
        self.steps = state["steps"]

    def remember(self, tensors: Mapping[str, Tensor]) -> None:
        """Changes gates: as they were saved."""
        if self.gates is not None:
            self.gates.restore(tensors, self.steps)


def updates_of(part: MasksPart, recipe: Recipe) -> int:
    """How many updates gates learn for."""
    return max(1, math.ceil(part.end * recipe.steps))


def too_short(recipe: Recipe) -> str | None:
    """What to say before a run in which no gate can close, so that the cut would close open ones."""
    part = None if recipe.prune is None else recipe.prune.masks
    if part is None or (last := updates_of(part, recipe)) >= (least := least_updates(part.lr)):
        return None
    return (
        f"prune.masks: in {last:,} update{'s' * (last != 1)} at lr {part.lr:g} no gate can close (at least {least:,} are needed, "
        "several times as many are better), so the cut will close open ones, which costs loss; raise tokens, masks.end or masks.lr"
    )


def missed(gates: Gates) -> str | None:
    """What to say of gates that are cut before they came to the target."""
    far, expected = gates.far(), gates.expected()
    if not far and gates.doubt() <= _DOUBT:
        return None
    if not far:
        return (
            f"prune.masks: {gates.steps:,} updates did not sort units (gates are {gates.doubt():.0%} as undecided as if all were "
            "alike), so the cut is hardly what they learned and costs loss; raise tokens or masks.end"
        )
    sizes = ", ".join(f"{kind} at {expected[kind]:.1f} instead of {gates.targets[kind]:,}" for kind in far)
    return (
        f"prune.masks: {gates.steps:,} updates did not bring the gates to the target ({sizes}), so the cut is not what they "
        "learned and costs loss; raise tokens or masks.end"
    )


def gates_of(part: PrunePart, anatomy: Anatomy, rates: Rates, seed: int) -> Gates:
    """Gates of the axes that the target shortens: a row a layer, or one row of the whole model."""
    assert part.target is not None
    sizes, targets = {}, {}
    for kind, target in part.target.sizes.items():
        rows = sum(kind_of(name) == kind for name in anatomy.axes)
        if target < size_of(anatomy, kind):
            sizes[kind], targets[kind] = (rows, size_of(anatomy, kind)), target
    return Gates(sizes, targets, rates, seed)


def groups_of(anatomy: Anatomy, kind: str, kept: Mapping[str, Tensor]) -> list[Group]:
    """What goes of a kind of axis, a unit of every layer that stays at a time."""
    stays = kept["layers"][0].tolist() if "layers" in kept else [True] * anatomy.shape.num_hidden_layers
    gone = {}
    for axis in anatomy.axes.values():
        if kind_of(axis.name) == kind and (axis.layer is None or stays[axis.layer]):
            gone[axis.name] = (~kept[kind][axis.layer or 0]).nonzero().flatten().tolist()
    return [
        Group(kind, {name: (units[i],) for name, units in gone.items()}, 0.0) for i in range(len(next(iter(gone.values()))))
    ]
