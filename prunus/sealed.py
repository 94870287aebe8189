"""JSON that carries the SHA-256 of itself, so that a flipped bit in what a command goes on from is seen. And files that changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SEAL = "seal"


def sealed(data: Mapping[str, Any]) -> str:
    """One line of JSON, with its seal last."""
    plain = json.loads(json.dumps(data, allow_nan=False))  # as it will be read: lists for tuples, text for names
    return json.dumps(plain | {SEAL: _digest(plain)}, allow_nan=False) + "\n"


def unsealed(text: str) -> dict[str, Any]:
    """What `sealed` was given; ValueError for what is no JSON object, or was changed. Without a seal it is of an older version."""
    data = json.loads(text)
    if not isinstance(data, dict):
        raise ValueError("no JSON object")
    if data.pop(SEAL, None) not in (None, _digest(data)):
        raise ValueError("it was changed since it was written (SHA-256)")
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
