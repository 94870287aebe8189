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


@dataclass(frozen=True)
class Likeliest:
    """The k tokens that a teacher thinks most probable, int64 [N, k], and their log-probabilities [N, k] at a temperature.

    The other V - k count as one, the tail, which has what is left of the probability.
    """

    ids: Tensor
    logs: Tensor

    @classmethod
    def of(cls, logits_NV: Tensor, k: int, temperature: float) -> Likeliest:
        """Those of logits."""
        top = torch.log_softmax(logits_NV / temperature, 1).topk(k)
        return cls(top.indices, top.values)


Teacher = Callable[[slice], Tensor | Likeliest]  # some tokens -> the teacher's logits [n, V], or its likeliest tokens there


@dataclass(frozen=True)
class Mix:
    """What the loss is: a share `mix` of temperature^2 * KL(teacher || student), and the rest cross-entropy.

    Where the teacher names its likeliest tokens only, both distributions are those of these tokens and of the tail.
    """

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
            grad_ND[part] = narrow @ head_VD
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
    """As `_cross_entropy_`. The gradient of t^2 KL at the logits is t times that at the logits divided by t."""
    t, counted_N = mix.temperature, targets_N != IGNORED
    theirs = mix.teacher(part)
    ours = torch.log_softmax(logits_NV / t, 1)
    if isinstance(theirs, Likeliest):
        soft, grad = _divergence_of_likeliest(theirs, ours)
    else:
        soft, grad = _divergence(torch.log_softmax(theirs.to(ours.dtype) / t, 1), ours)
    loss = mix.mix * t * t * (soft * counted_N).sum()
    grad *= mix.mix * t * counted_N[:, None]
    if mix.mix < 1:
        hard, hard_grad = _cross_entropy_(logits_NV, targets_N)
        loss, grad = loss + (1 - mix.mix) * hard, grad + (1 - mix.mix) * hard_grad
    return loss, grad


def _divergence(theirs_NV: Tensor, ours_NV: Tensor) -> tuple[Tensor, Tensor]:
    """(KL(p || q) of every token in float64, its gradient q - p where log q = log_softmax(x)) from log p and log q."""
    share = theirs_NV.exp()
    return (share * (theirs_NV - ours_NV)).sum(1, dtype=torch.float64), ours_NV.exp() - share


def _divergence_of_likeliest(theirs: Likeliest, ours_NV: Tensor) -> tuple[Tensor, Tensor]:
    """As `_divergence`, with one lumped tail r: q_i - p_i at the likeliest, q_i - p_r q_i / q_r at every other i.

    The student's tail is summed from its members, as logarithms: 1 - sum q would lose it to cancellation, and where q_r itself
    rounds to 0, q_i / q_r still does not. The teacher's tail is what its likeliest leave.
    """
    ids, logs = theirs.ids, theirs.logs.to(ours_NV.dtype)
    everything = ids.shape[1] == ours_NV.shape[1]
    total = logs.exp().sum(1, keepdim=True)
    # Rounded logarithms can add up to a little more than 1, or without a tail to less: made a distribution again.
    logs = logs - (total if everything else total.clamp_min(1)).log()
    share = logs.exp()
    loss = (share * (logs - ours_NV.gather(1, ids))).sum(1, dtype=torch.float64)
    grad = ours_NV.exp().scatter_add_(1, ids, -share)
    if not everything:
        tail = (1 - share.sum(1, keepdim=True)).clamp_min(0)  # rounding again; and 0 log 0 is 0 below
        rest = ours_NV.scatter(1, ids, -torch.inf)
        whole = rest.logsumexp(1, keepdim=True)
        loss += (torch.xlogy(tail, tail) - tail * whole).squeeze(1)
        grad -= rest.sub_(whole).exp_().mul_(tail)
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
