"""Methods that remove whole layers: scored by what the model loses without them.

Shapes: B windows in a batch, T tokens, D hidden size.
"""

from __future__ import annotations

import torch

from .allocate import contiguous
from .evaluation import token_nll
from .job import Job, Outcome, finish_
from .statistics import Sweep, logits_from


def run_(job: Job) -> Outcome:
    """Carry out a plan that removes layers."""
    with job.timed("score"):
        losses = losses_without(job)
    assert job.plan.run is not None
    outcome = finish_(job, contiguous(losses, job.plan.run, job.plan.anatomy.shape.num_hidden_layers))
    outcome.losses = losses
    return outcome


@torch.no_grad()
def losses_without(job: Job) -> list[float]:
    """Mean loss (nats a token) without layers i to i + run - 1, for every i.

    One batch at a time keeps the dense stream in front of every gap, so a candidate costs only the layers behind it.
    """
    plan, windows = job.plan, job.windows
    assert plan.run is not None
    assert windows is not None
    anatomy, run = plan.anatomy, plan.run
    count = anatomy.shape.num_hidden_layers
    candidates = count - run + 1
    totals = [0.0] * candidates
    batches = windows.ids_NT.split(job.batch_size)
    for b, ids_BT in enumerate(batches):
        sweep = Sweep(job.model, anatomy, ids_BT, job.batch_size)
        hidden = sweep.hidden[0]
        for i in range(candidates):
            stream = hidden
            for layer in range(i + run, count):
                stream = sweep.forward(layer, stream)
            for j, ids_T in enumerate(ids_BT):
                logits = logits_from(job.model, anatomy, stream[j : j + 1], ids_T[None])
                totals[i] += token_nll(logits[0], ids_T)
            job.progress("score", b * candidates + i + 1, len(batches) * candidates)
            if i + 1 < candidates:
                hidden = sweep.forward(i, hidden)
    return [total / (windows.num_windows * (windows.seq_len - 1)) for total in totals]
