"""The library's front door: `plan`, `prune`, `evaluate`. The command line calls these and nothing else."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import checkpoint, costs, findings, measure
from . import latency as latencies
from .combination import planned
from .data.windows import Windows, pack
from .distributed import ALONE, World
from .errors import UserError, unknown
from .evaluation import Perplexity
from .evaluation import perplexity as score_windows
from .job import Outcome, Progress, no_progress
from .ledger import Ledger
from .methods import METHODS
from .network import offline
from .oneshot import decided, one_shot_
from .planning import BATCH, Plan, Request
from .source import DTYPES, Source
from .streaming import Files

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CALIBRATION_WINDOWS, CALIBRATION_SEQ_LEN = 32, 512
EVALUATION_WINDOWS, EVALUATION_SEQ_LEN = 16, 1024


@dataclass(frozen=True)
class TextOptions:
    """How text becomes windows."""

    windows: int  # of evaluation text 0: all full ones
    seq_len: int
    seed: int | None = None  # None: the first windows; else drawn without replacement
    documents: str | None = None  # a slice such as ":800" or "-100:"
    field: str = "text"
    stride: int | None = None  # tokens from one window's start to the next, where they overlap

    def checked(self, name: str, most: int | None) -> TextOptions:
        """Self, or UserError for a count that cannot be."""
        if self.windows < (0 if name == "evaluation" else 1):
            raise UserError(f"windows: {self.windows} windows of {name} text are too few; give at least 1")
        if self.seq_len < 2 or (most is not None and self.seq_len > most):
            limit = f"2 to {most}, the positions the model knows" if most else "at least 2"
            raise UserError(f"seq_len: {self.seq_len} tokens a window of {name} text; it must be {limit}")
        if self.stride is not None and not 1 <= self.stride < self.seq_len:
            raise UserError(
                f"stride: {self.stride} tokens between windows of {self.seq_len}; it must be 1 to {self.seq_len - 1}"
            )
        if self.stride is not None and self.seed is not None:
            raise UserError("stride: windows that are drawn do not follow one another; drop --stride or --seed")
        return self

    def pack(self, tokenizer: PreTrainedTokenizerBase, source: str, online: bool) -> Windows:
        """Read and cut the text."""
        return pack(
            tokenizer,
            source,
            windows=self.windows or None,
            seq_len=self.seq_len,
            seed=self.seed,
            docs=self.documents,
            field=self.field,
            stride=self.stride,
            online=online,
        )


CALIBRATION = TextOptions(CALIBRATION_WINDOWS, CALIBRATION_SEQ_LEN)
EVALUATION = TextOptions(EVALUATION_WINDOWS, EVALUATION_SEQ_LEN)


@dataclass
class Result:
    """A pruned model in memory."""

    outcome: Outcome
    source: Source
    tokenizer: PreTrainedTokenizerBase
    calibration: Windows | None

    @property
    def model(self) -> PreTrainedModel:
        """The cut model. Of a streamed one the weights are read, and cut, when they run; only `save` can write it."""
        return self.outcome.model

    @property
    def ratios(self) -> dict[str, float]:
        """What was really removed: of all parameters, of block parameters, and for sparse results the share of zeros."""
        return self.outcome.ratios

    def save(self, out: str | Path, *, overwrite: bool = False) -> checkpoint.Manifest:
        """Write the checkpoint, reload it in a clean process, and compare; VerificationError leaves nothing behind."""
        path = Path(out).expanduser()
        needed = self.outcome.target.anatomy.weight_bytes(self.model.dtype.itemsize)
        checkpoint.check_destination(path, overwrite=overwrite, needed_bytes=needed)
        return checkpoint.save(
            self.outcome, self.source, self.tokenizer, path, calibration=self.calibration, overwrite=overwrite
        )


def dtype_named(name: str) -> str:
    """The name, or UserError if it is none of the dtypes we run in."""
    if name not in DTYPES:
        raise unknown("dtype", name, DTYPES)
    return name


def positions(source: Source) -> int | None:
    """How many tokens the model can see at once; None if its config does not say. UserError if that is less than two."""
    value = getattr(source.config, "max_position_embeddings", None)
    if isinstance(value, int) and value < 2:
        raise UserError(
            f"{source.name}: max_position_embeddings is {value} in its config, but a prediction takes two tokens"
        )
    return value if isinstance(value, int) else None


def plan(
    source: str,
    request: Request,
    *,
    dtype: str = "float32",
    text: TextOptions = CALIBRATION,
    latency: bool = False,
    statistics: str | Path | None = None,
    calibration: str | None = None,
    online: bool = False,
    progress: Progress = no_progress,
) -> dict:
    """What a cut would be, from the config alone: sizes, counts, and estimates of memory and time. Reads no weight.

    With `latency` the parts that the latency table of this machine lacks are measured first; see `latency.py`. Where scores
    decide the sizes, `statistics` (a file that `prune` left, with the `calibration` text that it was made on) says them too.
    """
    offline(online)
    opened = Source.open(source, online=online)
    width = DTYPES[dtype_named(dtype)].itemsize
    made = _planned(opened, request, dtype, progress if latency else None)
    if statistics is not None:
        made = _decided(made, opened, statistics, calibration, text, dtype, online)
    if made.needs_text:
        text.checked("calibration", positions(opened))
    report = {"source": opened.label, **made.describe(text.seq_len, width)}
    report["notes"] = [*opened.all_notes, *report["notes"]]
    report |= _latency(made, opened, dtype, progress if latency else None)
    return report | {"estimate": _estimate(made, text, width)}


def _decided(
    made: Plan, source: Source, statistics: str | Path, calibration: str | None, text: TextOptions, dtype: str, online: bool
) -> Plan:
    """The plan with the target that saved findings give it."""
    if calibration is None:
        raise UserError("calibration: statistics belong to the text that they were taken on; give it as --calibration")
    windows = text.checked("calibration", positions(source)).pack(source.tokenizer(), calibration, online)
    found = _saved_findings(made, statistics, source, windows, dtype)
    if found is None:
        raise UserError(f"statistics: {statistics} is not there; prunus prune --statistics writes it")
    return decided(made, source.config, found)


def _latency(made: Plan, source: Source, dtype: str, progress: Progress | None) -> dict[str, Any]:
    """Milliseconds before and after, as far as the table has them; what it lacks is measured if there is a `progress`."""
    table = latencies.Table.open(latencies.key(dtype, latencies.prompt_tokens(positions(source))))
    sides = {"before": (source.config, source.anatomy)}
    if made.target is not None:
        sides["after"] = (made.target.config, made.target.anatomy)
    if progress is not None:
        for name, (config, anatomy) in sides.items():
            table = latencies.filled(table, config, anatomy, progress=partial(progress, f"time {name}"))
    times = {name: latencies.estimate(anatomy, table.entries) for name, (_, anatomy) in sides.items()}
    known = {name: vars(timing) for name, timing in times.items() if timing is not None}
    return {"latency": known | {"key": dict(table.key)}} if known else {}


def _estimate(made: Plan, text: TextOptions, width: int) -> dict[str, Any]:
    flops = made.scoring_flops(text.windows, text.seq_len)
    rate = measure.gemm_rate()
    return {
        "scoring_flops": flops,
        "scoring_seconds": flops / rate,
        "memory_bytes": made.memory_bytes(text.windows, text.seq_len, width),
        "measured_gemm_flops_per_s": rate,
        "basis": "float32 matmul rate measured now; loading, saving and verifying come on top",
    }


def prune(
    source: str,
    *,
    method: str,
    ratio: float | None = None,
    calibration: str | None = None,
    pattern: str | None = None,
    target: Mapping[str, int] | None = None,
    uniform: bool = False,
    multiple_of: int | None = None,
    compensate: str | None = None,
    options: Mapping[str, str] | None = None,
    sparsity: float | None = None,
    split: Sequence[float] | None = None,
    allocate: str | None = None,
    cost: str | None = None,
    order: str | None = None,
    text: TextOptions = CALIBRATION,
    statistics: str | Path | None = None,
    dtype: str = "float32",
    batch_size: int = BATCH,
    online: bool = False,
    progress: Progress = no_progress,
    stream: bool = False,
    scratch: str | Path | None = None,
    world: World = ALONE,
) -> Result:
    """Cut a model in one shot.

    `source` is a Hugging Face folder, a GGUF file or a hub name; `method` a row of `prunus.METHODS`; `ratio` the fraction
    of block parameters to remove (for sparse methods the sparsity of the block matrices). Every argument is checked before
    a weight is read; UserError says what is wrong. `statistics` names a file where what a method's passes over the dense
    model found is kept (`findings.py`), so that the next target needs no new pass.

    `allocate` is one of the method's allocators; `cost` what the ratio is of, and what scores are divided by: params, flops,
    kv-bytes, prefill-ms or decode-ms; `order` sequential or dense.

    Several methods joined by ``+`` share `ratio`, as `split` says; a sparse last one takes `sparsity` or `pattern`. Their
    options are named ``PART.NAME``, and `compensate` is ``PART=VALUE,...``.

    With `stream` the weights stay in files, and memory holds one block at a time, in `save` too. Changed weights are put
    aside in a nameless file in the folder `scratch` (the system's temporary one, unless said).

    Under torchrun, inside `with World.joined() as world`, processes share the calibration windows out. Each comes to the same
    cut, that of one process but for the rounding of sums; the first is to save it.
    """
    offline(online)
    asked = (method, ratio, pattern, target or {}, uniform, multiple_of, compensate, options or {})
    request = Request(*asked, sparsity, tuple(split or ()), allocate, cost, order)
    opened = Source.open(source, online=online)
    Ledger.check(opened.path)
    made = _planned(opened, request, dtype_named(dtype), progress, world)
    if made.method.trains:
        raise UserError(f"tokens: {method} trains what it cuts; give prunus prune --tokens, or call train.shearing")
    if batch_size < 1:
        raise UserError(f"batch_size: {batch_size} windows at a time are too few; give at least 1")
    aside = _scratch(made, opened, stream, scratch)
    tokenizer, windows = opened.tokenizer(), None
    if made.needs_text:
        if calibration is None:
            raise UserError(f"calibration: {method} needs text; give a .txt, .jsonl or .parquet file")
        text.checked("calibration", positions(opened))
        windows = text.pack(tokenizer, calibration, online)
        windows.check_fits(opened.anatomy.shape.vocab_size, calibration)
        if windows.num_windows < world.size:
            raise UserError(
                f"windows: {world.size} processes cannot share {windows.num_windows} windows of calibration text; give at least "
                f"{world.size}, or start fewer"
            )
    elif calibration is not None or text != CALIBRATION:
        raise UserError(f"calibration: {method} reads no text; drop the calibration options")
    saved = _saved_findings(made, statistics, opened, windows, dtype)
    progress("load", 0, 1)
    store = None if aside is None else Files(opened, dtype, aside)
    model = opened.load(dtype) if store is None else store.model
    progress("load", 1, 1)
    outcome = one_shot_(
        made, model, windows, findings=saved, batch_size=batch_size, progress=progress, store=store, world=world
    )
    del model
    if world.first and statistics is not None and windows is not None:
        key = findings.key(opened, windows, DTYPES[dtype])
        findings.keep(saved, outcome.findings, Path(statistics).expanduser(), key)
    return Result(outcome, opened, tokenizer, windows)


def needs_text(source: str, request: Request, *, progress: Progress = no_progress) -> bool:
    """Whether a cut goes by calibration text; UserError for one that cannot be."""
    return _planned(Source.open(source), request, "float32", progress).needs_text


def serves_all(source: str, request: Request, *, progress: Progress = no_progress) -> bool:
    """Whether what a cut gathers (`prune`'s `statistics`) serves cuts of any size as it is."""
    return findings.serves_all(_planned(Source.open(source), request, "float32", progress))


def _planned(source: Source, request: Request, dtype: str, progress: Progress | None, world: World = ALONE) -> Plan:
    """The plan; of one that counts milliseconds, what the latency table lacks is measured first, if there is a `progress`.

    Of several processes the first measures, with the others waiting.
    """
    if not costs.is_timed(request.cost):
        return planned(source.config, source.anatomy, request)
    params = planned(source.config, source.anatomy, replace(request, cost=None))  # refuses what does not hang on the cost
    table = latencies.Table.open(latencies.key(dtype, latencies.prompt_tokens(positions(source))))
    if progress is not None and world.first:
        table = costs.measured(table, source.config, source.anatomy, params.out_bias, partial(progress, "time layers"))
    return planned(source.config, source.anatomy, request, world.agree(table.entries))


def _scratch(made: Plan, source: Source, stream: bool, scratch: str | Path | None) -> Path | None:
    """Where changed weights are put aside; None if the model is loaded whole."""
    if not stream:
        if scratch is not None:
            raise UserError(
                "scratch: only a model that is streamed needs a folder for changed weights; add stream or drop it"
            )
        return None
    if not made.method.streams:
        raise UserError(
            f"stream: {made.method.name} runs the whole model for every candidate, or back through it, so its weights must be "
            f"in memory; drop it or use {', '.join(name for name, row in METHODS.items() if row.streams)}"
        )
    if made.candidates or made.allocator == "search":
        raise UserError(
            f"stream: {made.method.name} with --allocate {made.allocator} runs whole models to compare them, so they must be in "
            "memory; drop one of the two"
        )
    if source.kind == "gguf":
        raise UserError(
            f"stream: {source.label} is a GGUF file, which is dequantised as a whole; give a Hugging Face folder with "
            "safetensors"
        )
    folder = Path(tempfile.gettempdir() if scratch is None else scratch).expanduser()
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"scratch: {folder} is no folder that can be written to; changed weights are put aside there")
    return folder


def _saved_findings(
    made: Plan, path: str | Path | None, source: Source, windows: Windows | None, dtype: str
) -> findings.Findings | None:
    if path is None:
        return None
    what = findings.wanted(made)
    if what is None or windows is None:
        why = "must sweep again for every target" if made.needs_text else "needs no statistics"
        raise UserError(f"statistics: {made.method.name} {why}; drop --statistics")
    file = Path(path).expanduser()
    if not file.parent.is_dir() or file.is_dir():
        raise UserError(f"statistics: {file} is no place for a file; give a file in a folder that exists")
    return findings.load(file, findings.key(source, windows, DTYPES[dtype]), what) if file.exists() else None


def evaluate(
    source: str,
    text: str,
    *,
    options: TextOptions = EVALUATION,
    dtype: str = "float32",
    online: bool = False,
    progress: Progress = no_progress,
) -> tuple[Perplexity, Windows]:
    """Perplexity and bits per byte of a model on windows of text."""
    offline(online)
    opened = Source.open(source, online=online)
    options.checked("evaluation", positions(opened))
    windows = options.pack(opened.tokenizer(), text, online)
    windows.check_fits(opened.anatomy.shape.vocab_size, text)
    model = opened.load(dtype_named(dtype))
    with torch.no_grad():
        return score_windows(model, windows, progress=lambda d, t: progress(f"eval {opened.label}"[:24], d, t)), windows
