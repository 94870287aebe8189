"""The peak rate by trying: short beginnings of the run at several rates, and the one that ends lowest in training loss."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..distributed import ALONE, World
from ..errors import UserError
from ..place import staged_files
from ..reading import table_of
from .loop import Training, train_
from .recipe import Recipe

SWEEP = "sweep.json"
_SHARE, _BEYOND, _SCORED = 0.02, 200, 0.2  # of all steps at least; steps behind the warm-up; the end that is scored


@dataclass(frozen=True)
class Sweep:
    """What was tried: rate -> mean training loss at the end of the beginning; None where it was no number.

    `cut`: of these, the updates that were read, the last of which came to nothing.
    """

    steps: int
    losses: Mapping[float, float | None]
    cut: Mapping[float, int] = field(default_factory=dict)

    @property
    def read(self) -> list[int]:
        """Updates of every beginning."""
        return [self.cut.get(rate, self.steps) for rate in self.losses]

    @property
    def best(self) -> float:
        """The rate with the lowest loss, the lower one of equals; UserError if none held."""
        held = {rate: loss for rate, loss in self.losses.items() if loss is not None}
        if not held:
            raise UserError(
                f"optimizer.lr: the loss is no number at any of {', '.join(map(str, self.losses))}; name a lower rate"
            )
        return min(sorted(held), key=lambda rate: held[rate])

    @property
    def note(self) -> str | None:
        """A word of warning where the best rate may lie beyond those that were tried."""
        if self.best not in (low := min(self.losses), max(self.losses)):
            return None
        side = "lowest" if self.best == low else "highest"
        return f"the best rate, {self.best:g}, is the {side} that was tried; a {side[:-3]}er one may be better"


def prefix(recipe: Recipe) -> int:
    """Steps of a beginning: past the real warm-up and a while on, so that the schedule is the run's own."""
    total = recipe.schedule.total or recipe.schedule.start + recipe.steps * recipe.batch_tokens
    warm = max(0, math.ceil((recipe.schedule.warmup * total - recipe.schedule.start) / recipe.batch_tokens))
    return min(recipe.steps, max(math.ceil(_SHARE * recipe.steps), warm + _BEYOND))


def tried(recipe: Recipe) -> int:
    """Tokens of all beginnings together; none where the rate is named."""
    return len(recipe.optimizer.rates) * prefix(recipe) * recipe.batch_tokens if recipe.optimizer.sweeps else 0


def swept(
    recipe: Recipe,
    out: Path,
    begin: Callable[[float], Training],
    say: Callable[[Mapping[str, Any]], None],
    world: World = ALONE,
) -> Sweep:
    """Try every rate; `begin(rate)` is a fresh run. Rates that were tried before, by a run that was stopped, are known.

    Losses are those of whole updates, so that all processes come to the same choice; the first writes and says.
    """
    steps, path = prefix(recipe), out / SWEEP
    losses, cut = world.agree(_read(path, steps) if world.first else ({}, {}))
    for rate in recipe.optimizer.rates:
        if rate in losses:
            continue
        seen: list[float] = []
        beginning = begin(rate)
        try:
            train_(beginning, steps, lambda training, seen=seen: seen.append(training.last["loss"]))  # type: ignore[misc]
        except UserError:  # no number: too high a rate
            losses[rate], cut[rate] = None, len(seen) + 1
        else:
            tail = seen[-max(1, round(_SCORED * steps)) :]
            losses[rate] = sum(tail) / len(tail)
        if world.first:
            with staged_files(path) as (stage,):
                known = {"steps": steps, "losses": list(losses.items()), "cut": list(cut.items())}
                stage.write_text(json.dumps(known) + "\n", encoding="utf-8")
            say({"step": steps, "sweep": {"lr": rate, "loss": losses[rate]}})
    return Sweep(steps, losses, cut)


def _read(path: Path, steps: int) -> tuple[dict[float, float | None], dict[float, int]]:
    if not path.is_file():
        return {}, {}
    try:
        data = table_of(path)
        if data["steps"] != steps:
            return {}, {}
        return {float(rate): loss for rate, loss in data["losses"]}, {float(rate): int(n) for rate, n in data["cut"]}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not readable; delete it, and the rates are tried again") from error
