"""Hard-concrete gates and the Lagrangian that brings them to given sizes (Louizos et al. 2018; Sheared LLaMA, Xia et al. 2024).

A unit's gate z in [0, 1] is a stretched and clipped sigmoid of noise and of one learned number, its log alpha:
s = sigmoid((log u - log(1 - u) + log_alpha) / BETA), z = min(1, max(0, s (HIGH - LOW) + LOW)) with u uniform in (0, 1).
Gates are 0 and 1 with probabilities of their own and have gradients between. Shapes: R rows (layers, or 1), U units of each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

BETA, LOW, HIGH = 2 / 3, -0.1, 1.1
LIMIT = math.log(100)  # log alphas stay within it, so that no unit is out of reach of its gradient
_EDGE = 1e-6  # noise keeps off 0 and 1, whose logits are infinite
_START, _SPREAD = 4.0, 0.3  # of log alphas: nearly all gates open, none quite like another
_SETTLED = 0.8  # sharpens a gate that is no longer drawn, as published
_BETAS = (0.9, 0.95)
_SLOTS = ("exp_avg", "exp_avg_sq")
_NEAR = 0.02  # of an axis: sizes that are expected so near to the target are there

Z = Mapping[str, Tensor]  # kind of axis -> gates [R, U]


# -- one gate -------------------------------------------------------------------------------------------------------------


def drawn(log_alpha: Tensor, u: Tensor) -> Tensor:
    """Gates of noise u in (0, 1); differentiable in log_alpha."""
    u = u.clamp(_EDGE, 1 - _EDGE)
    s = torch.sigmoid((u.log() - (1 - u).log() + log_alpha) / BETA)
    return (s * (HIGH - LOW) + LOW).clamp(0, 1)


def alive(log_alpha: Tensor) -> Tensor:
    """P(z > 0) = sigmoid(log_alpha - BETA log(-LOW / HIGH))."""
    return torch.sigmoid(log_alpha - BETA * math.log(-LOW / HIGH))


def top(log_alpha_RU: Tensor, count_R: Tensor) -> Tensor:
    """bool [R, U]: the so many units of each row with the largest log alphas; ties go to the lower index."""
    order_RU = log_alpha_RU.argsort(dim=1, descending=True, stable=True)
    return order_RU.argsort(dim=1) < count_R[:, None]


def settled(log_alpha_RU: Tensor, count_R: Tensor) -> Tensor:
    """Gates without noise [R, U]: sigmoid(0.8 log_alpha / BETA) for the so many largest of each row, 0 for the others."""
    z_RU = torch.sigmoid(_SETTLED / BETA * log_alpha_RU)
    return z_RU * top(log_alpha_RU, count_R)


def off_target(log_alpha_RU: Tensor, target: float) -> Tensor:
    """A row's expected share of closed gates, less the share that is to be closed [R]."""
    return 1 - alive(log_alpha_RU).mean(dim=1) - target


def penalty(off_R: Tensor, multipliers: Tensor) -> Tensor:
    """Mean over rows of l1 d + l2 d^2, d being how far they are off; its ascent in (l1, l2) is the mean of (d, d^2)."""
    return (multipliers[0] * off_R + multipliers[1] * off_R.square()).mean()


def least_updates(rate: float) -> int:
    """Before so many, no gate can close: Adam moves a log alpha by about its rate, from its start to where P(z > 0) is 1/2."""
    return math.ceil((_START + BETA * math.log(-HIGH / LOW)) / rate)


# -- the gates of a model -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """Of log alphas, by Adam; of multipliers, by plain ascent; and what the square's multiplier starts from.

    The square holds sizes close to what is asked for, the other multiplier takes away what is left: an augmented Lagrangian.
    From a start of 0, and multipliers moved by Adam (as published), sizes swing about the target for hundreds of updates.
    """

    masks: float
    multipliers: float
    stiffness: float


class Gates:
    """Log alphas and multipliers of some kinds of axes: the ones go down the loss and the penalty, the others up.

    Everything is a function of seed, steps and the gradients that come in, the same in every process that is given the same.
    """

    def __init__(self, sizes: Mapping[str, tuple[int, int]], targets: Mapping[str, int], rates: Rates, seed: int) -> None:
        self.sizes, self.targets, self.seed = dict(sizes), dict(targets), seed
        noise = torch.Generator().manual_seed(seed)
        self.log_alpha = {
            kind: nn.Parameter((_START + _SPREAD * torch.randn(shape, generator=noise)).clamp(-LIMIT, LIMIT))
            for kind, shape in self.sizes.items()
        }
        self.multipliers = {kind: torch.tensor([0.0, rates.stiffness]) for kind in self.sizes}
        self.rates = rates
        self.optimizer = torch.optim.Adam(self.log_alpha.values(), lr=rates.masks, betas=_BETAS)
        for p in self.log_alpha.values():  # moments that are there before the first step, so that checkpoints have them
            self.optimizer.state[p] = {"step": torch.tensor(0.0), **{slot: torch.zeros_like(p) for slot in _SLOTS}}

    @property
    def steps(self) -> int:
        """Updates so far."""
        return int(next(iter(self.optimizer.state.values()))["step"])

    def draw(self, update: int) -> dict[str, Tensor]:
        """Gates for one update, as leaves of their own: micro-batches and processes add up their gradients there."""
        return {kind: z.detach().requires_grad_(True) for kind, z in self._drawn(update).items()}

    def _drawn(self, update: int) -> dict[str, Tensor]:
        noise = torch.Generator().manual_seed((self.seed + 1) * 1_000_003 + update)  # of the position alone: resumable
        return {kind: drawn(a, torch.rand(a.shape, generator=noise)) for kind, a in self.log_alpha.items()}

    def learn_(self, update: int, gradients: Z, share: float) -> float:
        """Changes self: one step from the loss's gradients of the gates of `draw(update)`; returns the penalty.

        `share` of the way to the targets is asked for now.
        """
        self.optimizer.zero_grad(set_to_none=True)
        off = {kind: off_target(a, share * self.asked(kind)) for kind, a in self.log_alpha.items()}
        cost = torch.stack([penalty(off[kind], pair) for kind, pair in self.multipliers.items()]).sum()
        z = self._drawn(update)
        torch.autograd.backward([cost, *z.values()], [torch.ones_like(cost), *(gradients[kind] for kind in z)])
        self.optimizer.step()
        with torch.no_grad():
            for kind, pair in self.multipliers.items():
                pair += self.rates.multipliers * torch.stack([off[kind].mean(), off[kind].square().mean()])
                self.log_alpha[kind].clamp_(-LIMIT, LIMIT)
        return float(cost.detach())

    def asked(self, kind: str) -> float:
        """Share of an axis's units that is to go."""
        return 1 - self.targets[kind] / self.sizes[kind][1]

    @torch.no_grad()
    def expected(self) -> dict[str, float]:
        """Units of each kind that are expected to stay, as a mean over rows."""
        return {kind: float(alive(a).sum(1).mean()) for kind, a in self.log_alpha.items()}

    def doubt(self) -> float:
        """`undecided` over that of gates which are all alike and at the target, 2 q (1 - q) at a share q that stays: its mean."""
        shares = {kind: 1 - self.asked(kind) for kind in self.targets}
        return sum(u / (2 * shares[k] * (1 - shares[k])) for k, u in self.undecided().items()) / len(shares)

    def far(self) -> list[str]:
        """The kinds whose expected size is not near the target: what is cut of them then is not what was learned."""
        return [k for k, n in self.expected().items() if abs(n - self.targets[k]) > _NEAR * self.sizes[k][1]]

    @torch.no_grad()
    def kept(self) -> dict[str, Tensor]:
        """bool [R, U]: exactly the targets' sizes."""
        return {kind: top(a, self._count(kind)) for kind, a in self.log_alpha.items()}

    @torch.no_grad()
    def settled(self, *, exactly: bool) -> dict[str, Tensor]:
        """Gates without noise: as many are open as the targets say (`exactly`), or as are expected now."""
        return {
            kind: settled(a, self._count(kind) if exactly else alive(a).sum(1).round()) for kind, a in self.log_alpha.items()
        }

    @torch.no_grad()
    def undecided(self) -> dict[str, float]:
        """Share of each kind's gates that would be drawn otherwise than `kept` has it: sizes that are off, and gates in between."""
        kept = self.kept()
        return {kind: float((alive(a) - kept[kind].float()).abs().mean()) for kind, a in self.log_alpha.items()}

    def _count(self, kind: str) -> Tensor:
        return torch.full((self.sizes[kind][0],), self.targets[kind])

    # -- checkpoints ------------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint keeps, live, but `steps`."""
        out = {f"multiplier.{kind}": pair for kind, pair in self.multipliers.items()}
        for kind, p in self.log_alpha.items():
            out[f"mask.{kind}"] = p.detach()
            out |= {f"mask.{slot}.{kind}": self.optimizer.state[p][slot] for slot in _SLOTS}
        return out

    def restore(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Undo `tensors`."""
        for name, live in self.tensors().items():
            live.copy_(tensors[name])
        for state in self.optimizer.state.values():
            state["step"].fill_(float(steps))
