"""Training checkpoints: weights and moments as safetensors by PyTorch's distributed checkpoint, all else as JSON.

A checkpoint is a folder that appears whole: it is written under another name, its files' checksums are put into its
`state.json` last, and it is renamed. Another number of processes can go on from it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from ..distributed import ALONE, World
from ..errors import UserError
from ..reading import first_wrong, text_of
from ..sealed import sealed, unsealed

STATE, FORMAT = "state.json", 1
_PREFIX = "step-"
_Count = Annotated[int, Field(ge=0, lt=10**30)]


def folder_of(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint after `step` updates lies."""
    return checkpoints / f"{_PREFIX}{step:08d}"


def steps(checkpoints: Path) -> list[int]:
    """Steps of the whole checkpoints, ascending."""
    if not checkpoints.is_dir():
        return []
    found = (path.name.removeprefix(_PREFIX) for path in checkpoints.iterdir() if (path / STATE).is_file())
    return sorted(int(name) for name in found if name.isdigit())


def write(
    checkpoints: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], world: World = ALONE
) -> Path:
    """Write one checkpoint; what is there under that step is replaced. Nothing half-written is ever taken for whole.

    Every process writes its own parts; the first makes the folder before, and completes it after.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.api import CheckpointException

    target = folder_of(checkpoints, step)
    stage = world.agree(target.with_name(f".{target.name}.partial-{os.getpid()}"))
    try:
        if world.first:
            clear_partial(checkpoints)
            stage.mkdir(parents=True)
        world.barrier()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            writer = HuggingFaceStorageWriter(str(stage), save_distributed=True)
            dcp.save(dict(tensors), storage_writer=writer, no_dist=world.alone)
        if world.first:
            files = {path.name: _sha256(path) for path in sorted(stage.glob("*.safetensors"))}
            (stage / STATE).write_text(sealed({"format": FORMAT, **state, "files": files}), encoding="utf-8")
            _to_disk(stage)
            _remove(target)
            stage.rename(target)
        world.barrier()
    except (OSError, CheckpointException) as error:
        first = error if isinstance(error, OSError) else next(iter(error.failures.values()))[0]
        if not isinstance(first, OSError | SafetensorError):
            raise
        why = getattr(first, "strerror", None) or first
        raise UserError(
            f"{target}: the checkpoint cannot be written: {why}; mend that, and the same command goes on from the one before"
        ) from error
    finally:
        if world.first:
            shutil.rmtree(stage, ignore_errors=True)
    return target


def clear_partial(checkpoints: Path) -> None:
    """Remove what a killed process left half-written, or half-removed."""
    for path in checkpoints.glob(f".{_PREFIX}*.partial-*") if checkpoints.is_dir() else ():
        shutil.rmtree(path, ignore_errors=True)


def _remove(folder: Path) -> None:
    """A checkpoint goes as it comes, whole: by its name first, so that a killed process leaves nothing that looks like one."""
    if folder.exists():
        gone = folder.with_name(f".{folder.name}.partial-gone")
        folder.rename(gone)
        shutil.rmtree(gone)


def _to_disk(folder: Path) -> None:
    """A rename is only worth something if what it shows is on the disk."""
    for path in [*folder.iterdir(), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class State(BaseModel):
    """`state.json`, but for what the pruner and the mixer say of themselves."""

    model_config = ConfigDict(strict=True)
    format: int
    recipe: str
    step: _Count
    tokens: _Count
    updates: _Count
    skipped: _Count
    usual: float | None
    best: dict[str, Any]
    seconds: float
    flops: _Count
    pruning: dict[str, Any] | None
    mixing: dict[str, Any] | None
    rng: Annotated[str, Field(pattern="^([0-9a-f]{2})+$")]
    files: dict[Annotated[str, Field(pattern=r"^[\w-][\w.-]*$")], str]  # of this folder


def read_state(folder: Path) -> dict[str, Any]:
    """`state.json`; UserError if it is not what we write."""
    path = folder / STATE
    mend = "delete the folder to go on from the one before"
    state = unsealed(text_of(path, mend), str(path), mend)
    if state.get("format") != FORMAT:
        raise UserError(f"{path}: not a checkpoint of format {FORMAT}")
    try:
        State.model_validate(state)
    except ValidationError as error:
        raise UserError(f"{path}: {first_wrong(error)}; {mend}") from error
    return state


def read_(folder: Path, tensors: Mapping[str, Tensor], world: World = ALONE) -> None:
    """Changes `tensors`: filled from the checkpoint. UserError if a part is missing, changed, or of another shape.

    The first process looks at the files; then each reads what it needs, of whichever process wrote it.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    if world.first:
        _check_files(folder)
    world.barrier()
    reader = HuggingFaceStorageReader(str(folder))
    entries: dict[str, Any] = reader.read_metadata().state_dict_metadata
    found = {name: tuple(entry.size) for name, entry in entries.items()}
    for name, tensor in tensors.items():
        if found.get(name) != tuple(tensor.shape):
            have = list(found[name]) if name in found else "nothing"
            raise UserError(
                f"{folder}: '{name}' is {have} there, but {list(tensor.shape)} in this run; it is of another model"
            )
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(dict(tensors), storage_reader=reader, no_dist=world.alone)


def _check_files(folder: Path) -> None:
    for name, digest in read_state(folder)["files"].items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{folder}: {name} is missing; delete the folder to go on from the checkpoint before")
        if _sha256(path) != digest:
            raise UserError(f"{path}: changed since it was written; delete the folder to go on from the checkpoint before")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def prune(checkpoints: Path, keep: int, best: int | None) -> None:
    """Remove all but the last `keep` checkpoints and the best."""
    for step in steps(checkpoints)[:-keep]:
        if step != best:
            _remove(folder_of(checkpoints, step))
