"""Repair at a cut: what is left reads as much of what goes as least squares finds in it; norms keep their scale.

Least squares is EfficientLLM's second-order update too: to remove input after input by W - W[:, p] x^T / x_p, H x = e_p, with H
brought up to date in between, ends where the inputs that stay are fitted at once (`joint`).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ...anatomy import Anatomy
from ...axes import kind_of
from ...distributed import local
from ...solve import refit
from ..loop import Training
from .activations import Activations
from .goal import INNER
from .groups import Units
from .part import RepairPart


def joint(gram_CC: Tensor, gone: Tensor, kept: Tensor, damp: float = 1e-4) -> Tensor:
    """What inputs that go are of those that stay, G[P, S] G[S, S]^-1 [gone, kept], float64.

    W[:, S] + W[:, P] times it minimises the output's error but for damping, which draws to W[:, S] and not to zero: so the error
    is never above that of W[:, S] itself.
    """
    return refit(torch.eye(len(gram_CC), dtype=torch.float64)[gone], gram_CC, kept, damp=damp)


@torch.no_grad()
def repair_(
    run: Training, anatomy: Anatomy, seen: Activations, part: RepairPart, units: Units, alive: Mapping[str, np.ndarray]
) -> None:
    """Changes weights before these units are zeroed: what reads them, and the norms over the stem. Moments stay.

    `alive`: by axis, what will be left.
    """
    named, refitted = run.learner.trained, {*(INNER if part.kind == "least-squares" else ())}
    refitted |= {"hidden"} if part.stem == "least-squares" else set()
    for name, gone in units.items():
        left = np.flatnonzero(alive[name]).tolist()
        for span in anatomy.axes[name].spans if name != "layers" else ():
            rows = span.rows(gone).reshape(-1)
            if part.stem != "none" and span.param in seen.norms:
                share_C = seen.mean(span.param)
                left_over = 1 - share_C[rows].sum() / share_C.sum()
                _scale_(local(named[span.param]), float(left_over.clamp_min(0).sqrt()), anatomy)
            elif kind_of(name) in refitted and span.dim == 1 and span.param in seen.points and left:
                kept = span.rows(left).reshape(-1)
                moved = joint(seen.mean(span.param), rows, kept)
                for matrix in seen.points[span.param]:
                    weight = local(named[matrix])
                    weight[:, kept] += (weight[:, rows].double() @ moved).to(weight.dtype)


def _scale_(gain_C: Tensor, factor: float, anatomy: Anatomy) -> None:
    """Changes a norm's gain: R2, E[rms of what stays / rms of all], as the root of the mean square, since squares add up."""
    offset = 1.0 if anatomy.family.gain == "one_plus_weight" else 0.0
    gain_C.add_(offset).mul_(factor).sub_(offset)
