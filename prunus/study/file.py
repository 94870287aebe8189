"""A study as it is written: arms, what they start from, and a grid; checked, and laid out as runs.

name: half
set: {data.domains: [{folder: tokens}], model.tokenizer: tokenizer}      # of every run that trains
cut: {calibration: {text: c4.jsonl}}                                     # of every cut
arms:
  parent: {recipe: scratch, set: {tokens: 2000000, data.range: parent}, grid: {}}
  P2M-R0.5M: {from: parent, cut: {ratio: 0.5}, recipe: continue, set: {tokens: 500000}}
  S0.5M: {shape_of: P2M-R0.5M, recipe: scratch, set: {tokens: 500000}}
grid: {cut.method: [flap, minitron-width], data.seed: [0, 1, 2]}         # every combination of every arm
compare: [{protocol: training-tokens, arms: [P2M-R0.5M, S0.5M]}]
evaluate: [{texts: [wiki.txt]}]
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..api import CALIBRATION, EVALUATION, TextOptions
from ..appraisal import Question
from ..bench import Asked
from ..errors import UserError, nearest, unknown
from ..planning import Request
from ..reading import text_of, yaml_of
from ..tasks import local
from ..train import recipe as recipes
from ..train.recipe import Recipe

CUT = "cut."  # before grid keys that are a cut's
NAMED = "cut"  # the grid key whose values name cuts
_MOST_RUNS = 2_000  # of an arm
RATE = "optimizer.lr"
WITH = "+"  # between fields that have one value: seed+data.seed
RESERVED = ("steps", "cuts", "evaluations", "measures", "logs", "slurm")  # folders beside those of the runs
MADE = "study:"  # before the name of a run in place of the folder that it leaves
Protocol = Literal["training-tokens", "total-tokens", "total-flops"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class CalibrationPart(_Strict):
    """The text that a cut goes by, and how it becomes windows."""

    text: str
    windows: int = CALIBRATION.windows
    seq_len: int = CALIBRATION.seq_len
    seed: int | None = None
    documents: str | None = None
    field: str = "text"

    @property
    def options(self) -> TextOptions:
        """As `prune` takes them."""
        return TextOptions(self.windows, self.seq_len, self.seed, self.documents, self.field)


class CutPart(_Strict):
    """One cut in one shot: what `prunus prune` asks."""

    method: str
    ratio: float | None = None
    pattern: str | None = None
    target: dict[str, int] = {}
    uniform: bool = False
    multiple_of: int | None = None
    compensate: str | None = None
    options: dict[str, str] = {}
    sparsity: float | None = None
    split: tuple[float, ...] = ()
    allocate: str | None = None
    cost: str | None = None
    order: str | None = None
    calibration: CalibrationPart | None = None

    @property
    def request(self) -> Request:
        """What is to be cut."""
        return Request(**{name: getattr(self, name) for name in Request.__dataclass_fields__})


class EvaluatePart(_Strict):
    """What every arm's model is asked at its end."""

    texts: list[str] = []
    windows: int = EVALUATION.windows
    seq_len: int = EVALUATION.seq_len
    documents: str | None = None
    tasks: list[str] = []
    task_data: str | None = None
    limit: int | None = None
    dtype: str = "float32"

    @property
    def question(self) -> Question:
        """As `appraise` takes it, a mean's name standing for its tasks; UserError for a name of neither."""
        tasks = local.named(",".join(self.tasks)) if self.tasks else ()
        options = TextOptions(self.windows, self.seq_len, None, self.documents)
        data = None if self.task_data is None else Path(self.task_data).expanduser()
        return Question(tuple(self.texts), options, tasks, data, self.limit, dtype=self.dtype)


class MeasurePart(_Strict):
    """What is timed of every shape that comes up: a prompt and the tokens behind it."""

    threads: int = 1
    batch: int = 1
    context: int = 128
    new_tokens: int = 16
    repeats: int = 5
    dtype: str = "float32"

    @property
    def asked(self) -> Asked:
        """As `bench.run` takes it."""
        return Asked((self.threads,), (self.batch,), (self.context,), self.new_tokens, self.repeats, dtype=self.dtype)


class ComparePart(_Strict):
    """Arms that are compared, and what must be equal of them; checked before the first run, and proved from ledgers after."""

    protocol: Protocol
    arms: list[str] = Field(min_length=2)
    within: float = Field(default=0.02, gt=0, lt=1, description="of total-flops: how far FLOPs may lie apart")


class LeadPart(_Strict):
    """What one arm is ahead of another, along the values of a grid's key."""

    arms: list[str] = Field(min_length=2, max_length=2)
    along: str
    values: list[Any] = Field(default=[], description="from the first to the last; default: all, in the grid's order")


class ClaimPart(_Strict):
    """A finding that the study is asked about; one of `better`, `shrinks` and `ranks` says what it comes to."""

    says: str
    source: str = Field("", description="where it was found before")
    better: list[str] = Field([], description="two arms: the first is better wherever both were run")
    shrinks: LeadPart | None = Field(
        None, description="what the first arm is ahead is less at the last value than at the first"
    )
    ranks: list[str] = Field([], description="two arms: their places of the grid rank alike")
    where: dict[str, list[Any]] = Field(default={}, description="places that count")
    on: str | None = Field(None, description="what is measured; default: the first that both arms have")

    @model_validator(mode="after")
    def _one(self) -> ClaimPart:
        if sum(map(bool, (self.better, self.shrinks, self.ranks))) != 1:
            raise ValueError("give one of better, shrinks and ranks")
        if any(len(arms) not in (0, 2) for arms in (self.better, self.ranks)):
            raise ValueError(f"{self.better or self.ranks} are not two arms")
        return self

    @property
    def arms(self) -> list[str]:
        """Both of them."""
        return self.better or self.ranks or (self.shrinks.arms if self.shrinks else [])


class ArmPart(_Strict):
    """One arm: a model, what is cut of it, and the recipe that trains it."""

    model: str | None = Field(None, description="a released model: folder, GGUF file or hub name")
    source: str | None = Field(None, alias="from", description="an arm to go on from")
    shape_of: str | None = Field(None, description="an arm whose cut names the shape of fresh weights")
    cut: dict[str, Any] | None = None
    recipe: str | None = None
    set: dict[str, Any] = Field(default_factory=dict)
    grid: dict[str, list[Any]] | None = Field(None, description="instead of the study's")
    flops_of: str | None = Field(
        None, description="an arm: as many tokens as its FLOPs pay for, its parents' included, less this one's source"
    )
    lr_of: str | None = Field(
        None, description="an arm whose sweep found the rate, or whose run at the best of its rates did"
    )

    @model_validator(mode="after")
    def _one(self) -> ArmPart:
        if self.model is not None and (self.source or self.shape_of):
            raise ValueError("model is released, and from or shape_of is made here; give one of them")
        if self.source and self.shape_of:
            raise ValueError("from goes on with weights, shape_of begins with fresh ones; give one of them")
        if self.cut is not None and not (self.model or self.source):
            raise ValueError("cut needs weights; give from, an arm, or model, a released one")
        if self.recipe is None and self.cut is None and self.model is None:
            raise ValueError("nothing to do; give recipe, cut, or model")
        if self.recipe is None and (self.flops_of or self.lr_of or self.set or self.shape_of):
            raise ValueError("flops_of, lr_of, set and shape_of are of training; give recipe")
        return self

    @property
    def others(self) -> dict[str, str]:
        """Arms that it names, by field."""
        named = {"from": self.source, "shape_of": self.shape_of, "flops_of": self.flops_of, "lr_of": self.lr_of}
        return {name: arm for name, arm in named.items() if arm is not None}


class StudyFile(_Strict):
    """A study as it is written."""

    name: str
    set: dict[str, Any] = Field(default_factory=dict)
    cut: dict[str, Any] = Field(default_factory=dict)
    cuts: dict[str, dict[str, Any]] = Field(default_factory=dict, description="by name, for a grid's key cut")
    arms: dict[str, ArmPart] = Field(min_length=1)
    grid: dict[str, list[Any]] = Field(default_factory=dict)
    compare: list[ComparePart] = []
    claims: list[ClaimPart] = []
    evaluate: list[EvaluatePart] = []
    measure: MeasurePart | None = None


@dataclass(frozen=True)
class Cell:
    """One run of a study: its arm, its place in the grid, and what is done. Other runs stand where theirs are needed."""

    arm: str
    place: Mapping[str, Any]
    recipe: Recipe | None = None  # its source or shape is `MADE` and a name where another run makes it
    cut: CutPart | None = None
    model: str | None = None
    others: Mapping[str, Cell] = field(default_factory=dict)  # from, shape_of, flops_of
    rated: tuple[Cell, ...] = ()  # whose best one's learning rate it takes

    @property
    def name(self) -> str:
        """Of its folder."""
        parts = [f"{key.rpartition('.')[2]}={value}" for key, value in self.place.items()]
        return re.sub(r"[^\w.+:=,-]", "-", "_".join([self.arm, *parts]))

    @property
    def shaped(self) -> Cell:
        """The run that first had this one's shape at its end: of one with fresh weights, that whose cut made it."""
        if self.recipe is not None and (self.recipe.prune is not None or self.recipe.model.enlarge is not None):
            return self
        if (other := self.others.get("shape_of")) is not None:
            return other.shaped if other.cut is None else other._cut_alone
        if self.cut is not None:
            return self._cut_alone
        return other.shaped if (other := self.others.get("from")) is not None else self

    @property
    def _cut_alone(self) -> Cell:
        """What this one goes on from, cut and not trained yet."""
        return Cell(f"{self.arm}-cut", self.place, None, self.cut, self.model, self.others)

    def ancestors(self) -> Iterator[Cell]:
        """What it goes on from, and so on, the nearest first."""
        at = self.others.get("from")
        while at is not None:
            yield at
            at = at.others.get("from")


@dataclass(frozen=True)
class Study:
    """A study that is one: every recipe and every cut in it is one, and every arm that is named is there."""

    path: Path
    file: StudyFile
    cells: tuple[Cell, ...]

    @property
    def name(self) -> str:
        """As written."""
        return self.file.name

    def of(self, arm: str) -> list[Cell]:
        """The runs of an arm."""
        return [cell for cell in self.cells if cell.arm == arm]


def read(path: Path) -> Study:
    """A study's file; UserError for one that is none, which names the first mistake in it."""
    written = _parsed(path)
    for arm in written.arms:
        _check_arm(path, written, arm)
    made = _Made(path, written)
    cells = tuple(made.cell(arm, place) for arm in written.arms for place in _places(written, arm))
    names = [cell.name for cell in cells]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{path}: two runs are called '{twice}'; give arms and grid values that differ")
    for i, part in enumerate(written.compare):
        for arm in part.arms:
            if arm not in written.arms:
                raise UserError(f"{path}: compare.{i}: {unknown('arm', arm, written.arms)}")
    for i, claim in enumerate(written.claims):
        for arm in claim.arms:
            if arm not in written.arms:
                raise UserError(f"{path}: claims.{i}: {unknown('arm', arm, written.arms)}")
        asked = {**claim.where, **({claim.shrinks.along: claim.shrinks.values} if claim.shrinks else {})}
        places = [place for arm in claim.arms for place in _places(written, arm)]
        for key, values in asked.items():
            known = [place[key] for place in places if key in place]
            if not known or any(value not in known for value in values):
                raise UserError(
                    f"{path}: claims.{i}: {' and '.join(claim.arms)} are run at {key}={', '.join(map(str, known)) or 'nothing'}; "
                    "name values of their grid"
                )
    for i, one in enumerate(written.evaluate):
        if not one.texts and not one.tasks:
            raise UserError(f"{path}: evaluate.{i}: nothing is asked; give texts, tasks, or both")
    return Study(path, written, cells)


def _parsed(path: Path) -> StudyFile:
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder; give a study's .yaml file")
    try:
        data = yaml_of(text_of(path), str(path), _Once)
        return StudyFile.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{path}: {recipes.sentence(error, data, StudyFile)}") from error
    except _TwiceError as error:
        raise UserError(f"{path}: {error}") from error


class _TwiceError(Exception):
    """One name stands for two things."""


class _Once(yaml.SafeLoader):
    """YAML in which a name stands for one thing: PyYAML keeps the last of two arms of one name, without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A table; `_TwiceError` for a key that is there twice."""
        seen: list[Any] = []
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge":
                name = self.construct_object(key, deep=True)
                if name in seen:
                    raise _TwiceError(
                        f"line {key.start_mark.line + 1}: '{name}' is there twice; give each a name of its own"
                    )
                seen.append(name)
        return super().construct_mapping(node, deep)


def _check_arm(path: Path, written: StudyFile, arm: str) -> None:
    """UserError for a name that could not be a folder's, and for arms named for what they do not have."""
    if not re.fullmatch(r"[\w+=,-][\w.+:=,-]*", arm) or arm in RESERVED:
        raise UserError(
            f"{path}: arm '{arm}': it names a folder; give letters, digits and .+:=,- without a dot in front, and none of "
            f"{', '.join(RESERVED)}"
        )
    part, arms = written.arms[arm], written.arms
    grid = written.grid if part.grid is None else part.grid
    if (places := math.prod(map(len, grid.values()))) > _MOST_RUNS:
        raise UserError(f"{path}: arm '{arm}': its grid has {places:,} places, more than {_MOST_RUNS:,}; give fewer values")
    for name, other in part.others.items():
        if other not in arms:
            raise UserError(f"{path}: arm '{arm}': {name}: there is no arm '{other}'{nearest(other, arms)}; add it")
    if part.lr_of is not None and arms[part.lr_of].recipe is None:
        raise UserError(f"{path}: arm '{arm}': lr_of: '{part.lr_of}' trains nothing; name an arm that tries rates")
    for name in ("shape_of", "flops_of"):
        named = part.others.get(name)
        if named is not None and arms[named].recipe is None and arms[named].cut is None:
            raise UserError(f"{path}: arm '{arm}': {name}: '{named}' is a released model; name an arm that is made here")


def _places(written: StudyFile, arm: str) -> list[dict[str, Any]]:
    own = written.arms[arm].grid
    grid = written.grid if own is None else own
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def fields(place: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Fields with their values, one by one, of a place whose keys may give one value to several."""
    return ((field, value) for key, value in place.items() for field in key.split(WITH))


def _is_cuts(key: str) -> bool:
    """Whether a grid's field is of the cut, not of the recipe."""
    return key == NAMED or key.startswith(CUT)


class _Made:
    """Runs by arm and place, each made once."""

    def __init__(self, path: Path, written: StudyFile) -> None:
        self.path, self.written = path, written
        self.done: dict[tuple[str, str], Cell] = {}
        self.begun: list[str] = []

    def cell(self, arm: str, place: Mapping[str, Any]) -> Cell:
        key = (arm, str(sorted(place.items(), key=str)))
        if key not in self.done:
            if arm in self.begun:
                raise UserError(f"{self.path}: arm '{arm}' needs itself, by {' and '.join(self.begun)}; break the circle")
            self.begun.append(arm)
            self.done[key] = self._made(arm, place)
            self.begun.pop()
        return self.done[key]

    def _made(self, arm: str, place: Mapping[str, Any]) -> Cell:
        part = self.written.arms[arm]
        others = {name: self._other(arm, name, other, place)[0] for name, other in part.others.items() if name != "lr_of"}
        rated = () if part.lr_of is None else self._other(arm, "lr_of", part.lr_of, place)
        for key in place:
            used = any((part.cut if _is_cuts(one) else part.recipe) is not None for one in key.split(WITH))
            if not used and not any(key in other.place for other in others.values()):
                raise UserError(
                    f"{self.path}: arm '{arm}': '{key}' of the grid changes nothing in it; give the arm a grid without it"
                )
        try:
            cut = None if part.cut is None else self._cut(part.cut, place)
            recipe = None if part.recipe is None else self._recipe(part, place, others)
            if len(rated) > 1 and any(one.recipe is None or not one.recipe.validate_.every for one in rated):
                raise UserError(f"lr_of: which run of '{part.lr_of}' is best is told by validation; give validate.every")
        except UserError as error:
            raise UserError(f"{self.path}: arm '{arm}': {error}") from error
        return Cell(arm, place, recipe, cut, part.model, others, rated)

    def _other(self, arm: str, name: str, other: str, place: Mapping[str, Any]) -> tuple[Cell, ...]:
        """The run of another arm that has this one's place, as far as it goes; of an arm that tries rates, all of them."""
        free = RATE if name == "lr_of" and RATE not in place else None
        fitting = [
            p
            for p in _places(self.written, other)
            if all(place.get(key) == p[key] and key in place for key in p if key != free)
        ]
        if not fitting:
            keys = ", ".join(_places(self.written, other)[0])
            at = ", ".join(f"{key}={value}" for key, value in place.items()) or "no place in the grid"
            raise UserError(
                f"{self.path}: arm '{arm}' at {at}: {name}: '{other}' has no run there, since its runs differ by {keys}; "
                "give both arms those keys and values"
            )
        return tuple(self.cell(other, place) for place in (fitting if free else fitting[:1]))

    def _cut(self, own: Mapping[str, Any], place: Mapping[str, Any]) -> CutPart:
        data, named = {**self.written.cut, **own}, self.written.cuts
        for key, value in fields(place):
            if key == NAMED:
                if not isinstance(value, str) or value not in named:
                    raise unknown("cut", str(value), named)
                data |= named[value]
        for key, value in fields(place):
            if key.startswith(CUT):
                recipes.put(data, key.removeprefix(CUT), value)
        try:
            return CutPart.model_validate(data)
        except ValidationError as error:
            raise UserError(f"cut: {recipes.sentence(error, data, CutPart)}") from error

    def _recipe(self, part: ArmPart, place: Mapping[str, Any], others: Mapping[str, Cell]) -> Recipe:
        changes = {**self.written.set, **part.set, **{k: v for k, v in fields(place) if not _is_cuts(k)}}
        if (parent := others.get("from")) is not None or part.model is not None:
            begun: str | None = (
                MADE + "cut" if part.cut is not None else part.model if parent is None else MADE + parent.name
            )
            changes |= {"model.source": begun}
            changes = {
                k: v for k, v in changes.items() if k not in ("model.shape", "model.tokenizer", "model.target_params")
            }
        cut_one = part.model if parent is None else MADE + parent.name
        if changes.get("teacher.source") == "from":  # what was cut teaches what is left
            changes["teacher.source"] = cut_one
        if isinstance(teacher := changes.get("teacher"), dict) and teacher.get("source") == "from":
            changes["teacher"] = teacher | {"source": cut_one}
        if (shaped := others.get("shape_of")) is not None:
            changes |= {"model.shape": MADE + shaped.name, "model.tokenizer": None, "model.target_params": None}
        if part.lr_of is not None:
            changes |= {RATE: 1e-3}  # until it is found
        recipe = recipes.read(str(part.recipe), (), changes)
        if "flops_of" in others:
            _check_paid(recipe)
        return recipe


def _check_paid(recipe: Recipe) -> None:
    """UserError for a recipe that spends FLOPs on anything but updates that all cost the same."""
    if recipe.teacher is not None:
        raise UserError("flops_of counts updates alone, and a teacher costs FLOPs too; drop one of them")
    if recipe.optimizer.sweeps:
        raise UserError("flops_of counts updates alone, and trying rates costs FLOPs too; name one rate, or give lr_of")
    if recipe.prune is not None:
        raise UserError("flops_of counts updates of one model, and prune makes later ones cheaper; drop one of them")


def shared_places(study: Study, arms: Sequence[str]) -> list[dict[str, Cell]]:
    """Runs of the arms that belong together: of each the one at the place of the first arm, as far as it goes."""
    out = []
    most = max(arms, key=lambda arm: len(study.of(arm)))
    for cell in study.of(most):
        found = {}
        for arm in arms:
            at = [one for one in study.of(arm) if all(cell.place.get(k) == v for k, v in one.place.items())]
            if arm == most:
                at = [cell]
            if at:
                found[arm] = at[0]
        if len(found) == len(arms):
            out.append(found)
    return out
