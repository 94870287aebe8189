"""Licences of what prunus needs to run, from installed metadata alone: each must be one that we know, or a named exception.

python tools/licences.py            # prints a line a distribution; exit code 1 where one is unknown
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution

from packaging.requirements import Requirement

# Permissive ones, and MPL-2.0, whose copyleft ends at its own files.
_NAMES = (
    "MIT", "MIT-CMU", "BSD", "[023]-Clause", "0BSD", "Apache", "ISC", "PSF", "Python Software Foundation", r"Python-2\.0", "MPL",
    "Mozilla Public", "Unlicense", "HPND", "CC0", "zlib",
    r"BSL-1\.0", "CNRI-Python",
)  # fmt: skip
KNOWN = re.compile(rf"\b({'|'.join(_NAMES)})\b", re.IGNORECASE)
EXCEPTIONS = {  # by the beginning of a name: why
    "nvidia-": "NVIDIA's runtime, which torch's CUDA builds bring; redistributed by its owner alone",
    "cuda-": "the same",
}


def named(found: Distribution) -> str:
    """What a distribution says of its licence: expression, classifiers, or the field's first line."""
    about = found.metadata
    said = [about.get("License-Expression") or ""]
    said += [text.rpartition("::")[2].strip() for text in about.get_all("Classifier") or [] if text.startswith("License ::")]
    said += (about.get("License") or "").strip().splitlines()[:1]
    return "; ".join(dict.fromkeys(text for text in said if text)) or "nothing"


def is_known(said: str) -> bool:
    """Whether all of several licences that bind together are known; of alternatives one is enough."""
    return all(KNOWN.search(part) for part in re.split(r"\bAND\b|;", said))


def needed(name: str, seen: dict[str, Distribution]) -> Iterator[Distribution]:
    """A distribution that is installed and all that it needs here, each once; extras are not followed."""
    key = re.sub(r"[-_.]+", "-", name).lower()
    if key in seen:
        return
    try:
        found = distribution(name)
    except PackageNotFoundError:  # of another platform
        return
    seen[key] = found
    yield found
    for text in found.requires or []:
        asked = Requirement(text)
        if asked.marker is None or asked.marker.evaluate({"extra": ""}):
            yield from needed(asked.name, seen)


def unknown(roots: list[str]) -> tuple[list[str], list[str]]:
    """(a line a distribution, the lines of those whose licence is none of the known ones)."""
    lines, wrong = [], []
    seen: dict[str, Distribution] = {}
    for root in roots:
        for found in needed(root, seen):
            name, said = found.metadata["Name"], named(found)
            lines.append(f"{name} {found.version}: {said}")
            if not is_known(said) and not name.lower().startswith(tuple(EXCEPTIONS)):
                wrong.append(lines[-1])
    return lines, wrong


def roots(pyproject: str) -> list[str]:
    """The core dependencies by name."""
    import tomllib

    return [Requirement(text).name for text in tomllib.loads(pyproject)["project"]["dependencies"]]


def main() -> int:
    from pathlib import Path

    lines, wrong = unknown(roots((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text(encoding="utf-8")))
    print("\n".join(sorted(lines, key=str.lower)))
    for line in wrong:
        print(f"not known: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
