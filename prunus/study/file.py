"""Studies: a grid of recipes, run one after another, each in a folder of its own; stopped and gone on with run by run.

name: warm-up
set: {data.domains: [{folder: tokens}], model.tokenizer: tokenizer}      # of every run
arms:
  short: {recipe: scratch, set: {schedule.warmup: 0.01}}
  long: {recipe: scratch, set: {schedule.warmup: 0.1}}
grid: {tokens: [1000000, 2000000], seed: [0, 1, 2]}                      # every combination of every arm
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .. import record
from ..errors import UserError
from .opening import RECORD, prepare
from .recipe import Recipe, read
from .run import Say, execute
from .stopping import StoppedError

RECORDS = "records.jsonl"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ArmPart(_Strict):
    """One arm: a recipe, and what is changed in it."""

    recipe: str
    set: dict[str, Any] = Field(default_factory=dict)


class StudyFile(_Strict):
    """A study as it is written."""

    name: str
    set: dict[str, Any] = Field(default_factory=dict)
    arms: dict[str, ArmPart] = Field(min_length=1)
    grid: dict[str, list[Any]] = Field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One run of a study: its arm, its place in the grid, its folder's name, and its recipe."""

    arm: str
    place: Mapping[str, Any]
    recipe: Recipe

    @property
    def name(self) -> str:
        """Of its folder."""
        parts = [f"{key.rpartition('.')[2]}={value}" for key, value in self.place.items()]
        return "_".join([self.arm, *parts]).replace("/", "-")


def cells(path: Path) -> tuple[str, list[Cell]]:
    """(the study's name, its runs); UserError for a study that is none, and for the first recipe in it that is none."""
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder; give a study's .yaml file")
    try:
        study = StudyFile.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc'])) or 'the study'}: {first['msg'].lower()}") from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not readable as YAML") from error
    out = []
    for arm, part in study.arms.items():
        for values in itertools.product(*study.grid.values()):
            place = dict(zip(study.grid, values, strict=True))
            try:
                recipe = read(part.recipe, (), {**study.set, **part.set, **place})
            except UserError as error:
                raise UserError(f"{path}: arm '{arm}': {error}") from error
            out.append(Cell(arm, place, recipe))
    names = [cell.name for cell in out]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{path}: two runs are called '{twice}'; give arms and grid values that differ")
    return study.name, out


def run(
    path: Path, out: Path, *, tell: Callable[[str], None] = lambda text: None, say: Say = lambda line: None
) -> dict[str, Any]:
    """Do what is not done yet. A run that fails is reported and leaves the others alone; StoppedError ends the study."""
    name, planned = cells(path)
    opened = [(cell, prepare(cell.recipe, out / cell.name)) for cell in planned if not (out / cell.name / RECORD).is_file()]
    failed: dict[str, str] = {}
    for number, (cell, run_) in enumerate(opened, 1):
        tell(f"{name}: run {number} of {len(opened)}, {cell.name}")
        try:
            execute(run_, say=say)
        except StoppedError:
            raise
        except UserError as error:
            failed[cell.name] = str(error)
            tell(f"{cell.name} failed: {error}")
    rows = [row for cell in planned if (row := _row(cell, out)) is not None]
    _write(out, planned)
    return {"study": name, "out": str(out), "ran": len(opened) - len(failed), "failed": failed, "rows": rows}


def _row(cell: Cell, out: Path) -> dict[str, Any] | None:
    path = out / cell.name / RECORD
    if not path.is_file():
        return None
    figures = record.read(path)[-1]["figures"]
    validation = figures["validation"][-1]["validation"]["loss"] if figures["validation"] else None
    cost = sum(figures["flops"].values())
    return {
        "run": cell.name,
        "arm": cell.arm,
        **cell.place,
        "tokens": figures["tokens"],
        "flops": cost,
        "validation": validation,
    }


def _write(out: Path, planned: list[Cell]) -> None:
    """All records in one file, in the study's order, each with its arm and place."""
    from ..place import staged_files

    found = [(cell, out / cell.name / RECORD) for cell in planned]
    with staged_files(out / RECORDS) as (stage,):
        lines = [
            record.read(path)[-1] | {"arm": cell.arm, "place": dict(cell.place)} for cell, path in found if path.is_file()
        ]
        stage.write_text(
            "".join(json.dumps(entry, sort_keys=True, allow_nan=False) + "\n" for entry in lines), encoding="utf-8"
        )
