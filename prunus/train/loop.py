"""The training loop: batches in, updates out, and one seam through which others read gradients and change the model.

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import products
from ..distributed import ALONE, World, local, whole
from ..errors import UserError
from .learner import Learner, Taught, boundaries
from .loss import IGNORED
from .optim import set_lr_
from .schedule import Schedule


class Batch(Protocol):
    """Sequences with one id more than they predict, and where they came from."""

    @property
    def ids(self) -> Tensor:
        """[B, T + 1] int64."""


class Feed(Protocol):
    """Where sequences come from: a pure function of the position."""

    def take(self, position: int, count: int) -> Batch:
        """Sequences `position` to `position + count`."""


class Hook:
    """What rides on the loop. Gradients are whole and not yet clipped in `before_clip`; weights are new in `after_step`."""

    def after_backward(self, run: Training) -> None:
        """Read gradients after each of an update's micro-batches, if it has several."""

    def before_clip(self, run: Training) -> None:
        """Read, or change, gradients."""

    def after_step(self, run: Training) -> None:
        """Read, or change, weights and moments; or put another model and optimizer in their place."""


@dataclass
class Training:
    """A run on its way: what it changes, where it stands, and what it goes by."""

    learner: Learner
    optimizer: torch.optim.Optimizer
    feed: Feed
    schedule: Schedule
    batch: int  # sequences of one update
    micro: int  # sequences that go through the model together
    clip: float | None = 1.0
    teacher: Taught | None = None
    starts: Callable[[Any], Tensor] | None = None  # [B, T] bool: first tokens of documents, where these are kept apart
    spike: float | None = None
    hooks: tuple[Hook, ...] = ()
    world: World = ALONE
    step: int = 0
    tokens: int = 0
    skipped: int = 0
    usual: float | None = None  # running mean of the loss, which spikes are told by
    last: dict[str, Any] = field(default_factory=dict)  # loss, lr and grad_norm of the last update

    @property
    def position(self) -> int:
        """The next sequence."""
        return self.step * self.batch


_USUAL = 0.98  # what the running mean keeps at each update


@products.fast()
def train_(run: Training, until: int, each: Callable[[Training], None] = lambda run: None) -> None:
    """Changes `run`: updates until step `until`. `each` is called after every one; what it raises ends the loop.

    UserError if the loss or a gradient is no number: nothing is updated then.
    """
    while run.step < until:
        loss, predictions = accumulate_(run, run.position, run.batch)
        for hook in run.hooks:
            hook.before_clip(run)
        parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
        most = math.inf if run.clip is None else run.clip
        norm = float(whole(torch.nn.utils.clip_grad_norm_(parameters, most, foreach=True)))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            run.optimizer.zero_grad(set_to_none=True)
            raise UserError(
                f"the {'loss' if not math.isfinite(loss) else 'gradient'} of step {run.step + 1} is no number; the checkpoint "
                "before stands: lower optimizer.lr or optimizer.clip, or use another precision"
            )
        tokens = run.tokens + predictions
        rate = run.schedule(tokens)
        spiked = run.spike is not None and run.usual is not None and loss > run.spike * run.usual
        if spiked:
            run.skipped += 1
        else:
            set_lr_(run.optimizer, rate)
            run.optimizer.step()
            run.usual = loss if run.usual is None else _USUAL * run.usual + (1 - _USUAL) * loss
        run.optimizer.zero_grad(set_to_none=True)
        run.step, run.tokens = run.step + 1, tokens
        run.last = {"loss": loss, "lr": rate, "grad_norm": norm, "skipped": float(spiked)}
        for hook in run.hooks:
            hook.after_step(run)
        each(run)


@products.fast()
def accumulate_(run: Training, position: int, sequences: int) -> tuple[float, int]:
    """Adds up gradients of the mean loss of the sequences from `position` on, in micro-batches and over processes.

    (that loss in nats, the tokens it is the mean of)
    """
    share = run.world.share(sequences)
    first_own = position + share.start
    batch = run.feed.take(first_own, share.stop - share.start)
    predictions = sequences * (batch.ids.shape[1] - 1)
    total = 0.0
    starts_BT = run.starts(batch) if run.starts is not None else None
    rounds = range(0, run.world.largest_share(sequences), run.micro)
    for first in rounds:
        idle = first >= len(batch.ids)  # others still work, and need this process's part of the weights
        part = slice(0, 1) if idle else slice(first, first + run.micro)
        ids, targets = batch.ids[part, :-1], batch.ids[part, 1:]
        positions = {} if starts_BT is None else boundaries(starts_BT[part])
        counted = torch.full_like(targets, IGNORED) if idle else targets
        loss = run.learner(ids, counted, teacher=run.teacher, at=first_own + part.start, **positions)
        (loss / predictions).backward()
        total += float(loss.detach())
        for hook in run.hooks if len(rounds) > 1 else ():
            hook.after_backward(run)
    return run.world.total(total / predictions), predictions


class Sparse(Hook):
    """A hook that keeps zeros zero: gradients, and so moments, outside the mask are none, and weights are set again.

    Of a weight that is shared out, `kept` is this process's part of the mask.
    """

    def __init__(self, weights: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> None:
        self.pairs = [(weights[name], mask) for name, mask in kept.items()]

    @torch.no_grad()
    def before_clip(self, run: Training | None) -> None:
        """Gradients of what is cut are zero, so they have no part in the norm."""
        for weight, kept in self.pairs:
            if weight.grad is not None:
                local(weight.grad).mul_(kept)

    @torch.no_grad()
    def after_step(self, run: Training | None) -> None:
        """Rounding in the update may not revive a weight."""
        for weight, kept in self.pairs:
            local(weight).mul_(kept)

    def check(self) -> None:
        """AssertionError if a weight outside the mask is not zero."""
        assert all(not bool(local(weight.detach())[~kept].any()) for weight, kept in self.pairs), (
            "a weight outside the mask is alive"
        )


@torch.no_grad()
@products.fast()
def validate(learner: Learner, feed: Feed, sequences: int, micro: int, world: World = ALONE) -> dict[str, Any]:
    """Mean cross-entropy in nats a token of the first sequences of a feed, and of each of its domains, without dropout."""
    found: list[tuple[int, float]] = []
    trains = learner.model.training
    learner.model.eval()
    share = world.share(sequences)
    for first in range(share.start, share.start + world.largest_share(sequences), micro):
        idle = first >= share.stop
        batch = feed.take(0, 1) if idle else feed.take(first, min(micro, share.stop - first))
        losses_BT = learner.nll(batch.ids[:, :-1], batch.ids[:, 1:])
        if not idle:
            found += zip(_domains(batch), losses_BT.mean(1).tolist(), strict=True)
    learner.model.train(trains)
    sums: dict[int, list[float]] = {}
    for domain, loss in world.together(found):
        sums.setdefault(domain, []).append(loss)
    every = [value for values in sums.values() for value in values]
    by_domain = {str(domain): sum(values) / len(values) for domain, values in sorted(sums.items())}
    return {"loss": sum(every) / len(every), "by_domain": by_domain, "sequences": len(every)}


def _domains(batch: Batch) -> Iterable[int]:
    domains = getattr(batch, "domains", None)
    return [0] * len(batch.ids) if domains is None else domains.tolist()


class Clock:
    """Seconds spent in updates: what is measured between `start` and `stop`."""

    def __init__(self) -> None:
        self.seconds, self._since = 0.0, time.perf_counter()

    def start(self) -> None:
        """From here on."""
        self._since = time.perf_counter()

    def stop(self) -> None:
        """Up to here."""
        self.seconds += time.perf_counter() - self._since
