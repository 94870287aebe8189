"""Learning rates as pure functions of tokens seen, so that batch size, restarts and processes do not matter."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """A rate for every token count. Several stages under one curve share `total` and differ in where they `start`.

    `warmup` and `decay` are shares of `total`; `floor` is a share of `peak`.
    """

    kind: str  # cosine, wsd or constant
    peak: float
    total: int  # tokens of the whole curve
    start: int = 0  # tokens of it that earlier stages have used
    warmup: float = 0.05
    floor: float = 0.1
    decay: float = 0.2  # of wsd: the share at the end in which the rate falls to the floor

    def __call__(self, tokens: int) -> float:
        """The rate of the step that ends at `tokens` of this stage (Lingua's lr_cosine, in tokens)."""
        at, ramp = self.start + tokens, self.warmup * self.total
        if at < ramp:
            return self.peak * at / ramp
        return self.peak * _SHAPES[self.kind](self, min(at, self.total), ramp)


def _cosine(schedule: Schedule, at: float, ramp: float) -> float:
    done = (at - ramp) / max(schedule.total - ramp, 1)
    return schedule.floor + (1 - schedule.floor) * 0.5 * (1 + math.cos(math.pi * done))


def _wsd(schedule: Schedule, at: float, ramp: float) -> float:
    """Warm-up, stable, decay: a straight line down to the floor at the end."""
    falls = max(schedule.total * (1 - schedule.decay), ramp)
    done = max(at - falls, 0) / max(schedule.total - falls, 1)
    return 1 - (1 - schedule.floor) * done


def _constant(schedule: Schedule, at: float, ramp: float) -> float:
    return 1.0


_SHAPES = {"cosine": _cosine, "wsd": _wsd, "constant": _constant}
KINDS = tuple(_SHAPES)
