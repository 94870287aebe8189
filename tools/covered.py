"""Write results/suite/coverage.json: how many of the package's lines a suite ran, from the data that coverage.py left.

    python tools/covered.py --least 92

Exit code 1, and no record, says that it is less than `--least` per cent. Lines count, branches do not.
"""

from __future__ import annotations

import argparse
import io
import json
from datetime import UTC, datetime
from pathlib import Path

import coverage

from prunus import record

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / ".coverage")
    parser.add_argument("--record", type=Path, default=ROOT / "results" / "suite" / "coverage.json")
    parser.add_argument("--least", type=float, default=92.0, help="per cent")
    arguments = parser.parse_args()
    measured = coverage.Coverage(data_file=arguments.data, config_file=str(ROOT / "pyproject.toml"))
    measured.load()
    percent = measured.report(file=io.StringIO())
    modules = {}
    for path in sorted((ROOT / "prunus").rglob("*.py")):
        _, lines, _, missing, _ = measured.analysis2(str(path))
        modules[path.relative_to(ROOT).as_posix()] = (len(lines), len(lines) - len(missing))
    total, ran = (sum(counts) for counts in zip(*modules.values(), strict=True))
    print(f"{ran:,} of {total:,} lines of {len(modules)} modules: {100 * ran / total:.2f} % (coverage.py: {percent:.2f} %)")
    if 100 * ran < arguments.least * total:
        return 1
    found = {
        "kind": "coverage",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": record.commit(),
        "versions": record.versions() | {name: record.version(name) for name in ("coverage", "pytest")},
        "lines": total,
        "ran": ran,
        "percent": round(100 * ran / total, 2),
        "missing": {name: total - ran for name, (total, ran) in modules.items() if ran < total},
    }
    arguments.record.parent.mkdir(parents=True, exist_ok=True)
    arguments.record.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
