"""Least squares on Gram matrices: refit what reads the survivors, and SparseGPT's blocked update.

Shapes: W [out, in]; G = X^T X [in, in] over the calibration tokens. The error of W' is tr((W - W') G (W - W')^T), which is
||X W^T - X W'^T||^2.
"""

from __future__ import annotations

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


def inverse_upper(gram: Tensor, damp: float = DAMP) -> tuple[Tensor, Factor]:
    """U upper triangular with (G + damping)^-1 = U^T U: one Cholesky of the flipped matrix and one triangular inverse."""
    flipped = factor(gram.flip(0, 1), damp)
    upper = flipped.lower.flip(0, 1)  # G = R R^T with R upper triangular, so G^-1 = R^-T R^-1
    eye = torch.eye(gram.shape[0], dtype=gram.dtype)
    return torch.linalg.solve_triangular(upper, eye, upper=True), flipped


@dataclass(frozen=True)
class Sparse:
    """A pruned matrix, its mask, and the damping that the factorisation took."""

    weight: Tensor
    kept: Tensor
    damp: float
    escalated: bool


_BLOCK, _INNER = 128, 16


def sparsegpt(
    weight: Tensor,
    gram: Tensor,
    *,
    sparsity: float | None = None,
    pattern: tuple[int, int] | None = None,
    damp: float = DAMP,
    block: int = _BLOCK,
    mask: Tensor | None = None,
) -> Sparse:
    """SparseGPT (arXiv 2301.00774) on one matrix, float32.

    Columns go left to right in blocks of `block`. For a `sparsity` the round(sparsity * out * block) weights of a block with
    the lowest w^2 / U_jj^2 go; for a `pattern` (n, m) the m - n lowest of every m columns of a row, at the current weights.
    What a removed weight carried goes to the columns behind it. A given `mask` (True = keep) is used instead of scores. Dead
    inputs (G_jj = 0) are removed.
    """
    rows, columns = weight.shape
    diagonal = gram.diagonal()
    dead = diagonal == 0
    gram = gram.float().clone()
    gram.diagonal()[dead] = 1.0
    upper, found = inverse_upper(gram, damp)
    w_IO = weight.float().T.clone()  # columns of W as contiguous rows
    w_IO[dead] = 0
    kept_IO = torch.ones(columns, rows, dtype=torch.bool) if mask is None else mask.T.clone()
    scale = upper.diagonal().square()
    for start in range(0, columns, block):
        end = min(start + block, columns)
        if mask is None and sparsity is not None:
            scores = w_IO[start:end].square() / scale[start:end, None]
            count = round(sparsity * scores.numel())
            lowest = torch.topk(scores.reshape(-1), count, largest=False, sorted=False).indices
            kept_IO[start:end].view(-1)[lowest] = False
        errors = torch.zeros(end - start, rows)
        for inner in range(start, end, _INNER):
            stop = min(inner + _INNER, end)
            for j in range(inner, stop):
                if mask is None and pattern is not None and j % pattern[1] == 0:
                    n, m = pattern
                    scores = w_IO[j : j + m].square() / scale[j : j + m, None]
                    goes = torch.topk(scores, m - n, dim=0, largest=False).indices
                    kept_IO[j : j + m].scatter_(0, goes, False)
                error = torch.where(kept_IO[j], 0.0, w_IO[j]) / upper[j, j]
                if j + 1 < stop:
                    w_IO[j + 1 : stop].addr_(upper[j, j + 1 : stop], error, alpha=-1)
                errors[j - start] = error
            if stop < end:
                w_IO[stop:end].addmm_(upper[inner:stop, stop:end].T, errors[inner - start : stop - start], alpha=-1)
        if end < columns:
            w_IO[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    w_IO.masked_fill_(~kept_IO, 0)
    return Sparse(w_IO.T.contiguous().to(weight.dtype), kept_IO.T.contiguous(), found.damp, found.escalated)
