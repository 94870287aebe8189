"""The long form of tests/test_faults.py: every long command disturbed at random moments and run again; one record a command.

    python tools/faults.py --kills 20 --seed 0 --record results/faults.jsonl

A fault is anything existing that was harmed, anything half-written that would be taken for whole, a traceback, a wrong exit code,
or an outcome that is not bit for bit (but for times) that of the run that nobody disturbed. The exit code is 1 if there is one.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from types import ModuleType

from prunus import record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="disturbances that stop a process, of every command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", nargs="*", help="of tests/faults.py; default: all")
    parser.add_argument("--record", type=Path, required=True)
    arguments = parser.parse_args()
    faults = harness()
    found = sum(
        disturbed(faults, name, arguments.kills, arguments.seed, arguments.record)
        for name in arguments.commands or faults.COMMANDS
    )
    raise SystemExit(1 if found else 0)


def harness() -> ModuleType:
    """tests/faults.py, which knows the commands."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    import torch

    torch.set_num_threads(1)
    return importlib.import_module("faults")


def disturbed(faults: ModuleType, name: str, kills: int, seed: int, to: Path) -> int:
    """How many faults one command has; a disturbance that came too late is one more moment, not one of the kills."""
    since, kinds, exact, late, told = time.monotonic(), Counter[str](), 0, 0, []
    for what in itertools.islice(faults.drawn(name, seed), 3 * kills):
        happened = faults.disturb(what)
        if happened.faults:
            told.append({"what": str(what), "faults": list(happened.faults)})
            print(what, *happened.faults, sep="\n  ", file=sys.stderr, flush=True)
        if not happened.stopped:
            late += 1
            continue
        kinds[f"{signal.Signals(what.signum).name}, {'at any time' if what.place is None else 'inside a save'}"] += 1
        exact += not happened.faults
        if kinds.total() == kills:
            break
    figures = {"kills": kinds.total(), "exact_resumes": exact, "too_late": late, "by_kind": dict(sorted(kinds.items())),
               "faults": told, "undisturbed_seconds": faults.reference(name).ended.seconds,
               "seconds": time.monotonic() - since}  # fmt: skip
    record.append(to, "faults", {"command": name, "kills": kills, "seed": seed}, figures)
    print(f"{name}: {kinds.total()} killed, {exact} gone on with exactly, {late} too late", flush=True)
    return len(told)


if __name__ == "__main__":
    main()
