"""Models side by side on the same texts and tasks: perplexity, zero-shot scores, and what of a difference is chance."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import checkpoint
from . import record as records
from .api import EVALUATION, TextOptions, dtype_named, positions
from .data.tokenizer import fingerprint
from .data.windows import Windows
from .errors import UserError, unknown
from .evaluation import Perplexity, perplexity
from .generations import check_chat, check_lengths, continuations
from .job import Progress, no_progress
from .judge import Judge, verdicts
from .judge import judge as judge_named
from .network import offline
from .record import digest
from .source import Source
from .tables import told_apart
from .tasks.run import Asked, Result, results, table

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NEW_TOKENS = 64  # behind a prompt
_OF_THE_FILE = ("_name_or_path", "transformers_version", "dtype")  # of a config: what changes no score by itself
PROTOCOLS: Mapping[str, tuple[TextOptions, str]] = {
    "sixteen": (EVALUATION, "the first 16 windows of 1,024 tokens"),
    "gptq": (TextOptions(0, 2048), "every full window of 2,048 tokens (GPTQ, SparseGPT, Wanda; text joined by blank lines)"),
    "papers": (TextOptions(256, 8192), "256 windows of 8,192 tokens (Small LLMs: pruning vs. training from scratch, appendix E)"),
    "strided": (replace(EVALUATION, windows=32, stride=512), "32 windows of 1,024 tokens, 512 apart: a token has 512 before it"),
}  # fmt: skip


def protocol(name: str | None) -> TextOptions | None:
    """What a name stands for; UserError for one that is none."""
    if name is None:
        return None
    if name not in PROTOCOLS:
        raise unknown("protocol", name, PROTOCOLS)
    return PROTOCOLS[name][0]


@dataclass(frozen=True)
class Question:
    """What models are asked. `texts` are files or `datasets:` names, all cut as `options` say."""

    texts: tuple[str, ...] = ()
    options: TextOptions = EVALUATION
    tasks: tuple[str, ...] = ()
    task_data: Path | None = None
    limit: int | None = None  # the first rows of a task
    prompts: tuple[str, ...] = ()  # what models write behind them is told, not scored
    new_tokens: int = NEW_TOKENS
    chat: bool = False
    judge: str | None = None  # says whose answers are better: program:COMMAND or model:SOURCE
    dtype: str = "float32"
    online: bool = False

    def checked(self) -> Asked | None:
        """The tasks with their rows; UserError for a question that cannot be asked."""
        dtype_named(self.dtype)
        if not self.texts and not self.tasks and not self.prompts:
            raise UserError("eval: nothing to score; give --text FILE, --tasks NAMES, --prompts FILE, or several of them")
        if self.new_tokens < 1:
            raise UserError(f"new_tokens: {self.new_tokens} tokens behind a prompt are too few; give at least 1")
        if not self.texts and self.options != EVALUATION:
            raise UserError(
                "text: what says how windows are cut, or which documents, belongs to --text; name a file, or drop it"
            )
        if not self.prompts and (self.chat or self.new_tokens != NEW_TOKENS):
            raise UserError("prompts: --chat and --new-tokens belong to --prompts; name a file, or drop them")
        if self.judge is not None and not self.prompts:
            raise UserError("judge: it compares what is written behind prompts; name them with --prompts, or drop --judge")
        if not self.tasks:
            if self.task_data is not None or self.limit is not None:
                raise UserError("tasks: --task-data and --limit belong to --tasks; name some, or drop them")
            return None
        return Asked.of(self.tasks, self.task_data, self.limit, online=self.online)


@dataclass
class Found:
    """What one model said."""

    source: Source
    name: str  # its label, with a number where one before it has the same
    tokenizer: PreTrainedTokenizerBase
    windows: list[Windows]  # of every text
    texts: list[Perplexity] = field(default_factory=list)
    tasks: dict[str, Result] = field(default_factory=dict)
    written: list[str] = field(default_factory=list)
    judged: dict[str, Any] = field(default_factory=dict)  # against each other model

    def row(self) -> dict[str, Any]:
        """The model's figures."""
        opened = self.source
        out: dict[str, Any] = {
            "model": self.name,
            "weights_sha256": opened.sha256,
            "params": opened.anatomy.num_params,
            "texts": [
                figures.to_json() | {"text": windows.provenance()}
                for figures, windows in zip(self.texts, self.windows, strict=True)
            ],
        }
        if self.tasks:
            out |= table(self.tasks)
        if self.written:
            out["written"] = self.written
        if self.judged:
            out["judged"] = self.judged
        if opened.kind == "folder" and (opened.path / checkpoint.MANIFEST).exists():
            made = checkpoint.read_manifest(opened.path)
            out |= {"method": made.method["request"], "ratios": made.ratios, "calibration": made.calibration}
        return out


def appraise(
    sources: Sequence[str], question: Question, *, progress: Progress = no_progress, record: Path | None = None
) -> dict[str, Any]:
    """Score models on the same texts, each with its own tokenizer, and on the same items; the first is the one asked about.

    Returns the figures of every model, and of several what sets the first apart from each other one, window by window and item
    by item. `record` appends one run record a model.
    """
    offline(question.online)
    if record is not None:
        records.check_place(record)
    asked = question.checked()
    opened = [Source.open(source, online=question.online, quantized=True) for source in sources]
    for source in opened:  # all are checked before any is read
        source.anatomy.checked()
        source.check_dtype(question.dtype)
        if question.texts:
            question.options.checked("evaluation", positions(source))
        if question.chat:
            check_chat(source.tokenizer(), source.label)
    judge = _judge(question, opened)
    names = told_apart([source.label for source in opened])
    found = [_opened(source, name, question) for source, name in zip(opened, names, strict=True)]
    for one in found:
        _ask_(one, question, asked, progress)
    if judge is not None:
        for other in found[1:]:
            told = partial(progress, f"judge, {other.name}"[:24])
            said = verdicts(judge, question.prompts, found[0].written, other.written, progress=told)
            found[0].judged[other.name] = {"judge": judge.name} | said.to_json()
    rows = [one.row() for one in found]
    for one, row in zip(found, rows, strict=True):
        if record is not None:
            records.append(record, "eval", _recipe(one, question), row)
    out: dict[str, Any] = {"dtype": question.dtype, "models": rows, "notes": [] if asked is None else asked.notes()}
    out |= {"prompts": question.prompts} if question.prompts else {}
    if len(found) > 1:
        out["against"] = [_apart(found[0], other) for other in found[1:]]
    return out


def _judge(question: Question, opened: Sequence[Source]) -> Judge | None:
    """Who decides, checked before anybody writes."""
    if question.judge is None:
        return None
    if len(opened) < 2:
        raise UserError("judge: it compares two models; name the other with --baseline, or drop --judge")
    found = judge_named(question.judge, question.dtype, online=question.online)
    found.check(question.prompts, question.new_tokens)
    return found


def _recipe(one: Found, question: Question) -> dict[str, Any]:
    texts = [windows.provenance() for windows in one.windows]
    recipe: dict[str, Any] = {"command": "eval", "model": one.source.label, "texts": texts, "dtype": question.dtype}
    recipe |= {"tasks": {name: dict(r.key) for name, r in one.tasks.items()}} if one.tasks else {}
    told = hashlib.sha256("\0".join(question.prompts).encode()).hexdigest()  # prompts have a licence of their own
    written = {"prompts": len(question.prompts), "sha256": told, "new_tokens": question.new_tokens, "chat": question.chat}
    judges = {said["judge"] for said in one.judged.values()}
    written |= {"judge": judges.pop()} if judges else {}
    return recipe | ({"written": written} if question.prompts else {})


def _opened(source: Source, name: str, question: Question) -> Found:
    """A model that is ready to be asked: every text as its tokenizer cuts it. No weight is read."""
    tokenizer, windows = source.tokenizer(), []
    for text in question.texts:
        windows.append(question.options.pack(tokenizer, text, question.online))
        windows[-1].check_fits(source.anatomy.shape.vocab_size, text)
    known, new = positions(source), question.new_tokens
    check_lengths(tokenizer, question.prompts, source.label, known, new_tokens=new, chat=question.chat)
    return Found(source, name, tokenizer, windows)


def _ask_(found: Found, question: Question, asked: Asked | None, progress: Progress) -> None:
    """Changes `found`: one model's answers. Its weights are read once, and only if something is left to compute."""
    source, name, tokenizer = found.source, found.name, found.tokenizer
    loaded: list[PreTrainedModel] = []

    def model() -> PreTrainedModel:
        if not loaded:
            loaded.append(source.load(question.dtype))
        return loaded[0]

    label = name[:16]
    for windows in found.windows:
        stage = f"{label} {windows.source}"[:24]
        figures = perplexity(model(), windows, progress=partial(progress, stage))
        if not math.isfinite(figures.nll):
            raise UserError(
                f"{name}: its loss on {windows.source} is no finite number in {question.dtype}; use a --dtype of a wider range"
            )
        found.texts.append(figures)
    if asked is not None:
        told = {"weights_sha256": source.sha256, "config": _config_digest(source), "tokenizer": fingerprint(tokenizer)}
        told |= {"dtype": question.dtype}
        found.tasks = results(asked, lambda: (model(), tokenizer), told, progress=partial(progress, f"{label} tasks"))
    if question.prompts:
        found.written = continuations(
            model(), tokenizer, question.prompts, new_tokens=question.new_tokens, chat=question.chat,
            progress=partial(progress, f"{label} writes"),
        )  # fmt: skip


def _config_digest(source: Source) -> str:
    """Of all that makes another model of the same weights: activation, positions, norms."""
    return digest({name: value for name, value in source.config.to_dict().items() if name not in _OF_THE_FILE})


def _apart(one: Found, other: Found) -> dict[str, Any]:
    """How the first model differs: of texts nats a token, by windows where both read the same ones."""
    texts = []
    for mine, theirs, windows, others in zip(one.texts, other.texts, one.windows, other.windows, strict=True):
        same = windows.sha256 == others.sha256
        texts.append(
            {"source": windows.source, **(_loss_apart(mine, theirs, windows) if same else {"loss": None, "error": None})}
        )
    out: dict[str, Any] = {"model": other.name, "texts": texts}
    return out | (table(one.tasks, other.tasks)["against"] if one.tasks else {})


def _loss_apart(mine: Perplexity, theirs: Perplexity, windows: Windows) -> dict[str, Any]:
    """Mean difference of the loss a token and its standard error over windows; windows that overlap are no independent sample."""
    each = [
        (a - b) / (windows.seq_len - windows.first_predicted(i))
        for i, (a, b) in enumerate(zip(mine.window_nll, theirs.window_nll, strict=True))
    ]
    error = statistics.stdev(each) / len(each) ** 0.5 if len(each) > 1 and windows.stride is None else None
    return {"loss": (mine.nll - theirs.nll) / windows.num_predictions, "error": error}
