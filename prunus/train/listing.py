"""Runs of a folder, as rows: read from their recipes and logs alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import UserError
from .opening import LOG, RECIPE, RECORD


def listed(folder: Path) -> list[dict[str, Any]]:
    """One row a run: its folder's name, recipe, state, and last figures. A folder that is no run is passed over."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such file or folder; give one whose sub-folders are runs")
    places = (
        [folder] if (folder / RECIPE).is_file() else sorted(path for path in folder.iterdir() if (path / RECIPE).is_file())
    )
    return [_row(path) for path in places]


def _row(path: Path) -> dict[str, Any]:
    try:
        recipe = json.loads((path / RECIPE).read_text(encoding="utf-8"))
        lines = [json.loads(text) for text in whole_lines(path / LOG)]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: the run cannot be read: {error}") from error
    updates = [line for line in lines if "loss" in line]
    best = [line["validation"]["loss"] for line in lines if "validation" in line]
    last = updates[-1] if updates else {}
    return {
        "run": path.name,
        "recipe": recipe["name"],
        "state": "done" if (path / RECORD).is_file() else "stopped or running" if lines else "begun",
        "tokens": last.get("tokens", 0),
        "budget": recipe["tokens"],
        "loss": last.get("loss"),
        "best": min(best, default=None),
        "tokens_per_s": last.get("tokens_per_s"),
    }


def whole_lines(path: Path) -> list[str]:
    """The last line of a running process may be half there."""
    if not path.is_file():
        return []
    return [text for text in path.read_text(encoding="utf-8").splitlines(keepends=True) if text.endswith("\n")]
