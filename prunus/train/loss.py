"""Cross-entropy of a linear head, in chunks, so that the logits of all tokens are never in memory together.

Shapes: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK = 512  # tokens whose logits are in memory together
IGNORED = -100  # a target that counts for nothing


Teacher = Callable[[slice], Tensor]  # some tokens -> the teacher's logits [n, V] of them


@dataclass(frozen=True)
class Mix:
    """What the loss is: a share `mix` of temperature^2 * KL(teacher || student), and the rest cross-entropy."""

    teacher: Teacher
    mix: float = 1.0
    temperature: float = 1.0


class _HeadLoss(torch.autograd.Function):
    """Gradients are made on the way forward, while a chunk's logits are there: three products a chunk, and no fourth."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        cap: float | None,
        mix: Mix | None,
    ) -> Tensor:
        wide = torch.promote_types(weight_VD.dtype, torch.float32)
        head_VD = weight_VD.to(hidden_ND.dtype)
        grad_ND = torch.empty_like(hidden_ND)
        grad_VD = torch.zeros(weight_VD.shape, dtype=wide)
        grad_V = None if bias_V is None else torch.zeros(bias_V.shape, dtype=wide)
        total = torch.zeros((), dtype=torch.float64)
        for start in range(0, len(hidden_ND), CHUNK):
            part = slice(start, start + CHUNK)
            logits = (hidden_ND[part] @ head_VD.T).to(wide)
            if bias_V is not None:
                logits += bias_V
            slope = None
            if cap is not None:
                squashed = torch.tanh(logits / cap)
                slope, logits = 1 - squashed.square(), squashed * cap
            loss, grad = (
                _cross_entropy_(logits, targets_N[part]) if mix is None else _mixed(logits, targets_N[part], mix, part)
            )
            total += loss
            if slope is not None:
                grad *= slope
            narrow = grad.to(hidden_ND.dtype)
            torch.mm(narrow, head_VD, out=grad_ND[part])
            if hidden_ND.dtype == wide:
                grad_VD.addmm_(narrow.T, hidden_ND[part])
            else:
                grad_VD += narrow.T @ hidden_ND[part]
            if grad_V is not None:
                grad_V += grad.sum(0)
        ctx.save_for_backward(grad_ND, grad_VD, *([] if grad_V is None else [grad_V]))
        ctx.dtype = weight_VD.dtype
        return total.to(wide)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grads
        grad_ND, grad_VD, *rest = ctx.saved_tensors
        bias = rest[0].mul(scale).to(ctx.dtype) if rest else None
        return grad_ND.mul(scale.to(grad_ND.dtype)), grad_VD.mul(scale).to(ctx.dtype), bias, None, None, None


def _cross_entropy_(logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Uses `logits_NV` up. (sum of the losses in float64, gradient of the sum at the logits)"""
    counted_N, at_N1 = targets_N != IGNORED, targets_N.clamp_min(0)[:, None]
    logits_NV.sub_(logits_NV.amax(1, keepdim=True))
    picked = logits_NV.gather(1, at_N1)
    sums = logits_NV.exp_().sum(1, keepdim=True)
    loss = ((sums.log() - picked).squeeze(1) * counted_N).sum(dtype=torch.float64)
    grad = logits_NV.div_(sums)
    grad.scatter_add_(1, at_N1, torch.full_like(picked, -1.0))
    if not bool(counted_N.all()):
        grad *= counted_N[:, None]
    return loss, grad


def _mixed(logits_NV: Tensor, targets_N: Tensor, mix: Mix, part: slice) -> tuple[Tensor, Tensor]:
    """As `_cross_entropy_`. The gradient of t^2 KL(p || q) at the logits of q is t (q - p), q and p at temperature t."""
    t, counted_N1 = mix.temperature, (targets_N != IGNORED)[:, None]
    theirs = torch.log_softmax(mix.teacher(part).to(logits_NV.dtype) / t, 1)
    ours = torch.log_softmax(logits_NV / t, 1)
    share = theirs.exp()
    loss = mix.mix * t * t * (share * (theirs - ours) * counted_N1).sum(dtype=torch.float64)
    grad = mix.mix * t * (ours.exp() - share) * counted_N1
    if mix.mix < 1:
        hard, hard_grad = _cross_entropy_(logits_NV, targets_N)
        loss, grad = loss + (1 - mix.mix) * hard, grad + (1 - mix.mix) * hard_grad
    return loss, grad


def head_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    cap: float | None = None,
    mix: Mix | None = None,
) -> Tensor:
    """Sum of the loss in nats over the tokens that count, float32 or wider; differentiable once. -log p(target), or `mix`.

    `cap` is a final soft cap: logits become cap * tanh(logits / cap) (Gemma 2).
    """
    return _HeadLoss.apply(hidden_ND, weight_VD, bias_V, targets_N, cap, mix)


@torch.no_grad()
def head_nll(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, bias_V: Tensor | None = None, cap: float | None = None
) -> Tensor:
    """Cross-entropy of every token in nats [N], float64; logits of a chunk at a time."""
    out = []
    for start in range(0, len(hidden_ND), CHUNK):
        part = slice(start, start + CHUNK)
        logits = (hidden_ND[part] @ weight_VD.to(hidden_ND.dtype).T).float()
        logits = logits if bias_V is None else logits + bias_V
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        out.append(torch.nn.functional.cross_entropy(logits, targets_N[part], reduction="none").double())
    return torch.cat(out)
