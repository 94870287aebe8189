"""Where the cut falls: scores and a target make a decision. Pure and deterministic; ties go to the lower index."""

from __future__ import annotations

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
    position: int
    units: tuple[int, ...]
    cost: int


def _chunks(name: str, scores: Tensor, unit_cost: int, multiple_of: int) -> list[_Chunk]:
    """Units of an axis, best first, in chunks of `multiple_of`; the last chunk holds the remainder."""
    order = torch.argsort(scores, descending=True, stable=True).tolist()
    parts = [order[i : i + multiple_of] for i in range(0, len(order), multiple_of)]
    return [
        _Chunk(float(scores[part].double().mean()), name, i, tuple(part), unit_cost * len(part))
        for i, part in enumerate(parts)
    ]


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
    chunks = [
        chunk
        for name, scores in values.items()
        for chunk in _chunks(name, scores, unit_costs[name], multiple_of.get(kind_of(name), 1))
    ]
    chunks.sort(key=lambda c: -c.score)  # stable: ties by layer, then position
    kept: dict[str, list[int]] = {name: [] for name in values}
    left = budget
    for chunk in (c for c in chunks if c.position == 0):
        kept[chunk.axis].extend(chunk.units)
        left -= chunk.cost
    if left < 0:
        raise UserError(
            f"ratio: the least that can stay (one unit of every axis) costs {budget - left:,} parameters, but the target "
            f"leaves {budget:,}; ask for a smaller ratio"
        )
    reached = dict.fromkeys(values, 1)
    for chunk in chunks:
        if chunk.position == reached[chunk.axis] and chunk.cost <= left:
            kept[chunk.axis].extend(chunk.units)
            left -= chunk.cost
            reached[chunk.axis] += 1
    return Keep({name: tuple(sorted(units)) for name, units in kept.items() if len(units) < len(values[name])})


def contiguous(losses: list[float], run: int, num_layers: int) -> Keep:
    """Remove the run of `run` layers whose absence costs least: `losses[i]` is the loss without layers i to i+run-1."""
    assert len(losses) == num_layers - run + 1, (len(losses), run, num_layers)
    start = int(np.argmin(losses))
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
