"""Files out, all of them or none: written beside their places first; and one process a folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError


@contextmanager
def staged_files(*paths: Path) -> Iterator[list[Path]]:
    """Temporary names beside `paths`, which take their places when the block ends well, and vanish when it does not."""
    stages = [path.with_name(f".{path.stem}.partial-{os.getpid()}{path.suffix}") for path in paths]
    try:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
        yield stages
        for stage, path in zip(stages, paths, strict=True):
            stage.replace(path)
    except OSError as error:
        raise UserError(f"{error.filename or paths[0]}: cannot be written: {error.strerror or error}") from error
    finally:
        for stage in stages:
            if stage.exists():
                stage.unlink()


def check_files(*paths: Path, overwrite: bool) -> None:
    """UserError, before any work, if a file is there already, or its folder is not."""
    for path in paths:
        if path.is_dir():
            raise UserError(f"{path} is a folder; give the name of a file")
        if path.exists() and not overwrite:
            raise UserError(f"{path} already exists; use --overwrite, or another name")
        if not path.absolute().parent.is_dir():
            raise UserError(f"{path.absolute().parent}: no such folder to write a file in")


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """One process a folder, which is made if need be; UserError for the second."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / ".lock").open("a")
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror or error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{out}: another process is at work there; wait for it, or give another --out") from error
        yield
