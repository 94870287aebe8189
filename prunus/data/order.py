"""The order of the training data: a pure function of the data, a seed and a position.

Shapes: N sequences, T tokens predicted in each. Nothing is remembered between calls, so any number of processes may take any
part of any batch, and a run that goes on needs nothing but its position (and the history of shares, if they change).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from .mixing import Schedule, millionths
from .shards import Shards

_ROUNDS = 8  # of the Feistel network; four make it hard to tell from random, small ones like a few more


class Tokens(Protocol):
    """What a stream needs of its data; `Shards` has it."""

    @property
    def num_tokens(self) -> int:
        """How many there are."""
        ...

    def __getitem__(self, span: slice) -> np.ndarray:
        """Ids as int64."""
        ...

    def document_starts(self, first: int, end: int) -> np.ndarray:
        """Positions at which documents start."""
        ...


@dataclass(frozen=True)
class Domain:
    """A source of sequences and its share of them."""

    name: str
    shards: Tokens
    weight: float = 1.0


@dataclass(frozen=True)
class Batch:
    """Sequences with where they are from.

    `ids` [N, T + 1] int64: the first T are read, the last T predicted. `domains` [N] int64 index into the stream's. `ranges`:
    of every sequence (domain's name, first token, end) with end - first = T, so that sequences side by side share no token;
    the id at `end` is predicted too, but it counts as the next one's first.
    """

    ids: Tensor
    domains: Tensor
    ranges: list[tuple[str, int, int]]


class Stream:
    """Shuffled sequences of several domains by shares.

    Sequence i of a domain covers the tokens [i * T, i * T + T]. All of a domain's sequences come in a new order each epoch,
    and all of an epoch before any of the next.
    """

    def __init__(self, domains: Sequence[Domain], seq_len: int, seed: int, epochs: int = 1) -> None:
        names = [domain.name for domain in domains]
        if not domains or len(set(names)) < len(names):
            raise UserError(f"domains: {', '.join(names) or 'none'}; give at least one, each with a name of its own")
        if seq_len < 1 or epochs < 1:
            raise UserError(f"seq_len and epochs are {seq_len} and {epochs}; both must be 1 or more")
        self.domains, self.seq_len, self.seed, self.epochs = tuple(domains), seq_len, seed, epochs
        self.sizes = np.array([(domain.shards.num_tokens - 1) // seq_len for domain in domains], np.int64)
        for domain, size in zip(domains, self.sizes.tolist(), strict=True):
            if size < 1:
                raise UserError(
                    f"domain '{domain.name}': {domain.shards.num_tokens:,} tokens are fewer than one sequence of {seq_len} "
                    "and the token behind it; give more text or a smaller seq_len"
                )
        self._schedule = Schedule([domain.weight for domain in domains])

    @property
    def num_sequences(self) -> int:
        """How many positions there are before some domain has been seen `epochs` times, by the shares known so far."""
        limits = self.sizes * self.epochs
        low, high = 0, int(limits.sum())  # low fits, high + 1 does not
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if (self._schedule.counts(middle) <= limits).all() else (low, middle - 1)
        return low

    def check_budget(self, num_sequences: int) -> None:
        """UserError, before any work, if there are not as many sequences."""
        there = self.num_sequences
        if num_sequences > there:
            counts = self._schedule.counts(there + 1)
            short = self.domains[int(np.argmax(counts - self.sizes * self.epochs))].name
            raise UserError(
                f"budget: {num_sequences * self.seq_len:,} tokens are asked for, but domain '{short}' is used up after "
                f"{there * self.seq_len:,}; lower the budget, or allow repetition with epochs (now {self.epochs})"
            )

    def take(self, position: int, count: int) -> Batch:
        """The sequences of `count` positions from `position` on."""
        chosen, ordinals = self._schedule.draws(position, count)
        sequences = np.empty(count, np.int64)
        for k in np.unique(chosen).tolist():
            at = np.flatnonzero(chosen == k)
            epochs, within = np.divmod(ordinals[at], self.sizes[k])
            if int(epochs.max()) >= self.epochs:
                raise UserError(
                    f"domain '{self.domains[k].name}' is used up: its {self.sizes[k]:,} sequences of {self.seq_len} have been "
                    f"seen {self.epochs} times; lower the budget, or allow repetition with epochs"
                )
            for epoch in np.unique(epochs).tolist():
                now = epochs == epoch
                sequences[at[now]] = permuted(within[now], int(self.sizes[k]), self._key(k, epoch))
        t = self.seq_len
        ids = np.empty((count, t + 1), np.int64)
        ranges = []
        for row, (k, i) in enumerate(zip(chosen.tolist(), sequences.tolist(), strict=True)):
            ids[row] = self.domains[k].shards[i * t : i * t + t + 1]
            ranges.append((self.domains[k].name, i * t, i * t + t))
        return Batch(torch.from_numpy(ids), torch.from_numpy(chosen), ranges)

    def segments(self, batch: Batch) -> Tensor:
        """[N, T + 1] int64: the number of the document within its sequence that each id belongs to, for masks."""
        return _segments(self.domains, batch)

    def reweight(self, position: int, weights: Mapping[str, float]) -> None:
        """From `position` on draw by these shares; what was drawn before stays as it was."""
        self._schedule.change(position, [weights[domain.name] for domain in self.domains])

    @property
    def history(self) -> list[tuple[int, dict[str, float]]]:
        """`(position, shares)` of every change, the first at 0; plain JSON, and with the position the whole state."""
        names = [domain.name for domain in self.domains]
        return [(position, dict(zip(names, weights, strict=True))) for position, weights in self._schedule.history]

    def replay(self, history: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Take over the history of a stream that goes on here; what this one knew is forgotten."""
        names = [domain.name for domain in self.domains]
        for _, weights in history:
            if sorted(weights) != sorted(names):
                raise UserError(f"domains: the run had {', '.join(weights)}, now there are {', '.join(names)}")
        self._schedule = Schedule([history[0][1][name] for name in names])
        for position, weights in history[1:]:
            self.reweight(position, weights)

    def begun(self) -> Stream:
        """Another, by the shares that this one began with."""
        made = Stream(self.domains, self.seq_len, self.seed, self.epochs)
        made.replay(self.history[:1])
        return made

    def _key(self, k: int, epoch: int) -> np.ndarray:
        text = f"{self.seed}/{epoch}/{self.domains[k].name}"
        return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=8 * _ROUNDS).digest(), "<u8").astype(np.uint64)


class Chain:
    """Streams one behind the other: of each the first so many sequences, in its own order.

    So a run reads what two others read before it, token for token. Domains are called after stream and domain,
    ``retrain:wiki``.
    """

    def __init__(self, streams: Mapping[str, tuple[Stream, int]]) -> None:
        self._streams = list(streams.values())
        first, _ = self._streams[0]
        self.seq_len, self.seed = first.seq_len, first.seed
        self._named = [(name, stream) for name, (stream, _) in streams.items()]
        ends = np.cumsum([count for _, count in self._streams]).tolist()
        self._spans = list(zip([0, *ends[:-1]], ends, strict=True))
        self.domains = tuple(
            Domain(f"{name}:{domain.name}", domain.shards, domain.weight * (end - start) / ends[-1])
            for (name, stream), (start, end) in zip(self._named, self._spans, strict=True)
            for domain in stream.domains
        )

    @property
    def parts(self) -> dict[str, dict[str, int]]:
        """Of every stream the seed of its order, and how many of its tokens there are."""
        return {
            name: {"seed": stream.seed, "tokens": count * self.seq_len}
            for (name, stream), (_, count) in zip(self._named, self._streams, strict=True)
        }

    @property
    def num_sequences(self) -> int:
        """Of all streams together."""
        return int(self._spans[-1][1])

    def check_budget(self, num_sequences: int) -> None:
        """UserError, before any work, if there are not as many sequences."""
        for (name, _), (stream, count) in zip(self._named, self._streams, strict=True):
            try:
                stream.check_budget(count)
            except UserError as error:
                raise UserError(f"range '{name}': {error}") from error
        if num_sequences > self.num_sequences:
            raise UserError(
                f"budget: {num_sequences * self.seq_len:,} tokens are asked for, but the ranges hold "
                f"{self.num_sequences * self.seq_len:,}; name more of them, or lower the budget"
            )

    def take(self, position: int, count: int) -> Batch:
        """The sequences of `count` positions from `position` on."""
        found, before = [], 0
        for (name, stream), (start, end) in zip(self._named, self._spans, strict=True):
            first, last = max(position, start), min(position + count, end)
            if first < last:
                batch = stream.take(first - start, last - first)
                ranges = [(f"{name}:{domain}", a, b) for domain, a, b in batch.ranges]
                found.append(Batch(batch.ids, batch.domains + before, ranges))
            before += len(stream.domains)
        if sum(len(batch.ranges) for batch in found) < count:
            raise UserError(
                f"ranges: their {self.num_sequences:,} sequences are used up; name more of them, or lower the budget"
            )
        ids, domains = (torch.cat([getattr(batch, part) for batch in found]) for part in ("ids", "domains"))
        return Batch(ids, domains, [one for batch in found for one in batch.ranges])

    def segments(self, batch: Batch) -> Tensor:
        """As `Stream.segments`."""
        return _segments(self.domains, batch)

    @property
    def history(self) -> list[tuple[int, dict[str, float]]]:
        """Where each stream begins, and the shares in it."""
        return [
            (start, {f"{name}:{domain}": share for domain, share in stream.history[0][1].items()})
            for (name, stream), (start, _) in zip(self._named, self._spans, strict=True)
        ]


def _segments(domains: Sequence[Domain], batch: Batch) -> Tensor:
    by_name = {domain.name: domain.shards for domain in domains}
    starts = np.zeros(tuple(batch.ids.shape), np.int64)
    for row, (name, first, end) in enumerate(batch.ranges):
        starts[row, by_name[name].document_starts(first, end + 1) - first] = 1
    return torch.from_numpy(np.cumsum(starts, axis=1) - starts[:, :1])


def permuted(index: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """Where a keyed permutation of `range(size)` sends each index: a Feistel network that walks until it is back inside.

    Random access and no memory, unlike a shuffled list. `key` holds one uint64 a round.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)  # bits; the network permutes 4^half >= size numbers
    mask = np.uint64((1 << half) - 1)
    shift = np.uint64(half)
    out = index.astype(np.uint64)
    walking = np.ones(len(out), bool)
    while walking.any():
        left, right = out[walking] >> shift, out[walking] & mask
        for round_key in key:
            left, right = right, left ^ (mixed(right ^ round_key) & mask)
        out[walking] = (left << shift) | right
        walking = out >= size
    return out.astype(np.int64)


def mixed(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: every bit of the input moves every bit of the output."""
    x = (x + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def open_domains(
    folders: Sequence[str], which: str, *, weights: Mapping[str, float] | None = None, tokenizer: str | None = None
) -> list[Domain]:
    """The same range of several folders of prepared data, named after the folders.

    Without `weights` each gets its share of the tokens. UserError if shares, tokenizers or folders do not fit together.
    """
    opened = {Path(folder).name: Shards.open(Path(folder).expanduser(), which, tokenizer=tokenizer) for folder in folders}
    if len(opened) < len(folders) or not folders:
        raise UserError(f"data: {', '.join(folders) or 'nothing'}; name folders whose last parts differ, they name domains")
    if len({shards.manifest.tokenizer_sha256 for shards in opened.values()}) > 1:
        raise UserError(f"data: {', '.join(folders)} were prepared with different tokenizers; prepare them with one")
    if weights is None:
        total = sum(shards.num_tokens for shards in opened.values())
        weights = {name: shards.num_tokens / total for name, shards in opened.items()}
    if set(weights) != set(opened):
        raise UserError(f"weights: are for {', '.join(weights)}, but the domains are {', '.join(opened)}")
    millionths(list(weights.values()))
    return [Domain(name, shards, weights[name]) for name, shards in opened.items()]
