"""AdamW with decay on matrices only, and clipping."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

SLOTS = ("exp_avg", "exp_avg_sq")


def adamw(
    named: Iterable[tuple[str, nn.Parameter]], *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.AdamW:
    """Two groups: what has two dimensions or more decays, norms and biases do not."""
    params = [p for _, p in named if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, eps=eps, fused=True)


def set_lr_(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Changes the optimizer: one rate for all groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def slots(optimizer: torch.optim.Optimizer, named: Mapping[str, nn.Parameter]) -> dict[str, dict[str, Tensor]]:
    """Slot -> parameter name -> the live moment; empty before the first step."""
    return {
        slot: {name: optimizer.state[p][slot] for name, p in named.items() if slot in optimizer.state.get(p, {})}
        for slot in SLOTS
    }


def steps_done(optimizer: torch.optim.Optimizer) -> int:
    """Updates so far; AdamW's bias correction depends on it."""
    counts = {int(state["step"]) for state in optimizer.state.values()}
    assert len(counts) <= 1, "all parameters are updated together"
    return counts.pop() if counts else 0


def start_slots_(optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Changes the optimizer: zero moments where it has none yet, and its count of updates."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state[p]
            for slot in SLOTS:
                if slot not in state:
                    state[slot] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["step"] = torch.tensor(float(steps), dtype=torch.float32)
