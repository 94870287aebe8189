"""`prunus teach`: asks a recipe's teacher about every token that the run will read, and writes down what it says.

Written shard by shard, each with the manifest that names it: killed anywhere, the same command goes on behind the last shard. So
does the same recipe with a larger budget, since a longer run begins with the same sequences.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import products, record
from ..checkpoint import standing
from ..data.tokenizer import fingerprint
from ..errors import UserError
from ..headers import sha256
from ..place import locked, staged_files
from .cache import LOGS, MANIFEST, Manifest, Remembered, Shard, bytes_of, files, wanted
from .learner import Learner, Taught, Teacher, boundaries
from .loss import CHUNK
from .opening import Run, opened
from .recipe import Recipe

SHARD_BYTES = 1 << 26  # of ids and logs together: what a kill costs, and what is in memory beside the teacher


@dataclass(frozen=True)
class Teaching:
    """A teacher's lesson, checked, with nothing of it read yet. `manifest` has the shards that are there already."""

    run: Run
    out: Path
    manifest: Manifest
    sequences: int

    @property
    def left(self) -> int:
        """Sequences that are not written yet."""
        return max(0, self.sequences - self.manifest.sequences)

    @property
    def bytes(self) -> int:
        """Of those sequences on disk."""
        return self._bytes(self.left)

    def _bytes(self, sequences: int) -> int:
        return bytes_of(sequences * self.manifest.seq_len, self.manifest.top_k, self.manifest.vocab_size)

    def describe(self) -> dict[str, Any]:
        """Disk and cost, as plain data."""
        known = self.manifest
        return {
            "out": str(self.out),
            "teacher": known.teacher,
            "tokens": self.sequences * known.seq_len,
            "tokens_left": self.left * known.seq_len,
            "top_k": known.top_k,
            "bytes_per_token": bytes_of(1, known.top_k, known.vocab_size),
            "bytes": self._bytes(self.sequences),
            "bytes_left": self.bytes,
            "bytes_free": shutil.disk_usage(standing(self.out)).free,
            "flops_left": known.flops_per_sequence * self.left,
        }


def prepare(recipe: Recipe, out: Path | None = None, *, online: bool = False) -> Teaching:
    """Check recipe, folder and disk; UserError otherwise. Hashes the teacher's weights, and loads none."""
    part = recipe.teacher
    if part is None or part.source is None or part.top_k is None:
        lacking = "teacher.source" if part is None or part.source is None else "teacher.top_k"
        raise UserError(f"{recipe.name}: the recipe has no {lacking}, so there is nothing to write down; give it with --set")
    if recipe.data.mixing is not None:
        raise UserError(
            "data.mixing: the order of the data is settled while the run goes, so no teacher can be asked before; drop it, or "
            "teach on-line without teacher.cache"
        )
    if out is None and part.cache is None:
        raise UserError("--out: where to? give it, or teacher.cache in the recipe")
    out = Path(out or part.cache or "").expanduser()
    run = opened(recipe.model_copy(update={"teacher": part.model_copy(update={"cache": None})}), out, online=online)
    assert run.teacher is not None
    seq_len = recipe.data.seq_len
    manifest = Manifest(
        teacher=run.teacher.label,
        teacher_sha256=run.teacher.sha256,
        precision=recipe.precision,
        flops_per_sequence=run.teacher.anatomy.flops(seq_len),
        **wanted(recipe, run.feeds, fingerprint(run.tokenizer), run.anatomy.shape.vocab_size),
        versions=record.versions(),
    )
    if (out / MANIFEST).is_file():
        there = Manifest.read(out)
        if name := there.differing(manifest):
            raise UserError(
                f"{out}: was written for something else ({name} differs); give another --out, or the same recipe"
            )
        there.check_files(out, whole=True)
        manifest = there
    elif out.exists() and (not out.is_dir() or any(not path.name.startswith(".") for path in out.iterdir())):
        raise UserError(f"{out}: is there already and holds nothing that prunus teach wrote; give another --out")
    made = Teaching(run, out, manifest, recipe.steps * recipe.sequences)
    free = shutil.disk_usage(standing(out)).free
    if made.bytes > free:
        raise UserError(
            f"{out}: needs {made.bytes / 1e6:,.1f} MB, but {free / 1e6:,.1f} MB are free there; lower tokens or teacher.top_k"
        )
    return made


@products.fast()
def write(teaching: Teaching, progress: Callable[[str, int, int], None] = lambda stage, done, total: None) -> Manifest:
    """Write what is not written yet; returns the manifest of all."""
    run, out, manifest = teaching.run, teaching.out, teaching.manifest
    if not teaching.left:
        return manifest
    with locked(out):
        for path in out.glob(".*.partial-*"):  # of a process that was killed
            path.unlink()
        manifest.write(out)  # whose folder it is, before the first shard is whole
        teacher, size = taught(run), max(1, SHARD_BYTES // teaching._bytes(1))
        assert teacher is not None
        while manifest.sequences < teaching.sequences:
            first, number = manifest.sequences, len(manifest.shards)
            count = min(size, teaching.sequences - first)
            shape = (count, manifest.seq_len, manifest.top_k)
            arrays = np.empty(shape, manifest.ids_dtype), np.empty(shape, LOGS)
            for start in range(0, count, run.recipe.micro_batch):
                part = slice(start, min(count, start + run.recipe.micro_batch))
                _ask(run, teacher, first + start, [array[part].reshape(-1, manifest.top_k) for array in arrays])
                progress("teach", first + part.stop, teaching.sequences)
            with staged_files(*files(out, number)) as stages:
                for stage, array in zip(stages, arrays, strict=True):
                    _save(stage, array)
                hashes = [sha256([stage]) for stage in stages]
            shard = Shard(sequences=count, ids_sha256=hashes[0], logs_sha256=hashes[1])
            manifest = manifest.model_copy(update={"shards": [*manifest.shards, shard]})
            manifest.write(out)
    return manifest


def taught(run: Run) -> Taught | None:
    """A run's teacher at its start: none, what one said when a cache was written, or one whose weights are read here."""
    part, precision = run.recipe.teacher, run.recipe.precision
    if part is None or part.snapshot:
        return None
    if run.cache is not None:
        return Remembered(run.cache, part.mix)
    assert run.teacher is not None
    model = run.teacher.load("bfloat16" if precision == "bfloat16" else "float32")
    return Teacher(Learner(model, precision=precision), part.mix, part.temperature, part.top_k)


def _ask(run: Run, teacher: Taught, position: int, into: list[np.ndarray]) -> None:
    """Changes the arrays of `into` [N, top_k], views of a shard: likeliest tokens and log-probabilities from `position` on."""
    ids, logs = into
    batch = run.feeds.training.take(position, len(ids) // run.recipe.data.seq_len)
    apart = boundaries(run.feeds.starts(batch)) if run.recipe.data.separate_documents else {}
    mix = teacher(batch.ids[:, :-1], **apart)
    for start in range(0, len(ids), CHUNK):
        part = slice(start, start + CHUNK)
        found: Any = mix.teacher(part)
        ids[part] = found.ids.numpy()
        # Below float16's range a probability is 0 in every type; -inf there would make 0 times infinity of it.
        logs[part] = found.logs.clamp_min(torch.finfo(torch.float16).min).numpy()


def _save(path: Path, array: np.ndarray) -> None:
    """On the disk before its name stands in a manifest."""
    with path.open("wb") as file:
        np.save(file, array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
