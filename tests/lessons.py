"""What a teacher said of a tiny run, for tests. Made once, never changed."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import pipeline
import torch
from training import asked, tiny_shape

from prunus.train import teaching
from prunus.train.cache import Manifest

K = 8
NUMBERS = 8 * 4  # sequences that the tiny run reads


def taught_by(cache: Path | str | None = None, **changes):
    """The tiny run with a teacher, a small student, no validation; `teacher__x` changes the teacher."""
    base = {"teacher": {"source": str(pipeline.folder()), "mix": 0.7, "temperature": 2.0, "top_k": K}}
    base |= {"model__shape": tiny_shape(intermediate_size=8), "validate__every": 0}
    made = {**base, **changes}
    if cache is not None:
        made["teacher"] = made["teacher"] | {"cache": str(cache)}
    return asked(**made)


def teach(out: Path, recipe=None, **more) -> Manifest:
    return teaching.write(teaching.prepare(recipe or taught_by(), out), **more)


@functools.cache
def another_teacher() -> Path:
    import checkpoints

    made = pipeline.model("llama", dtype=torch.float32, seed=1)
    return checkpoints.save_folder(pipeline.scratch() / "another-teacher", made, pipeline.tokenizer())


@functools.cache
def written() -> Path:
    out = pipeline.scratch() / "what-the-teacher-says"
    teach(out)
    return out


def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(written(), tmp_path / "cache"))
