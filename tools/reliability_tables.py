"""The table of docs/reliability.md: what was done to prunus to find what breaks it, from the records in results/*.jsonl."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prunus.tables import markdown

Record = dict[str, Any]
HEADER = ["what was asked", "what was found", "commit", "again by"]


def table(records: Sequence[Record], suite: Path) -> str:
    """A row for everything that was recorded; `suite` has what is known of the tests themselves."""
    by_kind: dict[str, list[Record]] = {}
    for one in records:
        by_kind.setdefault(one["kind"], []).append(one)
    rows = [row(found) for kind, row in ROWS.items() if (found := by_kind.get(kind))]
    return "\n".join(markdown(HEADER, [*rows, *_of_suite(suite)], left=len(HEADER)))


def _total(found: Sequence[Record], *names: str) -> list[int]:
    return [sum(one["figures"][name] for one in found) for name in names]


def _commits(found: Sequence[Record]) -> str:
    return ", ".join(dict.fromkeys(str(one["commit"]) for one in found))


def _faults(found: list[Record]) -> list[str]:
    kills, exact = _total(found, "kills", "exact_resumes")
    commands = ", ".join(one["recipe"]["command"] for one in found)
    return [
        f"a signal (SIGKILL, SIGTERM, Ctrl-C) at a random moment, half of them inside a save, in each of {len(found)} commands "
        f"({commands}); looked at, then run again",
        f"{kills} disturbances, {exact} with nothing harmed, nothing half-written taken for whole, and an end that is bit for bit "
        "the undisturbed one",
        _commits(found), "`python tools/faults.py --kills 20 --record FILE`",
    ]  # fmt: skip


def _fuzz(found: list[Record]) -> list[str]:
    tried, refused, taken, failed = _total(found, "inputs", "refused", "taken", "failed")
    return [
        f"bad input of {len(found)} kinds: damaged, hostile, absurd",
        f"{tried:,} inputs: {refused:,} refused in one sentence with the place, {taken:,} taken, {failed:,} with a traceback, a "
        "hang, too much memory or a write outside the output folder",
        _commits(found), "`python tools/fuzz.py`",
    ]  # fmt: skip


def _mutants(head: Record, rows: Sequence[Record]) -> list[str]:
    killed = sum(row["outcome"] != "survived" for row in rows)
    return [
        f"{len(rows)} small errors in the core, a seeded sample of what mutmut makes: does a test of the module notice?",
        f"{killed} noticed ({killed / len(rows):.1%}); why nobody can notice the other {len(rows) - killed} stands in "
        "`results/suite/survivors.yaml`",
        str(head["commit"]), "`make mutants`",
    ]  # fmt: skip


def _coverage(found: Record) -> list[str]:
    return [
        "lines of the package that the default tests run",
        f"{found['ran']:,} of {found['lines']:,} ({found['ran'] / found['lines']:.2%})",
        str(found["commit"]), "`make coverage`",
    ]  # fmt: skip


def _slow(found: dict[str, Record]) -> list[str]:
    passed, seconds = (sum(one[name] for one in found.values()) for name in ("passed", "seconds"))
    failed = [f"`{test}` of {name}" for name, one in found.items() for test in one["failed"]]
    skipped = sorted({reason for one in found.values() for reason in one["skipped"].values()})
    return [
        f"tests marked slow, in {len(found)} files, {seconds / 60:.0f} minutes: every command twice in processes with nothing in "
        "common, the real model, exports in the engines they are for, pages in a browser, tutorials, kills at random points",
        f"{passed:,} passed, {len(failed)} failed" + (f": {', '.join(failed)}" if failed else "")
        + (f"; not run: {'; '.join(skipped)}" if skipped else ""),
        ", ".join(dict.fromkeys(str(one["commit"]) for one in found.values())), "`make slow DATA=FOLDER`",
    ]  # fmt: skip


def _of_suite(suite: Path) -> list[list[str]]:
    """What the tests themselves are worth."""
    rows = []
    if (mutants := suite / "mutants.jsonl").exists():
        head, *tried = (json.loads(line) for line in mutants.read_text(encoding="utf-8").splitlines())
        rows.append(_mutants(head, tried))
    if (coverage := suite / "coverage.json").exists():
        rows.append(_coverage(json.loads(coverage.read_text(encoding="utf-8"))))
    if (slow := suite / "slow.json").exists():
        rows.append(_slow(json.loads(slow.read_text(encoding="utf-8"))))
    return rows


def _soak(found: list[Record]) -> list[str]:
    f = found[-1]["figures"]
    speed = f["processor_ms_an_update"]
    return [
        f"{f['hours']:.2f} hours of pruning-aware training, {len(f['lives'])} processes that were stopped or killed by turns, with "
        "saves and validation",
        f"{f['updates']:,} updates and {f['cuts']:,} cuts, each logged once: {'yes' if f['each_logged_once'] else 'no'}; memory of "
        f"a process grows by at most {f['rss_growth'] - 1:.2%} after its first save, its peak by {f['peak_growth'] - 1:.2%}; open "
        f"files {f['open_files'][0]} to {f['open_files'][1]}; processor time of an update {min(speed):.0f} to {max(speed):.0f} ms, "
        f"{speed[0]:.0f} at first and {speed[-1]:.0f} at last; parts of the log: {len(f['log_parts_mb'])}",
        _commits(found), "`python tools/soak.py --data DATA --work FOLDER --record FILE`",
    ]  # fmt: skip


def _listing(found: list[Record]) -> list[str]:
    one = found[-1]
    f = one["figures"]
    return [
        f"`prunus runs` of a folder of {one['recipe']['runs']:,} runs",
        f"{f['listed']['median_s']:.2f} s, {f['ratio_to_floor']:.1f} times what reading their {f['bytes'] / 1e6:.0f} MB takes",
        _commits(found), "`python benchmarks/listing.py`",
    ]  # fmt: skip


ROWS: dict[str, Callable[[list[Record]], list[str]]] = {
    "faults": _faults, "fuzz": _fuzz, "soak": _soak, "listing": _listing,
}  # fmt: skip
