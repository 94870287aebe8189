"""Look at weight files before they are loaded: headers are parsed and every size is held against the file's length."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .errors import UserError
from .reading import size_of

_MAX_TEXT = 1 << 26  # bytes of one text in a GGUF header; chat templates have thousands
_MAX_HEADER = 100_000_000  # bytes; the limit that the safetensors library itself sets


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in a safetensors file: its type as the format writes it, and its first and last byte + 1."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    def rows(self, part: slice) -> Entry:
        """Where some of the first dimension lies: side by side."""
        width = (self.end - self.start) // max(1, self.shape[0])
        places = self.start + part.start * width, self.start + part.stop * width
        return Entry(self.path, self.dtype, (part.stop - part.start, *self.shape[1:]), *places)


def safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape from a safetensors header; UserError if the file is truncated or its header is broken."""
    return {name: entry.shape for name, entry in safetensors_entries(path).items()}


def safetensors_entries(path: Path) -> dict[str, Entry]:
    """Tensor name -> `Entry` from a safetensors header; UserError if the file is truncated or its header is broken."""
    size = size_of(path)
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))[0]
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise UserError(f"{path}: the file is truncated or not safetensors ({size} bytes); fetch it again")
        try:
            header = json.loads(file.read(length))
            entries = {}
            for name, said in header.items():
                if name != "__metadata__":
                    shape = tuple(int(n) for n in said["shape"])
                    start, end = (8 + length + int(n) for n in said["data_offsets"])
                    if not 8 + length <= start <= end or min(shape, default=0) < 0:
                        raise ValueError(f"'{name}' lies from byte {start} to {end}, with shape {list(shape)[:8]}")
                    entries[name] = Entry(path, str(said.get("dtype")), shape, start, end)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, ArithmeticError, RecursionError) as error:
            raise UserError(f"{path}: the safetensors header is corrupt ({error}); fetch the file again") from error
    promised = max((entry.end for entry in entries.values()), default=8 + length)
    if promised != size:
        raise UserError(
            f"{path}: {size} bytes, but its header promises {promised}; the file is truncated or corrupt, fetch it again"
        )
    return entries


_GGUF_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_GGUF_STRING, _GGUF_ARRAY = 8, 9


@dataclass
class _Reader:
    file: BinaryIO
    size: int
    path: Path

    def take(self, count: int) -> bytes:
        data = self.file.read(count) if 0 <= count <= self.size else b""
        if len(data) != count:
            raise UserError(f"{self.path}: the GGUF file ends inside its header ({self.size} bytes); fetch it again")
        return data

    def skip(self, count: int) -> None:
        """Go on behind bytes that are not looked at, and need no memory."""
        if self.file.tell() + count > self.size:
            self.take(-1)
        self.file.seek(count, 1)

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize(code)))[0]

    def text(self) -> str:
        count = self.scalar("Q")
        if _MAX_TEXT < count <= self.size:
            raise UserError(f"{self.path}: the GGUF header has a text of {count:,} bytes; the file is corrupt")
        return self.take(count).decode("utf-8", errors="replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _GGUF_SCALARS:
            return self.scalar(_GGUF_SCALARS[kind])
        if kind == _GGUF_STRING:
            return self.text()
        if kind == _GGUF_ARRAY and depth < 4:
            inner, count = self.scalar("I"), self.scalar("Q")
            if inner in _GGUF_SCALARS:
                self.skip(count * struct.calcsize(_GGUF_SCALARS[inner]))
            else:
                for _ in range(count):
                    self.value(inner, depth + 1)
            return None  # arrays (tokens, merges) are walked, not kept
        raise UserError(f"{self.path}: the GGUF header has a value of unknown kind {kind}; the file is corrupt")


def gguf_metadata(path: Path) -> dict[str, Any]:
    """Scalar metadata of a GGUF file (arrays are skipped); UserError if the file is truncated or corrupt."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    size = size_of(path)
    with path.open("rb") as file:
        r = _Reader(file, size, path)
        if r.take(4) != b"GGUF":
            raise UserError(f"{path}: not a GGUF file (it does not begin with 'GGUF')")
        version, num_tensors, num_values = r.scalar("I"), r.scalar("Q"), r.scalar("Q")
        if version not in (2, 3):
            raise UserError(f"{path}: GGUF version {version} is not supported; versions 2 and 3 are")
        metadata: dict[str, Any] = {}
        for _ in range(num_values):
            key = r.text()
            metadata[key] = r.value(r.scalar("I"))
        end = 0
        for _ in range(num_tensors):
            r.text()
            elements = 1
            for _ in range(min(r.scalar("I"), 8)):
                elements *= r.scalar("Q")
            kind, offset = r.scalar("I"), r.scalar("Q")
            try:
                block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            except ValueError as error:
                raise UserError(f"{path}: a tensor has unknown GGUF type {kind}; the file is corrupt or too new") from error
            end = max(end, offset + elements // block * block_bytes)
        align = metadata.get("general.alignment", 32)
        if not isinstance(align, int) or align < 1:
            raise UserError(f"{path}: general.alignment is {align!r}, which is no number of bytes; the file is corrupt")
        start = -(-file.tell() // align) * align
    if start + end > size:
        raise UserError(
            f"{path}: {size} bytes, but its header promises {start + end}; the file is truncated, fetch it again"
        )
    return metadata


def sha256(paths: list[Path]) -> str:
    """One SHA-256 over the bytes of files in the given order."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
