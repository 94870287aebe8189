"""Least squares on Gram matrices: refit what reads the survivors, and SparseGPT's blocked update.

Shapes: W [out, in]; G = X^T X [in, in] over the calibration tokens. The error of W' is tr((W - W') G (W - W')^T), which is
||X W^T - X W'^T||^2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DAMP = 0.01  # of the mean diagonal (SparseGPT)
ESCALATE, MOST = 10.0, 5


@dataclass(frozen=True)
class Factor:
    """A Cholesky factor, and the damping it took (a multiple of the mean diagonal): more than asked is worth a note."""

    lower: Tensor
    damp: float
    escalated: bool


def factor(gram: Tensor, damp: float = DAMP) -> Factor:
    """Lower Cholesky factor of G + damp * mean(diag G) * I; damping grows tenfold until it succeeds.

    Raises ArithmeticError if it never does (a NaN in G).
    """
    mean = float(gram.diagonal().mean())
    used = damp
    for _ in range(MOST):
        damped = gram.clone()
        damped.diagonal().add_(used * mean if mean > 0 else 1.0)
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            return Factor(lower, used, used > damp)
        used = max(used * ESCALATE, 1e-8)
    raise ArithmeticError(f"no Cholesky factor of a Gram matrix of size {gram.shape[0]} even with damping {used:g}")


def refit(weight: Tensor, gram: Tensor, kept: Tensor, cross: Tensor | None = None, damp: float = 1e-4) -> Tensor:
    """W' [out, kept]: the weights on the kept inputs that best give W's output, W' = W C[:, S] G[S, S]^-1.

    `gram` is of the inputs that the cut matrix will see, X^T X; `cross` = Z^T X relates the dense inputs Z that W was
    meant for to them (the same matrix if None). Exact minimiser up to damping; float64.
    """
    target = gram if cross is None else cross
    small = factor(gram[kept][:, kept].double(), damp)
    right = (weight.double() @ target[:, kept].double()).T  # [kept, out]
    return torch.cholesky_solve(right, small.lower).T


@dataclass(frozen=True)
class Inverse:
    """U upper triangular [in, in] with (G + damping)^-1 = U^T U, the inputs that are always zero, and the damping."""

    upper: Tensor
    dead: Tensor
    damp: float
    escalated: bool


def inverse_upper(gram: Tensor, damp: float = DAMP) -> Inverse:
    """One Cholesky of the flipped matrix and one triangular inverse, float32. Dead inputs get a unit diagonal."""
    gram = gram.float().clone()
    dead = gram.diagonal() == 0
    gram.diagonal()[dead] = 1.0
    found = factor(gram.flip(0, 1), damp)
    upper = found.lower.flip(0, 1)  # G = R R^T with R upper triangular, so G^-1 = R^-T R^-1
    eye = torch.eye(gram.shape[0], dtype=gram.dtype)
    return Inverse(torch.linalg.solve_triangular(upper, eye, upper=True), dead, found.damp, found.escalated)


_BLOCK, _INNER = 128, 16


def sparsegpt(
    weights: Sequence[Tensor],
    inverse: Inverse,
    *,
    sparsity: float | None = None,
    pattern: tuple[int, int] | None = None,
    masks: Sequence[Tensor] | None = None,
    block: int = _BLOCK,
) -> list[tuple[Tensor, Tensor]]:
    """SparseGPT (arXiv 2301.00774) on matrices that read one input: (pruned weight, bool mask [out, in]) of each, float32.

    Columns go left to right in blocks of `block`. For a `sparsity` the round(sparsity * out * block) weights of a matrix's
    block with the lowest w^2 / U_jj^2 go; for a `pattern` (n, m) the m - n lowest of every m columns of a row, at the current
    weights; given `masks` (True = keep) are taken as they are. What a removed weight carried goes to the columns behind it.
    Dead inputs are removed. All rows of all matrices move together; rows never meet.
    """
    upper, sizes = inverse.upper, [w.shape[0] for w in weights]
    w_IO = torch.cat([w.float() for w in weights]).T.contiguous()  # a column of W is a contiguous row here
    columns, rows = w_IO.shape
    w_IO[inverse.dead] = 0
    kept_IO = torch.ones(columns, rows, dtype=torch.bool) if masks is None else torch.cat(list(masks)).T.contiguous()
    scale = upper.diagonal().square()
    for start in range(0, columns, block):
        end = min(start + block, columns)
        if masks is None and sparsity is not None:
            scores = w_IO[start:end].square() / scale[start:end, None]
            for part, kept in zip(scores.split(sizes, 1), kept_IO[start:end].split(sizes, 1), strict=True):
                flat = torch.ones(part.numel(), dtype=torch.bool)
                count = round(sparsity * part.numel())
                flat[torch.topk(part.reshape(-1), count, largest=False, sorted=False).indices] = False
                kept.copy_(flat.view(part.shape))
        errors = torch.zeros(end - start, rows)
        for inner in range(start, end, _INNER):
            stop = min(inner + _INNER, end)
            for j in range(inner, stop):
                if masks is None and pattern is not None and j % pattern[1] == 0:
                    _choose_n_of_m(w_IO, kept_IO, scale, j, pattern)
                error = torch.where(kept_IO[j], 0.0, w_IO[j]).div_(upper[j, j])
                ahead = end if pattern is not None and masks is None else stop  # n:m looks m columns ahead
                if j + 1 < ahead:
                    w_IO[j + 1 : ahead].addr_(upper[j, j + 1 : ahead], error, alpha=-1)
                errors[j - start] = error
            if stop < end and (pattern is None or masks is not None):
                w_IO[stop:end].addmm_(upper[inner:stop, stop:end].T, errors[inner - start : stop - start], alpha=-1)
        if end < columns:
            w_IO[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    w_IO.masked_fill_(~kept_IO, 0)
    parts = zip(w_IO.T.split(sizes), kept_IO.T.split(sizes), strict=True)
    return [(w.contiguous(), kept.contiguous()) for w, kept in parts]


def _choose_n_of_m(w_IO: Tensor, kept_IO: Tensor, scale: Tensor, j: int, pattern: tuple[int, int]) -> None:
    """Changes `kept_IO`: of columns j to j + m - 1 the m - n with the lowest score go, row by row of W."""
    n, m = pattern
    scores = w_IO[j : j + m].square() / scale[j : j + m, None]
    goes = torch.topk(scores, m - n, dim=0, largest=False).indices
    kept_IO[j : j + m] = kept_IO[j : j + m].scatter(0, goes, False)


_RHO, _ITERATIONS, _GRADUAL = 1.0, 30, 20


def admm(
    weights: Sequence[Tensor],
    gram: Tensor,
    *,
    sparsity: float | None = None,
    pattern: tuple[int, int] | None = None,
    damp: float = DAMP,
) -> list[tuple[Tensor, Tensor]]:
    """Sparse weights by ADMM on the layer error (Boza 2024, arXiv 2401.02938): (weight, bool mask [out, in]) of each, float32.

    Inputs are scaled to norm 1, so |w| is Wanda's score. W = (G + rho)^-1 (G W_0 + rho (Z - U)) moves all weights of a row
    together, Z is W + U without its lowest scores, and U adds up what that took. The share that goes grows over the first
    `_GRADUAL` iterations (cubic schedule); then the mask stays and the rest converges to its least squares. For a `sparsity`
    a matrix' scores are ranked together; for a `pattern` (n, m) n of every m inputs of a row stay. All rows of all matrices
    that read one input share one factorisation.
    """
    sizes = [w.shape[0] for w in weights]
    norms = gram.diagonal().sqrt().float()
    dead = norms == 0
    norms = norms.masked_fill(dead, 1.0)
    start = torch.cat([w.float() for w in weights]).masked_fill(dead, 0) * norms
    unit = gram.float() / norms / norms[:, None]
    unit.diagonal().add_(damp + dead.float())
    shifted = unit.clone()
    shifted.diagonal().add_(_RHO)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(shifted))
    pull = start @ unit @ inverse
    inverse *= _RHO
    w, u, z = start, torch.zeros_like(start), start
    kept = torch.ones(start.shape, dtype=torch.bool)
    for step in range(_ITERATIONS):
        if step <= _GRADUAL:
            share = 1 - (1 - step / _GRADUAL) ** 3
            scores = (w + u).abs_()
            kept = torch.cat([_kept_share(s, share, sparsity, pattern) for s in scores.split(sizes)])
        z = (w + u) * kept
        u += w - z
        w = torch.addmm(pull, z - u, inverse)
    z = (w + u) * kept / norms
    parts = zip(z.split(sizes), kept.split(sizes), strict=True)
    return [(weight.contiguous(), mask.contiguous()) for weight, mask in parts]


def _kept_share(scores: Tensor, share: float, sparsity: float | None, pattern: tuple[int, int] | None) -> Tensor:
    """Bool mask [out, in] with `share` of the weights gone that are to go in the end, the lowest scores first."""
    if pattern is None:
        assert sparsity is not None
        candidates, count = scores, round(share * sparsity * scores.numel())
    else:
        n, m = pattern
        order = torch.argsort(scores.unflatten(1, (-1, m)), dim=-1, descending=True, stable=True)
        stays = torch.zeros(order.shape, dtype=torch.bool).scatter_(-1, order[..., :n], True).flatten(1)
        candidates = scores.masked_fill(stays, torch.inf)
        count = round(share * (1 - n / m) * scores.numel())
    kept = torch.ones(scores.numel(), dtype=torch.bool)
    kept[torch.topk(candidates.reshape(-1), count, largest=False, sorted=False).indices] = False
    return kept.view(scores.shape)


@dataclass(frozen=True)
class Elimination:
    """Units in the order in which they went, int64 [gone], and what each added to the output error, float64 [gone]."""

    order: Tensor
    added: Tensor


def eliminate(
    weight: Tensor, gram: Tensor, rows: Tensor, keep: int, *, damp: float = 1e-3, step: float = 0.05
) -> Elimination:
    """Remove units of a matrix's input until `keep` stay, the cheapest first, each repaired by least squares (OBS).

    `rows` [U, S] are the S inputs of every unit. A unit's cost is tr(W_u (G^-1)_uu^-1 W_u^T), the error that its removal adds
    once the inputs that stay have taken over what they can (ZipLM eq. 2; for S = 1 it is |W_j|^2 / [G^-1]_jj). A share `step`
    of the units that are to go goes between two updates of G^-1; what each adds is exact also inside such a step. Inputs that
    are always zero cost nothing. Float64.
    """
    units, size = rows.shape
    inputs = rows.reshape(-1)
    inverse = torch.cholesky_inverse(factor(gram[inputs][:, inputs].double(), damp).lower)
    matrix = _alive(weight, gram, inputs)
    alive, here = torch.arange(units), torch.ones(units, dtype=torch.bool)
    order, added = [], []
    at_once = max(1, math.ceil((units - keep) * step))
    while (count := min(at_once, int(here.sum()) - keep)) > 0:
        costs = _unit_costs(matrix, inverse, size).masked_fill_(~here, math.inf)
        goes = torch.argsort(costs, descending=True, stable=True)[len(alive) - count :].flip(0)  # of equals the first stays
        gone = _inputs_of(goes, size)
        corner = torch.linalg.cholesky(inverse[gone][:, gone])
        both = torch.cat([matrix[:, gone].T, inverse[gone]], 1)
        of_weight, of_inverse = torch.linalg.solve_triangular(corner, both, upper=False).split(
            [matrix.shape[0], matrix.shape[1]], 1
        )
        order.append(alive[goes])
        added.append(of_weight.square().sum(1).view(-1, size).sum(1))
        matrix.addmm_(of_weight.T, of_inverse, alpha=-1)
        inverse.addmm_(of_inverse.T, of_inverse, alpha=-1)
        matrix[:, gone] = inverse[:, gone] = inverse[gone] = 0
        inverse[gone, gone] = 1
        here[goes] = False
        if int(here.sum()) < _CROWDED * len(here):
            rest = _inputs_of(here.nonzero().squeeze(1), size)
            matrix, inverse, alive, here = matrix[:, rest], inverse[rest][:, rest], alive[here], here[here]
    none = torch.zeros(0)
    return Elimination(torch.cat([none.long(), *order]), torch.cat([none.double(), *added]))


def _alive(weight: Tensor, gram: Tensor, inputs: Tensor) -> Tensor:
    """W's columns, float64; those of dead inputs are zero, or damping would give them a price."""
    return weight[:, inputs].double() * (gram.diagonal()[inputs] > 0)


_CROWDED = 0.8  # of the units in the matrices must be alive: those that went are taken out together, as copies cost more


def _inputs_of(units: Tensor, size: int) -> Tensor:
    """Inputs of units that own `size` neighbouring ones each, int64."""
    return (units[:, None] * size + torch.arange(size)).reshape(-1)


def _unit_costs(matrix: Tensor, inverse: Tensor, size: int) -> Tensor:
    """tr(W_u (G^-1)_uu^-1 W_u^T) of every unit of `size` neighbouring inputs, float64 [U]."""
    return _quotients(_by_unit(matrix, size), _corners(inverse, size))


def _corners(square: Tensor, size: int) -> Tensor:
    """The blocks on the diagonal [U, S, S]."""
    units = square.shape[0] // size
    return square.reshape(units, size, units, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _by_unit(matrix: Tensor, size: int) -> Tensor:
    """[O, U * S] -> [U, S, O]."""
    return matrix.reshape(matrix.shape[0], -1, size).permute(1, 2, 0)


def _quotients(weights_USO: Tensor, blocks_USS: Tensor) -> Tensor:
    """tr(W_u^T B_u^-1 W_u) of every unit, float64 [U]."""
    if blocks_USS.shape[1] == 1:
        return weights_USO[:, 0].square().sum(1) / blocks_USS[:, 0, 0]
    root = torch.linalg.cholesky(blocks_USS)
    return torch.linalg.solve_triangular(root, weights_USO, upper=False).square().sum((1, 2))


# -- which units stay -----------------------------------------------------------------------------------------------------


def stay_one_by_one(weight: Tensor, gram: Tensor, rows: Tensor, keep: int) -> tuple[int, ...]:
    """ZipLM's choice (arXiv 2302.04089, algorithm 1): `eliminate`, one unit after another."""
    return _all_but(eliminate(weight, gram, rows, keep, step=0.0).order, len(rows))


def stay_after_swaps(
    weight: Tensor, gram: Tensor, rows: Tensor, keep: int, *, damp: float = 1e-2, swaps: int = 32
) -> tuple[int, ...]:
    """OSSCAR's choice (arXiv 2403.12983): `eliminate`, then swap units while ||X W^T - X_S W'^T||^2 of the best W' falls.

    A round takes back the unit that gains most for which another can go at a lower cost than its gain. It ends after `swaps`
    rounds, or where no swap of two units lowers the error. Exact costs, on the damped Gram matrix; float64.
    """
    units, size = rows.shape
    inputs = rows.reshape(-1)
    dense, whole = _alive(weight, gram, inputs), gram[inputs][:, inputs].double()
    whole.diagonal().add_(damp * float(whole.diagonal().mean()) or 1.0)
    inside = torch.tensor(_all_but(eliminate(weight, gram, rows, keep, damp=damp).order, units))
    for _ in range(swaps):
        found = _swap(dense, whole, inside, size)
        if found is None:
            break
        goes, comes = found
        inside[goes] = comes
        inside = inside.sort().values
    return tuple(inside.tolist())


def _all_but(gone: Tensor, units: int) -> tuple[int, ...]:
    stays = torch.ones(units, dtype=torch.bool)
    stays[gone] = False
    return tuple(stays.nonzero().squeeze(1).tolist())


_LESS = 1.0 - 1e-9  # a swap that gains less than rounding could go round in circles


def _swap(dense: Tensor, gram: Tensor, inside: Tensor, size: int) -> tuple[int, int] | None:
    """(index into `inside`, unit) of a swap that lowers the error; None if there is none.

    With unit j among the inputs S, its Schur complement D_j and R_j = W G_:j - W'_S G_Sj, the error falls by
    tr(R_j D_j^-1 R_j^T). The weights become W'_S - R_j D_j^-1 U_j^T and the inverse G_SS^-1 + U_j D_j^-1 U_j^T, with
    U_j = G_SS^-1 G_Sj, which gives the costs of all units of S.
    """
    units = gram.shape[0] // size
    stays = _inputs_of(inside, size)
    outside = torch.tensor([u for u in range(units) if u not in set(inside.tolist())], dtype=torch.int64)
    if not len(outside):
        return None
    away = _inputs_of(outside, size)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram[stays][:, stays]))
    matrix = dense @ gram[:, stays] @ inverse
    solved = inverse @ gram[stays][:, away]
    missing_JSO = _by_unit(dense @ gram[:, away] - matrix @ gram[stays][:, away], size)
    schur_JSS = _corners(gram[away][:, away] - gram[away][:, stays] @ solved, size)
    gains = _quotients(missing_JSO, schur_JSS)
    weights_USO, corners_USS = _by_unit(matrix, size), _corners(inverse, size)
    for j in torch.argsort(gains, descending=True, stable=True).tolist():
        u_USS = solved[:, j * size : (j + 1) * size].view(len(inside), size, size)
        moved_USS = torch.linalg.solve(schur_JSS[j], u_USS.mT).mT  # U_j D_j^-1
        costs = _quotients(weights_USO - moved_USS @ missing_JSO[j], corners_USS + moved_USS @ u_USS.mT)
        goes = int(costs.argmin())
        if float(costs[goes]) < _LESS * float(gains[j]):
            return goes, int(outside[j])
    return None
