"""Hours of pruning-aware training with saves, validation and restarts, watched from outside: memory, files, threads, speed, logs.

    python tools/soak.py --data DATA --work WORK --hours 2 --record results/soak.jsonl

`prunus train` works in a process of its own, as a user's; every so many minutes it is asked to stop (SIGTERM) or killed (SIGKILL),
by turns, and the same command goes on. What is measured hangs little on what else the machine does: a process's own memory, its
open files, its processor time. Figures are of each process from its
first save and validation on, when it has allocated what it needs. A soak that is stopped goes on: hours add up.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from while_training import prepare

from prunus import record
from prunus.train import log

RECIPE: dict[str, Any] = {  # small updates, so that there are many; logged one by one, so that the log has parts
    "name": "soak",
    "model": {"shape": "nano", "tokenizer": "tokenizer"},
    "data": {"domains": [{"folder": "stories"}, {"folder": "wiki"}, {"folder": "c4"}], "range": "parent", "seq_len": 256},
    "batch_tokens": 512,
    "micro_batch": 2,
    "optimizer": {"lr": 5e-4},
    "log_every": 1,
    "save": {"every": 1000, "keep": 2},
    "validate": {"every": 1000, "sequences": 32},
    "prune": {
        "target": {"ratio": 0.25},
        "axes": ["kv_heads", "intermediate", "hidden"],
        "alike": True,
        "saliency": {"metric": "second", "matrices": "output", "average": 0.9},
        "per": "params",
        "pace": {"kind": "curve", "start": 0.02, "end": 0.95},
    },
}
EVERY_S = 5.0
LIVES = Path("lives.jsonl")
Row = tuple[
    float, float, int, int, float, int, float
]  # seconds, resident MB, files, threads, processor seconds, step, peak MB


@dataclass
class Life:
    """One process from its start to its end."""

    ended: str = ""
    rows: list[Row] = field(default_factory=list)

    def figures(self) -> dict[str, Any] | None:
        """None for one that ended before it was warm, or soon after."""
        every = RECIPE["save"]["every"]
        saved = (self.rows[0][5] // every + 1) * every if self.rows else 0
        rows = [row for row in self.rows if row[5] > saved + 20]
        if len(rows) < 12:
            return None
        parts = [rows[i : i + len(rows) // 4 + 1] for i in range(0, len(rows), len(rows) // 4 + 1)]
        speed = [(b[-1][4] - b[0][4]) / max(b[-1][5] - b[0][5], 1) for b in parts if len(b) > 1]
        tenths = [rows[i : i + len(rows) // 10 + 1] for i in range(0, len(rows), len(rows) // 10 + 1)]
        usual = [
            statistics.median(row[1] for row in part) for part in tenths
        ]  # of each tenth; not of a moment inside a save
        return {
            "ended": self.ended,
            "seconds": self.rows[-1][0],
            "updates": self.rows[-1][5] - self.rows[0][5],
            "rss_mb": usual,
            "rss_growth": max(usual) / usual[0],
            "peak_mb": [rows[0][6], rows[-1][6]],
            "open_files": [rows[0][2], max(row[2] for row in rows)],
            "threads": [rows[0][3], max(row[3] for row in rows)],
            "processor_ms_an_update": [1e3 * seconds for seconds in speed],  # of each quarter
        }


def look(process: int, run: Path, since: float) -> Row | None:
    """A row of a process that is alive and has logged something."""
    try:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
        times = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        files = len(os.listdir(f"/proc/{process}/fd"))
        lines = log.lines(run) if not (run / log.LOG).exists() else _tail(run / log.LOG)
        step = next((json.loads(line)["step"] for line in reversed(lines)), None)
    except (OSError, KeyError, ValueError):
        return None
    if step is None or "VmRSS" not in status:
        return None
    processor = (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")
    resident, peak = (int(status[name].split()[0]) / 1e3 for name in ("VmRSS", "VmHWM"))
    return time.monotonic() - since, resident, files, int(status["Threads"]), processor, step, peak


def _tail(path: Path, size: int = 20_000) -> list[bytes]:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - size))
        return file.read().split(b"\n")[1:-1]


def live(run: Path, recipe: Path, seconds: float, signum: int) -> Life:
    """Start the command, or go on with it, and end it after so many seconds."""
    life, since = Life(), time.monotonic()
    with Path("said.txt").open("a", encoding="utf-8") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "prunus", "train", str(recipe), "--out", str(run)],
            stdout=said, stderr=said, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        try:
            while process.poll() is None and time.monotonic() - since < seconds:
                time.sleep(EVERY_S)
                if (row := look(process.pid, run, since)) is not None:
                    life.rows.append(row)
        finally:
            done = process.poll() is not None
            if not done:
                process.send_signal(signum)
            code = process.wait()
    if done and code:
        raise SystemExit(f"the run ended with {code} by itself; see {Path('said.txt').resolve()}")
    life.ended = "its end" if done else signal.Signals(signum).name
    return life


def lasted(lives: Sequence[Life]) -> float:
    """Seconds."""
    return sum(life.rows[-1][0] for life in lives if life.rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with tinystories/, wiki_passages/ and c4/")
    parser.add_argument("--work", type=Path, required=True, help="where tokens and the run go")
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--tokens", type=int, default=20_000_000, help="of the run's schedule; it may end before")
    parser.add_argument("--minutes", type=float, default=20.0, help="of each process")
    parser.add_argument("--record", type=Path, required=True)
    asked = parser.parse_args()
    data, to = asked.data.resolve(), asked.record.resolve()
    asked.work.mkdir(parents=True, exist_ok=True)
    os.chdir(asked.work)
    prepare(data)
    asking = RECIPE | {"tokens": asked.tokens // 512 * 512}
    asking["data"] = RECIPE["data"] | {"epochs": 1 + asked.tokens // 1_000_000}
    recipe, run = Path("soak.yaml"), Path("run")
    lives = [Life(**json.loads(line)) for line in LIVES.read_text().splitlines()] if LIVES.exists() else []
    recipe.write_text(yaml.safe_dump(asking, sort_keys=False), encoding="utf-8")
    while (left := 3600 * asked.hours - lasted(lives)) > 60 and not (run / "record.jsonl").exists():
        signum = (signal.SIGTERM, signal.SIGKILL)[len(lives) % 2]
        lives.append(live(run, recipe, min(left, 60 * asked.minutes), signum))
        with LIVES.open("a", encoding="utf-8") as file:
            file.write(json.dumps(vars(lives[-1])) + "\n")
        print(json.dumps(lives[-1].figures()), flush=True)
    told = [found for life in lives if (found := life.figures()) is not None]
    lines = [json.loads(line) for line in log.lines(run)]
    steps = [line["step"] for line in lines if "loss" in line]
    figures = {
        "hours": lasted(lives) / 3600,
        "lives": told,
        "rss_growth": max(one["rss_growth"] for one in told),
        "rss_mb": [told[0]["rss_mb"][0], told[-1]["rss_mb"][-1]],
        "peak_growth": max(one["peak_mb"][1] / one["peak_mb"][0] for one in told),
        "open_files": [told[0]["open_files"][0], max(one["open_files"][1] for one in told)],
        "processor_ms_an_update": [ms for one in told for ms in one["processor_ms_an_update"]],
        "updates": steps[-1],
        "each_logged_once": steps == list(range(1, steps[-1] + 1)),
        "cuts": sum("loss_after" in line for line in lines),
        "params": [next(line["params"] for line in some if "params" in line) for some in (lines, lines[::-1])],
        "log_parts_mb": [Path(part).stat().st_size / 1e6 for part in log.parts(run) if Path(part).exists()],
        "validation": [line["validation"]["loss"] for line in lines if "validation" in line],
    }
    record.append(to, "soak", {"recipe": asking, "minutes": asked.minutes}, figures)


if __name__ == "__main__":
    main()
