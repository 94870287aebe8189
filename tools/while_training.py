"""Cutting while training, at nano scale: texts to tokens, one parent, and the study files of studies/while-training.

Every step is a command that a user would type, in the folder `--work`, where a second call goes on, run by run. Studies may run
side by side (`--only`), but for those that start from another's models: the parent comes first, and 21 after 20.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from recover import do

from prunus import record
from prunus.place import staged_files
from prunus.study import file as studies
from prunus.train.opening import RECORD

STUDIES = Path(__file__).resolve().parent.parent / "studies" / "while-training"
KIND = "study"
SPLITS = [word for share in ("parent=0.72", "retrain=0.25", "validation=rest") for word in ("--split", share)]
TEXTS = {  # folder of tokens -> file, licence, options
    "stories": ("tinystories/tinystories_all_dedup.txt", "CDLA-Sharing-1.0", ["--separator", "<|endoftext|>"]),
    "wiki": ("wiki_passages/boolq_train_passages.txt", "CC-BY-SA-3.0", []),
    "c4": ("c4/c4_sample1.jsonl", "ODC-BY", []),
}
OF_TOKENIZER = ("stories", "wiki")


def passages(text: Path) -> Path:
    """A file whose documents stand apart by blank lines, as JSONL."""
    out = Path(f"{text.stem}.jsonl")
    if not out.exists():
        found = (part.strip() for part in text.read_text(encoding="utf-8").split("\n\n"))
        with staged_files(out) as (stage,):
            stage.write_text("".join(json.dumps({"text": part}) + "\n" for part in found if part), encoding="utf-8")
    return out


def prepare(data: Path) -> None:
    """Tokenizer and tokens, where they are not there yet."""
    files = {name: data / file for name, (file, _, _) in TEXTS.items()}
    if not Path("tokenizer").exists():
        options = ["--separator", "<|endoftext|>", "--vocab-size", 4096, "--out", "tokenizer"]
        do("data", "tokenizer", *(files[name] for name in OF_TOKENIZER), *options)
    files["wiki"] = passages(files["wiki"])
    for name, (_, licence, options) in TEXTS.items():
        if not Path(name, "manifest.json").exists():
            more = ["--tokenizer", "tokenizer", "--out", name, "--licence", licence, *options, *SPLITS]
            do("data", "prepare", files[name], *more)


def gather(out: Path) -> None:
    """Every finished run of every study, besides those that were recorded before."""
    kept: dict[str, dict[str, Any]] = {}
    for row in record.read(out) if out.exists() else []:
        kept[_key(row)] = row
    for path in sorted(STUDIES.glob("*.yaml")):
        study = studies.read(path)
        for cell in study.cells:
            made = Path(path.stem, cell.name, RECORD)
            if made.is_file():
                row = record.read(made)[-1] | {"kind": KIND, "study": study.name, "arm": cell.arm, "place": dict(cell.place)}
                kept[_key(row)] = row
    with staged_files(out) as (stage,):
        stage.write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in kept.values()), encoding="utf-8")


def _key(row: dict[str, Any]) -> str:
    return json.dumps([row["study"], row["arm"], row["place"]], sort_keys=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with tinystories/, wiki_passages/ and c4/")
    parser.add_argument("--work", type=Path, required=True, help="where tokens and runs go")
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=sorted(path.stem for path in STUDIES.glob("*.yaml")))
    arguments = parser.parse_args()
    data, out = arguments.data.resolve(), arguments.record.resolve()
    arguments.work.mkdir(parents=True, exist_ok=True)
    os.chdir(arguments.work)  # studies name tokens and each other's models by where they lie in it
    prepare(data)
    gather(out)
    for name in arguments.only:
        do("study", "run", STUDIES / f"{name}.yaml", "--out", name)
        gather(out)


if __name__ == "__main__":
    main()
