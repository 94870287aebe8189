"""Run records: one JSON line per measurement, with what is needed to repeat it."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from . import products
from .errors import UserError
from .place import NO_LOCKS
from .reading import bytes_of, rows_of

_MEND = "remove it and run again what it stood for"  # a line
_PACKAGES = ("prunus", "torch", "transformers", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Python and the libraries that numbers depend on."""
    out = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            out[name] = "not installed"
    return out


def machine() -> dict[str, Any]:
    """What a speed depends on; no host name, no path. `products` are those of scoring and training."""
    import torch

    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": "cpu",
        "products": products.library(),
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the source tree this package runs from, with ``+`` if it is changed; None for an installed wheel."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=10)
        state = subprocess.run([*git, "status", "--porcelain", "prunus"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip() + ("+" if state.stdout.strip() else "") if head.returncode == 0 else None


def digest(data: Any) -> str:
    """SHA-256 of data as canonical JSON, 16 hex digits: the recipe's identity."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()[:16]


def append(path: Path, kind: str, recipe: dict[str, Any], figures: dict[str, Any]) -> dict[str, Any]:
    """Append one record as one line, whole or not at all, and return it. Two processes do not mix theirs."""
    record = {
        "kind": kind,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "recipe": recipe,
        "recipe_hash": digest(recipe),
        "commit": commit(),
        "versions": versions(),
        "machine": machine(),
        "figures": figures,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(record, sort_keys=True, allow_nan=False).encode() + b"\n"
    with path.open("a+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise UserError(f"{path}: cannot be locked: {error.strerror}") from error
        file.seek(0)
        end, missing = _end(file.read())
        file.truncate(end)
        try:
            if file.write(missing + line) < len(missing + line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            file.truncate(end)
            raise UserError(
                f"{path}: the record cannot be written: {error.strerror}; make room, and run it again"
            ) from error
    return record


def _end(content: bytes) -> tuple[int, bytes]:
    """Where the next line begins, and what must stand before it: half a killed process's record goes, a whole line gets its end."""
    last = content.rpartition(b"\n")[2]
    if not last:
        return len(content), b""
    if not last.startswith(b"{"):  # no record's beginning: somebody's own text, which is none of ours to remove
        return len(content), b"\n"
    try:
        json.loads(last)
    except (ValueError, RecursionError):
        return len(content) - len(last), b""
    return len(content), b"\n"


def check_place(path: Path, what: str = "record") -> None:
    """UserError, before any work, if a record cannot be appended there; `what` is the option that named the place."""
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if path.is_dir() or not parent.is_dir() or not os.access(path if path.exists() else parent, os.W_OK):
        raise UserError(f"{what}: {path} cannot be written; give a file in a folder that you may write to")


def read(path: Path) -> list[dict[str, Any]]:
    """All records of a file, oldest first, but for half a line that a killed process left at its end; UserError names another."""
    records = []
    content = bytes_of(path, _MEND)
    for number, line in rows_of(content[: _end(content)[0]], str(path), _MEND):
        if not isinstance(line, dict):
            raise UserError(f"{path}: line {number} is no record, which is an object; {_MEND}")
        records.append(line)
    return records
