"""Run the tests that are marked slow, file by file, and keep in results/suite/slow.json how each file went last.

    python tools/slow.py --data DATA [FILES]

`DATA` holds the texts of `tests/test_slow_smollm2.py`. Exit code 1 says that a test failed; a file that was stopped keeps the
record of the time before.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from prunus import record

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "results" / "suite" / "slow.json"
STOPPED = 2  # and above: pytest did not come to its end


def files() -> list[str]:
    """Those that have slow tests."""
    found = sorted((ROOT / "tests").rglob("test_*.py"))
    return [path.relative_to(ROOT).as_posix() for path in found if "mark.slow" in path.read_text(encoding="utf-8")]


def outcome(xml: Path) -> dict[str, Any]:
    """What pytest wrote about one file: names are given where a test did not pass."""
    out: dict[str, Any] = {"passed": 0, "failed": [], "skipped": {}, "seconds": 0.0}
    for case in ElementTree.parse(xml).getroot().iter("testcase"):
        out["seconds"] += float(case.get("time", 0))
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            out["failed"].append(case.get("name"))
        elif skipped is not None:
            out["skipped"][case.get("name")] = skipped.get("message")
        else:
            out["passed"] += 1
    return out | {"seconds": round(out["seconds"], 1)}


def run(name: str, data: Path | None) -> dict[str, Any] | None:
    """One file's slow tests in a process of their own; None if it was stopped."""
    environment = os.environ | ({"PRUNUS_TEST_DATA": str(data.resolve())} if data else {})
    with tempfile.TemporaryDirectory(prefix="prunus-slow-") as folder:
        xml = Path(folder) / "out.xml"
        command = [sys.executable, "-m", "pytest", "-m", "slow", "-q", "-p", "no:logging", f"--junitxml={xml}", name]
        code = subprocess.run(command, cwd=ROOT, env=environment).returncode
        return outcome(xml) if code < STOPPED else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="default: all that have slow tests")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--record", type=Path, default=RECORD)
    arguments = parser.parse_args()
    known = json.loads(arguments.record.read_text(encoding="utf-8")) if arguments.record.exists() else {}
    for name in arguments.files or files():
        print(f"== {name}", flush=True)
        if (found := run(name, arguments.data)) is None:
            return 1
        about = {
            "commit": record.commit(),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": record.machine(),
            "versions": record.versions(),
        }
        known[name] = about | found
        arguments.record.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n", encoding="utf-8")
    failed = [f"{name}::{test}" for name, one in known.items() for test in one["failed"]]
    print(f"{sum(one['passed'] for one in known.values())} passed, {len(failed)} failed", *failed, sep="\n")
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
