"""The same steps as Slurm array jobs: one array a level of what needs what, each behind the one before."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ..place import staged_files
from .file import Study
from .protocol import check
from .steps import Step, steps

FOLDER = "slurm"
_TASK = """#!/bin/bash
# One step of a study; written by prunus study slurm.
set -eu
read -r step key < <(sed -n "${{SLURM_ARRAY_TASK_ID}}p" {level})
exec {python} -m prunus study step {file} "$step" --key "$key" --out {out}
"""
_SUBMIT = """#!/bin/bash
# Submits the steps of the study {name}; written by prunus study slurm. Again after a failure: what is done is done.
set -eu
{lines}
printf 'submitted as %s; %s\\n' "$job" {then}
"""


def levels(known: dict[str, Step], out: Path) -> list[list[str]]:
    """Steps that are not done yet, in as few arrays as their needs allow."""
    depth: dict[str, int] = {}
    for name, step in known.items():  # each stands behind what it needs
        depth[name] = 0 if step.is_done(out) else 1 + max((depth[need] for need in step.needs), default=0)
    return [[name for name, d in depth.items() if d == level] for level in range(1, max(depth.values(), default=0) + 1)]


def write(study: Study, out: Path, options: Sequence[str] = ()) -> Path:
    """The scripts in OUT/slurm, and the one that submits them; `options` go to every sbatch."""
    check(study)
    folder = (out / FOLDER).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    said = {
        "python": shlex.quote(sys.executable), "file": shlex.quote(str(study.path.absolute())),
        "out": shlex.quote(str(out.absolute())), "name": " ".join(study.name.split()),  # on the line of its comment
    }  # fmt: skip
    then = "{python} -m prunus study gather {file} --out {out} gathers the records once it has ended".format(**said)
    lines, more = [], " ".join(map(shlex.quote, options))
    known = steps(study)
    for i, names in enumerate(levels(known, out), 1):
        listed, task = folder / f"level-{i}.txt", folder / f"level-{i}.sh"
        _write(listed, "".join(f"{name} {known[name].key}\n" for name in names))
        _write(task, _TASK.format(level=shlex.quote(str(listed)), **said))
        logs = shlex.quote(str(folder / f"level-{i}-%a.log"))
        behind = "" if i == 1 else ' --dependency="afterany:$job"'
        words = f"sbatch --parsable --array=1-{len(names)} --output={logs}{behind} {more}".rstrip()
        lines.append(f"job=$({words} {shlex.quote(str(task))})")
    submit = folder / "submit.sh"
    _write(submit, _SUBMIT.format(lines="\n".join(lines) or "job=nothing", then=shlex.quote(then), **said))
    submit.chmod(0o755)
    return submit


def _write(path: Path, text: str) -> None:
    with staged_files(path) as (stage,):
        stage.write_text(text, encoding="utf-8")
