"""Which domain each sequence is drawn from: fixed shares, and shares that follow the losses (Sheared LLaMA).

K domains. A share is a whole number of millionths, so that the order hangs on no rounding.
"""

from __future__ import annotations

import bisect
import math
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import UserError, unknown

PARTS = 1_000_000
FLOOR = 1e-3  # the least share of a domain, so that each is heard of and can come back


def millionths(weights: Sequence[float]) -> list[int]:
    """Shares in millionths that add up to `PARTS` exactly: the largest remainders are rounded up, none falls to nothing.

    UserError if the weights are not positive numbers that add up to 1.
    """
    if not weights or not all(math.isfinite(w) and w > 0 for w in weights) or abs(sum(weights) - 1) > 1e-6:
        listed = ", ".join(f"{w:g}" for w in weights)
        raise UserError(f"weights: {listed or 'none'} are no shares; give every domain one above 0, adding up to 1")
    exact = [w / sum(weights) * PARTS for w in weights]
    parts = [max(1, math.floor(x)) for x in exact]
    while missing := PARTS - sum(parts):
        step = 1 if missing > 0 else -1
        may = [k for k in range(len(parts)) if parts[k] + step >= 1]
        k = max(may, key=lambda k: (step * (exact[k] - parts[k]), parts[k], -k))
        parts[k] += step
    return parts


class _Stretch:
    """The draws from one change of the shares to the next, by Tijdeman's rule for the chairman assignment problem.

    After t draws domain k is due `carry_k + t * parts_k` millionths of a sequence. Its next draw may come once it is owed
    1/M of a sequence and must come before it is owed more than 1 - 1/M, with M = 2K - 2; of those that may, the one that
    must come first is drawn. From a clean start no domain is then ever off its share by more than 1 - 1/M.
    """

    def __init__(self, start: int, parts: Sequence[int], carry: Sequence[int], drawn: np.ndarray) -> None:
        self.start, self.parts, self.carry, self.drawn = start, list(parts), list(carry), drawn
        # after a period from a clean start every domain has exactly its share, and all begins anew
        self.period = None if any(carry) else PARTS // math.gcd(*parts)
        self.forget()

    def forget(self) -> None:
        """Give the memory back; what is asked for again is worked out again."""
        self._choices, self._ordinals = array("H"), array("q")
        self._counts = [0] * len(self.parts)
        self._windows = [self._window(k, 0) for k in range(len(self.parts))]

    def _window(self, k: int, drawn: int) -> tuple[int, int]:
        """The first and the last draw that may give domain k its sequence number `drawn`."""
        m = max(2, 2 * len(self.parts) - 2)
        owed = m * (drawn * PARTS - self.carry[k])
        return -((-owed - PARTS) // (m * self.parts[k])), (owed + (m - 1) * PARTS) // (m * self.parts[k]) + 1

    def _extend(self, length: int) -> None:
        windows, counts = self._windows, self._counts
        domains = range(len(self.parts))
        for t in range(len(self._choices) + 1, length + 1):
            best, least = -1, math.inf
            for k in domains:
                first, last = windows[k]
                if first <= t and last < least:
                    best, least = k, last
            if best < 0:  # only after a change of shares: nobody is owed enough, so who will be first
                best = min(domains, key=lambda k: windows[k])
            self._choices.append(best)
            self._ordinals.append(counts[best])
            counts[best] += 1
            windows[best] = self._window(best, counts[best])

    def _split(self, offset: int) -> tuple[int, int]:
        rounds, rest = divmod(offset, self.period) if self.period else (0, offset)
        self._extend(rest)
        return rounds, rest

    def counts(self, offset: int) -> np.ndarray:
        """int64 [K]: sequences of each domain drawn before `offset`, from the beginning of all."""
        rounds, rest = self._split(offset)
        inside = np.bincount(np.frombuffer(self._choices[:rest], np.uint16), minlength=len(self.parts))
        return self.drawn + rounds * self._per_period() + inside

    def _per_period(self) -> np.ndarray:
        return np.array([p * (self.period or 0) // PARTS for p in self.parts], np.int64)

    def draws(self, offset: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The domains of `count` draws from `offset` on, and which sequence of its domain each one is."""
        domains, ordinals = [], []
        while count:
            if self.period:
                rounds, rest = divmod(offset, self.period)
                size = min(count, self.period - rest)
            else:
                rounds, rest, size = 0, offset, count
            self._extend(rest + size)
            chosen = np.frombuffer(self._choices[rest : rest + size], np.uint16).astype(np.int64)
            within = np.frombuffer(self._ordinals[rest : rest + size], np.int64)
            domains.append(chosen)
            ordinals.append(within + (self.drawn + rounds * self._per_period())[chosen])
            offset, count = offset + size, count - size
        return np.concatenate(domains), np.concatenate(ordinals)


class Schedule:
    """From position to domain, a pure function of the history of shares: `[(position, weights)]`, the first at 0."""

    def __init__(self, weights: Sequence[float]) -> None:
        self.history: list[tuple[int, list[float]]] = [(0, [float(w) for w in weights])]
        parts = millionths(weights)
        self._stretches = [_Stretch(0, parts, [0] * len(parts), np.zeros(len(parts), np.int64))]

    def change(self, position: int, weights: Sequence[float]) -> None:
        """From `position` on draw by other shares. What a domain was owed or ahead of by then is carried over."""
        last = self._stretches[-1]
        if len(weights) != len(last.parts) or position < last.start:
            raise ValueError(f"{len(weights)} weights from {position} on, after {len(last.parts)} from {last.start} on")
        parts = millionths(weights)
        drawn = last.counts(position - last.start)
        new = drawn - last.drawn
        carry = [
            c + (position - last.start) * p - int(n) * PARTS for c, p, n in zip(last.carry, last.parts, new, strict=True)
        ]
        last.forget()
        self.history.append((position, [float(w) for w in weights]))
        self._stretches.append(_Stretch(position, parts, carry, drawn))

    def counts(self, position: int) -> np.ndarray:
        """int64 [K]: sequences of each domain before `position`."""
        stretch = self._stretches[self._index(position)]
        return stretch.counts(position - stretch.start)

    def draws(self, position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(domain, which sequence of that domain) of the `count` positions from `position` on, both int64."""
        domains, ordinals = [], []
        i = self._index(position)
        while count:
            stretch = self._stretches[i]
            end = self._stretches[i + 1].start if i + 1 < len(self._stretches) else position + count
            size = min(count, end - position)
            if size:
                got = stretch.draws(position - stretch.start, size)
                domains.append(got[0])
                ordinals.append(got[1])
            position, count, i = position + size, count - size, i + 1
        return np.concatenate(domains), np.concatenate(ordinals)

    def _index(self, position: int) -> int:
        if position < 0:
            raise ValueError(f"position {position}")
        return bisect.bisect_right(self._stretches, position, key=lambda stretch: stretch.start) - 1


class Mixer:
    """Dynamic batch loading: domains whose loss is furthest above where it should be get more of the data.

    Every so often: `excess_k = max(loss_k - reference_k, 0)`, `w_k <- w_k * exp(excess_k / temperature)`, shared out anew
    (Sheared LLaMA, algorithm 1). The published code leaves out the max, so that easy domains are starved, and instead of a
    floor mixes a little of the uniform distribution in at every update, which pulls the shares together even where no domain
    has any excess.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        references: Mapping[str, float],
        *,
        temperature: float = 1.0,
        floor: float = FLOOR,
    ) -> None:
        millionths(list(weights.values()))
        for name in weights:
            if not math.isfinite(references.get(name, math.nan)):
                raise UserError(f"references: domain '{name}' has no reference loss; give one for every domain")
        for name in references:
            if name not in weights:
                raise unknown("domain", name, weights)
        if not (math.isfinite(temperature) and temperature > 0):
            raise UserError(f"temperature: {temperature:g} is not above 0")
        if not 0 <= floor * len(weights) < 1 or any(w < floor * (1 - 1e-9) for w in weights.values()):
            raise UserError(f"floor: {floor:g} is more than a domain's share, or {len(weights)} domains have no room for it")
        self.weights = {name: float(w) for name, w in weights.items()}
        self.references = {name: float(references[name]) for name in weights}
        self.temperature, self.floor = temperature, floor
        self.num_updates = 0

    def update(self, losses: Mapping[str, float | None]) -> dict[str, dict[str, float | None]]:
        """Take the domains' losses (None: drew nothing, its share stays) and return what happened, for the log.

        Domains that were drawn share out anew what they had together, none less than the floor.
        """
        for name, loss in losses.items():
            if name not in self.weights:
                raise unknown("domain", name, self.weights)
            if loss is not None and not math.isfinite(loss):
                raise UserError(f"losses: that of domain '{name}' is {loss}; training has diverged")
        excess = {name: max(loss - self.references[name], 0.0) for name, loss in losses.items() if loss is not None}
        if excess:
            highest = max(excess.values())  # taken off, so that exp cannot overflow; the quotient is the same
            raised = {name: self.weights[name] * math.exp((e - highest) / self.temperature) for name, e in excess.items()}
            self.weights |= _shared_out(raised, sum(self.weights[name] for name in excess), self.floor)
            whole = sum(self.weights.values())
            self.weights = {name: w / whole for name, w in self.weights.items()}
        self.num_updates += 1
        return {
            name: {"loss": losses.get(name), "excess": excess.get(name), "weight": weight}
            for name, weight in self.weights.items()
        }

    def state(self) -> dict[str, Any]:
        """All of it as plain JSON."""
        return {
            "weights": dict(self.weights),
            "references": dict(self.references),
            "temperature": self.temperature,
            "floor": self.floor,
            "num_updates": self.num_updates,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Mixer:
        """What `state` said, bit for bit."""
        mixer = cls(state["weights"], state["references"], temperature=state["temperature"], floor=state["floor"])
        mixer.num_updates = state["num_updates"]
        return mixer


def _shared_out(amounts: Mapping[str, float], whole: float, floor: float) -> dict[str, float]:
    """`whole` in proportion to the amounts, but `floor` for those that would get less."""
    lifted: set[str] = set()
    while True:
        rest = sum(value for name, value in amounts.items() if name not in lifted)
        scale = (whole - floor * len(lifted)) / rest
        low = {name for name, value in amounts.items() if name not in lifted and value * scale < floor}
        if not low or len(low | lifted) == len(amounts):
            return {name: floor if name in lifted else value * scale for name, value in amounts.items()}
        lifted |= low
