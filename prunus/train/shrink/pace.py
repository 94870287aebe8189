"""When how much goes: pure functions of tokens seen, so that batches, restarts and processes do not matter."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .part import PacePart


@dataclass(frozen=True)
class Pace:
    """`total` tokens of the run, `update` of each update."""

    part: PacePart
    total: int
    update: int

    def share(self, tokens: int) -> float:
        """Of what is to go in all, how much should be gone (curve, once); it never falls."""
        if self.part.kind == "once":
            return 1.0
        start, end = self.part.start * self.total, self.part.end * self.total
        if tokens < start:
            return 0.0
        done = 1.0 if tokens >= end else (tokens - start) / (end - start)
        if self.part.rounds is not None:
            done = math.floor(done * self.part.rounds + 1e-9) / self.part.rounds
        return 1 - (1 - done) ** self.part.power

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

    @property
    def most_groups(self) -> int | None:
        """By the end of the run; None where groups are not counted."""
        return self.groups(self.total)
