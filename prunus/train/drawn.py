"""Fresh weights for processes that share a model out: the values that one process draws, with one whole tensor in memory.

Each process draws everything, in the order of one that is alone, since every value depends on all that were drawn before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..anatomy import Anatomy
from .shapes import depth_scale

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Put = Callable[[str, Tensor], None]  # takes what this process holds of a parameter, by its name; the last one counts
Fill = Callable[[Put], None]


def drawn(
    config: PreTrainedConfig, *, init: str, seed: int, dtype: torch.dtype, part: Callable[[Tensor], Tensor]
) -> tuple[PreTrainedModel, Fill]:
    """`shapes.fresh` without its memory: the model with parameters on the meta device, and what puts `part` of their values.

    The model is built twice: once for the order of its parameters, whose names are not known before the end, once for values.
    """
    order: list[nn.Parameter] = []
    model = _built(config, _Initialising(lambda p: torch.empty_like(p), lambda p, values: order.append(p)))
    named = {id(p): name for name, p in model.named_parameters()}
    names = [named.get(id(p)) for p in order]  # None: another one stands in its place since, as of a tied head
    largest = max(p.numel() for p in order)
    anatomy = Anatomy.of(config)

    def fill(put: Put) -> None:
        left, memory = iter(names), torch.empty(largest)  # for one after another: a heap of comings and goings has gaps

        def settled(p: nn.Parameter, values: Tensor) -> None:
            name = next(left)
            if name is not None:
                scale = depth_scale(anatomy, name) if init == "depth-scaled" else 1.0
                put(name, part(values).mul_(scale).to(dtype))

        torch.manual_seed(seed)
        _built(config, _Initialising(lambda p: memory[: p.numel()].view(p.shape), settled))
        assert not list(left), "built in another order"

    cast: Any = model.to  # which transformers declares as something else
    return cast(dtype), fill


def _built(config: PreTrainedConfig, initialising: _Initialising) -> PreTrainedModel:
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False), initialising:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.tie_weights()  # again: accelerate made two parameters of one
    return model


_OVERWRITE = {"normal_", "uniform_", "kaiming_uniform_", "trunc_normal_", "constant_", "fill_", "zero_", "ones_", "zeros_"}


class _Initialising(TorchFunctionMode):
    """While it is on, a parameter without memory is given some by `memory` when it is initialised, until the next one's turn.

    `settled` is called with each parameter and its values then.
    """

    def __init__(self, memory: Callable[[nn.Parameter], Tensor], settled: Callable[[nn.Parameter, Tensor], None]) -> None:
        super().__init__()
        self.memory, self.settled = memory, settled
        self.at: nn.Parameter | None = None  # whose turn it is
        self.values = torch.empty(0)

    def __exit__(self, *error: Any) -> None:
        self._settle()
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        p = kwargs.get("tensor", args[0] if args else None)  # functions of `nn.init` come with names
        if not (isinstance(p, nn.Parameter) and p.is_meta):
            return func(*args, **kwargs)
        name = func.__name__
        if name == "__getitem__" and p is self.at:  # some of its rows are set, as of a padding token
            return self.values[args[1]]
        if not name.endswith("_") or name.endswith("__") or name == "requires_grad_":
            return func(*args, **kwargs)
        if p is not self.at:
            assert name in _OVERWRITE, f"{name} wants values that are gone"
            self._settle()
            self.at, self.values = p, self.memory(p)
        if "tensor" in kwargs:
            func(*args, **(kwargs | {"tensor": self.values}))
        else:
            func(self.values, *args[1:], **kwargs)
        return p

    def _settle(self) -> None:
        if self.at is not None:
            self.settled(self.at, self.values)
        self.at, self.values = None, torch.empty(0)
