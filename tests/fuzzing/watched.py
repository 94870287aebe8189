"""Runs inputs of a kind in a child process, with limits of time and memory, and an eye on what it writes, calls and unpickles."""

from __future__ import annotations

import faulthandler
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from .mutations import mutate_

MEMORY = 2 << 30  # bytes more than the process had when it began
PLACE = "specimen"  # name of the folder of every input: what a refusal must name
_EACH = 1500  # inputs of one child: what libraries keep must not look like an input's own
_WRITES = {  # event -> its paths, each with the folder's handle that it is relative to, where the event tells one
    "os.mkdir": ((0, 2),), "os.remove": ((0, 1),), "os.rename": ((0, 2), (1, 3)), "os.rmdir": ((0, 1),), "os.symlink": ((1, 2),),
    "os.link": ((1, 3),), "os.truncate": ((0, None),), "os.chmod": ((0, 2),), "os.chown": ((0, 3),), "os.utime": ((0, 3),),
    "shutil.rmtree": ((0, 1),), "shutil.copyfile": ((1, None),), "shutil.move": ((1, None),), "sqlite3.connect": ((0, None),),
    "tempfile.mkstemp": ((0, None),), "tempfile.mkdtemp": ((0, None),),
}  # fmt: skip
_MEMORY_DISK = Path("/dev/shm")  # where there is one: inputs are made and removed three times as fast
_NEVER = ("socket.connect", "socket.getaddrinfo", "socket.bind", "pickle.find_class", "os.system")


_TOO_MUCH = (
    "allocate memory",
    "out of memory",
    "not enough memory",
    "Unable to allocate",
)  # refused by the limit, not by us


class WrongError(Exception):
    """What was promised of bad input does not hold."""


@dataclass(frozen=True)
class Kind:
    """One kind of input: files that are changed, and what reads them.

    `enter` gets the folder and the seed's generator; a refusal is a `UserError`, which `refusal` looks at.
    """

    name: str
    make: Callable[[], Path]  # a folder with whole files
    files: tuple[str, ...]  # of them, those that are changed; patterns, too
    enter: Callable[[Path, Random], None]
    weight: float = 1.0  # of all inputs
    place: str = PLACE  # what a refusal must name; of command lines the sentence alone does


@dataclass
class Tally:
    """What came of inputs."""

    tried: int = 0
    taken: int = 0
    refused: int = 0
    seconds: float = 0.0
    cpu_s: float = 0.0  # of the children; on a busy machine `seconds` are others' too
    failures: dict[int, str] = field(default_factory=dict)  # number -> why


def refusal(message: str, place: str) -> None:
    """WrongError for a refusal that is not one sentence with the place."""
    if any(word in message for word in _TOO_MUCH):
        raise WrongError(f"more memory is asked for than there is: {message[:300]!r}")
    if "\n" in message or not message.strip() or len(message) > 2000:
        raise WrongError(f"the refusal is not one sentence: {message[:300]!r} ({len(message)} characters)")
    if place not in message:
        raise WrongError(f"the refusal does not say where: {message[:300]!r}")


def run(kind: Kind, numbers: Iterable[int], seed: int, *, limit_s: float = 20.0, tally: Tally | None = None) -> Tally:
    """Every input of `numbers`; each depends on kind, seed and number alone."""
    tally = Tally() if tally is None else tally
    left, started, spent = list(numbers), time.monotonic(), _cpu()
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=_MEMORY_DISK if _MEMORY_DISK.is_dir() else None) as work:
        base = shutil.copytree(kind.make(), Path(work) / "base")
        while left:
            done = _child(kind, base, Path(work), left[:_EACH], seed, limit_s, tally)
            left = left[done:]
    tally.seconds += time.monotonic() - started
    tally.cpu_s += _cpu() - spent
    return tally


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _child(kind: Kind, base: Path, work: Path, numbers: list[int], seed: int, limit_s: float, tally: Tally) -> int:
    """One child that goes through inputs until it dies; how many it went through."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        _work(kind, base, work, numbers, seed, limit_s, writer)  # never returns
    os.close(writer)
    done = 0
    with os.fdopen(reader, encoding="utf-8", errors="replace") as told:
        for line in told:
            what, _, why = line.rstrip("\n").partition(" ")
            if what == "taken":
                tally.taken += 1
            elif what == "refused":
                tally.refused += 1
            else:
                tally.failures[numbers[done]] = why
            tally.tried, done = tally.tried + 1, done + 1
    _, status = os.waitpid(child, 0)
    if done < len(numbers):
        code = os.waitstatus_to_exitcode(status)
        tally.failures[numbers[done]] = f"hangs for {limit_s:g} s, or the process ends with code {code}"
        tally.tried, done = tally.tried + 1, done + 1
    shutil.rmtree(work / "run", ignore_errors=True)
    return done


def _work(kind: Kind, base: Path, work: Path, numbers: list[int], seed: int, limit_s: float, writer: int) -> None:
    try:
        log = os.open(work / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdin = open(os.devnull)  # noqa: SIM115
        watch = Watch(work / "run")
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for number in numbers:
            os.write(writer, (one(kind, base, work / "run", number, seed, limit_s, watch) + "\n").encode("utf-8", "replace"))
        os._exit(0)
    finally:
        os._exit(70)


def specimen(kind: Kind, base: Path, folder: Path, number: int, seed: int) -> tuple[Path, Random]:
    """Makes the input of a number; its folder, and the generator that made it."""
    rng = Random(f"{seed} {kind.name} {number}")
    place = folder / PLACE
    shutil.copytree(base, place, copy_function=os.link)
    found = [path for pattern in kind.files for path in sorted(place.glob(pattern))]
    if found:
        mutate_(found, rng)
    return place, rng


def one(kind: Kind, base: Path, folder: Path, number: int, seed: int, limit_s: float, watch: Watch | None) -> str:
    """`taken`, `refused`, or `failed` and why."""
    from prunus.errors import UserError, VerificationError

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "tmp").mkdir()
    tempfile.tempdir = str(folder / "tmp")
    place, rng = specimen(kind, base, folder, number, seed)
    os.chdir(folder)
    if watch is not None:
        faulthandler.dump_traceback_later(limit_s, exit=True)
        watch.begin(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", ResourceWarning)
            kind.enter(place, rng)
        said = "taken"
    except (UserError, VerificationError) as error:
        said = "refused"
        try:
            refusal(str(error), kind.place)
        except WrongError as wrong:
            said = f"failed {wrong}"
    except BaseException as error:
        at = traceback.extract_tb(error.__traceback__)
        ours = next((f for f in reversed(at) if "/prunus/" in f.filename), at[-1])
        where = f"{Path(ours.filename).name}:{ours.lineno}"
        said = "failed " + " ".join(
            f"{type(error).__name__} at {where} ({Path(at[-1].filename).name}:{at[-1].lineno}): {error}"[:400].split()
        )
    if watch is not None:
        faulthandler.cancel_dump_traceback_later()
        if wrong := watch.end():
            said = f"failed {wrong}"
    return said


class Watch:
    """An audit hook: what is written outside the input's own folder, sockets, pickles and shells are told of."""

    def __init__(self, allowed: Path) -> None:
        self.allowed, self.on, self.found = str(allowed), False, ""
        self.caches = sys.dont_write_bytecode
        sys.addaudithook(self._hook)

    def begin(self, allowed: Path) -> None:
        self.allowed, self.on, self.found = str(allowed), True, ""
        self.caches, sys.dont_write_bytecode = (
            sys.dont_write_bytecode,
            True,
        )  # what Python writes beside its sources is not ours

    def end(self) -> str:
        self.on, sys.dont_write_bytecode = False, self.caches
        return self.found

    def _hook(self, event: str, args: tuple[object, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            path, _, flags = args
            wants = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
            if isinstance(path, str | bytes) and isinstance(flags, int) and flags & wants:
                self._wrote(path, event)
        elif event in _NEVER:
            self.found = self.found or f"{event} was called: {args!r}"[:300]
        elif event in _WRITES:
            for i, at in _WRITES[event]:
                handle = args[at] if at is not None and len(args) > at else -1
                if isinstance(args[i], str | bytes | os.PathLike):
                    path = os.fsdecode(os.fspath(args[i]))  # type: ignore[arg-type]
                    if isinstance(handle, int) and handle >= 0:
                        path = f"/proc/self/fd/{handle}/{path}"
                    self._wrote(path, event)

    def _wrote(self, path: str | bytes, event: str) -> None:
        path = os.path.realpath(os.fsdecode(path))
        if path != os.devnull and path != self.allowed and not path.startswith(self.allowed + os.sep):
            self.found = self.found or f"writes outside its folder ({event}): {path}"[:300]
