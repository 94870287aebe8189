"""Which units of a matrix's input stay: those that together give its output best, once the rest is refitted.

Shapes: W [out, in]; G = X^T X [in, in] over the calibration tokens; U units of S inputs each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .solve import factor


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
    dense = _alive(weight, gram, inputs)
    left = _Left(inverse, dense.T @ dense, size)
    order: list[Tensor] = []
    added: list[Tensor] = []
    at_once = max(1, math.ceil((units - keep) * step))
    for start in range(0, units - keep, at_once):
        count = min(at_once, units - keep - start)
        goes = torch.argsort(left.costs(), descending=True, stable=True)[-count:].flip(0)  # of equals the first stays
        order.append(left.alive[goes])
        added.append(left.remove_(goes))
        left.tidy_(most=_TOGETHER)
    none = torch.zeros(0)
    return Elimination(torch.cat([none.long(), *order]), torch.cat([none.double(), *added]))


_TOGETHER = 64  # inputs: G^-1 and W^T W are as large as memory is slow, so removals wait until one product does for many
_CROWDED = 0.8  # of the units in the matrices must be alive: those that went are taken out together, as copies cost more


class _Left:
    """What is left of a matrix on its way through `eliminate`: G^-1 and W^T W of the inputs that stay, float64.

    Of the weights the costs ask no more than K = W^T W, however many rows W has. With P = G^-1 and L L^T = P_gg, B = L^-1 P[g]
    and Q = L^-1 K[g], the inputs g leave P - B^T B and K - B^T Z - Z^T B behind, Z = Q - R B / 2, where the diagonal of
    R = L^-1 K_gg L^-T is the error that each adds. P and K are brought up to date by `tidy_`; until then their rows are
    worked out when they are asked for, and only the blocks on their diagonals are kept as they are now.
    """

    def __init__(self, inverse: Tensor, square: Tensor, size: int) -> None:
        self.inverse, self.square, self.size = inverse, square, size
        self.alive = torch.arange(len(inverse) // size)  # the unit that stands at each place
        self.here = torch.ones(len(self.alive), dtype=torch.bool)
        self._start()

    def _start(self) -> None:
        self.b_GC = self.z_GC = torch.zeros(0, len(self.inverse), dtype=torch.float64)
        self.corners_USS = _corners(self.inverse, self.size).clone()
        self.squares_USS = _corners(self.square, self.size).clone()

    def costs(self) -> Tensor:
        """tr(W_u (G^-1)_uu^-1 W_u^T) of every place, infinite where the unit is gone."""
        return _quotients(self.squares_USS, self.corners_USS).masked_fill_(~self.here, math.inf)

    def remove_(self, goes: Tensor) -> Tensor:
        """Take the units at these places out, and return the error that each adds after those before it."""
        gone = _inputs_of(goes, self.size)
        b_then, z_then = self.b_GC[:, gone].T, self.z_GC[:, gone].T
        inverse_gC = self.inverse[gone].addmm_(b_then, self.b_GC, alpha=-1)
        square_gC = self.square[gone].addmm_(b_then, self.z_GC, alpha=-1).addmm_(z_then, self.b_GC, alpha=-1)
        root = torch.linalg.cholesky(inverse_gC[:, gone])
        both = torch.linalg.solve_triangular(root, torch.cat([inverse_gC, square_gC], 1), upper=False)
        b_gC, q_gC = both.split(len(self.inverse), 1)
        r_gg = torch.linalg.solve_triangular(root, q_gC[:, gone].T, upper=False)
        z_gC = torch.addmm(q_gC, r_gg, b_gC, alpha=-0.5)
        self.b_GC, self.z_GC = torch.cat([self.b_GC, b_gC]), torch.cat([self.z_GC, z_gC])
        crossed_USS = _corner_products(b_gC, z_gC, self.size)
        self.corners_USS -= _corner_products(b_gC, b_gC, self.size)
        self.squares_USS -= crossed_USS + crossed_USS.mT
        self.here[goes] = False
        self.corners_USS[goes], self.squares_USS[goes] = torch.eye(self.size, dtype=torch.float64), 0.0
        return r_gg.diagonal().clamp_min(0).view(-1, self.size).sum(1)

    def tidy_(self, most: int) -> None:
        """Once `most` removals wait, carry them out; those that are gone leave the matrices when they crowd them."""
        if len(self.b_GC) < most:
            return
        b_GC, z_GC = self.b_GC, self.z_GC
        if int(self.here.sum()) < _CROWDED * len(self.here):
            rest = _inputs_of(self.here.nonzero().squeeze(1), self.size)
            self.inverse, self.square = self.inverse[rest][:, rest], self.square[rest][:, rest]
            self.alive, self.here = self.alive[self.here], self.here[self.here]
            b_GC, z_GC = b_GC[:, rest], z_GC[:, rest]
        self.inverse.addmm_(b_GC.T, b_GC, alpha=-1)
        self.square.addmm_(b_GC.T, z_GC, alpha=-1).addmm_(z_GC.T, b_GC, alpha=-1)
        gone = ~self.here
        self._start()
        self.corners_USS[gone], self.squares_USS[gone] = torch.eye(self.size, dtype=torch.float64), 0.0


def _alive(weight: Tensor, gram: Tensor, inputs: Tensor) -> Tensor:
    """W's columns, float64; those of dead inputs are zero, or damping would give them a price."""
    return weight[:, inputs].double() * (gram.diagonal()[inputs] > 0)


def _inputs_of(units: Tensor, size: int) -> Tensor:
    """Inputs of units that own `size` neighbouring ones each, int64."""
    return (units[:, None] * size + torch.arange(size)).reshape(-1)


def _corners(square: Tensor, size: int) -> Tensor:
    """The blocks on the diagonal [U, S, S], a view."""
    units = square.shape[0] // size
    return square.unflatten(0, (units, size)).unflatten(2, (units, size)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _corner_products(a_GC: Tensor, b_GC: Tensor, size: int) -> Tensor:
    """The blocks on the diagonal of A^T B [U, S, S]."""
    if size == 1:
        return (a_GC * b_GC).sum(0)[:, None, None]
    return torch.einsum("gus,gut->ust", a_GC.unflatten(1, (-1, size)), b_GC.unflatten(1, (-1, size)))


def _quotients(squares: Tensor, blocks: Tensor) -> Tensor:
    """tr(B^-1 K) of blocks [..., S, S], float64 [...]; rounding makes none of them negative."""
    if blocks.shape[-1] == 1:
        return (squares / blocks)[..., 0, 0].clamp_min(0)
    solved = torch.cholesky_solve(squares, torch.linalg.cholesky(blocks))
    return solved.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(0)


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
    whole = gram[inputs][:, inputs].double()
    whole.diagonal().add_(damp * float(whole.diagonal().mean()) or 1.0)
    inside = torch.ones(units, dtype=torch.bool)
    inside[eliminate(weight, gram, rows, keep, damp=damp).order] = False
    choice = _Choice(_alive(weight, gram, inputs), whole, inside, size)
    for _ in range(swaps):
        swap = choice.best_swap()
        if swap is None:
            break
        choice.swap_(*swap)
    return tuple(choice.inside.nonzero().squeeze(1).tolist())


def _all_but(gone: Tensor, units: int) -> tuple[int, ...]:
    stays = torch.ones(units, dtype=torch.bool)
    stays[gone] = False
    return tuple(stays.nonzero().squeeze(1).tolist())


_LESS = 1.0 - 1e-9  # a swap that gains less than rounding could go round in circles


class _Choice:
    """Units S inside and J outside, the best weights on S, and what a swap of two units would do to the error. Float64.

    T = [[-P, U], [U^T, D]] with P = G_SS^-1, U = P G_SJ and the Schur complement D of G_SS; V = [W_S, R_J] with the best
    weights W_S = W G_:S P and R_J = W G_:J - W_S G_SJ, which is what the outside has to say that the inside has not. With j
    taken in the error falls by tr(R_j D_jj^-1 R_j^T). A swap is one pivot on its two units.
    """

    def __init__(self, dense: Tensor, gram: Tensor, inside: Tensor, size: int) -> None:
        self.inside, self.size = inside, size
        stays, away = self._inputs()
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram[stays][:, stays]))
        across = gram[stays][:, away]
        solved = inverse @ across
        self.table = torch.empty_like(gram)
        self.table[stays[:, None], stays], self.table[stays[:, None], away] = -inverse, solved
        self.table[away[:, None], stays] = solved.T
        self.table[away[:, None], away] = gram[away][:, away] - across.T @ solved
        reach = dense @ gram
        self.values = torch.empty_like(reach)
        self.values[:, stays] = best = reach[:, stays] @ inverse
        self.values[:, away] = reach[:, away] - best @ across

    def _inputs(self) -> tuple[Tensor, Tensor]:
        """Of the units inside and outside."""
        inside, outside = self.inside.nonzero().squeeze(1), (~self.inside).nonzero().squeeze(1)
        return _inputs_of(inside, self.size), _inputs_of(outside, self.size)

    def best_swap(self) -> tuple[int, int] | None:
        """(unit that goes, unit that comes) of a swap that lowers the error; None if there is none.

        Once j is in, W_i becomes W_i - M R_j and P_ii becomes P_ii + M U_ij^T, with M = U_ij D_jj^-1, and i costs
        tr(W_i P_ii^-1 W_i^T) to take out.
        """
        stays, away = self._inputs()
        if not len(away):
            return None
        size, best, missing = self.size, self.values[:, stays], self.values[:, away]
        units = (len(stays) // size, len(away) // size)
        schur_JSS = _corners(self.table, size)[~self.inside]
        missing_JSS = _corner_products(missing, missing, size)
        gains_J = _quotients(missing_JSS, schur_JSS)
        u_IJSS = _blocks(self.table[stays][:, away], units, size)
        m_IJSS = _times(u_IJSS, torch.linalg.inv(schur_JSS))
        crossed_IJSS = _times(m_IJSS, _blocks(best.T @ missing, units, size).mT)  # M R_j W_i^T
        squares_IJSS = _times(_times(m_IJSS, missing_JSS), m_IJSS.mT) - crossed_IJSS - crossed_IJSS.mT
        squares_IJSS += _corner_products(best, best, size)[:, None]
        corners_IJSS = _times(m_IJSS, u_IJSS.mT) - _corners(self.table, size)[self.inside][:, None]
        costs_J, goes_J = _quotients(squares_IJSS, corners_IJSS).min(0)
        pays_J = costs_J < _LESS * gains_J
        if not bool(pays_J.any()):
            return None
        j = int(gains_J.masked_fill(~pays_J, -math.inf).argmax())
        return int(self.inside.nonzero()[goes_J[j]]), int((~self.inside).nonzero()[j])

    def swap_(self, goes: int, comes: int) -> None:
        """T_PP^-1 turns the two units P over; the signs of the one that goes change."""
        pivot = _inputs_of(torch.tensor([goes, comes]), self.size)
        sign = torch.ones(len(pivot), 1, dtype=torch.float64)
        sign[: self.size] = -1
        turned = torch.linalg.inv(self.table[pivot][:, pivot])
        rows = self.table[pivot]
        over = turned @ rows
        values = self.values[:, pivot]
        self.values.addmm_(values, over, alpha=-1)
        self.values[:, pivot] = values @ turned * sign.T
        self.table.addmm_(rows.T, over, alpha=-1)
        self.table[pivot] = sign * over
        self.table[:, pivot] = (sign * over).T
        self.table[pivot[:, None], pivot] = -sign * turned * sign.T
        self.inside[goes], self.inside[comes] = False, True


def _blocks(matrix: Tensor, units: tuple[int, int], size: int) -> Tensor:
    """[I * S, J * S] -> [I, J, S, S]."""
    return matrix.view(units[0], size, units[1], size).transpose(1, 2)


def _times(a: Tensor, b: Tensor) -> Tensor:
    """Products of blocks [..., S, S]; of numbers where S is 1, of which there are a great many."""
    return a * b if a.shape[-1] == 1 else a @ b
