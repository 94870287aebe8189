"""The ledger: which tokens every stage of a model's making consumed, and what it cost.

It travels with the checkpoint as `ledger.json`. Tokens are named by prepared data (the digest of its manifest), range, and
intervals [first, end), so that two runs can be told to have seen the same, disjoint or overlapping tokens.
"""

from __future__ import annotations

import base64
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, ValidationError, model_validator

from .errors import UserError
from .place import staged_files
from .reading import first_wrong, json_of

FORMAT: Literal[1] = 1
LEDGER = "ledger.json"
SWEEP = "lr sweep"  # name of the stage whose models, trained to find a rate, are thrown away
_MOST_BYTES = 1 << 28  # of packed intervals, unpacked: 16 million of them
_MOST_FLOPS = 10**36  # a float holds sums of it; all that was ever computed is less
_LISTED = 32  # more intervals than this are packed
_PACK = ">u8"  # high bytes first: small differences leave long runs of zeros, which pack well

Kind = Literal["train", "teacher", "scoring"]
Verdict = Literal["same", "disjoint", "overlapping", "unknown"]


class Intervals:
    """A set of whole numbers as ascending, disjoint, non-touching intervals [first, end)."""

    def __init__(self, spans: Iterable[tuple[int, int]] | np.ndarray = ()) -> None:
        self._merged = np.empty((0, 2), np.int64)
        self._new: list[tuple[int, int]] = []
        for first, end in spans:
            self.add(int(first), int(end))

    def add(self, first: int, end: int) -> None:
        """Add [first, end)."""
        if not 0 <= first < end:
            raise ValueError(f"interval [{first}, {end})")
        self._new.append((first, end))
        if len(self._new) > 1024 + len(self._merged) // 2:  # rarely enough to cost n log n in all
            self._merge()

    def _merge(self) -> np.ndarray:
        if self._new:
            spans = np.concatenate([self._merged, np.array(self._new, np.int64)])
            spans = spans[np.argsort(spans[:, 0], kind="stable")]
            reach = np.maximum.accumulate(spans[:, 1])
            opens = np.concatenate([[True], spans[1:, 0] > reach[:-1]])
            last = np.concatenate([np.flatnonzero(opens)[1:] - 1, [len(spans) - 1]])
            self._merged, self._new = np.stack([spans[opens, 0], reach[last]], axis=1), []
        return self._merged

    @property
    def spans(self) -> list[tuple[int, int]]:
        """The intervals."""
        return [(a, b) for a, b in self._merge().tolist()]

    @property
    def size(self) -> int:
        """How many numbers are in it."""
        merged = self._merge()
        return int((merged[:, 1] - merged[:, 0]).sum())

    def __or__(self, other: Intervals) -> Intervals:
        out = Intervals()
        out._new = [tuple(span) for span in np.concatenate([self._merge(), other._merge()]).tolist()]
        return out

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Intervals) and np.array_equal(self._merge(), other._merge())

    __hash__ = None  # type: ignore[assignment]  # it grows

    def shared(self, other: Intervals) -> int:
        """How many numbers are in both."""
        return self.size + other.size - (self | other).size

    def to_json(self) -> Any:
        """A few intervals as a list; many as differences in units of their greatest common divisor, packed."""
        merged = self._merge()
        if len(merged) <= _LISTED:
            return merged.tolist()
        steps = np.diff(merged.reshape(-1), prepend=0)
        unit = int(np.gcd.reduce(steps))
        packed = zlib.compress((steps // unit).astype(_PACK).reshape(-1).view(np.uint8).reshape(-1, 8).T.tobytes(), 9)
        return {"unit": unit, "packed": base64.b64encode(packed).decode("ascii")}

    @classmethod
    def of(cls, data: Any) -> Intervals:
        """The inverse of `to_json`; ValueError if it is no set of intervals."""
        if isinstance(data, Intervals):
            return data
        if isinstance(data, dict):
            if set(data) != {"unit", "packed"} or not isinstance(data["unit"], int) or data["unit"] < 1:
                raise ValueError("packed intervals have a unit and the packed text")
            try:
                unpack = zlib.decompressobj()  # a few bytes of it can unfold to gigabytes
                raw = np.frombuffer(
                    unpack.decompress(base64.b64decode(data["packed"], validate=True), _MOST_BYTES), np.uint8
                )
                if not unpack.eof:
                    raise ValueError(f"packed intervals are cut short, or unfold to more than {_MOST_BYTES:,} bytes")
                steps = raw.reshape(8, -1).T.copy().view(_PACK).astype(np.int64).reshape(-1)
                merged = (np.cumsum(steps) * data["unit"]).reshape(-1, 2)
            except (zlib.error, TypeError, OverflowError) as error:
                raise ValueError(f"packed intervals cannot be read ({error})") from error
        else:
            try:
                merged = np.array(data, np.int64).reshape(-1, 2)
            except (TypeError, OverflowError) as error:
                raise ValueError(f"intervals are pairs of whole numbers ({error})") from error
        if len(merged) and (merged[0, 0] < 0 or not (np.diff(merged.reshape(-1)) > 0).all()):
            raise ValueError("intervals must ascend")
        out = cls()
        out._merged = merged
        return out


_Spans = Annotated[Intervals, PlainValidator(Intervals.of), PlainSerializer(Intervals.to_json)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, validate_assignment=True)


class Data(_Strict):
    """Prepared data that a domain was drawn from: `Shards.identity`."""

    manifest: str
    range: str
    splits: dict[str, float]
    sources: list[str]

    @property
    def key(self) -> tuple[str, str]:
        """Positions mean the same tokens where this is equal."""
        return self.manifest, self.range

    def apart_from(self, other: Data) -> bool:
        """Whether no document can be in both: other ranges of the same splits, or other sources."""
        by_split = self.range != other.range and list(self.splits.items()) == list(other.splits.items())
        return by_split or not set(self.sources) & set(other.sources)


class Stage(_Strict):
    """One stage of a run: what it read, what it cost."""

    name: str
    params: Annotated[int, Field(ge=0)] | None = None  # of the model at its end
    seed: int | None = None
    seeds: dict[str, int] = {}  # of several ranges each its own, which order it instead
    seq_len: Annotated[int, Field(ge=1)] | None = None
    positions: tuple[int, int] | None = None  # of the stream, [first, end)
    history: list[tuple[int, dict[str, float]]] = []  # of the shares
    data: dict[str, Data] = {}  # by domain
    consumed: dict[str, _Spans] = {}  # by domain
    tokens: Annotated[int, Field(ge=0)] = 0  # all that were predicted, repetitions too
    other_text: dict[str, Annotated[int, Field(ge=1)]] = {}  # text that is no prepared data (calibration): SHA-256 -> tokens
    flops: dict[Kind, Annotated[int, Field(ge=0, lt=_MOST_FLOPS)]] = {}
    teacher_cache: str | None = None  # the teacher's were spent when this was written, maybe for other runs too

    @model_validator(mode="after")
    def _named(self) -> Stage:
        if alien := self.consumed.keys() - self.data.keys():
            raise ValueError(f"consumed names domain '{sorted(alien)[0]}', which is not among the stage's data")
        return self

    def consume(self, ranges: Iterable[tuple[str, int, int]]) -> None:
        """Count the `ranges` of a `Batch`."""
        for domain, first, end in ranges:
            if domain not in self.data:
                raise ValueError(f"domain '{domain}' is not among the stage's data")
            self.consumed.setdefault(domain, Intervals()).add(first, end)
            self.tokens += end - first

    def consume_text(self, sha256: str, tokens: int) -> None:
        """Count text that is no prepared data, such as calibration windows."""
        self.other_text[sha256] = tokens
        self.tokens += tokens

    def spend(self, kind: Kind, flops: int) -> None:
        """Add FLOPs."""
        self.flops = self.flops | {kind: self.flops.get(kind, 0) + int(flops)}

    @property
    def unique_tokens(self) -> int:
        """Different tokens."""
        return sum(spans.size for spans in _by_data([self])[0].values())


class Ledger(_Strict):
    """The stages of a run, and the ledger of the run it went on from."""

    format: Literal[1] = FORMAT
    stages: list[Stage] = []
    parent: Ledger | None = None
    unrecorded: str | None = None  # what came before all this without a ledger, such as a released model

    @classmethod
    def check(cls, checkpoint: Path) -> None:
        """UserError if the ledger that stands by a checkpoint cannot be read; for before the work."""
        cls.after(checkpoint, "", [])

    @classmethod
    def after(cls, checkpoint: Path, label: str, stages: list[Stage]) -> Ledger:
        """What stands in the ledger of a checkpoint, then `stages`; of one without a ledger, that `label` is unrecorded."""
        found = ledger_of(checkpoint)
        return cls(stages=stages, unrecorded=label) if found is None else cls(stages=stages, parent=cls.read(found))

    def lineage(self) -> Iterator[Ledger]:
        """This ledger, its parent, and so on."""
        ledger: Ledger | None = self
        while ledger is not None:
            yield ledger
            ledger = ledger.parent

    def all_stages(self, *, parents: bool = True) -> list[Stage]:
        """Stages in the order they were run."""
        ledgers = list(self.lineage()) if parents else [self]
        return [stage for ledger in reversed(ledgers) for stage in ledger.stages]

    @property
    def tokens(self) -> int:
        """Tokens of this run's own stages."""
        return sum(stage.tokens for stage in self.stages)

    @property
    def flops(self) -> int:
        """FLOPs of this run's own stages, of all kinds."""
        return sum(sum(stage.flops.values()) for stage in self.stages)

    @property
    def total_tokens(self) -> int:
        """Parents included."""
        return sum(ledger.tokens for ledger in self.lineage())

    @property
    def total_flops(self) -> int:
        """Parents included."""
        return sum(ledger.flops for ledger in self.lineage())

    @property
    def missing(self) -> list[str]:
        """What went into the model without a ledger."""
        return [ledger.unrecorded for ledger in self.lineage() if ledger.unrecorded]

    def summary(self) -> dict[str, Any]:
        """Counts alone, for tables and records."""
        return {
            "tokens": self.tokens,
            "flops": self.flops,
            "total_tokens": self.total_tokens,
            "total_flops": self.total_flops,
            "unrecorded": self.missing,
            "stages": [
                {
                    "name": stage.name,
                    "parent": own is not self,
                    "params": stage.params,
                    "tokens": stage.tokens,
                    "unique_tokens": stage.unique_tokens,
                    "flops": dict(stage.flops),
                    "teacher_cache": stage.teacher_cache,
                    "data": [f"{data.manifest}:{data.range}" for data in stage.data.values()],
                }
                for own in reversed(list(self.lineage()))
                for stage in own.stages
            ],
        }

    def write(self, path: Path) -> None:
        """Write it as JSON, all or nothing."""
        with staged_files(path) as (stage,):
            stage.write_text(self.model_dump_json() + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Ledger:
        """A file, or the ledger in a checkpoint folder; UserError if there is none or it is broken."""
        places = [path / LEDGER, path / "prunus" / LEDGER] if path.is_dir() else [path]
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            reason = f"there is no {LEDGER} in it" if path.is_dir() else "no such file or folder"
            raise UserError(f"{path}: {reason}; give a checkpoint that prunus trained, or its {LEDGER}")
        try:
            return cls.model_validate(json_of(found))
        except ValidationError as error:
            raise UserError(f"{found}: is no ledger ({first_wrong(error)})") from error


def ledger_of(checkpoint: Path) -> Path | None:
    """The file with a checkpoint's ledger: in its folder, or beside it, where a run has that of its model; None if none is."""
    places = (checkpoint / LEDGER, checkpoint.absolute().parent / LEDGER)
    return next((place for place in places if place.is_file()), None)


# -- two runs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """What two runs have in common. Counts are of different tokens; repetitions do not add."""

    verdict: Verdict
    only_a: int
    only_b: int
    shared: int
    same_order: bool
    notes: list[str]  # why it cannot be told, for `unknown`; what else to know


def compare(a: Ledger, b: Ledger, *, parents: bool = False) -> Comparison:
    """Whether two runs saw the same, disjoint or overlapping tokens; with `parents` all that went into the two models.

    `unknown` where positions cannot tell: prepared data of one source in two ways, or training without a ledger.
    """
    stages = a.all_stages(parents=parents), b.all_stages(parents=parents)
    (spans_a, data_a), (spans_b, data_b) = (_by_data(listed) for listed in stages)
    nothing = Intervals()
    keys = spans_a.keys() | spans_b.keys()
    pairs = [(spans_a.get(key, nothing), spans_b.get(key, nothing)) for key in sorted(keys)]
    shared = sum(x.shared(y) for x, y in pairs)
    only_a, only_b = sum(x.size for x, _ in pairs) - shared, sum(y.size for _, y in pairs) - shared
    reasons = [
        f"{x.manifest}:{x.range} and {y.manifest}:{y.range} were prepared from one source in two ways"
        for x in data_a.values()
        for y in data_b.values()
        if x.key != y.key and not x.apart_from(y)
    ]
    if parents:
        reasons += [f"{text} has no ledger" for text in dict.fromkeys(a.missing + b.missing)]
    notes = []
    texts = [{text for stage in listed for text in stage.other_text} for listed in stages]
    if texts[0] ^ texts[1]:
        notes.append(
            "text that is no prepared data, such as calibration windows, is told apart as a whole, not token by token"
        )
    counts = [sum(stage.tokens for stage in listed) for listed in stages]
    verdict: Verdict
    if shared and (only_a or only_b):
        verdict = "overlapping"
    elif reasons:
        verdict = "unknown"
    else:
        verdict = "same" if shared else "disjoint"
    if verdict == "same" and counts[0] != counts[1]:
        notes.append(f"the same tokens, but seen {counts[0]:,} and {counts[1]:,} times in all")
    same_order = verdict == "same" and _order(stages[0]) == _order(stages[1])
    return Comparison(verdict, only_a, only_b, shared, same_order, reasons + notes)


def _order(stages: list[Stage]) -> list[Any]:
    return [
        (
            stage.seeds or stage.seed,
            stage.seq_len,
            stage.positions,
            stage.history,
            {name: data.key for name, data in stage.data.items()},
        )
        for stage in stages
        if stage.data
    ]


_TEXT = "text"  # in place of a manifest: no digest is called so


def _by_data(stages: Iterable[Stage]) -> tuple[Mapping[tuple[str, str], Intervals], Mapping[tuple[str, str], Data]]:
    spans: dict[tuple[str, str], Intervals] = defaultdict(Intervals)
    known = {}
    for stage in stages:
        for domain, consumed in stage.consumed.items():
            data = stage.data[domain]
            spans[data.key] = spans[data.key] | consumed
            known[data.key] = data
        for text, tokens in stage.other_text.items():
            spans[_TEXT, text] = spans[_TEXT, text] | Intervals([(0, tokens)])
    return spans, known
