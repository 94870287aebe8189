"""Several methods on one source at several ratios: every cut in memory, scored on the same windows, one record a run.

A comparison is a folder: what was compared on what (`comparison.json`), one line a finished run (`runs.jsonl`), and the table
and the picture of all runs in it. It can be stopped anywhere: the same call goes on behind the last finished run.
"""

from __future__ import annotations

import gc
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import api, measure, plots, record, report
from .combination import SEPARATOR, planned
from .data.overlap import token_overlap
from .data.windows import Windows
from .errors import UserError
from .evaluation import perplexity
from .findings import Findings, wanted
from .job import Outcome, Progress, no_progress
from .methods import METHODS
from .network import offline
from .oneshot import one_shot_
from .place import locked, staged_files
from .planning import Plan, Request
from .reading import json_of
from .source import DTYPES, Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ABOUT, RUNS, TABLE, PICTURE = "comparison.json", "runs.jsonl", "comparison.md", "comparison.png"
KIND, FORMAT = "compare-methods", 1
_PROMPT_TOKENS, _NEW_TOKENS, _REPEATS = 256, 16, 3


@dataclass(frozen=True)
class Question:
    """What to compare: every method at every ratio, calibrated on `seeds` draws of windows (1: the first windows)."""

    source: str
    methods: Sequence[str]  # see `request_of`
    ratios: Sequence[float]
    text: str
    calibration: str | None = None
    seeds: int = 1
    calibrate: api.TextOptions = api.CALIBRATION
    evaluate: api.TextOptions = api.EVALUATION
    dtype: str = "float32"
    batch_size: int = 4
    latency: bool = True
    online: bool = False


def split_methods(text: str) -> list[str]:
    """``flap,shortened-llama+protect=0,0`` -> its two methods: a comma separates where a name follows."""
    return [name for part in re.split(r",(?=\s*[A-Za-z])", text) if (name := part.strip(" ,"))]


def request_of(method: str, ratio: float) -> Request:
    """``flap+uniform+compensate=none`` at a ratio as a request: what is no field of a request is an option of the method.

    Words that are methods make it a combination: ``flap+wanda+sparsity=0.5``.
    """
    words = method.split("+")
    names = [word for i, word in enumerate(words) if i == 0 or word in METHODS]
    for name in names:
        if name in METHODS and METHODS[name].trains:
            raise UserError(
                f"methods: {name} trains, so it has no cut to compare with others' here; use prunus prune --tokens"
            )
    fields: dict[str, Any] = {}
    options: dict[str, str] = {}
    for word in words[1:]:
        name, equals, value = word.partition("=")
        if word in names:
            continue
        if word == "uniform":
            fields["uniform"] = True
        elif not (name and equals and value):
            raise UserError(f"methods: '{word}' in '{method}' is neither uniform nor NAME=VALUE nor a method")
        elif (field_name := name.replace("-", "_")) in _FIELDS:
            what, read = _FIELDS[field_name]
            try:
                fields[field_name] = read(value)
            except ValueError as error:
                raise UserError(f"methods: {word} in '{method}' is not {what}") from error
        else:
            options[name] = value
    return Request(SEPARATOR.join(names), ratio, options=options, **fields)


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError(text)
    return int(text)


_FIELDS: Mapping[str, tuple[str, Callable[[str], Any]]] = {  # fields of a request: what they are, and how they are read
    "multiple_of": ("a whole number", _whole),
    "compensate": ("a name", str),
    "pattern": ("a pattern", str),
    "sparsity": ("a number", float),
    "split": ("a list of shares", lambda text: tuple(float(share) for share in text.split(","))),
}


# -- before any weight is read --------------------------------------------------------------------------------------------


@dataclass
class Setting:
    """Everything that all runs share."""

    question: Question
    source: Source
    plans: list[Plan]
    held_out: Windows
    calibrations: dict[int | None, Windows]  # seed -> windows
    about: dict[str, Any]
    warnings: dict[int | None, str]  # seed -> what makes scores behind such windows doubtful
    findings: dict[Any, tuple[Findings, float]] = field(default_factory=dict)  # with the seconds of their passes

    def runs(self) -> Iterator[tuple[Plan | None, int | None]]:
        """The dense model, then for every seed every plan; methods that read no text run once."""
        yield None, None
        for n, seed in enumerate(self.calibrations or [None]):
            for plan in self.plans:
                if plan.needs_text or n == 0:
                    yield plan, seed if plan.needs_text else None

    def recipe(self, plan: Plan | None, seed: int | None) -> dict[str, Any]:
        """What a run is, so that a second call knows it again. Speeds are of one machine and number of threads."""
        calibration = self.calibrations[seed] if plan is not None and plan.needs_text else None
        timed = None
        if self.question.latency:
            machine = record.machine()
            timed = {**self.speed_options(), "cpu": machine["cpu"], "threads": machine["threads"]}
        return {
            "command": KIND,
            **{name: self.about[name] for name in ("source", "source_sha256", "evaluation", "dtype")},
            "request": plan.request.describe() if plan else None,
            "calibration": calibration.provenance() if calibration else None,
            "seed": seed,
            "latency": timed,
        }

    def speed_options(self) -> dict[str, int]:
        """How `measure.speed` times a model; the prompt and what follows stay within the positions the model knows."""
        positions = api.positions(self.source)
        prompt = _PROMPT_TOKENS if positions is None else max(1, min(_PROMPT_TOKENS, positions - _NEW_TOKENS))
        return {"prompt_tokens": prompt, "new_tokens": _NEW_TOKENS, "repeats": _REPEATS}


def prepare(question: Question) -> Setting:
    """Check everything that can be wrong, from configs, texts and options; UserError names the method it is about."""
    offline(question.online)
    if not question.methods or not question.ratios:
        raise UserError("methods: nothing to compare; give --methods flap,shortgpt and --ratio 0.2")
    if question.seeds < 1:
        raise UserError(f"seeds: {question.seeds} draws of calibration windows are too few; give at least 1")
    if question.batch_size < 1:
        raise UserError(f"batch_size: {question.batch_size} windows at a time are too few; give at least 1")
    if question.seeds > 1 and question.calibrate.seed is not None:
        raise UserError(
            f"seed: {question.calibrate.seed} and --seeds {question.seeds} contradict each other; give one of them"
        )
    api.dtype_named(question.dtype)
    source = Source.open(question.source, online=question.online)
    plans = [_planned(source, method, ratio) for method in question.methods for ratio in question.ratios]
    for i, plan in enumerate(plans):
        if plan.request in [other.request for other in plans[:i]]:
            raise UserError(f"methods: {plan.method.name} at {plan.request.ratio} is asked for twice; drop one of them")
    if question.seeds > 1 and not any(plan.needs_text for plan in plans):
        raise UserError("seeds: none of these methods reads calibration text, so all draws are alike; drop --seeds")
    tokenizer, limit, vocab = source.tokenizer(), api.positions(source), source.anatomy.shape.vocab_size
    held_out = question.evaluate.checked("evaluation", limit).pack(tokenizer, question.text, question.online)
    held_out.check_fits(vocab, question.text)
    calibrations: dict[int | None, Windows] = {}
    reader = next((plan.method.name for plan in plans if plan.needs_text), None)
    if reader is None and (question.calibration is not None or question.calibrate != api.CALIBRATION):
        raise UserError("calibration: none of these methods reads text; drop the calibration options")
    if reader is not None:
        if question.calibration is None:
            raise UserError(f"calibration: {reader} needs text; give a .txt, .jsonl or .parquet file")
        options = question.calibrate.checked("calibration", limit)
        for seed in [options.seed] if question.seeds == 1 else range(question.seeds):
            calibrations[seed] = replace(options, seed=seed).pack(tokenizer, question.calibration, question.online)
            calibrations[seed].check_fits(vocab, question.calibration)
    overlaps = {seed: token_overlap(held_out.ids_NT.numpy(), w.ids_NT.flatten().numpy()) for seed, w in calibrations.items()}
    said = {seed: found.warning("the evaluation text", "the calibration text") for seed, found in overlaps.items()}
    about = {
        "format": FORMAT,
        "source": source.label,
        "source_sha256": source.sha256,
        "evaluation": held_out.provenance(),
        "dtype": question.dtype,
    }
    warnings = {seed: text for seed, text in said.items() if text is not None}
    return Setting(question, source, plans, held_out, calibrations, about, warnings)


def _planned(source: Source, method: str, ratio: float) -> Plan:
    request = request_of(method, ratio)
    try:
        return planned(source.config, source.anatomy, request)
    except UserError as error:
        if str(error).startswith(("unknown method", f"{request.method}:")):
            raise
        raise UserError(f"{request.method} at {ratio}: {error}") from error


def check_folder(out: Path, about: Mapping[str, Any]) -> None:
    """UserError unless the folder is free or holds a comparison of the same source on the same text."""
    path = out / ABOUT
    if not path.exists():
        if out.exists() and (not out.is_dir() or any(not path.name.startswith(".") for path in out.iterdir())):
            raise UserError(f"{out}: is not a comparison that prunus wrote; give another --out")
        record.check_place(out / RUNS, "out")
        return
    found = json_of(path, "give another --out")
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UserError(f"{path}: not a comparison of format {FORMAT}; give another --out")
    for name, what in (("source_sha256", "source"), ("evaluation", "evaluation text"), ("dtype", "dtype")):
        if found.get(name) != about[name]:
            raise UserError(
                f"{out}: holds a comparison with another {what}, and one table must not mix them; give another --out"
            )
    record.check_place(out / RUNS, "out")


# -- the runs -------------------------------------------------------------------------------------------------------------


def run(question: Question, out: Path, *, also: Path | None = None, progress: Progress = no_progress) -> dict[str, Any]:
    """Do what is not done yet, then write the table and the picture of all runs in `out`; `also` gets the same records."""
    plots.check_library()
    if also is not None:
        record.check_place(also)
    setting = prepare(question)
    check_folder(out, setting.about)
    with locked(out, mark=False):
        known = record.read(out / RUNS) if (out / RUNS).exists() else []
        todo = [(plan, seed) for plan, seed in setting.runs() if not _is_done(known, setting.recipe(plan, seed))]
        for n, (plan, seed) in enumerate(todo, 1):
            name = f"run {n} of {len(todo)}, " + (f"{plan.method.name} {plan.request.ratio}" if plan else "dense")
            figures = _figures(setting, plan, seed, _named(progress, name))
            _begin(out, setting.about)
            recipe = setting.recipe(plan, seed)
            known.append(record.append(out / RUNS, KIND, recipe, figures))
            if also is not None:
                record.append(also, KIND, recipe, figures)
            gc.collect()
        result = report.comparison(setting.about, known)
        with staged_files(out / TABLE, out / PICTURE) as (table, picture):
            table.write_text(report.comparison_page(result, PICTURE), encoding="utf-8")
            plots.comparison(result, picture)
    return {"out": str(out), "table": str(out / TABLE), "picture": str(out / PICTURE), "ran": len(todo), **result}


def _named(progress: Progress, name: str) -> Progress:
    return lambda stage, done, total: progress(f"{name}: {stage}", done, total)


def _is_done(known: Sequence[Mapping[str, Any]], recipe: Mapping[str, Any]) -> bool:
    """Whether a record answers the recipe; one with times also answers a question without."""
    for found in (r["recipe"] for r in known):
        times = found.get("latency") if recipe["latency"] is None else recipe["latency"]
        if record.digest(found) == record.digest({**recipe, "latency": times}):
            return True
    return False


def _figures(setting: Setting, plan: Plan | None, seed: int | None, progress: Progress) -> dict[str, Any]:
    """One run: load, cut, score, time."""
    question, target = setting.question, setting.source.anatomy
    progress("load", 0, 1)
    model = setting.source.load(question.dtype)
    progress("load", 1, 1)
    figures: dict[str, Any] = {"model_type": model.config.model_type}
    if plan is not None:
        start = time.perf_counter()
        outcome, shared_s = _cut(setting, plan, seed, model, progress)
        figures |= {
            "cut_s": time.perf_counter() - start + shared_s,
            "shared_s": shared_s,
            "stages_s": outcome.seconds,
            "ratios": outcome.ratios,
            "model_type": outcome.target.config.model_type,
            "notes": list(outcome.notes),
        }
        if plan.needs_text and seed in setting.warnings:
            figures["warning"] = setting.warnings[seed]
        model, target = outcome.model, outcome.target.anatomy
        del outcome
    figures |= {"shape": target.shape.describe()}
    figures |= target.counts(setting.held_out.seq_len, DTYPES[question.dtype].itemsize)
    figures |= perplexity(model, setting.held_out, progress=lambda d, t: progress("score text", d, t)).to_json()
    if question.latency:
        speed = measure.speed(model, **setting.speed_options(), progress=lambda d, t: progress("time", d, t))
        figures["speed"] = {
            **speed,
            "gemm_flops_per_s": measure.plain_gemm_rate(),
        }  # a yardstick: is the machine as idle as before?
    return figures


def _cut(
    setting: Setting, plan: Plan, seed: int | None, model: PreTrainedModel, progress: Progress
) -> tuple[Outcome, float]:
    """Cut, with what an earlier run on the same windows found; and the seconds that this had taken."""
    windows = setting.calibrations[seed] if plan.needs_text else None
    key = (seed, wanted(plan))
    saved, shared_s = setting.findings.get(key, (None, 0.0))
    outcome = one_shot_(plan, model, windows, findings=saved, batch_size=setting.question.batch_size, progress=progress)
    if outcome.findings is not None and key[1] is not None:
        score = next((s for stage, s in outcome.seconds.items() if stage.endswith("score")), 0.0)  # a combination's first
        setting.findings[key] = (outcome.findings, shared_s if saved is not None else score)
    return outcome, shared_s


# -- files ----------------------------------------------------------------------------------------------------------------


def _begin(out: Path, about: Mapping[str, Any]) -> None:
    """Make the folder once there is a run to keep, so that a comparison that fails at once leaves nothing behind."""
    if not (out / ABOUT).exists():
        out.mkdir(parents=True, exist_ok=True)
        with staged_files(out / ABOUT) as (path,):
            path.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
