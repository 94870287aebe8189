"""Documents to token ids, in this process or in others: the part of `prepare` that takes the time."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_HASH_BYTES = 8


@dataclass(frozen=True)
class Coding:
    """How documents become tokens and where they belong; small, so that it travels to other processes."""

    tokenizer: Path  # tokenizer.json
    fingerprint: str  # of that file's tokenizer: another one may have lain in its place before
    eos_token_id: int
    dtype: str
    limits: tuple[int, ...]  # range i takes the hashes below limits[i] that no range before it took


@dataclass(frozen=True)
class Encoded:
    """Some documents in their order: all ids in one array, and per document length, range and UTF-8 bytes."""

    ids: np.ndarray
    lengths: np.ndarray  # 0: there was no text
    ranges: np.ndarray
    text_bytes: np.ndarray


def limits(shares: list[float]) -> tuple[int, ...]:
    """Upper ends of the ranges among 64-bit hashes; the last one takes all the rest."""
    ends = np.cumsum(shares)
    return (*(int(end * 2**64) for end in ends[:-1].tolist()), 2**64)


def document_hash(text: str) -> int:
    """64 bits of the text, spaces and line breaks all alike: copies of a document get the same number."""
    digest = hashlib.blake2b(" ".join(text.split()).encode(), digest_size=_HASH_BYTES).digest()
    return int.from_bytes(digest, "little")


def encode(coding: Coding, documents: list[str]) -> Encoded:
    """Ids of every document, with the end-of-text token behind it; one that is empty or only blanks gets none."""
    tokenizer = _tokenizer(coding.tokenizer, coding.fingerprint)
    pieces: list[np.ndarray] = []
    lengths, ranges, text_bytes = (np.zeros(len(documents), np.int64) for _ in range(3))
    for i, text in enumerate(documents):
        if not text.strip():
            continue
        # one at a time: a batch would be spread over all cores by the library, whatever number of processes was asked for
        ids = tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        if not ids:
            continue
        pieces.append(np.array([*ids, coding.eos_token_id], coding.dtype))
        lengths[i] = len(ids) + 1
        hashed = document_hash(text)
        ranges[i] = next(r for r, limit in enumerate(coding.limits) if hashed < limit)
        text_bytes[i] = len(text.encode())
    return Encoded(np.concatenate(pieces) if pieces else np.empty(0, coding.dtype), lengths, ranges, text_bytes)


@functools.cache
def _tokenizer(path: Path, fingerprint: str) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # text that spells <|endoftext|> is text: only prepare itself may end a document
    tokenizer.encode_special_tokens = True
    return tokenizer


def die_with_parent() -> None:
    """Run first in every worker: ends it when the process that started it is killed, and leaves Ctrl-C to that one."""
    import multiprocessing
    import os
    import signal
    import threading

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:

        def watch() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()
