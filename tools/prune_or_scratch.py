"""Prune or train from scratch, at nano scale: texts to tokens, studies/prune-or-scratch, and its records under results/studies.

Every step is a command that a user would type, in the folder `--work`, where a second call goes on; `--gather` runs nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

from recover import do
from while_training import prepare

from prunus.study.results import PROOFS, RECORDS, STUDY

ROOT = Path(__file__).resolve().parent.parent
STUDIES, RECORDED = ROOT / "studies" / "prune-or-scratch", ROOT / "results" / "studies"
TEXTS = {"c4.jsonl": "c4/c4_sample1.jsonl", "wikitext2.txt": "wikitext2/wiki.test.raw"}  # that cuts go by and scores are of


def keep(name: str) -> None:
    """Copy the records of a study, finished or not."""
    (RECORDED / name).mkdir(parents=True, exist_ok=True)
    for file in (STUDY, RECORDS, PROOFS):
        shutil.copyfile(Path(name, file), RECORDED / name / file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with tinystories/, wiki_passages/, c4/ and wikitext2/"
    )
    parser.add_argument("--work", type=Path, required=True, help="where tokens and runs go")
    parser.add_argument("--processes", type=int, default=1, help="steps at a time")
    parser.add_argument("--only", nargs="*", default=sorted(path.stem for path in STUDIES.glob("*.yaml")))
    parser.add_argument("--gather", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    data = arguments.data.resolve()
    arguments.work.mkdir(parents=True, exist_ok=True)
    os.chdir(arguments.work)  # studies name tokens and texts by where they lie in it
    prepare(data)
    for name, file in TEXTS.items():
        if not Path(name).exists():
            shutil.copyfile(data / file, name)
    for name in arguments.only:
        more = () if arguments.gather else ("--processes", arguments.processes)
        do("study", "gather" if arguments.gather else "run", STUDIES / f"{name}.yaml", "--out", name, *more)
        keep(name)


if __name__ == "__main__":
    main()
