"""Zero-shot tasks on a model: what is already known, what is left to run, and two models on the same items."""

from __future__ import annotations

import json
import logging
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import products
from ..errors import UserError
from ..latency import cache_folder
from ..place import staged_files
from ..record import digest
from .local import Rows, read, refer, write
from .paired import Difference, Score, mean_difference, means
from .table import MEANS, TASKS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

METRICS = ("acc", "acc_norm")


def check_library() -> None:
    """UserError without lm-eval."""
    if find_spec("lm_eval") is None:
        raise UserError("tasks: lm-eval is not installed; pip install 'prunus[eval]'")


@dataclass(frozen=True)
class Asked:
    """Tasks, and where their rows come from."""

    names: tuple[str, ...]
    rows: Mapping[str, Rows]  # none: the hub
    limit: int | None

    @classmethod
    def of(cls, names: tuple[str, ...], folder: Path | None, limit: int | None, *, online: bool) -> Asked:
        """Checked, and files read; UserError for what cannot be."""
        check_library()
        if limit is not None and limit < 1:
            raise UserError(f"limit: {limit} items of a task are too few; give at least 1")
        if folder is None and not online:
            raise UserError("tasks: their rows are files or on the hub; give --task-data FOLDER, or --online")
        if folder is not None and not folder.is_dir():
            raise UserError(f"task data: {folder}: no such file or folder; give one with NAME/SPLIT.jsonl of every task")
        return cls(names, {} if folder is None else {name: read(folder, name) for name in names}, limit)

    def notes(self) -> list[str]:
        """How rows differ from the official ones."""
        return [note for rows in self.rows.values() if (note := rows.note())]

    def key(self, name: str, model: Mapping[str, Any]) -> dict[str, Any]:
        """What a task's result depends on."""
        rows = self.rows.get(name)
        data = "hub" if rows is None else {"sha256": rows.sha256, "split": rows.split}
        by = {"lm_eval": version("lm_eval"), "products": products.library()}
        return {"task": name, "rows": data, "limit": self.limit, **by, **model}


@dataclass(frozen=True)
class Result:
    """A task's items in order, each 0 or 1 by every metric that the task has, and log-probabilities of its answers in nats."""

    name: str
    items: Mapping[str, list[float]]  # metric -> scores
    log_probs: list[list[float]]
    key: Mapping[str, Any]

    @property
    def metric(self) -> str:
        """The one that means go by."""
        return TASKS[self.name].metric

    @cached_property
    def scores(self) -> dict[str, Score]:
        """By metric."""
        return {metric: Score.of(items) for metric, items in self.items.items()}

    def to_json(self) -> dict[str, Any]:
        """All of it, for the file that keeps it."""
        return {"task": self.name, "key": dict(self.key), "items": dict(self.items), "log_probs": self.log_probs}


def results(
    asked: Asked,
    load: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]],
    model: Mapping[str, Any],
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Result]:
    """Every task's items. `model` says which model it is (hashes, dtype); it is loaded only if something is not known yet."""
    folder = cache_folder() / "tasks"
    folder.mkdir(parents=True, exist_ok=True)
    keys = {name: asked.key(name, model) for name in asked.names}
    found = {name: known for name, key in keys.items() if (known := _known(folder, name, key)) is not None}
    left = [name for name in asked.names if name not in found]
    if left:
        part = folder / f"{digest(dict(model))}.part.jsonl"
        for name, samples in _run(asked, left, *load(), part, progress).items():
            found[name] = _result(name, samples, keys[name])
            with staged_files(_file(folder, keys[name])) as (stage,):
                stage.write_text(json.dumps(found[name].to_json()), encoding="utf-8")
        part.unlink(missing_ok=True)
    return {name: found[name] for name in asked.names}


def _file(folder: Path, key: Mapping[str, Any]) -> Path:
    return folder / f"{key['task']}-{digest(dict(key))}.json"


def _known(folder: Path, name: str, key: Mapping[str, Any]) -> Result | None:
    try:
        data = json.loads(_file(folder, key).read_text(encoding="utf-8"))
        return Result(name, data["items"], data["log_probs"], data["key"])
    except (OSError, ValueError, KeyError, TypeError):  # not there, or damaged: it is computed anew
        return None


@products.fast()
def _run(
    asked: Asked,
    names: Sequence[str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    part: Path,
    progress: Callable[[int, int], None],
) -> dict[str, list[dict[str, Any]]]:
    """Samples of tasks as lm-eval tells them."""
    with _quiet() as aloud, tempfile.TemporaryDirectory(prefix="prunus-tasks-") as scratch:
        import lm_eval
        from lm_eval.tasks import TaskManager

        from .harness import Known, Shared

        folder, library = Path(scratch), Path(lm_eval.__file__).parent / "tasks"
        defined = {name: _define(asked, name, folder, library) for name in names}
        told = lm_eval.simple_evaluate(
            model=Shared(model, tokenizer, Known(part), aloud(progress)),
            tasks=[task for tasks in defined.values() for task in tasks],
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            limit=None if asked.rows else asked.limit,
            bootstrap_iters=0,
            log_samples=True,
        )
    return {name: [s for task in tasks for s in told["samples"][task]] for name, tasks in defined.items()}


def _define(asked: Asked, name: str, folder: Path, library: Path) -> list[str]:
    rows = asked.rows.get(name)
    if rows is None:
        return refer(name, folder, library)
    first = Rows(name, rows.split, rows.sha256, rows.rows[: asked.limit])
    return write(first, folder, library)


def _result(name: str, samples: Sequence[Mapping[str, Any]], key: Mapping[str, Any]) -> Result:
    metrics = [metric for metric in METRICS if metric in samples[0]]
    items = {metric: [float(sample[metric]) for sample in samples] for metric in metrics}
    log_probs = [[float(answer[0]) for answer in sample["filtered_resps"]] for sample in samples]
    if any(math.isnan(value) for values in log_probs for value in values):  # lm-eval took the first of them for the best
        raise UserError(f"tasks: {name}: the model's log-probabilities are no numbers; use a --dtype of a wider range")
    return Result(name, items, log_probs, key)


def table(found: Mapping[str, Result], others: Mapping[str, Result] | None = None) -> dict[str, Any]:
    """Scores of every task and the papers' means, each with its error; with `others` what sets the two models apart, pairwise."""
    main = {name: result.scores[result.metric] for name, result in found.items()}
    averaged = means(main, MEANS)
    out: dict[str, Any] = {
        "tasks": {
            name: {"metric": r.metric, **{m: score.to_json() for m, score in r.scores.items()}} for name, r in found.items()
        },
        "means": {name: score.to_json() for name, score in averaged.items()},
    }
    if others is not None:
        apart = {name: Difference.of(r.items[r.metric], others[name].items[r.metric]) for name, r in found.items()}
        theirs = means({name: r.scores[r.metric] for name, r in others.items()}, MEANS)
        out["against"] = {
            "tasks": {name: d.to_json() for name, d in apart.items()},
            "means": {name: mean_difference([apart[t] for t in MEANS[name]], theirs[name]).to_json() for name in averaged},
        }
    return out


Said = Callable[[int, int], None]


@contextmanager
def _quiet() -> Iterator[Callable[[Said], Said]]:
    """lm-eval and datasets draw two bars for every task, and log each; what is yielded makes a progress that is still heard."""
    noisy = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in noisy]
    for logger in noisy:
        logger.setLevel(logging.ERROR)
    shown = sys.stderr

    def aloud(progress: Said) -> Said:
        def said(done: int, total: int) -> None:
            with redirect_stderr(shown):
                progress(done, total)

        return said

    try:
        with redirect_stderr(StringIO()):
            yield aloud
    finally:
        for logger, level in zip(noisy, levels, strict=True):
            logger.setLevel(level)
