"""What a model costs to run on this machine: counted from its config, and timed, several models taking turns.

Shapes: B prompts, T tokens of each.
"""

from __future__ import annotations

import logging
import lzma
import multiprocessing
import os
import statistics as st
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import measure, products
from . import record as records
from .anatomy import Anatomy
from .api import dtype_named, positions
from .errors import UserError
from .job import Progress, no_progress
from .network import offline
from .source import DTYPES, Source
from .tables import told_apart

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

_SAMPLE = 1 << 18  # weights of each of some eight matrices that are packed
_ZEROS = 0.05  # of the block matrices; fewer are rounding and dead units, and make no sparse model


@dataclass(frozen=True)
class Asked:
    """Which cells are timed: every number of threads with every batch and every context."""

    threads: tuple[int, ...]
    batches: tuple[int, ...] = (1, 4)
    contexts: tuple[int, ...] = (128, 512)
    new_tokens: int = 16
    repeats: int = 5
    train: bool = False
    dtype: str = "float32"

    def checked(self, sources: Sequence[Source]) -> Asked:
        """Self; UserError for a cell that cannot be."""
        dtype_named(self.dtype)
        for name in ("threads", "batches", "contexts"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                raise UserError(f"{name}: {', '.join(map(str, values)) or 'none'}; give numbers from 1 on, with commas")
        if self.new_tokens < 1 or self.repeats < 1:
            raise UserError("new_tokens and repeats: both must be at least 1")
        if self.train and min(self.contexts) < 2:
            raise UserError("contexts: 1 token has none behind it to learn; give 2 or more, or drop --train")
        if max(self.threads) > (most := cores()):
            raise UserError(
                f"threads: {max(self.threads)} are more than the {most} cores of this machine; give at most that"
            )
        for source in sources:
            if self.train and source.is_quantized:
                raise UserError(f"train: {source.label} holds fewer bits, which have no gradients; drop --train")
            known = positions(source)
            if known is not None and max(self.contexts) + self.new_tokens > known:
                raise UserError(
                    f"contexts: {max(self.contexts)} tokens and {self.new_tokens} new ones are more than the {known} positions "
                    f"that {source.label} knows"
                )
        return self


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usual_threads() -> tuple[int, ...]:
    """1, 2, 4, 8, as far as the machine has them."""
    return tuple(n for n in (1, 2, 4, 8) if n <= cores())


# -- counted --------------------------------------------------------------------------------------------------------------


def counted(source: Source, dtype: str, context: int) -> dict[str, Any]:
    """What the config says of the costs: no weight is read, but for the share of zeros."""
    anatomy, width = source.anatomy, DTYPES[dtype].itemsize
    embedding = anatomy.tensors[f"{anatomy.family.embedding}.weight"].numel
    head = anatomy.tensors.get(f"{anatomy.family.head}.weight")
    outside = embedding + (head.numel if head is not None else 0)
    prompt = anatomy.flops(context)
    return {
        "params": anatomy.num_params,
        "params_without_embeddings": anatomy.num_params - outside,
        "prefill_flops": prompt,
        "prefill_context": context,
        "flops_per_token": prompt / context,
        "weight_bytes": sum(file.stat().st_size for file in source.weight_files)
        if source.is_quantized
        else anatomy.weight_bytes(width),
        "kv_bytes_per_token": anatomy.kv_bytes_per_token(width),
    }


def zeros(model: PreTrainedModel, anatomy: Anatomy) -> dict[str, Any] | None:
    """Share of zeros among the block matrices, and what packing makes of a sample of them; None if hardly any is zero."""
    named = dict(model.named_parameters())
    matrices = [named[name].detach() for name, t in anatomy.tensors.items() if t.layer is not None and t.is_matrix]
    total = sum(m.numel() for m in matrices)
    share = sum(int((m == 0).sum()) for m in matrices) / total
    if share < _ZEROS:
        return None
    plain = packed = 0
    for matrix in matrices[:: max(1, len(matrices) // 8)]:
        data = matrix.flatten()[:_SAMPLE].to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
        plain, packed = plain + len(data), packed + len(lzma.compress(data, preset=0))
    return {"share": share, "packed_share": packed / plain}


# -- timed ----------------------------------------------------------------------------------------------------------------


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """So many threads for matrix products, and as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def generate_s(model: PreTrainedModel, ids_BT: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    """(seconds to the first token behind the prompts, seconds of a token after it), greedy, every sequence to the end."""
    start = time.perf_counter()
    out: Any = model(input_ids=ids_BT, use_cache=True, logits_to_keep=1)
    token_B1 = out.logits[:, -1:].argmax(-1)
    first = time.perf_counter()
    for _ in range(new_tokens):
        out = model(input_ids=token_B1, past_key_values=out.past_key_values, use_cache=True)
        token_B1 = out.logits[:, -1:].argmax(-1)
    return first - start, (time.perf_counter() - first) / new_tokens


@products.fast()
def train_s(model: PreTrainedModel, ids_BT: torch.Tensor) -> float:
    """Seconds of one update by AdamW, its loss chunked and its products made as in training; the model is left as it was."""
    from .train.learner import Learner
    from .train.optim import adamw

    learner = Learner(model.train())
    optimizer = adamw(model.named_parameters(), lr=0.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)  # it moves nothing
    times = []
    for _ in range(2):  # the first one makes the moments
        start = time.perf_counter()
        (learner(ids_BT[:, :-1], ids_BT[:, 1:]) / ids_BT[:, 1:].numel()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - start)
    model.eval()
    return times[-1]


def in_turns(runs: Sequence[Callable[[], tuple[float, ...]]], repeats: int) -> list[list[tuple[float, ...]]]:
    """What each run says each time; they take turns, in an order that turns too, after one warm-up each."""
    for run in runs:
        run()
    found: list[list[tuple[float, ...]]] = [[] for _ in runs]
    for i in range(repeats):
        for k in range(len(runs)):
            place = (i + k) % len(runs)
            found[place].append(runs[place]())
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": st.median(values), "least": min(values), "most": max(values)}


def _prompts(source: Source, batch: int, context: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, source.anatomy.shape.vocab_size, (batch, context), generator=generator)


def _cell(
    sources: Sequence[Source], models: Sequence[PreTrainedModel], asked: Asked, threads: int, batch: int, context: int
) -> list[dict[str, Any]]:
    prompts = [_prompts(source, batch, context) for source in sources]
    runs = [partial(generate_s, model, ids, asked.new_tokens) for model, ids in zip(models, prompts, strict=True)]
    with on_threads(threads):
        generated = in_turns(runs, asked.repeats)
        updates = [partial(_alone, train_s, model, ids) for model, ids in zip(models, prompts, strict=True)]
        trained = in_turns(updates, asked.repeats) if asked.train else [[] for _ in models]
    rows = []
    for times, steps in zip(generated, trained, strict=True):
        first, each = (spread([1000 * t[k] for t in times]) for k in (0, 1))
        row: dict[str, Any] = {
            "threads": threads, "batch": batch, "context": context,
            "first_token_ms": first, "decode_ms": each,
            "prefill_tokens_per_s": 1000 * batch * context / first["median"],
            "decode_tokens_per_s": 1000 * batch / each["median"],
        }  # fmt: skip
        rows.append(row | ({"update_ms": spread([1000 * t[0] for t in steps])} if asked.train else {}))
    return rows


def _alone(run: Callable[..., float], *arguments: Any) -> tuple[float]:
    return (run(*arguments),)


# -- memory ---------------------------------------------------------------------------------------------------------------


def _peak(told: Connection, path: str, dtype: str, batch: int, context: int, new_tokens: int) -> None:
    """In a process of its own: bytes at its peak, before the model is read and when it has written."""
    import warnings

    offline(online=False)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    before = _high_water()
    source = Source.open(path, quantized=True)
    generate_s(source.load(dtype), _prompts(source, batch, context), new_tokens)
    told.send((before, _high_water()))


def _high_water() -> int:
    """The most bytes that this program has held. getrusage also counts, on Linux, those of the process that started it."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
    except (OSError, StopIteration):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_bytes(path: str, dtype: str, batch: int, context: int, new_tokens: int) -> dict[str, int] | None:
    """Peak memory of a process that loads the model and generates, and of it what libraries take; None where it died."""
    mine, theirs = multiprocessing.Pipe(duplex=False)
    arguments = (theirs, path, dtype, batch, context, new_tokens)
    process = multiprocessing.get_context("spawn").Process(target=_peak, args=arguments)
    process.start()
    theirs.close()
    try:
        before, peak = mine.recv()
    except EOFError:
        return None
    finally:
        process.join()
    return {"peak_bytes": peak, "libraries_bytes": before, "batch": batch, "context": context}


# -- the whole ------------------------------------------------------------------------------------------------------------


def run(
    paths: Sequence[str], asked: Asked, *, progress: Progress = no_progress, record: Path | None = None
) -> dict[str, Any]:
    """Counts, times and memory of models side by side; `record` appends one run record a model."""
    offline(online=False)
    if record is not None:
        records.check_place(record)
    sources = [Source.open(path, quantized=True) for path in paths]
    asked.checked(sources)
    for source in sources:
        source.anatomy.checked()
        source.check_dtype(asked.dtype)
    models = [source.load(asked.dtype) for source in sources]
    rows: list[dict[str, Any]] = []
    names = told_apart([source.label for source in sources])
    for name, source, model in zip(names, sources, models, strict=True):
        row: dict[str, Any] = {"model": name, "weights_sha256": source.sha256}
        row |= counted(source, asked.dtype, max(asked.contexts))
        row["widths"] = [vars(found) for found in measure.slow_widths(source.anatomy.shape, DTYPES[asked.dtype])]
        rows.append(row | {"zeros": None if source.is_quantized else zeros(model, source.anatomy), "cells": []})
    cells = [(t, b, c) for t in asked.threads for b in asked.batches for c in asked.contexts]
    for i, (threads, batch, context) in enumerate(cells):
        for row, cell in zip(rows, _cell(sources, models, asked, threads, batch, context), strict=True):
            row["cells"].append(cell)
        progress("time", i + 1, len(cells))
    models.clear()
    for i, (path, row) in enumerate(zip(paths, rows, strict=True)):
        row["memory"] = peak_bytes(path, asked.dtype, max(asked.batches), max(asked.contexts), asked.new_tokens)
        progress("memory", i + 1, len(paths))
    out = {"dtype": asked.dtype, "machine": records.machine(), "gemm_flops_per_s": measure.plain_gemm_rate(), "models": rows}
    for row in rows if record is not None else ():
        recipe = {"command": "measure", "model": row["model"], "weights_sha256": row["weights_sha256"], **vars(asked)}
        records.append(record, "measure", recipe, row | {"beside": [other["model"] for other in rows]})  # type: ignore[arg-type]
    return out | {"notes": _notes(rows)}


def _notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What figures alone would not say."""
    out = []
    for row in rows:
        if found := row["zeros"]:
            out.append(
                f"{row['model']}: {found['share']:.0%} of its block matrices are zeros, which bring no speed here: dense products "
                f"multiply them too; packed (xz) a sample of its bfloat16 matrices takes {found['packed_share']:.0%} of their bytes"
            )
        out += [
            f"{row['model']}: {width['name']} {width['size']} is slow here: a product as wide as {width['better']} takes "
            f"{width['ratio']:.0%} of its time; --multiple-of auto cuts to widths that are not"
            for width in row["widths"]
            if width["better"] is not None
        ]
    return out
