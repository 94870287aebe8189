"""What a teacher said, on disk: its likeliest tokens for every token that a run reads, written once and read by memory map.

FOLDER/manifest.json       whose words these are, for which tokens, and a checksum for every file
FOLDER/ids-00000.npy       [sequences, seq_len, top_k] uint16 or int32: the likeliest tokens, most probable first
FOLDER/logs-00000.npy      the same shape, float16: their log-probabilities at the temperature

The order of the data is a pure function of data, seed and position, so the n-th sequence here is the n-th of the run's stream.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from ..data.shards import SMALL_VOCAB, Hash
from ..errors import UserError
from ..headers import sha256
from ..place import staged_files
from ..reading import first_wrong, json_of
from ..record import digest
from .feeds import Feeds
from .loss import Likeliest, Mix
from .recipe import Recipe

FORMAT: Literal[1] = 1
MANIFEST = "manifest.json"
LOGS = np.float16
_OF_A_RUN = {  # what must be the same for a run to read it, and what a recipe calls it
    "tokenizer_sha256": "the tokenizer",
    "vocab_size": "the vocabulary's size",
    "data": "data.domains or data.range",
    "seed": "data.seed",
    "seq_len": "data.seq_len",
    "separate_documents": "data.separate_documents",
    "temperature": "teacher.temperature",
    "top_k": "teacher.top_k",
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Shard(_Strict):
    """Two files of so many sequences."""

    sequences: Annotated[int, Field(ge=1)]
    ids_sha256: Hash
    logs_sha256: Hash


class Manifest(_Strict):
    """Whose words these are, and for which sequences: the first ones of a stream, as many as the shards hold."""

    format: Literal[1] = FORMAT
    teacher: str  # its name, no folder of the user's machine
    teacher_sha256: Hash  # of its weights
    precision: str  # that it was run in
    flops_per_sequence: int  # of its forward pass
    data: list[dict[str, Any]]  # of every domain: name, weight, what its tokens are; of several ranges seed and tokens, too
    seed: int
    seq_len: int
    separate_documents: bool
    temperature: float
    top_k: int
    tokenizer_sha256: Hash
    vocab_size: int
    shards: list[Shard] = []
    versions: dict[str, str]

    @property
    def sequences(self) -> int:
        """Positions of the stream that are there."""
        return sum(shard.sequences for shard in self.shards)

    @property
    def flops(self) -> int:
        """What the teacher took to say it."""
        return self.flops_per_sequence * self.sequences

    @property
    def digest(self) -> str:
        """16 hex digits of whose words these are, about what; not of how far they go."""
        return digest(self.model_dump(exclude={"shards", "versions"}))

    @property
    def ids_dtype(self) -> np.dtype[Any]:
        """Of token ids."""
        return ids_dtype(self.vocab_size)

    def differing(self, other: Manifest | Mapping[str, Any]) -> str | None:
        """The first thing in which the words of `other`, or what a run asks for, are not these."""
        theirs = other if isinstance(other, Mapping) else other.model_dump(exclude={"shards", "versions"})
        mine = self.model_dump()
        return next((name for name in theirs if mine[name] != theirs[name]), None)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Of a folder; UserError if there is none or it is broken."""
        path = folder / MANIFEST
        if not path.is_file():
            why = f"there is no {MANIFEST} in it" if folder.is_dir() else "no such file or folder"
            raise UserError(f"{folder}: {why}; prunus teach writes what a teacher says")
        try:
            return cls.model_validate(json_of(path, "write it again"))
        except ValidationError as error:
            raise UserError(f"{path}: is nothing that prunus teach wrote ({first_wrong(error)}); write it again") from error

    def write(self, folder: Path) -> None:
        """All or nothing."""
        with staged_files(folder / MANIFEST) as (stage,):
            stage.write_text(json.dumps(self.model_dump(), indent=1) + "\n", encoding="utf-8")

    def check_files(self, folder: Path, *, whole: bool) -> None:
        """UserError if a shard is missing, truncated, or (`whole`: by its SHA-256) not what was written."""
        for number, shard in enumerate(self.shards):
            shape = (shard.sequences, self.seq_len, self.top_k)
            for path, dtype, promised in zip(
                files(folder, number), (self.ids_dtype, LOGS), (shard.ids_sha256, shard.logs_sha256), strict=True
            ):
                if not path.is_file():
                    raise UserError(f"{path}: is missing; copy the folder again, or remove it and run prunus teach again")
                try:
                    found = np.load(path, mmap_mode="r", allow_pickle=False)
                    right = found.shape == shape and found.dtype == dtype
                except (ValueError, OSError):
                    right = False
                if not right or (whole and sha256([path]) != promised):
                    raise UserError(f"{path}: changed since it was written; remove the folder and run prunus teach again")


def ids_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smaller type that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= SMALL_VOCAB else np.int32)


def bytes_of(tokens: int, top_k: int, vocab_size: int) -> int:
    """What so many tokens take on disk; headers and the manifest are hundreds of bytes a shard besides."""
    return tokens * top_k * (ids_dtype(vocab_size).itemsize + np.dtype(LOGS).itemsize)


def files(folder: Path, number: int) -> tuple[Path, Path]:
    """(ids, logs) of a shard."""
    return folder / f"ids-{number:05d}.npy", folder / f"logs-{number:05d}.npy"


def wanted(recipe: Recipe, feeds: Feeds, tokenizer_sha256: str, vocab_size: int) -> dict[str, Any]:
    """What a run must find in the manifest."""
    assert recipe.teacher is not None
    known, parts = feeds.identity(), feeds.parts
    data = [
        # proportions of ranges alone would fit other words: each is in the order of its own seed, and ends where it ends
        {"name": d.name, "weight": d.weight, **known[d.name], **parts.get(known[d.name]["range"], {})}
        for d in feeds.training.domains
    ]
    part = recipe.data
    asked = (part.seed, part.seq_len, part.separate_documents, recipe.teacher.temperature, recipe.teacher.top_k)
    return dict(zip(_OF_A_RUN, (tokenizer_sha256, vocab_size, data, *asked), strict=True))


@dataclass(frozen=True)
class Cache:
    """A folder that fits a run, opened."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(
        cls, folder: Path, asked: Mapping[str, Any], sequences: int, *, teacher: str | None = None, whole: bool = True
    ) -> Cache:
        """UserError if it is of something else, holds too little, or was changed; `teacher`: SHA-256 that it must be of."""
        manifest = Manifest.read(folder)
        if name := manifest.differing(asked):
            have, want = getattr(manifest, name), asked[name]
            numbers = f": {have} there, {want} here" if isinstance(want, int | float) else ""  # hashes say nothing to people
            raise UserError(
                f"teacher.cache: {folder} was written for another recipe ({_OF_A_RUN[name]} differs{numbers}); run prunus teach "
                "with this one"
            )
        if teacher is not None and teacher != manifest.teacher_sha256:
            raise UserError(
                f"teacher.cache: {folder} holds the words of {manifest.teacher}, whose weights are not those of teacher.source; "
                "run prunus teach with this recipe"
            )
        if manifest.sequences < sequences:
            raise UserError(
                f"teacher.cache: {folder} holds {manifest.sequences:,} of the {sequences:,} sequences that the run reads; run "
                "prunus teach with this recipe, it goes on where it was"
            )
        manifest.check_files(folder, whole=whole)
        return cls(folder, manifest)

    def describe(self) -> dict[str, Any]:
        """What records keep of it. The FLOPs were spent when it was written, once for all runs that read it."""
        known = self.manifest
        said = known.model_dump(include={"teacher", "teacher_sha256", "precision", "temperature", "top_k"})
        tokens = known.sequences * known.seq_len
        size = bytes_of(tokens, known.top_k, known.vocab_size)
        return {"digest": known.digest, **said, "tokens": tokens, "bytes": size, "flops": known.flops}

    def __getitem__(self, span: slice) -> Likeliest:
        """Of the sequences from `start` to `stop`, one row a token."""
        ids, logs, first = [], [], 0
        for number, shard in enumerate(self.manifest.shards):
            low, high = max(span.start, first), min(span.stop, first + shard.sequences)
            if low < high:
                # Opened anew each time: a map that stands keeps its pages, and a run would come to hold the whole folder.
                of_ids, of_logs = (np.load(path, mmap_mode="r", allow_pickle=False) for path in files(self.folder, number))
                ids.append(of_ids[low - first : high - first].astype(np.int64))
                logs.append(of_logs[low - first : high - first].astype(np.float32))
            first += shard.sequences
        assert sum(map(len, ids)) == span.stop - span.start, "a position that was not written"
        shape = (-1, self.manifest.top_k)
        return Likeliest(*(torch.from_numpy(np.concatenate(parts).reshape(shape)) for parts in (ids, logs)))


@dataclass(frozen=True)
class Remembered:
    """A teacher that is not there: it says what it said when the cache was written."""

    cache: Cache
    mix: float

    def __call__(self, ids_BT: Tensor, *, at: int, **positions: Tensor) -> Mix:
        """By the place in the stream alone."""
        found = self.cache[at : at + len(ids_BT)]
        return Mix(lambda part: Likeliest(found.ids[part], found.logs[part]), self.mix, self.cache.manifest.temperature)
