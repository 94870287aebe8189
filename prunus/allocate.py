"""Where the cut falls: scores and a target make a decision. Pure and deterministic; ties go to the lower index."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .axes import kind_of
from .criteria import Scores
from .errors import UserError
from .keep import Keep

_HALVINGS = 60  # of an interval of at most 3: far below what one parameter of a layer is worth

# -- units --------------------------------------------------------------------------------------------------------------


def top(scores: Tensor, count: int) -> tuple[int, ...]:
    """The `count` best units, sorted by index."""
    order = torch.argsort(scores, descending=True, stable=True)[:count]
    return tuple(sorted(order.tolist()))


def to_counts(scores: Scores, counts: Mapping[str, int]) -> Keep:
    """Keep the given number of units on each axis, best first."""
    return Keep({name: top(scores.values[name], n) for name, n in counts.items() if n < len(scores.values[name])})


def standardised(scores: Scores) -> dict[str, Tensor]:
    """(s - mean) / std with the mean and deviation of the channels under each axis (FLAP section 3.2), float64."""
    out = {}
    for name, values in scores.values.items():
        mean, std = scores.spread.get(name) or (float(values.double().mean()), float(values.double().std(correction=0)))
        out[name] = (values.double() - mean) / max(std, 1e-12)
    return out


def global_budget(
    values: Mapping[str, Tensor], prices: Mapping[str, Sequence[int]], budget: int, *, multiple_of: Mapping[str, int]
) -> Keep:
    """Rank the units of all axes together and keep the best whose costs fit into `budget`; `prices[axis][n]`: of n units.

    Every axis keeps at least its best chunk. A unit that does not fit is passed over for a cheaper one, so what is kept
    costs at most the budget and falls short of it by less than the cheapest next chunk (unless nothing is left to add).
    """
    names = list(values)
    chunk = [multiple_of.get(kind_of(name), 1) for name in names]
    best_first = [torch.argsort(scores, descending=True, stable=True) for scores in values.values()]
    worth, costs, taken = [], [], []  # of every axis' chunks, best first; chunks taken
    for name, size, order in zip(names, chunk, best_first, strict=True):
        starts = np.arange(0, len(order), size)
        sizes = np.diff(starts, append=len(order))
        means = np.add.reduceat(values[name][order].double().numpy(), starts) / sizes
        worth.append(np.minimum.accumulate(means))  # rounding must not let a chunk overtake a better one of its axis
        costs.append(np.diff(np.asarray(prices[name])[np.append(starts, len(order))]))
        taken.append(1)
    least = sum(int(cost[0]) for cost in costs)
    if least > budget:
        raise UserError(
            f"ratio: the least that can stay (one unit of every axis) costs {least:,} of what is counted, but the target leaves "
            f"{budget:,}; ask for a smaller ratio"
        )
    axis = np.repeat(np.arange(len(names)), [len(cost) - 1 for cost in costs])
    cost = np.concatenate([c[1:] for c in costs])
    ranked = np.argsort(-np.concatenate([w[1:] for w in worth]), kind="stable")  # ties: the earlier axis, the better chunk
    axis, cost, left = axis[ranked], cost[ranked], budget - least
    fit = int(np.searchsorted(np.cumsum(cost), left, side="right"))
    left -= int(cost[:fit].sum())
    taken_A = np.asarray(taken) + np.bincount(axis[:fit], minlength=len(names))
    closed: set[int] = set()
    for i, price in zip(axis[fit:].tolist(), cost[fit:].tolist(), strict=True):
        if i in closed:
            continue
        if price > left:
            closed.add(i)
        else:
            left -= price
            taken_A[i] += 1
    keep = {}
    for name, size, order, count in zip(names, chunk, best_first, taken_A.tolist(), strict=True):
        if count * size < len(order):
            keep[name] = tuple(sorted(order[: count * size].tolist()))
    return Keep(keep)


@dataclass(frozen=True)
class Curve:
    """What one axis loses at every size that it may have: `sizes` ascending, units; `error` in one unit for all axes."""

    sizes: tuple[int, ...]
    error: tuple[float, ...]


_MOST_STATES = 200_000  # of the programme: beyond that costs are rounded up to a coarser grain


def least_error(curves: Mapping[str, Curve], prices: Mapping[str, Sequence[int]], budget: int) -> dict[str, int]:
    """Units of every axis with the least sum of errors whose prices fit into `budget`: an exact dynamic programme.

    `prices[axis][n]` is what n units cost. It counts in the largest grain that divides all prices, so it is exact; were that
    more than `_MOST_STATES` steps, prices are rounded up, and what is kept may fall short of the budget by one grain an
    axis. UserError if nothing fits.
    """
    listed = {name: [prices[name][size] for size in curve.sizes] for name, curve in curves.items()}
    least = {name: curve.sizes[0] for name, curve in curves.items()}
    if sum(costs[0] for costs in listed.values()) > budget:
        raise UserError(f"ratio: even the smallest sizes cost more than the {budget:,} that the target leaves")
    grain = math.gcd(*(cost for costs in listed.values() for cost in costs)) or 1
    grain *= max(1, math.ceil(budget / grain / _MOST_STATES))
    room = budget // grain
    best = np.zeros(room + 1)
    choices = []
    for name, curve in curves.items():
        found, choice = np.full(room + 1, np.inf), np.zeros(room + 1, dtype=np.int32)
        for i, (cost, error) in enumerate(zip(listed[name], curve.error, strict=True)):
            steps = -(-cost // grain)
            if steps <= room:
                tried = best[: room + 1 - steps] + error
                better = tried < found[steps:]
                found[steps:][better] = tried[better]
                choice[steps:][better] = i
        best = found
        choices.append(choice)
    if not np.isfinite(best[-1]):  # the smallest sizes fit, but not with their prices rounded up
        return least
    sizes, left = {}, room
    for name, choice in zip(reversed(list(curves)), reversed(choices), strict=True):
        level = choice[left]
        sizes[name] = curves[name].sizes[level]
        left -= -(-listed[name][level] // grain)
    return sizes


def contiguous(losses: list[float], run: int, num_layers: int) -> Keep:
    """Remove the run of `run` layers whose absence costs least: `losses[i]` is the loss without layers i to i+run-1."""
    assert len(losses) == num_layers - run + 1, (len(losses), run, num_layers)
    start = int(np.argmin(np.nan_to_num(np.asarray(losses), nan=np.inf)))  # a loss that is no number is never the least
    return Keep({"layers": tuple(i for i in range(num_layers) if not start <= i < start + run)})


def adaptive_ratios(
    importance_L: Tensor, size_L: Sequence[int], most_L: Sequence[float], removed: int, amplitude: float
) -> list[float]:
    """The share of every layer that goes, S_l = clip(b - A * Ihat_l, 0, most_l); b such that `removed` parameters go in all.

    Ihat is the importance less its mean, over its largest absolute value (Adapt-Pruner); equal layers get equal shares.
    `size_L` are the layers' parameters. The sum grows with b, so b is found by bisection, clipped layers included.
    """
    centred_L = importance_L.double() - importance_L.double().mean()
    scale = float(centred_L.abs().max())
    noise = float(importance_L.abs().max()) * torch.finfo(importance_L.dtype).eps  # what rounding makes of equal layers
    ihat = [0.0] * len(size_L) if scale <= noise else (centred_L / scale).tolist()

    def ratios(b: float) -> list[float]:
        return [min(max(b - amplitude * i, 0.0), most) for i, most in zip(ihat, most_L, strict=True)]

    low, high = -amplitude, 1.0 + amplitude
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        gone = sum(ratio * size for ratio, size in zip(ratios(middle), size_L, strict=True))
        low, high = (middle, high) if gone < removed else (low, middle)
    return ratios(high)


# -- weights ------------------------------------------------------------------------------------------------------------


def kept_in_matrix(scores: Tensor, sparsity: float) -> Tensor:
    """Bool mask [out, in]: exactly round(sparsity * numel) of the lowest scores go; ties by index."""
    flat = scores.reshape(1, -1)
    return _all_but_lowest(flat, round(sparsity * flat.shape[1])).reshape(scores.shape)


def kept_in_rows(scores: Tensor, sparsity: float) -> Tensor:
    """Bool mask [out, in]: int(sparsity * in) of the lowest scores go in every row (Wanda)."""
    return _all_but_lowest(scores, int(sparsity * scores.shape[1]))


def kept_n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    """Bool mask [out, in]: the n best of every m consecutive inputs of a row stay, also with ties."""
    rows, columns = scores.shape
    order = torch.argsort(scores.reshape(rows, columns // m, m), dim=-1, descending=True, stable=True)
    kept = torch.zeros(order.shape, dtype=torch.bool).scatter_(-1, order[..., :n], True)
    return kept.reshape(rows, columns)


def _all_but_lowest(scores: Tensor, count: int) -> Tensor:
    """Per row: True for all but exactly `count` lowest entries, ties broken by index.

    A partition finds each row's threshold (numpy's is vectorised and some ten times faster than a sort); only rows where
    the threshold is tied are sorted.
    """
    if count <= 0:
        return torch.ones(scores.shape, dtype=torch.bool)
    values = scores.numpy()
    threshold = torch.from_numpy(np.partition(values, count - 1, axis=1)[:, count - 1 : count])
    kept = scores > threshold
    tied = np.count_nonzero(kept.numpy(), axis=1) != kept.shape[1] - count  # ten times faster than a sum of bools
    for row in np.flatnonzero(tied).tolist():
        order = torch.argsort(scores[row], stable=True)
        kept[row] = True
        kept[row, order[:count]] = False
    return kept
