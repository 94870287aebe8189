"""Runs of a folder, as rows: read from their recipes and logs alone.

Ten thousand runs are listed in about three times the time that reading their files takes: of a log only the lines are parsed
that say something that is shown.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError, model_validator

from .. import record
from ..errors import UserError
from ..reading import parsed, table_of
from . import log
from .opening import RECIPE, RECORD
from .recipe import sentence

_Figure = Annotated[float, Field(allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=0, lt=10**30)]


def listed(folder: Path) -> list[dict[str, Any]]:
    """One row a run: its folder's name, recipe, state, and last figures. A folder that is no run is passed over."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such file or folder; give one whose sub-folders are runs")
    if (row := _row(str(folder), folder.name)) is not None:
        return [row]
    rows = (_row(f"{folder}/{name}", name) for name in sorted(os.listdir(folder)))
    return [row for row in rows if row is not None]


def _row(place: str, name: str) -> dict[str, Any] | None:
    """None for what is no run."""
    if not os.path.isfile(f"{place}/{RECIPE}"):
        return None
    recipe, lines = begun(place), log.lines(place)
    where = f"{place}/{log.LOG}: line"
    updates = (_line(lines[i], f"{where} {i + 1}") for i in reversed(range(len(lines))) if b'"loss"' in lines[i])
    last = next((line for line in updates if "loss" in line), {})
    validated = (_line(line, f"{where} {i}") for i, line in enumerate(lines, 1) if b'"validation"' in line)
    return {
        "run": name,
        "recipe": recipe["name"],
        "state": "done" if os.path.isfile(f"{place}/{RECORD}") else "stopped or running" if lines else "begun",
        "tokens": last.get("tokens", 0),
        "budget": recipe["tokens"],
        "loss": last.get("loss"),
        "best": min((line["validation"]["loss"] for line in validated if "validation" in line), default=None),
        "tokens_per_s": last.get("tokens_per_s"),
    }


class Begun(BaseModel):
    """The recipe of a run, as far as it is shown: it may be of another version of prunus."""

    name: str
    tokens: _Count
    batch_tokens: Annotated[int, Field(ge=1, lt=10**30)]


def begun(run: Path | str) -> dict[str, Any]:
    """A run's recipe as plain data; UserError if it is none."""
    path = f"{run}/{RECIPE}"
    data = table_of(path)
    try:
        Begun.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{path}: is no recipe: {sentence(error, data, Begun)}") from error
    return data


class Cut(BaseModel):
    """What pruning took away on the way."""

    source_params: _Count


class Figures(BaseModel):
    """What a run came to, as far as pages, pictures and cards tell it."""

    tokens: Annotated[int, Field(ge=1, lt=10**30)]
    params: _Count
    flops: dict[str, _Count]
    seconds: _Figure
    pruning: Cut | None = None


class Called(BaseModel):
    """What a record keeps of a recipe, of which the name is told."""

    name: str


class Asked(BaseModel):
    """What a record's recipe says."""

    recipe: Called


class Finished(BaseModel):
    """The record of a training run."""

    recipe: Asked
    recipe_hash: str
    commit: str | None
    time: str
    versions: dict[str, str]
    machine: dict[str, Any]
    figures: Figures


def finished(run: Path) -> Finished | None:
    """The record of a run; None before its end. UserError for one that is none."""
    path = run / RECORD
    if not path.is_file():
        return None
    try:
        return Finished.model_validate([None, *record.read(path)][-1])
    except ValidationError as error:
        raise UserError(f"{path}: is no record of a training run: {sentence(error, None, Finished)}") from error


class Validation(BaseModel):
    """What a validation found."""

    loss: _Figure


class Line(BaseModel):
    """A line of a run's log, as far as tables and pictures read it."""

    tokens: _Count | None = None
    loss: _Figure | None = None
    lr: _Figure | None = None
    flops: _Count | None = None
    params: _Count | None = None
    tokens_per_s: _Figure | None = None
    validation: Validation | None = None

    @model_validator(mode="after")
    def _update(self) -> Line:
        if self.loss is not None and self.lr is None:
            raise ValueError("a loss without its lr")
        if self.tokens is None and (self.loss is not None or self.validation is not None):
            raise ValueError("a loss without its tokens")
        return self


def logged(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's log, counted through its parts; UserError for lines that are no log's."""
    return [_line(line, f"{run}/{log.LOG}: line {i}") for i, line in enumerate(log.lines(run), 1)]


def _line(text: bytes, where: str) -> dict[str, Any]:
    line = parsed(text, where)
    try:
        Line.model_validate(line)
    except ValidationError as error:
        raise UserError(f"{where} is none of a run's log: {sentence(error, line, Line)}") from error
    return dict(line)
