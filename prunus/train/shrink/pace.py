"""When how much goes: pure functions of tokens seen, so that batches, restarts and processes do not matter."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from .part import PacePart


@dataclass(frozen=True)
class Pace:
    """`total` tokens of the run, `update` of each update; `rate`: tokens -> learning rate of the update that ends there."""

    part: PacePart
    total: int
    update: int
    rate: Callable[[int], float] = lambda tokens: 1.0

    def share(self, tokens: int) -> float:
        """Of what is to go in all, how much should be gone (curve, rate, once); it never falls."""
        if self.part.kind == "once":
            return 1.0
        start, end = self.part.start * self.total, self.part.end * self.total
        if tokens < start:
            return 0.0
        if self.part.kind == "rate":
            done = self._gone_by_rate[min(tokens // self.update, len(self._gone_by_rate) - 1)]
        else:
            done = 1.0 if tokens >= end else (tokens - start) / (end - start)
        if self.part.rounds is not None:
            done = math.floor(done * self.part.rounds + 1e-9) / self.part.rounds
        return done if self.part.kind == "rate" else 1 - (1 - done) ** self.part.power

    @cached_property
    def _gone_by_rate(self) -> list[float]:
        """Share that is gone after so many updates: at each goes c * rate^power, with c such that all of them sum to one."""
        start, end = self.part.start * self.total, self.part.end * self.total
        ends = range(0, self.total + 1, self.update)
        each = [self.rate(at) ** self.part.power if start < at <= end else 0.0 for at in ends]
        gone = list(accumulate(each))
        return [g / gone[-1] for g in gone] if gone[-1] else [float(at >= end) for at in ends]

    def groups(self, tokens: int) -> int | None:
        """How many groups may be gone (steps); None where the share alone counts."""
        if self.part.kind != "steps":
            return None
        return max(0, (tokens - self._warm) // (self.part.train * self.update)) * self.part.prune

    @property
    def _warm(self) -> int:
        """Tokens before the first cut, in whole updates."""
        return math.ceil(self.part.start * self.total / self.update) * self.update

    def cuts(self, before: int, tokens: int) -> bool:
        """Whether more may go at `tokens` than at `before`."""
        if self.part.kind == "steps":
            return (self.groups(tokens) or 0) > (self.groups(before) or 0)
        return self.part.kind != "once" and self.share(tokens) > self.share(before)

    def updates_until(self, tokens: int, due: Callable[[int], bool]) -> int | None:
        """After how many updates from `tokens` on something is `due` that stays so once it is; None if not in this run."""
        left = range(1, (self.total - tokens) // self.update + 1)
        at = bisect_left(left, True, key=lambda n: due(tokens + n * self.update))
        return left[at] if at < len(left) else None

    @property
    def most_groups(self) -> int | None:
        """By the end of the run; None where groups are not counted."""
        return self.groups(self.total)
