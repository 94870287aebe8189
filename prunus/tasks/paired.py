"""Scores with their errors, and two models on the same items: what of a difference is chance.

Shapes: N items; scores are 0 or 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Score:
    """A mean of N items and its standard error, sqrt(p (1 - p) / N), as the papers give it."""

    mean: float
    error: float
    items: int

    @classmethod
    def of(cls, scores: Sequence[float]) -> Score:
        """Of the items' scores."""
        mean = float(np.mean(scores))
        return cls(mean, math.sqrt(mean * (1 - mean) / len(scores)), len(scores))

    def to_json(self) -> dict[str, Any]:
        """For records."""
        return {"mean": self.mean, "error": self.error, "items": self.items}


def mean_of(scores: Sequence[Score]) -> Score:
    """The plain mean of tasks, whose items are others': errors add up in squares."""
    count = len(scores)
    error = math.sqrt(sum(s.error**2 for s in scores)) / count
    return Score(sum(s.mean for s in scores) / count, error, sum(s.items for s in scores))


@dataclass(frozen=True)
class Difference:
    """One model's score less another's on the same items.

    `error` is that of a difference of pairs, sqrt(n01 + n10 - (n01 - n10)^2 / N) / N; `p` McNemar's exact probability of items that
    differ falling so unevenly by chance. `within_noise` is the papers' rule: smaller than the standard error of the other's score.
    """

    mean: float
    error: float
    p: float | None
    within_noise: bool

    @classmethod
    def of(cls, scores: Sequence[float], others: Sequence[float]) -> Difference:
        """Items in the same order, each 0 or 1."""
        one, other = np.asarray(scores, dtype=bool), np.asarray(others, dtype=bool)
        won, lost = int((one & ~other).sum()), int((other & ~one).sum())
        count = len(one)
        mean = (won - lost) / count
        error = math.sqrt(max(0.0, won + lost - (won - lost) ** 2 / count)) / count
        return cls(mean, error, mcnemar(won, lost), abs(mean) < Score.of(list(other.astype(float))).error)

    def to_json(self) -> dict[str, Any]:
        """For records."""
        return {"mean": self.mean, "error": self.error, "p": self.p, "within_noise": self.within_noise}


def mean_difference(found: Sequence[Difference], other: Score) -> Difference:
    """Of means of tasks: errors add up in squares; p by the normal distribution."""
    mean = sum(d.mean for d in found) / len(found)
    error = math.sqrt(sum(d.error**2 for d in found)) / len(found)
    p = math.erfc(abs(mean) / error / math.sqrt(2)) if error else None
    return Difference(mean, error, p, abs(mean) < other.error)


def mcnemar(won: int, lost: int) -> float:
    """Two-sided, exact: how likely `won + lost` fair coins fall at least so unevenly (McNemar 1947, the binomial form)."""
    count, least = won + lost, min(won, lost)
    if count == 0:
        return 1.0
    logs = [
        math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1) - count * math.log(2)
        for k in range(least + 1)
    ]
    return min(1.0, 2 * sum(math.exp(x) for x in logs))


def means(scores: Mapping[str, Score], table: Mapping[str, Sequence[str]]) -> dict[str, Score]:
    """Named means whose tasks are all there."""
    return {name: mean_of([scores[t] for t in tasks]) for name, tasks in table.items() if all(t in scores for t in tasks)}
