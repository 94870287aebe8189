"""JSON that carries the SHA-256 of itself, so that a flipped bit in what a command goes on from is seen. And files that changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import UserError
from .reading import parsed, tail

SEAL = "seal"


def sealed(data: Mapping[str, Any]) -> str:
    """One line of JSON, with its seal last."""
    plain = json.loads(json.dumps(data, allow_nan=False))  # as it will be read: lists for tuples, text for names
    return json.dumps(plain | {SEAL: _digest(plain)}, allow_nan=False) + "\n"


def unsealed(text: str, where: str = "", mend: str = "") -> dict[str, Any]:
    """What `sealed` was given; UserError for what is no object, or was changed. Without a seal it is of an older version."""
    data = parsed(text, where, mend)
    if not isinstance(data, dict):
        raise UserError(f"{where}: expected a JSON object, got {type(data).__name__}{tail(mend)}")
    if data.pop(SEAL, None) not in (None, _digest(data)):
        raise UserError(f"{where}: was changed since it was written (SHA-256){tail(mend)}")
    return data


def _digest(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def stamp(path: Path) -> tuple[int, int, int] | None:
    """What differs once a file is written to or replaced: its number, size and time; None if there is none. Costs no reading."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
