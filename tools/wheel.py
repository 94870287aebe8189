"""The wheel of this tree, built twice apart; exit code 1 unless both are the same byte for byte.

python tools/wheel.py dist          # leaves the wheel there
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


def built(into: Path, epoch: str) -> Path:
    """A wheel of the files that git knows, from a copy of them: nothing that lies about can get in."""
    with tempfile.TemporaryDirectory(prefix="prunus-wheel-") as work:
        tree = Path(work) / "tree"
        known = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        for name in filter(None, known.split("\0")):
            if (ROOT / name).is_file() and (name.startswith("prunus/") or "/" not in name):
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, tree / name)
        into.mkdir(parents=True, exist_ok=True)
        told = os.environ | {"SOURCE_DATE_EPOCH": epoch, "PYTHONHASHSEED": "0", "TZ": "UTC"}
        done = subprocess.run(
            [sys.executable, "-c", _BUILD, str(into.resolve())],
            cwd=tree,
            env=told,
            check=True,
            capture_output=True,
            text=True,
        )
        return into / done.stdout.strip().splitlines()[-1]


def main(into: Path) -> int:
    epoch = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=ROOT, check=True, capture_output=True, text=True)
    with tempfile.TemporaryDirectory(prefix="prunus-wheel-") as second:
        wheels = built(into, epoch.stdout.strip()), built(Path(second), epoch.stdout.strip())
        digests = [hashlib.sha256(wheel.read_bytes()).hexdigest() for wheel in wheels]
    print(f"{wheels[0]}: sha256 {digests[0]}")
    if digests[0] != digests[1]:
        print(f"built again it is another: {digests[1]}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "dist")))
