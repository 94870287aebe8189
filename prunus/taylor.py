"""First-order Taylor scores of layers: what the loss would change, to first order, if a layer's weights were zero.

Shapes: B windows in a batch, T tokens, D hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .statistics import Sweep, logits_from

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .anatomy import Anatomy
    from .job import Job


@torch.no_grad()
def layer_taylor(job: Job) -> list[float]:
    """Shortened LLaMA's Taylor score of every layer: sum over its tensors of sum |w * g|, float32 or wider.

    g is the gradient of the mean loss over all windows, summed before the absolute value is taken. Blocks are run a second
    time on the way back, so memory holds the gradients, one batch's streams, and the activations of one block.
    """
    windows, anatomy = job.windows, job.plan.anatomy
    assert windows is not None
    sums: dict[str, Tensor] = {}
    batches = windows.ids_NT.split(job.batch_size)
    for b, ids_BT in enumerate(batches):
        sweep = Sweep(job.model, anatomy, ids_BT, job.batch_size)
        streams = [sweep.hidden.pop()]
        for layer in range(len(sweep.blocks)):
            streams.append(sweep.forward(layer, streams[-1]))
        gradient = _at_the_end(job.model, anatomy, streams.pop(), ids_BT)
        for layer in reversed(range(len(sweep.blocks))):
            gradient = _through_(sweep, layer, streams.pop(), gradient, sums, len(ids_BT) / windows.num_windows)
        job.progress("score", b + 1, len(batches))
    scores = [0.0] * anatomy.shape.num_hidden_layers
    for name, total in sums.items():
        owner = anatomy.tensors[name].layer
        assert owner is not None
        scores[owner] += float((job.tensors[name].to(total.dtype) * total).abs().sum(dtype=torch.float64))
    return scores


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@torch.enable_grad()
def _at_the_end(model: PreTrainedModel, anatomy: Anatomy, hidden_BTD: Tensor, ids_BT: Tensor) -> Tensor:
    """Gradient of the batch's mean loss at the stream that leaves the last block; logits of one window at a time are held."""
    out: list[Tensor] = []
    for j, ids_T in enumerate(ids_BT):
        stream = hidden_BTD[j : j + 1].detach().requires_grad_()
        logits_TV = _wide(logits_from(model, anatomy, stream, ids_T[None])[0])
        loss = torch.nn.functional.cross_entropy(logits_TV[:-1], ids_T[1:])
        out.extend(torch.autograd.grad(loss / len(ids_BT), stream))
    return torch.cat(out)


@torch.enable_grad()
def _through_(
    sweep: Sweep, layer: int, hidden_BTD: Tensor, gradient_BTD: Tensor, sums: dict[str, Tensor], weight: float
) -> Tensor:
    """Back through one block. Adds its weights' gradients to `sums`, and returns the gradient at its input."""
    block, prefix = sweep.blocks[layer], sweep.anatomy.block_name(layer)
    leaves = {
        name: p.detach().requires_grad_() for name, p in block.named_parameters()
    }  # the model's flags stay as they are
    stream = hidden_BTD.detach().requires_grad_()
    out = torch.func.functional_call(block, leaves, (stream,), sweep.keywords(layer, len(stream)))
    out = out[0] if isinstance(out, tuple) else out
    found = torch.autograd.grad(out, [stream, *leaves.values()], gradient_BTD, materialize_grads=True)
    for name, gradient in zip(leaves, found[1:], strict=True):
        total = _wide(gradient).mul(weight)
        if prefix + name in sums:
            sums[prefix + name] += total
        else:
            sums[prefix + name] = total
    return found[0]
