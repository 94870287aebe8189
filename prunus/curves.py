"""What every size of an axis costs, in nats a token, once what reads it is refitted: `prunus` chooses sizes by it.

1. One pass forward and back gives F = E[g g^T] at what every o_proj and down_proj puts out: g is the gradient there of the loss
   of a token that the model itself draws, so an output error e costs about e^T F e / 2 nats (the Fisher information: how far
   the cut model's words come to lie from the dense one's). The text's own next tokens would weigh by where the model errs.
2. One dense sweep gives for every sub-layer the error of all sizes that it could have: units go the cheapest first, and after
   each the weights that read the rest are solved again (optimal brain surgery on Gram matrices, `eliminate.py`).
   Windows are two halves, and what is fitted to one is judged by the other; a quarter of all tokens is heard on what the error
   does to them by their own gradients.

Shapes: B windows in a batch, T tokens, D hidden size, C channels of a matrix's input, H heard tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .allocate import Curve
from .axes import Axis, kind_of
from .compensate import INPUT_OF
from .distributed import World
from .eliminate import eliminate
from .job import Job
from .planning import Plan
from .solve import REFIT_DAMP, factor
from .statistics import Moments, reading_points
from .taylor import drawn, walk_back

WANTS = frozenset({"mean", "gram"})  # of a matrix's inputs

# -- 1: what an error costs -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gradients:
    """Of a drawn token's loss at what every matrix puts out, by the matrix's name.

    `fisher`: E[g g^T] [D, D] over the tokens of all processes, float64. `heard`: g at this process's heard tokens [H, D], bfloat16.
    """

    fisher: dict[str, Tensor]
    heard: dict[str, Tensor]


def output_gradients(job: Job) -> Gradients:
    """One pass forward and back."""
    windows = job.windows
    assert windows is not None
    tokens = windows.num_windows * (windows.seq_len - 1)
    ranks = _ranks(job)
    fisher: dict[str, Tensor] = {}
    heard: dict[str, list[Tensor]] = {}

    def take(name: str, gradient_BTD: Tensor, share: float) -> None:
        losses = share * tokens  # the gradient is of the batch's mean loss
        g_ND = gradient_BTD.flatten(0, 1)
        value = (g_ND.T @ g_ND).double() * (losses * losses / tokens)
        fisher[name] = fisher[name] + value if name in fisher else value
        for g_TD in gradient_BTD:
            rows = heard.setdefault(name, [])
            rows.append((g_TD[_heard(ranks[len(rows)], windows.seq_len)] * losses).bfloat16())

    walk_back(job, take, labels=drawn)
    return Gradients(
        {name: job.world.sum_(value) for name, value in fisher.items()},
        {name: torch.cat(rows) for name, rows in heard.items()},
    )


def _ranks(job: Job) -> list[int]:
    """Of this process's windows among all, by their tokens: in whatever order they come, they fall into the same halves."""
    assert job.windows is not None
    ids_NT = job.windows.ids_NT
    order = sorted(range(len(ids_NT)), key=lambda window: ids_NT[window].numpy().tobytes())
    ranks = {window: rank for rank, window in enumerate(order)}
    return [ranks[window] for window in range(len(ids_NT))[job.world.share(len(ids_NT))]]


_HALVES = 2  # of the windows, in turns: what is fitted to one is judged by the other
_EVERY = 4  # which token is heard on what an error would cost it: gradients of all of them are many times the model


def _heard(rank: int, seq_len: int) -> slice:
    """Where a window's heard tokens are; windows begin at different ones, since first tokens are like no others."""
    return slice(rank // _HALVES % min(_EVERY, seq_len - 1), seq_len - 1, _EVERY)


# -- 2: what each size costs ----------------------------------------------------------------------------------------------


@torch.no_grad()
def error_curves(job: Job, gradients: Gradients) -> dict[str, Curve]:
    """Axis name -> nats a token that each size from 1 to the whole costs, by itself, once what reads it is refitted."""
    sweep, ranks = job.sweep(), _ranks(job)
    count = len(sweep.blocks)
    curves: dict[str, Curve] = {}
    for layer in range(count):
        read = {_reading_module(job, axis): axis for axis in axes(job.plan, layer)}
        seen = {module: _Seen(job, ranks, sweep.room) for module in read}
        sweep.gather(layer, seen, onwards=True)
        for module, axis in read.items():
            curves[axis.name] = _curve(job, axis, seen[module], gradients)
        job.progress("score", layer + 1, count)
    return curves


def _reading_module(job: Job, axis: Axis) -> str:
    """The module that reads an axis; where several read the same, the first."""
    assert axis.layer is not None
    return reading_points(job.plan.anatomy, axis.layer)[INPUT_OF[kind_of(axis.name)]][0].removesuffix(".weight")


class _Seen:
    """What a matrix reads: its moments over each half of the windows, and x at the heard tokens."""

    def __init__(self, job: Job, ranks: Sequence[int], room: dict[torch.Size, Tensor]) -> None:
        assert job.windows is not None
        self.ranks, self.done = ranks, 0
        self.halves = [Moments(WANTS, room=room) for _ in range(min(_HALVES, job.windows.num_windows))]
        self.heard: list[Tensor] = []
        self.half_of: list[Tensor] = []

    def update(self, x_BTC: Tensor) -> None:
        """Add a batch of windows."""
        if not self.done:
            for moments in self.halves:
                moments.begin(x_BTC[0])
        for x_TC in x_BTC:
            rank = self.ranks[self.done]
            self.halves[rank % len(self.halves)].update(x_TC[None])
            rows = x_TC[_heard(rank, len(x_TC))].float()
            self.heard.append(rows)
            self.half_of.append(torch.full((len(rows),), rank % len(self.halves)))
            self.done += 1

    def settle(self, world: World) -> None:
        """Nothing more is to come."""
        for moments in self.halves:
            moments.settle(world)


def _curve(job: Job, axis: Axis, seen: _Seen, gradients: Gradients) -> Curve:
    """The errors of an axis's sizes, from what was seen of its inputs.

    A refit is worse on text that it was not fitted to. Fitted to n tokens its error there is e + a / n, and about e - a / n on
    those it was fitted to; from the latter of all tokens and the former of halves comes what all would give elsewhere:
    a third and two thirds of them. Both take gradients for independent of inputs, which `_together` mends.
    """
    if axis.size == 1:
        return _as_curve(torch.zeros(0, dtype=torch.float64))
    plan, reader = job.plan, job.plan.anatomy.reader(axis.name)
    weight, rows = job.tensors[reader.param].double(), reader.rows(range(axis.size))
    root = root_of(gradients.fisher[reader.param])
    gram, tokens = around(seen.halves, centre(plan, seen.halves)), sum(half.count for half in seen.halves)
    found = eliminate(root @ weight, gram, rows, 1, damp=unseen(plan, gram))
    inside = found.added.cumsum(0) / (2 * tokens)
    if len(seen.halves) == 1:
        return _as_curve(inside)
    outside, exact, apart = (torch.zeros(axis.size, dtype=torch.float64) for _ in range(3))
    x_HC, half_H, g_HD = torch.cat(seen.heard), torch.cat(seen.half_of), gradients.heard[reader.param].float()
    for half, fitted in enumerate(seen.halves):
        others = [moments for moments in seen.halves if moments is not fitted]
        nested = _Nested(plan, weight, root, rows, fitted)
        outside += nested.errors(around(others, nested.centre_C)) / (tokens - fitted.count) / len(seen.halves)
        heard = half_H != half
        for sums, told in zip((exact, apart), nested.felt(x_HC[heard], g_HD[heard]), strict=True):
            sums += told
    together = _together(job.world.sum_(exact), job.world.sum_(apart))
    return _as_curve((inside + 2 * outside[:-1]) / 3 * together)


class _Nested:
    """The refits of all sizes of one axis, fitted to some windows.

    L L^T = C, inputs in the order in which they go, the last to go first. Then x = L z, and without the last k inputs the refit's
    error is the sum over them of z_j v_j, v_j column j of W L, whatever k.
    """

    def __init__(self, plan: Plan, weight: Tensor, root: Tensor, rows: Tensor, fitted: Moments) -> None:
        self.centre_C, self.size = centre(plan, [fitted]), rows.shape[1]
        gram = around([fitted], self.centre_C)
        gone = eliminate(root @ weight, gram, rows, 1, damp=unseen(plan, gram)).order
        last = torch.ones(len(rows), dtype=torch.bool)
        last[gone] = False
        self.inputs = rows[torch.cat([last.nonzero().squeeze(1), gone.flip(0)])].reshape(-1)
        self.lower = factor(gram[self.inputs][:, self.inputs] / fitted.count, REFIT_DAMP).lower
        self.parts_DC = weight[:, self.inputs] @ self.lower
        self.root = root

    def errors(self, gram: Tensor) -> Tensor:
        """Sum of e^T F e / 2 over tokens with this Gram matrix around the centre, with 1 to all units gone, float64 [units]."""
        inner = torch.linalg.solve_triangular(self.lower, gram[self.inputs][:, self.inputs], upper=False)
        return self._errors(torch.linalg.solve_triangular(self.lower, inner.T, upper=False))

    def _errors(self, moments_CC: Tensor) -> Tensor:
        """As `errors`, of the sum of z z^T."""
        weighed = self.root @ self.parts_DC
        shares_CC = (weighed.T @ weighed).mul_(moments_CC).flip(0, 1)
        return self._by_unit(shares_CC.cumsum_(0).cumsum_(1).diagonal()) / 2

    def felt(self, x_HC: Tensor, g_HD: Tensor) -> tuple[Tensor, Tensor]:
        """What heard tokens lose with 1 to all units gone: by their own gradients, and by `errors`; float64 [units], summed.

        sqrt(1 + (g^T e)^2) - 1 is (g^T e)^2 / 2 where it is small; a loss grows with its logits' error, and not with the square.
        """
        centred_CH = (x_HC - self.centre_C.float())[:, self.inputs].T
        z_HC = torch.linalg.solve_triangular(self.lower.float(), centred_CH, upper=False).T
        lost_HC = (g_HD @ self.parts_DC.float()).mul_(z_HC).flip(1).cumsum_(1)
        lost_HU = self._by_unit(lost_HC).double()
        exact_HU = torch.hypot(lost_HU, torch.ones((), dtype=torch.float64)) - 1
        return exact_HU.sum(0), self._errors((z_HC.T @ z_HC).double())

    def _by_unit(self, sums: Tensor) -> Tensor:
        """Of sums along the inputs those at the units' ends."""
        return sums[..., self.size - 1 :: self.size]


def _together(exact: Tensor, apart: Tensor) -> float:
    """The mean ratio, of sizes with 1/32 to 3/4 of the units gone: `exact` is more where error and gradient go together.

    In blocks whose channels fire for few words that is several times. Of so few tokens, whose losses have heavy tails, more than
    one number for a matrix cannot be told.
    """
    units = len(exact)
    told = torch.arange(max(1, round(units / 32)), max(1, min(round(0.75 * units), units - 1)) + 1) - 1
    told = told[(exact[told] > 0) & (apart[told] > 0)]
    return float((exact / apart)[told].log().mean().exp()) if len(told) else 1.0


def _as_curve(error_of_gone: Tensor) -> Curve:
    """`error_of_gone`: nats with 1 to all but one unit gone [units - 1]. What more units cost is never less."""
    error = torch.cat([torch.zeros(1, dtype=torch.float64), error_of_gone]).cummax(0).values.flip(0)
    return Curve(tuple(range(1, len(error) + 1)), tuple(error.tolist()))


def centre(plan: Plan, parts: Sequence[Moments]) -> Tensor:
    """What a bias takes up [C]: the mean. Without one, nothing."""
    mean_C = sum(part.count * part.mean_C for part in parts) / sum(part.count for part in parts)
    assert isinstance(mean_C, Tensor)
    return mean_C if plan.compensator == "affine" else torch.zeros_like(mean_C)


def around(parts: Iterable[Moments], centre_C: Tensor) -> Tensor:
    """Sum over tokens of (x - c)(x - c)^T [C, C], float64."""
    total = torch.zeros(len(centre_C), len(centre_C), dtype=torch.float64)
    for part in parts:
        crossed_CC = torch.outer(part.mean_C, centre_C)
        total += part.gram_CC - part.count * (crossed_CC + crossed_CC.T - torch.outer(centre_C, centre_C))
    return total


def axes(plan: Plan, layer: int) -> list[Axis]:
    """The axes of one layer that may be cut, attention before the MLP."""
    return [axis for axis in plan.scored_axes if axis.layer == layer]


def unseen(plan: Plan, gram: Tensor) -> float:
    """Damping where units are priced: an input's variance is taken to be more than it was seen to be, by a share of the median.

    Channels of the last blocks fire for a few words each; those whose words the calibration windows lack would look free
    (LOG.md). The mean would be that of the few channels that are a thousand times as large as the others. Refits go by what was
    seen.
    """
    diagonal = gram.diagonal()
    alive = diagonal[diagonal > 0]
    return float(plan.options["unseen"]) * float(alive.median() / diagonal.mean()) if len(alive) else 0.0


def root_of(fisher_DD: Tensor) -> Tensor:
    """R with R^T R = F: in R y the squared error is the loss."""
    values, vectors = torch.linalg.eigh(fisher_DD)
    return (vectors * values.clamp_min(0).sqrt()).T
