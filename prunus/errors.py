"""The errors a user can meet. Each message is one sentence: what, where, the value, and the mend."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable

_LONGEST = 1600  # characters of a message; more of it are of a hostile name


class UserError(ValueError):
    """A wrong input. The command line prints the message alone and exits with code 2."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class VerificationError(RuntimeError):
    """A saved checkpoint does not behave like the model it was saved from. Exit code 3; nothing is left behind."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """Text that stays on its line, is not endless, and tells a terminal nothing: names in it may be another's choice."""
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 4 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def nearest(word: str, known: Iterable[str]) -> str:
    """`" (did you mean 'flap'?)"` when a known name is close to `word`, else an empty string."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{match[0]}'?)" if match else ""


def unknown(kind: str, word: str, known: Iterable[str], remedy: str = "") -> UserError:
    """The error for a name that is not in a table: nearest known name first, then the whole list."""
    names = sorted(known)
    tail = f"; {remedy}" if remedy else ""
    return UserError(f"unknown {kind} '{word}'{nearest(word, names)}: known are {', '.join(names)}{tail}")


_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
_NAMES = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR)  # names of files that the system does not take
_MEMORY = ("allocate memory", "out of memory", "unable to mmap")  # as torch, CUDA and safetensors say it
_LOWER = {  # what takes the memory, by command
    "eval": "lower --seq-len, or use --dtype bfloat16",
    "train": "lower micro_batch or data.seq_len, set checkpoint_activations, or start more processes with torchrun",
    "teach": "lower micro_batch or data.seq_len",
    "tune": "lower micro_batch",
    "data": "lower --processes",
    "study": "lower --processes, or micro_batch in the recipes",
    "export": "end other programs, or write a smaller --type",
}


def lacking(error: Exception, command: str = "") -> tuple[str, int] | None:
    """Sentence and exit code for a machine without room, rights, memory or such names for a command; None for another error."""
    if isinstance(error, OSError) and error.errno in _DISK:
        where = error.filename or "a file cannot be written or read"
        return f"{where}: {error.strerror}; mend that, and run the same command again", 2
    if isinstance(error, OSError) and error.errno in _NAMES:
        return one_line(f"{error.filename}: {error.strerror}; give another name"), 2
    memory = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    if not memory and not any(word in str(error) for word in _MEMORY):
        return None
    return f"out of memory: {_LOWER.get(command, 'lower --windows, --seq-len or --batch-size, or use --dtype bfloat16')}", 1
