"""The shards of one range as they are written, and taken up again after a kill."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import UserError
from ..headers import sha256
from .shards import DTYPES, STARTS, Manifest, Shard


class RangeWriter:
    """The shards of one range as they grow. On disk the open shard may be ahead of the state; taking up cuts it back."""

    def __init__(self, out: Path, name: str, work: Manifest, state: Mapping[str, Any]) -> None:
        self.out, self.name, self.limit = out, name, work.shard_tokens
        self.dtype = np.dtype(DTYPES[work.dtype])
        self.shards = [Shard.model_validate(shard) for shard in state["shards"]]
        self.tokens, self.documents, self.text_bytes, *self.promised = state["open"]
        self.files: tuple[BinaryIO, BinaryIO] | None = None
        self.digests = hashlib.sha256(), hashlib.sha256()  # of the open shard's files as they grow
        self._take_up()

    def _paths(self) -> tuple[Path, Path]:
        stem = f"{self.name}-{len(self.shards):05d}"
        return self.out / f"{stem}.bin", self.out / f"{stem}.starts.bin"

    def _take_up(self) -> None:
        known = {name for shard in self.shards for name in (shard.file, shard.starts)}
        sizes, promised = (self.tokens * self.dtype.itemsize, self.documents * 8), self.promised or (None, None)
        for path, size, digest, asked in zip(self._paths(), sizes, self.digests, promised, strict=True):
            stage = _stage(path)
            if path.exists():  # it was closed, but the kill came before the state said so
                path.replace(stage)
            if self.documents:
                known.add(stage.name)
                have = stage.stat().st_size if stage.exists() else 0
                if have < size:
                    raise UserError(f"{stage}: {have:,} bytes where {size:,} were; remove the folder and begin again")
                os.truncate(stage, size)
                digest.update(stage.read_bytes())
                if asked not in (None, digest.hexdigest()):
                    raise UserError(
                        f"{stage}: was changed since it was written (SHA-256); remove the folder and begin again"
                    )
        for path in range_files(self.out, self.name):
            if path.name not in known:
                path.unlink()

    def add(self, ids: np.ndarray, text_bytes: int) -> None:
        """Put a document behind the others; the shard that it fills is closed."""
        if self.files is None:
            tokens, starts = (_stage(path).open("ab") for path in self._paths())
            self.files = tokens, starts
        parts = ids.astype(self.dtype, copy=False).tobytes(), np.array(self.tokens, STARTS).tobytes()
        for file, digest, part in zip(self.files, self.digests, parts, strict=True):
            file.write(part)
            digest.update(part)
        self.tokens, self.documents, self.text_bytes = (
            self.tokens + len(ids),
            self.documents + 1,
            self.text_bytes + text_bytes,
        )
        if self.tokens >= self.limit:
            self.close()

    def flush(self) -> None:
        """What was added is on the disk."""
        for file in self.files or ():
            file.flush()
            os.fsync(file.fileno())

    def release(self) -> None:
        """Close the files, wherever the work is."""
        for file in self.files or ():
            file.close()
        self.files = None

    def close(self) -> None:
        """The open shard takes its place."""
        if not self.documents:
            return
        self.flush()
        self.release()
        paths = self._paths()
        hashes = [digest.hexdigest() for digest in self.digests]
        for path, promised in zip(paths, hashes, strict=True):
            if sha256([_stage(path)]) != promised:
                raise UserError(
                    f"{_stage(path)}: was changed while it was written (SHA-256); remove the folder and begin again"
                )
        for path in paths:
            _stage(path).replace(path)
        counts = {"tokens": self.tokens, "documents": self.documents, "text_bytes": self.text_bytes}
        self.shards.append(Shard(file=paths[0].name, sha256=hashes[0], starts_sha256=hashes[1], **counts))
        self.tokens = self.documents = self.text_bytes = 0
        self.digests = hashlib.sha256(), hashlib.sha256()

    def state(self) -> dict[str, Any]:
        """Where it is, as plain data."""
        shards = [shard.model_dump() for shard in self.shards]
        found = [digest.hexdigest() for digest in self.digests]
        return {"shards": shards, "open": [self.tokens, self.documents, self.text_bytes, *found]}


def range_files(out: Path, which: str) -> list[Path]:
    """All files of a range, half-written ones too."""
    pattern = re.compile(rf"\.?{which}-\d+(\.starts)?\.bin(\.partial)?")
    return [path for path in out.iterdir() if pattern.fullmatch(path.name)]


def _stage(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")
