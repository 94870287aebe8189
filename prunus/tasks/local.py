"""Task rows from files, checked and brought into the columns that lm-eval's own task files read; nothing else of a task is ours."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError, unknown
from ..reading import bytes_of
from .table import ANSWERS, MEANS, TASKS, Row, Task

SPLITS = ("test", "validation", "dev")


@dataclass(frozen=True)
class Rows:
    """A task's rows from one file."""

    name: str
    split: str  # of the file
    sha256: str
    rows: list[Row]

    @property
    def task(self) -> Task:
        """Its row of the table."""
        return TASKS[self.name]

    def note(self) -> str | None:
        """How these rows are not the official ones; None if they are as many, of the same split."""
        if self.split != self.task.split:
            return f"{self.name}: the {self.split} split ({len(self.rows):,} rows), not the official {self.task.split} split"
        if len(self.rows) != self.task.rows:
            return f"{self.name}: {len(self.rows):,} rows of the {self.task.rows:,} of the official {self.task.split} split"
        return None


def named(text: str) -> tuple[str, ...]:
    """Task names from a list with commas, in which a mean stands for its tasks; UserError for one that is none."""
    out: list[str] = []
    for name in filter(None, (part.strip() for part in text.split(","))):
        if name not in TASKS and name not in MEANS:
            raise unknown("task", name, (*TASKS, *MEANS))
        out += MEANS.get(name, (name,))
    if not out:
        raise UserError(f"tasks: {text!r} names none; give some of {', '.join((*TASKS, *MEANS))}, with commas")
    return tuple(dict.fromkeys(out))


def read(folder: Path, name: str) -> Rows:
    """A task's rows from FOLDER/NAME/SPLIT.jsonl or FOLDER/NAME.jsonl: the official split where it is there."""
    task = TASKS[name]
    splits = [task.split, *(s for s in SPLITS if s != task.split)]
    places = [(split, folder / name / f"{split}.jsonl") for split in splits] + [(task.split, folder / f"{name}.jsonl")]
    split, path = next(((s, p) for s, p in places if p.is_file()), (None, None))
    if split is None or path is None:
        raise UserError(
            f"task data: {folder} has no {name}/{task.split}.jsonl; put its rows there, or take them from the hub with --online"
        )
    data = bytes_of(path)
    rows = [_row(task, row, f"{path}:{number}") for number, row in _lines(data, path)]
    if not rows:
        raise UserError(f"task data: {path} has no rows")
    return Rows(name, split, hashlib.sha256(data).hexdigest(), rows)


def _lines(data: bytes, path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"task data: {path}:{number} is no JSON ({error}); a task file has one object a line") from None


def _row(task: Task, row: Any, place: str) -> Row:
    """A row as lm-eval's task file reads it."""
    if not isinstance(row, dict):
        raise UserError(f"task data: {place} is no object; a task file has one object a line")
    if all(column in row for column in task.columns):
        return _checked(task, {column: row[column] for column in task.columns}, place)
    if task.adapt is None or not all(column in row for column in task.simple):
        wanted = task.simple if task.adapt is not None and set(task.simple) & set(row) else task.columns
        missing = [column for column in wanted if column not in row]
        raise UserError(f"task data: {place} has no {', '.join(missing)}; a row needs {', '.join(wanted)}")
    try:
        adapted = task.adapt(row)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"task data: {place}: {', '.join(task.simple)} do not hold what they should ({error})") from None
    return _checked(task, adapted, place)


def _checked(task: Task, row: Row, place: str) -> Row:
    """The row; UserError for one that cannot be scored: lm-eval would stop at it, or count every answer as wrong."""
    if wrong := [name for name in task.columns if name not in ANSWERS and not isinstance(row[name], str)]:
        raise UserError(f"task data: {place}: {wrong[0]} is {str(row[wrong[0]])[:60]!r}, which is no text; mend the row")
    try:
        answers, right = task.answers(row)
        if not all(isinstance(answer, str) and answer for answer in answers):
            raise ValueError("an answer is no text")
        if not isinstance(right, int) or not 0 <= right < len(answers):
            raise ValueError(f"{right!r} is none of {len(answers)} answers")
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"task data: {place}: {', '.join(task.columns)} say no right answer ({error}); mend the row, or give a split whose "
            "answers are known"
        ) from None
    return row


def write(found: Rows, folder: Path, library: Path) -> list[str]:
    """Task files for lm-eval in a folder: its own by inclusion, with these rows for data. The names that it will know them by."""
    if not found.task.by_subject:
        return [_define(found.name, found.task.file, found.rows, found.task.split, folder, library)]
    by_subject: dict[str, list[Row]] = {}
    for row in found.rows:
        by_subject.setdefault(row["subject"], []).append(row)
    out = []
    for subject, rows in by_subject.items():
        file = found.task.file.format(subject=subject)
        if not (library / file).is_file():
            raise UserError(f"task data: {found.name} has a subject {subject!r} that lm-eval does not know")
        out.append(_define(f"{found.name}_{subject}", file, rows, found.task.split, folder, library))
    return out


def refer(name: str, folder: Path, library: Path) -> list[str]:
    """Task files for lm-eval whose rows come from the hub."""
    task = TASKS[name]
    if not task.by_subject:
        return [_define(name, task.file, None, task.split, folder, library)]
    before, after = task.file.split("{subject}")
    files = sorted((library / before).parent.glob(f"{Path(before).name}*{after}"))
    return [
        _define(
            f"{name}_{f.stem.removeprefix(Path(before).name)}",
            str(f.relative_to(library)),
            None,
            task.split,
            folder,
            library,
        )
        for f in files
    ]


def _define(name: str, file: str, rows: list[Row] | None, split: str, folder: Path, library: Path) -> str:
    told: dict[str, Any] = {"include": str(library / file), "task": name, "tag": None}
    if rows is not None:
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        told |= {"dataset_path": "json", "dataset_name": None, "fewshot_split": None}
        told |= {"dataset_kwargs": {"data_files": {split: str(data)}, "cache_dir": str(folder / "cache")}}
        told |= {f"{kind}_split": split if kind == split else None for kind in ("training", "validation", "test")}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(told), encoding="utf-8")
    return name
