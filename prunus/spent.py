"""What a job's matrix products cost, counted as they run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten


def _product(a: Tensor, b: Tensor) -> int:
    return 2 * a.numel() * b.shape[-1]


def _added(bias: Tensor, a: Tensor, b: Tensor) -> int:
    return _product(a, b)


def _attention(query: Tensor, key: Tensor, value: Tensor, *more: Any) -> int:
    """Whole squares, as `Anatomy.flops` counts them: a causal mask spares nothing here."""
    return 2 * math.prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _attention_back(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *more: Any) -> int:
    """Five products where the way forward had two: the scores are made again."""
    return 5 * _attention(query, key, value) // 2


_COUNTED: Mapping[Any, Callable[..., int]] = {
    _aten.mm: _product,
    _aten.bmm: _product,
    _aten.mv: lambda a, b: 2 * a.numel(),
    _aten.addmm: _added,
    _aten.baddbmm: _added,
    _aten.addmm_: _added,
    _aten.baddbmm_: _added,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_back,
    _aten._scaled_dot_product_flash_attention: _attention,
    _aten._scaled_dot_product_flash_attention_backward: _attention_back,
    _aten._scaled_dot_product_efficient_attention: _attention,
    _aten._scaled_dot_product_efficient_attention_backward: lambda grad, bias, *more: _attention_back(grad, *more),
    _aten._scaled_dot_product_cudnn_attention: _attention,
    _aten._scaled_dot_product_cudnn_attention_backward: _attention_back,
}


class Flops(TorchDispatchMode):
    """Counts the FLOPs of matrix products and attention, forward and back; factorisations and all else are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run it and count it."""
        count = _COUNTED.get(func.overloadpacket)
        if count is not None:
            self.total += count(*args)
        return func(*args, **(kwargs or {}))
