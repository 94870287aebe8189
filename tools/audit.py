"""Known vulnerabilities of what is installed here, as pip-audit finds them; exit code 1 for one that nobody has looked at.

python tools/audit.py               # needs pip-audit and the network; where the database does not answer, it says so, with code 0
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

LOOKED_AT: Mapping[str, str] = {}  # a vulnerability's id: why it does no harm here; goes once a mended version is out


def found(told: Mapping[str, Any]) -> tuple[list[str], list[str], int]:
    """(what is known and was not looked at, what was, how many distributions the database knows) of pip-audit's JSON."""
    wrong, looked_at, asked = [], [], 0
    for one in told["dependencies"]:
        asked += "vulns" in one
        for hole in one.get("vulns", ()):
            names = {hole["id"], *hole.get("aliases", ())}
            mend = f"mended in {', '.join(hole['fix_versions'])}" if hole.get("fix_versions") else "not mended yet"
            line = f"{one['name']} {one['version']}: {hole['id']}, {mend}"
            why = next((LOOKED_AT[name] for name in names if name in LOOKED_AT), None)
            wrong += [line] if why is None else []
            looked_at += [] if why is None else [f"{line} ({why})"]
    return wrong, looked_at, asked


def main() -> int:
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off", "--skip-editable"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        told = json.loads(done.stdout)
    except ValueError:
        why = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        print(f"not audited: {why}", file=sys.stderr)
        return 0
    wrong, looked_at, asked = found(told)
    print(f"{asked} of {len(told['dependencies'])} distributions are known to the database")
    for line in looked_at:
        print(f"looked at: {line}")
    for line in wrong:
        print(f"vulnerable: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
