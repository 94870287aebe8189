"""Freed memory, kept by the process for what comes next, or given back to the system. Only glibc can; else nothing happens."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # malloc.h
_LARGEST = 32 << 20  # where glibc's own threshold ends up, once tensors of that size have come and gone
_MAPPINGS = 65536  # glibc's default


def free_bytes() -> int | None:
    """Memory that this process may still take: what the machine, its control group and its own limit leave; None if unknown."""
    found = []
    with suppress(OSError, ValueError, KeyError):
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(sum(int(lines[name].split()[0]) << 10 for name in ("MemAvailable", "SwapFree")))
    with suppress(OSError, ValueError, KeyError):
        group = Path("/sys/fs/cgroup")
        used = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        found.append(int((group / "memory.max").read_text()) - int(used["anon"]))
    with suppress(OSError, ImportError):
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            found.append(limit - pages * resource.getpagesize())
    return min(found, default=None)


@cache
def _glibc(name: str) -> Callable[..., Any] | None:
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except (OSError, TypeError):  # no C library by that name: Windows
        return None


def give_back() -> None:
    """Freed pages go back to the system: glibc keeps those of middling tensors, and the heap would grow block by block."""
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


@contextmanager
def kept() -> Iterator[None]:
    """Freed pages stay with the process, large ones too.

    A training step takes and frees the same gigabytes. By default the system clears every page of them anew each time, 4 KiB by
    4 KiB: up to a tenth of a step of SmolLM2-135M. The price is a heap that does not shrink, and has gaps: up to 13 % more there.
    """
    option = _glibc("mallopt") if _glibc("malloc_trim") is not None else None
    if option is None:
        yield
        return
    option(_MMAP_MAX, 0)
    option(_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        option(_MMAP_MAX, _MAPPINGS)
        option(_MMAP_THRESHOLD, _LARGEST)
        option(_TRIM_THRESHOLD, 2 * _LARGEST)
        give_back()
