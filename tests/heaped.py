"""A process of its own for test_heap.py, since what a heap does hangs on all that was there before: says what it saw as JSON."""

from __future__ import annotations

import json
import resource

import torch

from prunus import heap

PAGE, SIZE = resource.getpagesize(), 64 << 20


def faults() -> int:
    """Pages that the system had to clear for a tensor that is made, filled and let go."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(SIZE, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * PAGE


def least() -> int:
    """What is left over beside a tensor is kept by glibc too, seven times, before it is made one with the gap again."""
    return min(faults() for _ in range(20))


if __name__ == "__main__":
    before, usual = resident(), least()
    with heap.kept():
        kept, during = least(), resident()
    print(json.dumps({"faults": [usual, kept], "resident": [before, during, resident()]}))
