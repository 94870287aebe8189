"""What the records of a study say: runs, seed by seed differences of arms, and an SQLite index. Reads records alone.

The JSON lines are the truth; the index and every table are made from them, and can be made again.
"""

from __future__ import annotations

import json
import math
import sqlite3
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from .. import record
from ..errors import UserError
from ..place import staged_files
from ..reading import json_of
from ..train import recipe as recipes
from .file import ClaimPart, Study, fields

STUDY, RECORDS, PROOFS, INDEX = "study.json", "records.jsonl", "proofs.json", "index.sqlite"
LOSS = ("validation", "loss")  # of the training run's own
Metric = tuple[str, str]  # what it was measured on, and what


_Count = Annotated[int, Field(ge=0, lt=10**36)]
_Figure = Annotated[float, Field(gt=-1e300, lt=1e300, allow_inf_nan=False)]


@dataclass(frozen=True)
class Score:
    """A figure, with the standard error that its items give it where they do."""

    value: _Figure
    error: _Figure | None = None


@dataclass(frozen=True)
class Run:
    """One run that is done."""

    name: str
    arm: str
    place: Mapping[str, Any]
    params: _Count | None
    tokens: _Count
    flops: _Count
    total_tokens: _Count | None  # parents included; None for a released model
    total_flops: _Count | None
    unrecorded: tuple[str, ...]  # parents of whose training nothing is known
    scores: Mapping[Metric, Score]
    recipe_hash: str | None
    commit: str | None
    curve: tuple[tuple[_Count, _Figure], ...]  # validation loss by tokens
    uncut: _Count | None  # parameters of the released model that it was cut from
    milliseconds: Mapping[str, _Figure]  # "first token" and "a token" behind it, where they were measured

    @property
    def group(self) -> str:
        """Its place without seeds."""
        return _told(self.place)

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> Run:
        """Of one record."""
        figures, ledger = line["figures"], line.get("ledger")
        scores: dict[Metric, Score] = {}
        curve = [(row["tokens"], row["validation"]["loss"]) for row in figures.get("validation", [])]
        if curve:
            scores[LOSS] = Score(curve[-1][1])
        for one in line.get("evaluations", []):
            scores |= _scores(one["figures"])
        evaluated = [one["figures"]["params"] for one in line.get("evaluations", [])]
        return cls(
            name=line["run"], arm=line["arm"], place=line["place"],
            params=figures.get("params") or next(iter(evaluated), None),
            tokens=figures.get("tokens", 0), flops=0 if ledger is None else ledger["flops"],
            total_tokens=None if ledger is None else ledger["total_tokens"],
            total_flops=None if ledger is None else ledger["total_flops"],
            unrecorded=() if ledger is None else tuple(ledger["unrecorded"]), scores=scores,
            recipe_hash=line.get("recipe_hash"), commit=line.get("commit"), curve=tuple(curve), uncut=line.get("uncut"),
            milliseconds=_milliseconds(line.get("measured")),
        )  # fmt: skip


def _scores(figures: Mapping[str, Any]) -> dict[Metric, Score]:
    out: dict[Metric, Score] = {}
    for text in figures["texts"]:
        out[loss_on(text["text"]["source"], text["text"]["documents"])] = Score(text["loss"])
    for name, task in figures.get("tasks", {}).items():
        score = task[task["metric"]]
        out[name, task["metric"]] = Score(score["mean"], score["error"])
    for name, score in figures.get("means", {}).items():
        out[f"mean of {name}", "accuracy"] = Score(score["mean"], score["error"])
    return out


def loss_on(text: str, documents: str | None) -> Metric:
    """What the loss on a text, as records name it, or on a slice of its documents stands under."""
    return text + (f" {documents}" if documents else ""), "loss"


def _milliseconds(timed: Mapping[str, Any] | None) -> dict[str, float]:
    if timed is None:
        return {}
    (cell,) = timed["models"][0]["cells"]
    return {"first token": cell["first_token_ms"]["median"], "a token": cell["decode_ms"]["median"]}


def is_seed(key: str) -> bool:
    """Whether a grid key tells repetitions of one thing apart."""
    return last(key) == "seed"


def last(key: str) -> str:
    """A grid key without the tables that it lies in."""
    return key.rpartition(".")[2]


def _told(place: Mapping[str, Any]) -> str:
    return ", ".join(f"{last(key)}={value}" for key, value in place.items() if not is_seed(key))


def is_loss(metric: Metric) -> bool:
    """Whether less is better."""
    return metric[1] == "loss"


class _Loose(BaseModel):
    model_config = ConfigDict(extra="allow")


class _Compared(_Loose):
    protocol: str
    arms: Annotated[list[str], Field(min_length=2)]


class _Arm(_Loose):
    source: str | None = Field(None, alias="from")
    cut: dict[str, Any] | None = None
    grid: dict[str, list[Any]] | None = None


class _File(_Loose):
    """As much of a study's file as tables read."""

    arms: dict[str, _Arm] = {}
    grid: dict[str, list[Any]] = {}
    compare: list[_Compared]
    claims: list[ClaimPart] = []


class Told(_Loose):
    """`study.json`."""

    name: str
    file: _File
    runs: list[str]


class _Proof(_Loose):
    protocol: str
    runs: tuple[str, str]
    holds: bool
    why: str


def _checked(run: Run) -> Run:
    """The same with every field of its type; ValidationError for one that is of another, which JSON can say."""
    return _RUN.validate_python(vars(run) | {"scores": {metric: vars(score) for metric, score in run.scores.items()}})


_RUN, _PROOFS = TypeAdapter(Run), TypeAdapter(list[_Proof])


@dataclass(frozen=True)
class Results:
    """A study's folder as far as it is done."""

    folder: Path
    name: str
    written: Mapping[str, Any]  # the study's file
    runs: tuple[Run, ...]
    missing: tuple[str, ...]  # runs that are not done
    proofs: tuple[Mapping[str, Any], ...]

    @property
    def metrics(self) -> list[Metric]:
        """All that was measured, in the order of the records."""
        return list(dict.fromkeys(metric for run in self.runs for metric in run.scores))

    def of(self, arm: str) -> list[Run]:
        """The runs of an arm."""
        return [run for run in self.runs if run.arm == arm]


def keep(study: Study, out: Path) -> None:
    """Writes what the study is beside its records, so that they can be read without its file."""
    told = {"name": study.name, "file": study.file.model_dump(mode="json", by_alias=True)}
    told |= {"runs": [cell.name for cell in study.cells]}
    out.mkdir(parents=True, exist_ok=True)
    with staged_files(out / STUDY) as (stage,):
        stage.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def load(out: Path) -> Results:
    """What is there of a study; UserError for a folder that holds none. An unfinished one says what is missing."""
    if not (out / STUDY).is_file():
        what = "holds no study" if out.is_dir() else "no such file or folder"
        raise UserError(f"{out}: {what}; give the --out of prunus study run")
    try:
        told = json_of(out / STUDY)
        Told.model_validate(told)
        lines = record.read(out / RECORDS) if (out / RECORDS).is_file() else []
        runs = tuple(_checked(Run.of(line)) for line in lines)
        proofs = json_of(out / PROOFS) if (out / PROOFS).is_file() else []
        _PROOFS.validate_python(proofs)
        done = {run.name for run in runs}
        missing = tuple(name for name in told["runs"] if name not in done)
        return Results(out, told["name"], told["file"], runs, missing, tuple(proofs))
    except ValidationError as error:
        raise UserError(
            f"{out}: its records cannot be read ({recipes.sentence(error, None, Told)}); run the study again"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{out}: its records cannot be read ({type(error).__name__}: {error}); run the study again"
        ) from error


def rows(found: Results) -> list[dict[str, Any]]:
    """Each run's figures as plain data."""
    counts = ("params", "tokens", "flops", "total_tokens", "total_flops", "unrecorded")
    return [
        {"run": run.name, "arm": run.arm, **run.place, **{name: getattr(run, name) for name in counts}}
        | {"scores": [{"on": on, "metric": what, **vars(score)} for (on, what), score in run.scores.items()]}
        for run in found.runs
    ]


# -- what a few seeds tell --------------------------------------------------------------------------------------------------

# Student's t, its 97.5 % quantile by degrees of freedom: two or three seeds tell little of how far they spread
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean of what was drawn; None of one value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def half_interval(error: float, count: int) -> float:
    """Half of the 95 % interval of a mean over `count` > 1 values with this standard error (Student's t).

    Behind ten degrees of freedom to 0.1 %, by the first terms of the expansion around the normal quantile (Abramowitz and
    Stegun 26.7.5).
    """
    freedom = count - 1
    if freedom <= len(_T):
        return _T[freedom - 1] * error
    z = 1.959964
    return error * (z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2))


def reach_of(values: Sequence[float]) -> float | None:
    """Half of the 95 % interval of the mean of what was drawn; None of one value."""
    error = standard_error(values)
    return None if error is None else half_interval(error, len(values))


# -- differences ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """One arm less another on the same metric at the same place, seed by seed."""

    protocol: str
    arms: tuple[str, str]
    place: Mapping[str, Any]  # without seeds
    metric: Metric
    values: tuple[float, float]  # means over the seeds that both have
    mean: float
    error: float | None  # standard error over seeds; None of one seed
    seeds: int
    noise: float | None  # of one seed: the items' standard error of the second arm's score, the rule of the papers

    @property
    def group(self) -> str:
        """The place in words."""
        return _told(self.place)

    @property
    def reach(self) -> float | None:
        """Half of the difference's 95 % interval; None of one seed."""
        return None if self.error is None else half_interval(self.error, self.seeds)

    @property
    def verdict(self) -> str:
        """Which arm is better, or that nothing can be told."""
        if self.reach is None and self.noise is None:
            return "one run each"
        far = self.noise if self.reach is None else self.reach
        if abs(self.mean) <= (far or 0.0):
            return "within noise"
        return f"{self.arms[0 if (self.mean < 0) == is_loss(self.metric) else 1]} better"


def differences(found: Results) -> list[Difference]:
    """Every pair of arms that the study compares, by place and metric."""
    out = []
    for part in found.written["compare"]:
        first, *others = part["arms"]
        for other in others:
            groups: dict[str, list[tuple[Run, Run]]] = {}
            places: dict[str, Mapping[str, Any]] = {}
            for one, two in _pairs(found, first, other):
                wide = one if len(one.place) >= len(two.place) else two
                groups.setdefault(wide.group, []).append((one, two))
                places[wide.group] = {key: value for key, value in wide.place.items() if not is_seed(key)}
            for group, pairs in groups.items():
                for metric in found.metrics:
                    both = [
                        (a.scores[metric], b.scores[metric]) for a, b in pairs if metric in a.scores and metric in b.scores
                    ]
                    if both:
                        out.append(_difference(part["protocol"], (first, other), places[group], metric, both))
    return out


def _pairs(found: Results, first: str, other: str) -> Iterable[tuple[Run, Run]]:
    """Runs of two arms that agree."""
    return ((one, two) for one in found.of(first) for two in found.of(other) if agree(one, two))


def agree(one: Run, two: Run) -> bool:
    """Whether two runs have the same values of all that both are told apart by.

    If their seeds are of other fields, such as `seed` and `data.seed`, these must have the same values: runs that are crossed
    would count each repetition several times.
    """
    mine, theirs = (dict(fields(run.place)) for run in (one, two))
    both = mine.keys() & theirs.keys()
    if any(mine[name] != theirs[name] for name in both):
        return False
    seeds = [{str(value) for name, value in place.items() if is_seed(name)} for place in (mine, theirs)]
    return any(map(is_seed, both)) or not all(seeds) or seeds[0] == seeds[1]


def _difference(
    protocol: str, arms: tuple[str, str], place: Mapping[str, Any], metric: Metric, both: Sequence[tuple[Score, Score]]
) -> Difference:
    apart = [a.value - b.value for a, b in both]
    error = standard_error(apart)
    means = (statistics.fmean(a.value for a, _ in both), statistics.fmean(b.value for _, b in both))
    noise = both[0][1].error if len(both) == 1 else None
    return Difference(protocol, arms, place, metric, means, statistics.fmean(apart), error, len(both), noise)


# -- index ------------------------------------------------------------------------------------------------------------------


def index(found: Results) -> Path:
    """Writes the runs as an SQLite file that pandas and DuckDB read: tables runs, places and scores."""
    path = found.folder / INDEX
    with staged_files(path) as (stage,):
        base = sqlite3.connect(stage)
        try:
            columns = ", ".join(f'"{name}" {kind}' for name, kind in _SQL.items())
            base.execute(f"create table runs (run text primary key, arm text, {columns})")
            base.execute("create table places (run text references runs, key text, value)")
            base.execute('create table scores (run text references runs, "on" text, metric text, value real, error real)')
            for run in found.runs:
                counts = [_stored(getattr(run, name), name) for name in COUNTS]
                base.execute(f"insert into runs values ({', '.join('?' * (2 + len(counts)))})", [run.name, run.arm, *counts])
                places = [
                    (run.name, k, v if isinstance(v, int | float | str) else json.dumps(v)) for k, v in run.place.items()
                ]
                base.executemany("insert into places values (?, ?, ?)", places)
                scores = [(run.name, on, metric, s.value, s.error) for (on, metric), s in run.scores.items()]
                base.executemany("insert into scores values (?, ?, ?, ?, ?)", scores)
            base.commit()
        finally:
            base.close()
    return path


COUNTS = ("params", "tokens", "flops", "total_tokens", "total_flops", "recipe_hash", "commit")
_SQL = dict.fromkeys(COUNTS, "integer") | {"recipe_hash": "text", "commit": "text", "flops": "real", "total_flops": "real"}


def _stored(value: Any, name: str) -> Any:
    """FLOPs of large runs are more than SQLite's whole numbers hold."""
    return float(value) if value is not None and _SQL[name] == "real" else value
