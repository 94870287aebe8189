"""What a method measured, beside its checkpoint: written when it is saved, read back for pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from .criteria import Scores
from .errors import UserError
from .headers import safetensors_shapes
from .reading import table_of

SCORES = "scores.safetensors"


def save_scores(scores: Scores, folder: Path) -> None:
    """Axis name -> float32, one value a unit of the source, higher = keep."""
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    save_file({name: value.float().contiguous() for name, value in scores.values.items()}, folder / SCORES)


def load_scores(folder: Path) -> dict[str, Tensor]:
    """Scores of units or of whole layers; empty if the method has none or an older version did not save them."""
    from safetensors import safe_open

    path = folder / SCORES
    if path.is_file():
        try:
            safetensors_shapes(path)
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (a handle is no mapping)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: the scores cannot be read: {error}") from error
    found = load_measured(folder, "scores")
    if not found:
        return {}
    values = [float("nan") if value is None else value for value in next(iter(found.values()))]
    return {"layers": torch.tensor(values, dtype=torch.float32)}


def load_measured(folder: Path, name: str) -> dict[str, Any]:
    """The plain data that a depth method saved under `name`; empty if there is none."""
    path = folder / f"{name}.json"
    if not path.is_file():
        return {}
    return table_of(path)
