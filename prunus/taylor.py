"""Taylor scores of layers and units: what the loss would change, to first or second order, if their weights were zero.

Shapes: B windows in a batch, T tokens, D hidden size, M matrices that a unit has rows in.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .axes import Axis, Span
from .criteria import AGGREGATES, TAYLOR_RULES, Scores, TaylorRule
from .errors import UserError
from .statistics import Sweep, logits_from, reading_points

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .anatomy import Anatomy
    from .job import Job

# parameter, gradient of a batch's mean loss (to keep or to change), the batch's share of the windows
Take = Callable[[str, Tensor, float], None]
Look = Callable[[int, Tensor, Tensor], None]  # layer, its input, its output [B, T, D]
Labels = Callable[
    [Tensor, Tensor], Tensor
]  # logits [T - 1, V] behind all but the last of a window's ids [T] -> tokens [T - 1]
_LOSS_SCALE = 2.0**10  # the way back starts with this: float16 would round many gradients of a mean loss to zero


@torch.no_grad()
def layer_taylor(job: Job) -> list[float]:
    """Shortened LLaMA's Taylor score of every layer: sum over its tensors of sum |w * g|, float32 or wider.

    g is the gradient of the mean loss over all windows, summed before the absolute value is taken.
    """
    anatomy = job.plan.anatomy
    sums: dict[str, Tensor] = {}
    walk_back(job, lambda name, gradient, share: _add(sums, name, gradient.mul_(share)))
    for total in sums.values():
        job.world.sum_(total)
    scores = [0.0] * anatomy.shape.num_hidden_layers
    for name, total in sums.items():
        owner = anatomy.tensors[name].layer
        assert owner is not None
        scores[owner] += float((job.tensors[name].to(total.dtype) * total).abs().sum(dtype=torch.float64))
    return scores


@torch.no_grad()
def unit_taylor(job: Job, look: Look | None = None) -> Scores:
    """LLM-Pruner's score of every unit that the plan may cut, by the plan's options ``score`` and ``aggregate``."""
    plan = job.plan
    rule = TAYLOR_RULES[plan.options.get("score", "first")]
    sums = UnitSums(plan.scored_axes, job.tensors, rule)
    walk_back(job, sums.take, per_window=rule.per_window, look=look)
    for total in sums.sums.values():
        job.world.sum_(total)
    scores = sums.scores(plan.options.get("aggregate", "sum"))
    for name, values in scores.values.items():
        if not bool(torch.isfinite(values).all()):
            raise UserError(
                f"scores: '{name}' has units whose score is no number; try another --dtype or other calibration text"
            )
    return scores


class UnitSums:
    """Adds up a Taylor rule's shares over windows, and makes them one score a unit.

    Where the rule takes the absolute value weight by weight, the sums are as large as the matrices; else one number a unit
    and matrix is kept.
    """

    def __init__(self, axes: Sequence[Axis], tensors: Mapping[str, Tensor], rule: TaylorRule) -> None:
        self.axes, self.tensors, self.rule = axes, tensors, rule
        self.readers: dict[str, list[tuple[Axis, Span]]] = {}
        for axis in axes:
            for span in self.matrices(axis):
                self.readers.setdefault(span.param, []).append((axis, span))
        self.sums: dict[object, Tensor] = {}  # by parameter, or by (axis name, span)

    def matrices(self, axis: Axis) -> list[Span]:
        """The spans that count: biases and norms have no part in the published scores."""
        return [span for span in axis.spans if self.tensors[span.param].dim() == 2]

    def take(self, name: str, gradient: Tensor, share: float) -> None:
        """Add what one batch gives."""
        shares = self.rule.share(_wide(self.tensors[name]), gradient) * share
        if self.rule.of_weights:
            _add(self.sums, name, shares)
            return
        for axis, span in self.readers[name]:
            _add(self.sums, (axis.name, span), _by_unit(axis, span, shares))

    def scores(self, aggregate: str) -> Scores:
        """One float64 a unit of every axis."""
        return Scores({axis.name: AGGREGATES[aggregate](self._by_matrix(axis)) for axis in self.axes})

    def _by_matrix(self, axis: Axis) -> Tensor:
        """Absolute sums of one axis [M, units], float64."""
        if self.rule.of_weights:
            found = [_by_unit(axis, span, self.sums[span.param].abs()) for span in self.matrices(axis)]
        else:
            found = [self.sums[axis.name, span].abs() for span in self.matrices(axis)]
        return torch.stack(found)


def _by_unit(axis: Axis, span: Span, matrix: Tensor) -> Tensor:
    return axis.unit_sums(span, matrix.sum(1 - span.dim, dtype=torch.float64))


def _add(sums: dict, key: object, value: Tensor) -> None:
    if key in sums:
        sums[key] += value
    else:
        sums[key] = value


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


# -- the way back ---------------------------------------------------------------------------------------------------------


def following(logits_PV: Tensor, ids_T: Tensor) -> Tensor:
    """The text's own next tokens."""
    return ids_T[1:]


def drawn(logits_PV: Tensor, ids_T: Tensor) -> Tensor:
    """Next tokens that the model itself draws, int64 [P]: gradients of their loss have the Fisher matrix for a covariance.

    A window always has the same luck, in whatever batch or process it is.
    """
    luck_P1 = torch.rand(len(logits_PV), 1, generator=torch.Generator().manual_seed(int(ids_T.sum())))
    up_to_PV = logits_PV.softmax(-1).cumsum_(-1)
    found_P1 = torch.searchsorted(up_to_PV, luck_P1.to(up_to_PV.dtype) * up_to_PV[:, -1:])
    return found_P1.squeeze(1).clamp_max_(logits_PV.shape[1] - 1)


@torch.no_grad()
def walk_back(
    job: Job, take: Take, *, per_window: bool = False, look: Look | None = None, labels: Labels = following
) -> None:
    """Hand the loss's gradient at every tensor of `plan.graded_tensors` to `take`, batch by batch, in float32 or wider.

    So too the gradient [B, T, out] at what every matrix of `plan.graded_outputs` gives, under the matrix's name. `labels` are
    the tokens that the loss is of.
    Blocks are run a second time on the way back, so memory holds one batch's streams and the activations of one block. The
    way ends at the first block that has such a tensor. `per_window` makes every window a batch of its own. Batches are of
    this process's windows, shares of all.
    """
    windows, anatomy, wanted, outputs = job.windows, job.plan.anatomy, job.plan.graded_tensors, job.plan.graded_outputs
    assert windows is not None
    first = min(layer for name in wanted | outputs if (layer := anatomy.tensors[name].layer) is not None)
    batches = job.ids_NT.split(1 if per_window else job.batch_size)
    for b, ids_BT in enumerate(batches):
        share = len(ids_BT) / windows.num_windows
        sweep = Sweep(job.model, anatomy, ids_BT, len(ids_BT))
        hidden, streams = sweep.hidden.pop(), []
        for layer in range(len(sweep.blocks)):
            if layer >= first:
                streams.append(hidden)
            out = sweep.forward(layer, hidden)
            if look is not None:
                look(layer, hidden, out)
            hidden = out
        gradient = _at_the_end(job.model, anatomy, hidden, ids_BT, labels)
        for layer in reversed(range(first, len(sweep.blocks))):
            gradient, found = _through(sweep, layer, streams.pop(), gradient, wanted, outputs)
            for name, value in found.items():
                take(name, _wide(value) / _LOSS_SCALE, share)
        job.progress("score", b + 1, len(batches))


@torch.enable_grad()
def _at_the_end(model: PreTrainedModel, anatomy: Anatomy, hidden_BTD: Tensor, ids_BT: Tensor, labels: Labels) -> Tensor:
    """Scaled gradient of the batch's mean loss at the stream that leaves the last block; one window's logits are held."""
    out: list[Tensor] = []
    for j, ids_T in enumerate(ids_BT):
        stream = hidden_BTD[j : j + 1].detach().requires_grad_()
        logits_TV = _wide(logits_from(model, anatomy, stream, ids_T[None])[0])
        loss = torch.nn.functional.cross_entropy(logits_TV[:-1], labels(logits_TV[:-1].detach(), ids_T))
        out.extend(torch.autograd.grad(loss * (_LOSS_SCALE / len(ids_BT)), stream))
    return torch.cat(out)


@torch.enable_grad()
def _through(
    sweep: Sweep,
    layer: int,
    hidden_BTD: Tensor,
    gradient_BTD: Tensor,
    wanted: Collection[str],
    outputs: Collection[str],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Back through one block: the gradients at its input and, by name, at its wanted weights and matrices' outputs."""
    block, prefix = sweep.blocks[layer], sweep.anatomy.block_name(layer)
    leaves = {name: p.detach() for name, p in block.named_parameters()}  # the model's flags stay as they are
    at = {prefix + name: p.requires_grad_() for name, p in leaves.items() if prefix + name in wanted}
    handles = []
    for name in leaves:
        if prefix + name in outputs:
            module = block.get_submodule(name.removesuffix(".weight"))
            handles.append(module.register_forward_hook(lambda _, __, out, n=prefix + name: at.__setitem__(n, out)))
    stream = hidden_BTD.detach().requires_grad_()
    try:
        with _end_unread(sweep, layer):
            out = torch.func.functional_call(block, leaves, (stream,), sweep.keywords(layer, len(stream)))
    finally:
        for handle in handles:
            handle.remove()
    out = out[0] if isinstance(out, tuple) else out
    found = torch.autograd.grad(out, [stream, *at.values()], gradient_BTD, materialize_grads=True)
    return found[0], dict(zip(at, found[1:], strict=True))


@contextmanager
def _end_unread(sweep: Sweep, layer: int) -> Iterator[None]:
    """On the way back nobody reads what a block gives, so its last matrices are not multiplied: a quarter of the work saved.

    Where a norm stands behind them it does read it.
    """
    anatomy = sweep.anatomy
    names = [] if anatomy.family.norms_behind else reading_points(anatomy, layer).get(("mlp", "intermediate"), [])
    modules = [sweep.model.get_submodule(name.removesuffix(".weight")) for name in names]
    ends = [module for module in modules if isinstance(module, nn.Linear)]
    for end in ends:
        end.forward = partial(_unread, end)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for end in ends:
            del end.forward


def _unread(linear: nn.Linear, x: Tensor) -> Tensor:
    out = _Unread.apply(x, linear.weight)
    return out if linear.bias is None else out + linear.bias


class _Unread(torch.autograd.Function):
    """Gradients of x W^T for whoever does not need its value; that is zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.new_zeros(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x = gradient @ weight if ctx.needs_input_grad[0] else None
        of_weight = gradient.flatten(0, -2).T @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return of_x, of_weight
