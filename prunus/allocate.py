"""Where the cut falls: scores and a target make a decision. Pure and deterministic; ties go to the lower index."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .axes import kind_of
from .criteria import Scores
from .errors import UserError
from .keep import Keep

# -- units --------------------------------------------------------------------------------------------------------------


def top(scores: Tensor, count: int) -> tuple[int, ...]:
    """The `count` best units, sorted by index."""
    order = torch.argsort(scores, descending=True, stable=True)[:count]
    return tuple(sorted(order.tolist()))


def to_counts(scores: Scores, counts: Mapping[str, int]) -> Keep:
    """Keep the given number of units on each axis, best first."""
    return Keep({name: top(scores.values[name], n) for name, n in counts.items() if n < len(scores.values[name])})


@dataclass(frozen=True)
class _Chunk:
    """Units of one axis that come or go together."""

    score: float
    axis: str
    units: tuple[int, ...]
    cost: int


def _chunks(name: str, scores: Tensor, unit_cost: int, multiple_of: int) -> list[_Chunk]:
    """Units of an axis, best first, in chunks of `multiple_of`; the last chunk holds the remainder."""
    order_U = torch.argsort(scores, descending=True, stable=True)
    order, ranked = order_U.tolist(), scores[order_U].double().tolist()
    starts = range(0, len(order), multiple_of)
    parts = [(order[i : i + multiple_of], ranked[i : i + multiple_of]) for i in starts]
    return [_Chunk(sum(worth) / len(worth), name, tuple(units), unit_cost * len(units)) for units, worth in parts]


def standardised(scores: Scores) -> dict[str, Tensor]:
    """(s - mean) / std with the mean and deviation of the channels under each axis (FLAP section 3.2), float64."""
    out = {}
    for name, values in scores.values.items():
        mean, std = scores.spread.get(name) or (float(values.double().mean()), float(values.double().std(correction=0)))
        out[name] = (values.double() - mean) / max(std, 1e-12)
    return out


def global_budget(
    values: Mapping[str, Tensor], unit_costs: Mapping[str, int], budget: int, *, multiple_of: Mapping[str, int]
) -> Keep:
    """Rank the units of all axes together and keep the best whose costs fit into `budget`.

    Every axis keeps at least its best chunk. A unit that does not fit is passed over for a cheaper one, so what is kept
    costs at most the budget and falls short of it by less than the cheapest chunk (unless nothing is left to add).
    """
    queues = {n: _chunks(n, scores, unit_costs[n], multiple_of.get(kind_of(n), 1)) for n, scores in values.items()}
    kept = {name: list(queue[0].units) for name, queue in queues.items()}
    left = budget - sum(queue[0].cost for queue in queues.values())
    if left < 0:
        raise UserError(
            f"ratio: the least that can stay (one unit of every axis) costs {budget - left:,} parameters, but the target "
            f"leaves {budget:,}; ask for a smaller ratio"
        )
    # best first; a chunk becomes a candidate once the better ones of its axis are kept, ties go to the earlier axis
    ready = [(-queue[1].score, i, 1, queue) for i, queue in enumerate(queues.values()) if len(queue) > 1]
    heapq.heapify(ready)
    while ready:
        _, i, position, queue = heapq.heappop(ready)
        if queue[position].cost > left:
            continue
        kept[queue[position].axis].extend(queue[position].units)
        left -= queue[position].cost
        if position + 1 < len(queue):
            heapq.heappush(ready, (-queue[position + 1].score, i, position + 1, queue))
    return Keep({name: tuple(sorted(units)) for name, units in kept.items() if len(units) < len(values[name])})


def contiguous(losses: list[float], run: int, num_layers: int) -> Keep:
    """Remove the run of `run` layers whose absence costs least: `losses[i]` is the loss without layers i to i+run-1."""
    assert len(losses) == num_layers - run + 1, (len(losses), run, num_layers)
    start = int(np.argmin(np.nan_to_num(np.asarray(losses), nan=np.inf)))  # a loss that is no number is never the least
    return Keep({"layers": tuple(i for i in range(num_layers) if not start <= i < start + run)})


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
    tied = (~kept).sum(1) != count
    for row in tied.nonzero().squeeze(1).tolist():
        order = torch.argsort(scores[row], stable=True)
        kept[row] = True
        kept[row, order[:count]] = False
    return kept
