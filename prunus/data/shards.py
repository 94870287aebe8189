"""Prepared data: a folder of memory-mapped token shards, and the manifest that says what they are.

A folder holds `manifest.json`, `tokenizer.json`, and for every range files `<range>-<number>.bin` (token ids, little-endian)
and `<range>-<number>.starts.bin` (uint64: where in the shard each document starts). A document lies in one shard, and ends
with the tokenizer's end-of-text token.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import UserError, unknown
from ..headers import sha256
from ..place import staged_files
from ..reading import check_tokenizer, first_wrong, json_of, refusing, text_of
from ..sealed import stamp

FORMAT: Literal[1] = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
PROGRESS = "progress.json"  # of a folder that is not finished
DTYPES = {"uint16": "<u2", "uint32": "<u4"}
STARTS = "<u8"
_DECODED = 1 << 18  # tokens turned back into text at a time
SMALL_VOCAB = 65_536  # below it an id takes two bytes

RANGE_NAME = re.compile(r"[a-z][a-z0-9_]*")
Name = Annotated[str, Field(pattern=rf"^{RANGE_NAME.pattern}$")]
Count = Annotated[int, Field(ge=0)]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Shard(_Strict):
    """One file of tokens with its file of document starts."""

    file: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*-\d+\.bin$")]
    tokens: Count
    documents: Count
    text_bytes: Count  # UTF-8 bytes of the documents
    sha256: Hash
    starts_sha256: Hash

    @property
    def starts(self) -> str:
        """Name of the file of document starts."""
        return self.file.removesuffix(".bin") + ".starts.bin"

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of both files, by name."""
        return {self.file: self.sha256, self.starts: self.starts_sha256}


class Origin(_Strict):
    """A source as it was when it was read; no folder of the user's machine."""

    source: str
    sha256: Hash | None  # None for a hub data set
    bytes: Count | None
    field: str
    separator: str | None
    licence: str | None
    documents: Count = 0


class Manifest(_Strict):
    """What a folder of shards is: tokenizer, sources, ranges, and a checksum for every file."""

    format: Literal[1] = FORMAT
    tokenizer_sha256: Hash  # `tokenizer.fingerprint`
    vocab_size: int
    eos_token_id: int
    dtype: Literal["uint16", "uint32"]
    splits: dict[Name, float]
    shard_tokens: int
    sources: list[Origin]
    ranges: dict[Name, list[Shard]]
    versions: dict[str, str]

    @model_validator(mode="after")
    def _agree(self) -> Manifest:
        if list(self.splits) != list(self.ranges):
            raise ValueError("splits and ranges differ")
        return self

    def tokens(self, which: str) -> int:
        """Tokens of a range."""
        return sum(shard.tokens for shard in self.ranges[which])

    def documents(self, which: str) -> int:
        """Documents of a range."""
        return sum(shard.documents for shard in self.ranges[which])

    @functools.cached_property
    def digest(self) -> str:
        """16 hex digits of what the tokens are: tokenizer, and every range's shards in order."""
        data = {name: [shard.sha256 for shard in shards] for name, shards in self.ranges.items()}
        text = json.dumps([self.tokenizer_sha256, data], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a folder; UserError if there is none, or if it is broken, unfinished or of another format."""
        path = folder / MANIFEST
        if not folder.exists():
            raise UserError(f"{folder}: no such file or folder; prunus data prepare makes one")
        if not path.is_file():
            if (folder / PROGRESS).is_file():
                raise UserError(
                    f"{folder}: is not finished; run the same prunus data prepare again, it goes on where it was"
                )
            raise UserError(f"{folder}: there is no {MANIFEST} in it, so it is no prepared data; see prunus data prepare")
        data = json_of(path, "prepare the data again")
        if isinstance(data, dict) and data.get("format") != FORMAT:
            raise UserError(f"{path}: format {data.get('format')} is not known, only {FORMAT}; prepare the data again")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise UserError(f"{path}: is no manifest ({first_wrong(error)}); prepare the data again") from error

    def write(self, folder: Path) -> None:
        """Write it, all or nothing."""
        with staged_files(folder / MANIFEST) as (stage,):
            stage.write_text(json.dumps(self.model_dump(), indent=1) + "\n", encoding="utf-8")

    def check_files(self, folder: Path, which: str) -> None:
        """UserError if a file of the range is missing or has not the size that the manifest says."""
        width = np.dtype(DTYPES[self.dtype]).itemsize
        for shard in self.ranges[which]:
            for name, promised in ((shard.file, shard.tokens * width), (shard.starts, shard.documents * 8)):
                path = folder / name
                if not path.is_file():
                    raise UserError(f"{path}: is missing; copy the folder again, or prepare the data again")
                if (size := path.stat().st_size) != promised:
                    raise UserError(
                        f"{path}: {size:,} bytes, but the manifest promises {promised:,}; the file is truncated or changed, "
                        "copy it again or prepare the data again"
                    )

    def verify(
        self, folder: Path, progress: Callable[[str, int, int], None] | None = None, *, which: str | None = None
    ) -> None:
        """UserError if a file of one range, or of any, was changed since (SHA-256 of every file)."""
        ranges = [*self.ranges] if which is None else [which]
        shards = [shard for name in ranges for shard in self.ranges[name]]
        for name in ranges:
            self.check_files(folder, name)
        for done, shard in enumerate(shards, 1):
            for name, promised in shard.hashes.items():
                if sha256([folder / name]) != promised:
                    raise UserError(f"{folder / name}: was changed since it was written (SHA-256); prepare the data again")
            if progress is not None:
                progress("verify", done, len(shards))


class Shards:
    """The tokens of one range, read-only, as if they were one long array."""

    def __init__(self, folder: Path, which: str, manifest: Manifest) -> None:
        """Open with `Shards.open`, which checks."""
        self.folder, self.range, self.manifest = folder, which, manifest
        self.shards = manifest.ranges[which]
        self.ends = np.cumsum([shard.tokens for shard in self.shards], dtype=np.int64)
        self._maps: dict[str, np.ndarray] = {}
        self._hashes = {name: promised for shard in self.shards for name, promised in shard.hashes.items()}
        self._stamps = {name: stamp(folder / name) for name in self._hashes}

    @classmethod
    def open(cls, folder: Path, which: str, *, tokenizer: str | None = None, whole: bool = False) -> Shards:
        """Open a range; UserError if files are missing or truncated, or the `tokenizer` (its fingerprint) is another one.

        `whole`: every byte is read once, and held against the manifest.
        """
        manifest = Manifest.read(folder)
        if which not in manifest.ranges:
            raise unknown(f"range of {folder}", which, manifest.ranges)
        if tokenizer is not None and tokenizer != manifest.tokenizer_sha256:
            raise UserError(
                f"{folder}: was prepared with another tokenizer than the model's; prepare the text with the model's"
            )
        manifest.check_files(folder, which)
        if not manifest.tokens(which):
            share = manifest.splits[which]
            raise UserError(f"{folder}: range '{which}' holds no tokens; its share of {share:g} took none of the documents")
        opened = cls(folder, which, manifest)
        if whole:  # behind the stamps, so that nothing changes unseen between
            manifest.verify(folder, which=which)
        return opened

    @property
    def num_tokens(self) -> int:
        """Tokens of the range, end-of-text tokens included."""
        return int(self.ends[-1])

    @property
    def num_documents(self) -> int:
        """Documents of the range."""
        return sum(shard.documents for shard in self.shards)

    def __getitem__(self, span: slice) -> np.ndarray:
        """Ids `[first:end]` as int64, a copy."""
        first, end = self._bounds(span)
        out = np.empty(end - first, np.int64)
        for i, start, a, b in self._pieces(first, end):
            out[start + a - first : start + b - first] = self._ids(i)[a:b]
        if len(out) and (most := int(out.max())) >= self.manifest.vocab_size:
            raise UserError(
                f"{self.folder}: range '{self.range}' has token {most} between {first} and {end}, but the manifest's vocabulary "
                f"ends at {self.manifest.vocab_size - 1}; prepare the data again"
            )
        return out

    def document_starts(self, first: int, end: int) -> np.ndarray:
        """Positions in `[first, end)` at which a document starts, int64, ascending."""
        first, end = self._bounds(slice(first, end))
        found = []
        for i, start, a, b in self._pieces(first, end):
            starts = self._starts(i)
            low, high = np.searchsorted(starts, np.array([a, b], np.uint64))
            found.append(starts[low:high].astype(np.int64) + start)
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def _bounds(self, span: slice) -> tuple[int, int]:
        first, end = span.start or 0, self.num_tokens if span.stop is None else span.stop
        if span.step not in (None, 1) or not 0 <= first <= end <= self.num_tokens:
            raise IndexError(f"tokens [{first}:{end}] of {self.num_tokens}")
        return first, end

    def _pieces(self, first: int, end: int) -> list[tuple[int, int, int, int]]:
        """(shard, its first token, and from where to where in it) for all shards that `[first, end)` touches."""
        out = []
        i = int(np.searchsorted(self.ends, first, side="right"))
        while first < end:
            start = int(self.ends[i]) - self.shards[i].tokens
            stop = min(end, int(self.ends[i]))
            out.append((i, start, first - start, stop - start))
            first, i = stop, i + 1
        return out

    def _ids(self, i: int) -> np.ndarray:
        return self._map(self.shards[i].file, DTYPES[self.manifest.dtype])

    def _starts(self, i: int) -> np.ndarray:
        name = self.shards[i].starts
        if name in self._maps:
            return self._maps[name]
        starts = self._map(name, STARTS)  # looked through once: a document that begins before its own end is read for ever
        if len(starts) and (starts[0] != 0 or starts[-1] >= self.shards[i].tokens or (starts[1:] <= starts[:-1]).any()):
            raise UserError(f"{self.folder / name}: starts of documents do not ascend; prepare the data again")
        return starts

    def _map(self, name: str, dtype: str) -> np.ndarray:
        path = self.folder / name
        if (now := stamp(path)) != self._stamps[
            name
        ]:  # a file that shrinks under a map would end the process without a word
            if now is None or sha256([path]) != self._hashes[name]:
                raise UserError(f"{path}: was changed while it was read; copy it again or prepare the data again")
            self._stamps[name] = now
        if name not in self._maps:
            self._maps[name] = np.memmap(path, dtype=dtype, mode="r")
        return self._maps[name]

    def identity(self) -> dict[str, Any]:
        """What a ledger keeps of the data: enough to tell whether two runs read the same."""
        return {
            "manifest": self.manifest.digest,
            "range": self.range,
            "splits": self.manifest.splits,
            "sources": [origin.sha256 or origin.source for origin in self.manifest.sources],
        }


def prepared_documents(place: str) -> Iterator[str] | None:
    """The documents of `FOLDER` or `FOLDER:RANGE` as text again, all ranges if none is named; None if it is no folder."""
    name, _, which = place.rpartition(":") if not Path(place).expanduser().is_dir() else (place, "", "")
    folder = Path(name).expanduser()
    if not name or not folder.is_dir():
        return None
    manifest = Manifest.read(folder)
    ranges = [which] if which else [name for name in manifest.ranges if manifest.tokens(name)]
    return _decoded(folder, [Shards.open(folder, which) for which in ranges])


def _decoded(folder: Path, opened: list[Shards]) -> Iterator[str]:
    from tokenizers import Tokenizer

    mend = "prepare the data again"
    check_tokenizer(folder / TOKENIZER)
    told = text_of(folder / TOKENIZER, mend)
    with refusing(f"{folder / TOKENIZER}: cannot be read", mend):
        tokenizer = Tokenizer.from_str(told)
    for shards in opened:
        first = 0
        while first < shards.num_tokens:
            end, starts = first, np.empty(0, np.int64)
            while not len(starts) and end < shards.num_tokens:  # until a document ends in it
                end = min(shards.num_tokens, end + _DECODED)
                starts = shards.document_starts(first + 1, end)
            stop = end if end == shards.num_tokens else int(starts[-1])
            ids = np.split(shards[first:stop], starts[starts < stop] - first)
            yield from tokenizer.decode_batch([document[:-1].tolist() for document in ids])
            first = stop
