"""Tensors in files, one at a time: so much memory as a tensor takes, and no more.

Files are read and written, not mapped: pages of a mapped file count as the process's own for as long as the map stands.
"""

from __future__ import annotations

import json
import math
import struct
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from .errors import UserError
from .headers import Entry

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_ALIGN = 8  # safetensors pads its header with spaces to a multiple of this
_CHUNK = 1 << 22  # elements of a tensor that are converted or checked together


def check_finite(tensor: Tensor, what: str) -> None:
    """UserError if an element is NaN or infinite. The sum in float64 is taken in pieces: it would make a wide copy."""
    for part in tensor.detach().reshape(-1).split(_CHUNK):
        if not bool(torch.isfinite(part.sum(dtype=torch.float64))):
            raise UserError(f"{what} holds NaN or infinite weights; the checkpoint is damaged")


def _bytes(tensor: Tensor) -> memoryview:
    """A contiguous tensor's own memory."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _fill_(tensor: Tensor, file: IO[bytes]) -> Tensor:
    """Changes `tensor`: the next bytes of a file."""
    left = _bytes(tensor)
    while left:  # a system call reads 2 GiB at most
        count = file.readinto(left)  # type: ignore[attr-defined]
        if not count:
            raise UserError(f"{file.name}: the file ends inside a tensor; it changed while it was read")
        left = left[count:]
    return tensor


def read(entry: Entry, dtype: torch.dtype | None = None) -> Tensor:
    """One tensor of a safetensors file, converted to `dtype` piece by piece. UserError for a type that we do not read."""
    kept = DTYPES.get(entry.dtype)
    if kept is None or math.prod(entry.shape) * kept.itemsize != entry.end - entry.start:
        raise UserError(
            f"{entry.path}: a tensor of type {entry.dtype}, shape {list(entry.shape)} in {entry.end - entry.start} bytes is "
            f"nothing that can be read one by one; known types are {', '.join(DTYPES)}"
        )
    with entry.path.open("rb", buffering=0) as file:
        file.seek(entry.start)
        if dtype is None or dtype == kept:
            return _fill_(torch.empty(entry.shape, dtype=kept), file)
        out = torch.empty(entry.shape, dtype=dtype)
        for part in out.view(-1).split(_CHUNK):
            part.copy_(_fill_(torch.empty(part.shape, dtype=kept), file))
        return out


def same_bytes(one: Entry, other: Entry) -> bool:
    """Whether two tensors of safetensors files are stored alike."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with one.path.open("rb") as a, other.path.open("rb") as b:
        a.seek(one.start)
        b.seek(other.start)
        left = one.end - one.start
        while left:
            piece = min(left, _CHUNK)
            if a.read(piece) != b.read(piece):
                return False
            left -= piece
    return True


class Stored(Mapping[str, Tensor]):
    """Weights of a checkpoint by name, read anew whenever they are asked for; the first time they are checked."""

    def __init__(self, entries: Mapping[str, Entry], dtype: torch.dtype, label: str) -> None:
        self.entries, self.dtype, self.label = entries, dtype, label
        self._checked: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        tensor = read(self.entries[name], self.dtype)
        if name not in self._checked:
            check_finite(tensor, f"{self.label}: '{name}'")
            self._checked.add(name)
        return tensor

    def rows(self, name: str, part: Callable[[int], slice]) -> Tensor:
        """Those of a tensor's first dimension that `part` of its length names; nothing else is read, or checked."""
        entry = self.entries[name]
        tensor = read(entry.rows(part(entry.shape[0])), self.dtype)
        check_finite(tensor, f"{self.label}: '{name}'")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


class Scratch(MutableMapping[str, Tensor]):
    """Tensors by name in a file without a name, which goes when the process does, however that ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: IO[bytes] | None = None
        self._places: dict[str, tuple[int, torch.dtype, torch.Size]] = {}
        self._end = 0

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        place, dtype, shape = self._places.get(name, (0, None, None))
        if (dtype, shape) != (tensor.dtype, tensor.shape):  # the same size again goes to the same place
            place = self._end
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115  (open as long as this mapping lives)
                weakref.finalize(self, self._file.close)
            self._file.seek(place)
            self._file.write(_bytes(tensor.contiguous()))
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self.folder}: changed weights cannot be put aside there: {error.strerror}") from error
        self._places[name] = (place, tensor.dtype, tensor.shape)
        self._end = max(self._end, place + tensor.nbytes)

    def __getitem__(self, name: str) -> Tensor:
        place, dtype, shape = self._places[name]
        assert self._file is not None
        self._file.seek(place)
        return _fill_(torch.empty(shape, dtype=dtype), self._file)

    def __delitem__(self, name: str) -> None:
        del self._places[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def write(
    path: Path, specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """A safetensors file from tensors that come one at a time, in any order; `specs` names them all beforehand.

    The header is known from names, types and shapes, so it is written first. Byte for byte what `safetensors.torch.save_file`
    writes with the metadata ``{"format": "pt"}``, as transformers does.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    places: dict[str, int] = {}
    end = 0
    for name in sorted(specs, key=lambda name: (-specs[name][0].itemsize, name)):
        dtype, shape = specs[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        places[name] = start
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGN)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
        for name, tensor in tensors:
            assert (tensor.dtype, tuple(tensor.shape)) == specs[name], name
            file.seek(8 + len(text) + places.pop(name))
            file.write(_bytes(tensor.contiguous()))
    assert not places, f"never came: {sorted(places)}"


def sort_metadata(path: Path) -> None:
    """Changes the file: the library writes metadata of several fields in another order each time, so no two files were the same."""
    with path.open("r+b") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
        if "__metadata__" not in header:
            return
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size, f"{path}: its header does not fit where it was"
        file.seek(8)
        file.write(text.ljust(size))
