"""What a recipe asks for, checked against the model that it starts from; no weight is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ...anatomy import Anatomy
from ...errors import UserError
from .clocked import check_clock
from .goal import Clocks, Goal, check_pace, floors_of
from .pace import Pace
from .part import PacePart, PrunePart, TargetPart

if TYPE_CHECKING:
    from ..recipe import Recipe


@dataclass(frozen=True)
class Cutting:
    """The cuts of one run: what goes, from what, when, and down to what."""

    part: PrunePart
    config: Any
    anatomy: Anatomy
    seq_len: int
    pace: Pace
    clocks: Clocks = field(default_factory=dict)  # what counts milliseconds, once they are measured

    @cached_property
    def goal(self) -> Goal:
        """What the model is cut down to; one of milliseconds is there with its clock only."""
        return Goal.of(self.part, self.anatomy, self.seq_len, self.clocks)

    @classmethod
    def of(cls, recipe: Recipe, config: Any, before: int | None = None) -> Cutting | None:
        """None for a recipe that prunes nothing; UserError for one that cannot be carried out.

        `before`: the FFN width that was enlarged, which a recipe without a target comes back to.
        """
        part = recipe.prune
        if part is None:
            return None
        if part.target is None:
            part = part.model_copy(update={"target": TargetPart(intermediate_size=before)})
        anatomy = Anatomy.of(config)
        pace = Pace(pace_of(part), recipe.steps * recipe.batch_tokens, recipe.batch_tokens, recipe.rates(1.0))
        made = cls(part, config, anatomy, recipe.data.seq_len, pace)
        floors_of(part, anatomy)
        check_clock(part, anatomy)
        if not part.clocked:
            check_pace(part, anatomy, made.goal, pace)
        if part.pace.kind == "once" and part.pace.samples > recipe.steps * recipe.sequences:
            raise UserError(
                f"prune.pace.samples: {part.pace.samples:,} sequences are more than the {recipe.steps * recipe.sequences:,} that "
                "the run trains on afterwards; give fewer"
            )
        if part.looks and part.activations.every > recipe.data.seq_len:
            raise UserError(
                f"prune.activations.every: {part.activations.every} is more than the {recipe.data.seq_len} tokens of a sequence, "
                "so that some updates would show nothing; give at most that"
            )
        return made


def pace_of(part: PrunePart) -> PacePart:
    """As it is given; what masks learn goes at once when their phase ends."""
    return part.pace if part.masks is None else PacePart(start=part.masks.end, end=part.masks.end, rounds=1)
