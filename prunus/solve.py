"""Least squares on Gram matrices: refit what reads the survivors, and SparseGPT's blocked update.

Shapes: W [out, in]; G = X^T X [in, in] over the calibration tokens. The error of W' is tr((W - W') G (W - W')^T), which is
||X W^T - X W'^T||^2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .allocate import kept_in_matrix, kept_n_of_m

DAMP = 0.01  # of the mean diagonal (SparseGPT)
REFIT_DAMP = 1e-4
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


def refit(weight: Tensor, gram: Tensor, kept: Tensor, cross: Tensor | None = None, damp: float = REFIT_DAMP) -> Tensor:
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
                kept.copy_(kept_in_matrix(part, sparsity))
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
    # v is W + U. What goes of it is the next U, and Z - U is v with the sign of that turned. Memory is slow beside the
    # products, so all steps share four tensors
    v, u, right, goes = start.clone(), torch.empty_like(start), torch.empty_like(start), torch.zeros_like(start)
    for step in range(_ITERATIONS):
        if step <= _GRADUAL:
            share = 1 - (1 - step / _GRADUAL) ** 3
            scores = torch.abs(v, out=u)
            kept = torch.cat([_kept_share(s, share, sparsity, pattern) for s in scores.split(sizes)])
            goes.copy_(~kept)
        torch.mul(v, goes, out=u)
        torch.sub(v, u, alpha=2, out=right)
        torch.add(pull, u, out=v).addmm_(right, inverse)
    z = v.mul_(kept).div_(norms)
    parts = zip(z.split(sizes), kept.split(sizes), strict=True)
    return [(weight.contiguous(), mask.contiguous()) for weight, mask in parts]


def _kept_share(scores: Tensor, share: float, sparsity: float | None, pattern: tuple[int, int] | None) -> Tensor:
    """Bool mask [out, in] with `share` of the weights gone that are to go in the end, the lowest scores first."""
    if pattern is None:
        assert sparsity is not None
        return kept_in_matrix(scores, share * sparsity)
    n, m = pattern
    candidates = scores.masked_fill(kept_n_of_m(scores, n, m), torch.inf)
    return kept_in_matrix(candidates, share * (1 - n / m))
