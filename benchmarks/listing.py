"""What listing a folder of runs costs, next to reading their files and nothing else.

Runs as `prunus train` leaves them: a recipe with every field said, and a log. Median of several turns, the two by turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

from prunus import record
from prunus.train import recipe as recipes
from prunus.train.listing import listed
from prunus.train.log import LOG
from prunus.train.opening import RECIPE

TARGET_S = 1.0


def made(folder: Path, runs: int, lines: int) -> None:
    """So many runs with logs of so many lines, a validation after every tenth update."""
    plain = recipes.read("continue", fields={"model.source": "model", "data.domains": [{"folder": "tokens"}]}).plain()
    log = []
    for step in range(1, lines + 1):
        log.append({"step": step, "tokens": step * 4096, "loss": 3.0 + 1 / step, "lr": 3e-4, "norm": 0.71, "flops": step * 10**12,
                    "params": 134_515_008, "tokens_per_s": 701.25, "share_of_peak": 0.55, "seconds_left": 1200.5})  # fmt: skip
        if step % 10 == 0:
            log.append(
                {"step": step, "tokens": step * 4096, "validation": {"loss": 3.1 + 1 / step, "by_domain": {"c4": 3.1}}}
            )
    text = "".join(json.dumps(line) + "\n" for line in log)
    for number in range(runs):
        place = folder / f"run-{number:05d}"
        place.mkdir()
        (place / RECIPE).write_text(json.dumps(plain | {"name": place.name}, indent=1) + "\n", encoding="utf-8")
        (place / LOG).write_text(text, encoding="utf-8")


def floor(folder: Path) -> int:
    """Every file is opened and read; bytes."""
    total = 0
    for name in os.listdir(folder):
        for file in (RECIPE, LOG):
            with open(f"{folder}/{name}/{file}", "rb") as opened:
                total += len(opened.read())
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--lines", type=int, default=20, help="updates in every log")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--record", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        made(folder, asked.runs, asked.lines)
        seconds: dict[str, list[float]] = {"floor": [], "listed": []}
        for _ in range(asked.repeats):
            for name, do in (("floor", floor), ("listed", listed)):
                start = time.perf_counter()
                do(folder)
                seconds[name].append(time.perf_counter() - start)
        size = floor(folder)
    figures = {name: {"median_s": statistics.median(all_), "least_s": min(all_)} for name, all_ in seconds.items()}
    ratio = figures["listed"]["median_s"] / figures["floor"]["median_s"]
    told = {"bytes": size, **figures, "ratio_to_floor": ratio, "target_s": TARGET_S}
    print(json.dumps(told, indent=1))
    if asked.record is not None:
        recipe = {"command": "benchmarks/listing.py", "runs": asked.runs, "lines": asked.lines, "repeats": asked.repeats}
        record.append(asked.record, "listing", recipe, told)


if __name__ == "__main__":
    main()
