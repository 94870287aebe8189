"""Token sequences that begin alike, as trees: what they share goes through the model once.

The answers to one question, or one sentence with two names tried in it, are branches. A row of the model's input is one tree;
every token sees its ancestors alone, at the positions that it would have by itself, so the numbers are those of separate
sequences but for rounding.

Shapes: B rows, T tokens of a row, N tokens that are predicted, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..train.learner import Learner

ALIKE = 0.25  # sequences share a tree where at least this part of the shorter one is common
LONGEST = 512  # tokens of a tree with several sequences: attention grows with the square of a row
HEAD = 256  # tokens whose logits are in memory together


@dataclass(frozen=True)
class Sequence_:
    """Context and continuation, whose log-probability is asked for. The last token is predicted and never read."""

    tokens: tuple[int, ...]
    continuation: int  # how many of the last tokens

    @property
    def read(self) -> tuple[int, ...]:
        """What the model reads."""
        return self.tokens[:-1]


@dataclass(frozen=True)
class Answer:
    """Log-probability of a continuation in nats, and whether each of its tokens is the likeliest."""

    log_prob: float
    greedy: bool


@dataclass(frozen=True)
class Branch:
    """Nodes that follow one another from `start` to `stop`, the first behind `parent` (-1: it is a root)."""

    start: int
    stop: int
    parent: int


@dataclass
class Tree:
    """Sequences by index, and for each the nodes that it goes through."""

    tokens: list[int]
    branches: list[Branch]
    paths: dict[int, np.ndarray]  # sequence -> nodes, from its first token on

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def starting(cls, index: int, read: Sequence[int]) -> Tree:
        """A tree of one sequence."""
        return cls(list(read), [Branch(0, len(read), -1)], {index: np.arange(len(read))})

    def grow(self, index: int, read: Sequence[int], beside: int, common: int) -> None:
        """Changes self: another sequence, whose first `common` tokens are those of the sequence `beside`."""
        shared = self.paths[beside][:common]
        first, more = len(self), len(read) - common
        if more:
            self.tokens.extend(read[common:])
            self.branches.append(Branch(first, first + more, int(shared[-1]) if common else -1))
        self.paths[index] = np.concatenate([shared, np.arange(first, first + more)])

    def depths(self) -> np.ndarray:
        """The position of every node: how many are before it on its path."""
        out = np.zeros(len(self), dtype=np.int64)
        for branch in self.branches:
            before = out[branch.parent] + 1 if branch.parent >= 0 else 0
            out[branch.start : branch.stop] = before + np.arange(branch.stop - branch.start)
        return out

    def sees(self) -> np.ndarray:
        """bool [T, T]: whether a node (row) sees a node (column): its ancestors and itself."""
        out = np.zeros((len(self), len(self)), dtype=bool)
        for branch in self.branches:
            own = slice(branch.start, branch.stop)
            if branch.parent >= 0:
                out[own, : branch.start] = out[branch.parent, : branch.start]
            out[own, own] = np.tril(np.ones((branch.stop - branch.start,) * 2, dtype=bool))
        return out


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def trees(sequences: Sequence[Sequence_]) -> list[Tree]:
    """All sequences as trees, by index. In dictionary order a sequence shares most with its neighbour."""
    order = sorted(range(len(sequences)), key=lambda i: sequences[i].tokens)
    out: list[Tree] = []
    last = -1
    for index in order:
        read = sequences[index].read
        if last >= 0:
            before = sequences[last].read
            alike = common(before, read)
            grown = len(out[-1]) + len(read) - alike
            if alike >= ALIKE * max(1, min(len(before), len(read))) and grown <= max(LONGEST, len(read)):
                out[-1].grow(index, read, last, alike)
                last = index
                continue
        out.append(Tree.starting(index, read))
        last = index
    return out


def batches(found: Sequence[Tree], tokens: int) -> Iterator[list[Tree]]:
    """Trees of about one size together, the longest first; of so many tokens, padding included, or of one tree."""
    batch: list[Tree] = []
    for tree in sorted(found, key=len, reverse=True):
        if batch and (len(batch) + 1) * len(batch[0]) > tokens:
            yield batch
            batch = []
        batch.append(tree)
    if batch:
        yield batch


@torch.no_grad()
def answers(learner: Learner, batch: Sequence[Tree], sequences: Sequence[Sequence_]) -> dict[int, Answer]:
    """What the model says to every sequence of a batch. Softmax in float32 or wider, sums in float64."""
    longest = max(len(tree) for tree in batch)
    ids_BT = torch.zeros(len(batch), longest, dtype=torch.long)
    positions_BT = torch.zeros_like(ids_BT)
    sees_BTT = torch.eye(longest, dtype=torch.bool).repeat(len(batch), 1, 1)  # padding sees itself: no row is empty
    for row, tree in enumerate(batch):
        size = len(tree)
        ids_BT[row, :size] = torch.tensor(tree.tokens)
        positions_BT[row, :size] = torch.from_numpy(tree.depths())
        sees_BTT[row, :size, :size] = torch.from_numpy(tree.sees())
    hidden_BTD = learner.hidden(ids_BT, position_ids=positions_BT, attention_mask=sees_BTT[:, None])
    asked = [index for tree in batch for index in tree.paths]
    sizes = [sequences[index].continuation for index in asked]
    places = [
        row * longest + path[-sequences[i].continuation :]
        for row, tree in enumerate(batch)
        for i, path in tree.paths.items()
    ]
    targets_N = torch.tensor([t for i in asked for t in sequences[i].tokens[-sequences[i].continuation :]])
    nodes_U, at_N = torch.from_numpy(np.concatenate(places)).unique(return_inverse=True)  # answers may begin behind one node
    order_N = at_N.argsort(stable=True)
    logs_N, likely_N = _scored(learner, hidden_BTD.flatten(0, 1)[nodes_U], at_N[order_N], targets_N[order_N])
    back_N = order_N.argsort()
    pieces = zip(asked, logs_N[back_N].split(sizes), likely_N[back_N].split(sizes), strict=True)
    return {index: Answer(float(logs.sum()), bool(likely.all())) for index, logs, likely in pieces}


def _scored(learner: Learner, hidden_UD: Tensor, at_N: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probability of every target behind a node, float64, and whether it is the likeliest); `at_N` in order."""
    logs, likely = [], []
    for start in range(0, len(hidden_UD), HEAD):
        logits = learner.logits(hidden_UD[start : start + HEAD])
        first, last = torch.searchsorted(at_N, torch.tensor([start, start + len(logits)])).tolist()
        at, targets = at_N[first:last] - start, targets_N[first:last]
        logs.append((logits[at, targets] - logits.logsumexp(1)[at]).double())
        likely.append(logits.argmax(1)[at] == targets)
    return torch.cat(logs), torch.cat(likely)
