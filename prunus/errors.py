"""The errors a user can meet. Each message is one sentence: what, where, the value, and the mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A wrong input. The command line prints the message alone and exits with code 2."""


class VerificationError(RuntimeError):
    """A saved checkpoint does not behave like the model it was saved from. Exit code 3; nothing is left behind."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`" (did you mean 'flap'?)"` when a known name is close to `word`, else an empty string."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{match[0]}'?)" if match else ""


def unknown(kind: str, word: str, known: Iterable[str], remedy: str = "") -> UserError:
    """The error for a name that is not in a table: nearest known name first, then the whole list."""
    names = sorted(known)
    tail = f"; {remedy}" if remedy else ""
    return UserError(f"unknown {kind} '{word}'{nearest(word, names)}: known are {', '.join(names)}{tail}")
