"""A trained model as a Hugging Face folder, from weights that may be shared out over processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import checkpoint, hf, tensorfiles
from ..distributed import World
from ..errors import UserError
from ..verification import check_saved, probe
from .learner import Learner

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def export(
    learner: Learner, weights: Mapping[str, Tensor], tokenizer: PreTrainedTokenizerBase, out: Path, world: World
) -> dict[str, Any]:
    """Write the folder and load it in a clean process; returns what was compared. All processes call it, the first writes.

    `weights` are the model's parameters by name. No process ever holds them all, if they are shared out: a parameter at a time
    comes to the first, and goes to the file.
    """
    expected = learner.read(probe)
    verified: dict[str, Any] = {}
    with _staged(out, world) as stage:
        if stage is None:
            assert not list(world.to_first(weights)), "parts are sent, none comes"
        else:
            save = partial(_save, weights=weights, world=world)
            checkpoint.write_folder(learner.model, tokenizer, stage, save)
            verified = check_saved(stage, expected)
    return world.agree(verified)


def _save(model: PreTrainedModel, stage: Path, *, weights: Mapping[str, Tensor], world: World) -> None:
    if world.alone:
        model.save_pretrained(stage)
        return
    model.save_pretrained(stage, state_dict={})  # all but the weights
    names = hf.names_in_files(model.config)
    specs = {names.get(name, name): (t.dtype, tuple(t.shape)) for name, t in weights.items()}
    path = stage / "model.safetensors"
    try:
        tensorfiles.write(path, specs, ((names.get(name, name), t) for name, t in world.to_first(weights)))
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


@contextmanager
def _staged(out: Path, world: World) -> Iterator[Path | None]:
    """Where the first process writes; None for the others."""
    if not world.first:
        yield None
        return
    with checkpoint.staged(out, overwrite=True) as stage:
        yield stage
