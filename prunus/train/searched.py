"""The searched architecture trained from scratch: what a run that cut its model found, on the same tokens, from fresh weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..reading import table_of
from . import recipe as recipes
from .opening import RECIPE
from .recipe import Recipe
from .shapes import checkpoint_of

OPTION = "--from-scratch-at-searched-shape"
_ITS_OWN = ("model", "prune", "teacher", "lora")  # all else is the pruning run's: data, order, tokens, batches, rate, seeds


def recipe_of(run: Path, changes: Sequence[str] = (), fields: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe of a run that cut its model, but for weights, cuts and teacher: fresh ones of the shape that it came to.

    `changes` and `fields` as in `recipe.read`. UserError for what is no such run, or not at its end.
    """
    if not run.exists():
        raise UserError(f"{OPTION}: {run}: no such file or folder; give a run that pruned while it trained")
    try:
        data = table_of(run / RECIPE)
    except UserError as error:
        raise UserError(
            f"{OPTION}: {run} holds no run of prunus; give the folder of one that pruned while it trained"
        ) from error
    if data.get("prune") is None:
        raise UserError(f"{OPTION}: the run in {run} cut nothing; give the folder of one that pruned while it trained")
    model = {"shape": str(checkpoint_of(str(run))), "init": data["model"]["init"]}
    kept = {name: value for name, value in data.items() if name not in _ITS_OWN}
    return recipes.changed(kept | {"name": f"{data['name']}-from-scratch", "model": model}, str(run), changes, fields)
