"""Files out, all of them or none: written beside their places first; and one process a folder."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import hashlib
import os
import re
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import UserError

# Of some network file systems: there one process a folder is the user's care.
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
_ASKING = (signal.SIGINT, signal.SIGTERM)
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of linux/fcntl.h and linux/fs.h


@contextmanager
def staged_files(*paths: Path) -> Iterator[list[Path]]:
    """Temporary names beside `paths`, which take their places when the block ends well, and vanish when it does not.

    The first comes last: where it stands, all do.
    """
    stages = [beside(path) for path in paths]
    try:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            clear_left(path)
        yield stages
        with unbroken():
            for stage, path in reversed([*zip(stages, paths, strict=True)]):
                make_readable(stage)
                stage.replace(path)
    except OSError as error:
        why = error.strerror or f"{error}; is there room?"  # numpy's own words have no number
        raise UserError(f"{error.filename or paths[0]}: cannot be written: {why}") from error
    finally:
        for stage in stages:
            if stage.exists():
                stage.unlink()


def make_readable(file: Path) -> None:
    """Some writers make files private; they are to be as readable as whatever is made with the user's own mask."""
    mask = os.umask(0)
    os.umask(mask)
    file.chmod(file.stat().st_mode | (0o666 & ~mask))


@contextmanager
def unbroken() -> Iterator[None]:
    """What is asked by Ctrl-C or SIGTERM meanwhile is done afterwards. For moments."""
    before = {signum: signal.getsignal(signum) for signum in _ASKING}
    if threading.current_thread() is not threading.main_thread() or None in before.values():
        yield  # no handler runs here, or a host program's own, which could not be put back
        return
    asked: list[int] = []
    for signum in _ASKING:
        signal.signal(signum, lambda signum, frame: asked.append(signum))
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        if asked:
            os.kill(os.getpid(), asked[0])


def beside(path: Path, kind: str = "partial") -> Path:
    """This process's own name beside `path`; it tells machine and process, so that what a killed one left can be removed."""
    return path.with_name(f".{path.stem}.{kind}-{_machine()}-{os.getpid()}{path.suffix}")


@contextmanager
def in_turn(path: Path) -> Iterator[None]:
    """Only while nobody else is in such a block of `path`, which is not touched; others wait. They need a disk that locks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("a") as lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _machine() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


@contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """A folder beside `path` for what becomes that file; it goes when the block ends, or, if the process is killed, at the next."""
    clear_left(path)
    folder = beside(path)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def clear_left(path: Path) -> None:
    """Remove what killed processes of this machine left beside `path`, or put it back if it stood there. Others may be at work."""
    name = f".{path.stem}.", f"-{_machine()}-"
    ours = re.compile(rf"{re.escape(name[0])}(partial|replaced){name[1]}(\d+){re.escape(path.suffix)}(-journal)?")
    for left in path.parent.glob(f"{glob.escape(name[0])}*{name[1]}*"):
        found = ours.fullmatch(left.name)
        if found is None or _is_another(int(found[2])):
            continue
        if found[1] == "replaced" and not path.exists():
            left.rename(path)
        elif left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _is_another(process: int) -> bool:
    """Whether a process of that number is at work, and is not this one."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    with suppress(OSError):  # one that has ended keeps its number until its parent asks how; in containers that may be never
        if Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0] in "ZX":
            return False
    return process != os.getpid()


def swap(stage: Path, out: Path) -> None:
    """Put the folder `stage` in the place of `out`; what was there is removed only once the new folder stands."""
    old = beside(out, "replaced")
    try:
        if out.exists():
            if exchange(stage, out):  # `stage`, now what was there, goes as it would have gone
                return
            out.rename(old)
        try:
            stage.rename(out)
        except BaseException:
            if old.exists():
                old.rename(out)
            raise
    except OSError as error:
        raise UserError(f"{out}: cannot be put in place: {error.strerror or error}") from error
    shutil.rmtree(old, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Whether the two have changed places, at no moment with nothing there; not every system and disk can."""
    call = getattr(ctypes.CDLL(None), "renameat2", None)
    return call is not None and call(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0


def check_files(*paths: Path, overwrite: bool) -> None:
    """UserError, before any work, if a file is there already, or its folder is not."""
    for path in paths:
        if path.is_dir():
            raise UserError(f"{path} is a folder; give the name of a file")
        if path.exists() and not overwrite:
            raise UserError(f"{path} already exists; use --overwrite, or another name")
        if not path.absolute().parent.is_dir():
            raise UserError(f"{path.absolute().parent}: no such folder to write a file in")


def check_own(out: Path) -> None:
    """UserError for links in a folder that is gone on with: what is appended, cut back or removed there would be elsewhere."""
    for path in (*out.iterdir(), *out.glob("checkpoints/*"), *out.glob("logs/*")):
        if path.is_symlink():
            raise UserError(
                f"{path}: is a link, and what is written there would land elsewhere; put in its place what it leads to, or give "
                "another --out"
            )


@contextmanager
def locked(out: Path, *, mark: bool = True) -> Iterator[None]:
    """One process a folder, which is made if need be; UserError for the second. A folder that stays empty goes again.

    The lock is a file in it, or without a `mark` the folder itself, which some network file systems cannot lock.
    """
    found, lock = out.exists(), out / ".lock" if mark else out
    try:
        out.mkdir(parents=True, exist_ok=True)
        check_own(out)
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW if mark else os.O_RDONLY, 0o666)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror or error}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{out}: another process is at work there; wait for it, or give another --out") from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise UserError(f"{out}: cannot be locked: {error.strerror or error}") from error
        try:
            yield
        finally:
            if not found and out.is_dir() and all(path == lock for path in out.iterdir()):
                if mark:
                    lock.unlink()
                out.rmdir()
    finally:
        os.close(handle)
