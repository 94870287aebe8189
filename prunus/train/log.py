"""A run's log: a JSON line an interval, in parts, so that no file of a long run grows without bound.

`log.jsonl` is the part that grows. One that is full becomes `log.1.jsonl`, the next `log.2.jsonl`, and is not written again,
unless a run goes on from before its end. No line is thrown away: pictures, reports and records are made of all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from ..place import staged_files
from ..reading import bytes_of

LOG = "log.jsonl"
PART_BYTES = 16 << 20  # some 50,000 lines


def append(run: Path, line: Mapping[str, Any]) -> None:
    """One more line; a part that is full by now is set aside."""
    with (run / LOG).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, allow_nan=False) + "\n")
        size = file.tell()
    if size >= PART_BYTES:
        (run / LOG).rename(run / _name(len(parts(run))))


def parts(run: Path | str) -> list[str]:
    """Paths of a run's parts, the oldest first; the last one is `log.jsonl`, whether it is there or not."""
    older: list[str] = []
    for number in count(1):
        path = f"{run}/{_name(number)}"
        if not os.path.exists(path):
            return [*older, f"{run}/{LOG}"]
        older.append(path)
    raise AssertionError


def _name(number: int) -> str:
    return f"log.{number}.jsonl"


def lines(run: Path | str) -> list[bytes]:
    """All whole lines, the oldest first: the last line of a running process may be half there."""
    found: list[bytes] = []
    for path in parts(run):
        if os.path.exists(path):
            found += bytes_of(path).split(b"\n")[:-1]
    return found


def cut(run: Path, step: int) -> None:
    """Forget what was logged after a step: it will be logged again."""
    for path in map(Path, reversed(parts(run))):
        if not path.exists():
            continue
        held = path.read_bytes().split(b"\n")
        keep = [line for line in held if _step_of(line) <= step]
        if len(keep) == len(held) - 1 and not held[-1]:
            return  # so is all that is older
        if not keep and path.name != LOG:
            path.unlink()
            continue
        with staged_files(path) as (stage,):
            stage.write_bytes(b"".join(line + b"\n" for line in keep))


def _step_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return float("inf")  # the last line of a killed process may be cut short
