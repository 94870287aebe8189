"""How much of an evaluation text was seen before: the share of its n-grams that occur in other text.

n-grams are compared by 64-bit hashes: among 10^6 of one side and 10^10 of the other, 0.0005 pairs are expected to agree by
accident.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..errors import UserError
from .order import Tokens, mixed

NGRAM = 13  # words or tokens; the length that GPT-3's check made customary
WARN = 0.01  # share from which on a score is in doubt
_CHUNK = 1 << 20
_WORD = re.compile(r"\w+")
_BASE = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Overlap:
    """Of the evaluation's n-grams (each counted as often as it stands there), how many occur in the data."""

    n: int
    ngrams: int
    hits: int
    documents: int
    documents_hit: int  # with at least one

    @property
    def share(self) -> float:
        """hits / ngrams; 0 if the text is too short to have any."""
        return self.hits / self.ngrams if self.ngrams else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the share."""
        return asdict(self) | {"share": self.share}

    def warning(self, what: str, data: str) -> str | None:
        """A sentence for the user if the share is too high to trust a score."""
        if self.share < WARN:
            return None
        return f"{self.share:.1%} of the {self.n}-grams of {what} occur in {data}; scores on it do not measure unseen text"


def text_overlap(evaluation: Iterable[str], data: Iterable[str], *, n: int = NGRAM) -> Overlap:
    """By words, without case and punctuation; n-grams do not reach over the end of a document."""
    return _overlap((words(text) for text in evaluation if text.strip()), (words(text) for text in data), n)


def token_overlap(evaluation: Iterable[np.ndarray], data: Tokens | np.ndarray, *, n: int = NGRAM) -> Overlap:
    """By token ids: windows of an evaluation against prepared data, which is read once, a piece at a time."""
    size = len(data) if isinstance(data, np.ndarray) else data.num_tokens
    pieces = (data[first : min(size, first + _CHUNK + n - 1)] for first in range(0, size, _CHUNK))
    return _overlap((mixed(np.asarray(ids).astype(np.uint64)) for ids in evaluation), map(_of_ids, pieces), n)


def words(text: str) -> np.ndarray:
    """uint64 hash of every word."""
    return np.array([_word(word) for word in _WORD.findall(text.lower())], np.uint64)


@functools.lru_cache(1 << 18)
def _word(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def _of_ids(ids: np.ndarray) -> np.ndarray:
    return mixed(ids.astype(np.uint64))


def ngram_hashes(items: np.ndarray, n: int) -> np.ndarray:
    """uint64 [len - n + 1]: `sum_j item[i + j] * base^(n - 1 - j)` modulo 2^64, mixed once more."""
    count = len(items) - n + 1
    if count < 1:
        return np.empty(0, np.uint64)
    total = np.zeros(count, np.uint64)
    for j in range(n):
        total = total * _BASE + items[j : j + count]
    return mixed(total)


def _overlap(evaluation: Iterable[np.ndarray], data: Iterable[np.ndarray], n: int) -> Overlap:
    if n < 1:
        raise UserError(f"n: {n} is no length of an n-gram; give 1 or more")
    per_document = [ngram_hashes(items, n) for items in evaluation]
    known = np.unique(np.concatenate(per_document)) if per_document else np.empty(0, np.uint64)
    seen = np.zeros(len(known), bool)
    for hashes in _gathered(data, lambda items: ngram_hashes(items, n)):
        at = np.minimum(np.searchsorted(known, hashes), max(len(known) - 1, 0))
        if len(known):
            seen[at[known[at] == hashes]] = True
    hits = [int(seen[np.searchsorted(known, hashes)].sum()) for hashes in per_document]
    return Overlap(n, sum(map(len, per_document)), sum(hits), len(per_document), sum(hit > 0 for hit in hits))


def _gathered(pieces: Iterable[np.ndarray], hashed: Callable[[np.ndarray], np.ndarray]) -> Iterator[np.ndarray]:
    """Hashes of many short pieces together: looking up a few at a time would take longer than hashing them."""
    waiting: list[np.ndarray] = []
    size = 0
    for piece in pieces:
        waiting.append(hashed(piece))
        size += len(waiting[-1])
        if size >= _CHUNK:
            yield np.concatenate(waiting)
            waiting, size = [], 0
    if waiting:
        yield np.concatenate(waiting)
