"""Measured speed of a model in memory, on this machine: prefill and decode, warm-up first, medians and spread."""

from __future__ import annotations

import math
import statistics as st
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from . import products

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .shape import Shape


def _repeat(run: Callable[[], None], repeats: int) -> list[float]:
    run()  # warm-up
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


@torch.no_grad()
def speed(
    model: PreTrainedModel,
    *,
    prompt_tokens: int = 256,
    new_tokens: int = 32,
    repeats: int = 5,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """One prefill and greedy decoding behind it, batch 1, as milliseconds (of the prompt, of a new token) and tokens/s.

    Medians of `repeats`, spread = max - min.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (1, prompt_tokens), generator=generator)

    def prefill() -> Any:
        return model(input_ids=ids, use_cache=True, logits_to_keep=1)

    def decode() -> None:
        out = prefill()
        marks[0] = time.perf_counter()
        for _ in range(new_tokens):
            out = model(input_ids=out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
        marks[1] = time.perf_counter()

    marks = [0.0, 0.0]
    prefill_s = _repeat(prefill, repeats)
    progress(1, 2)
    decode_s = []
    for _ in range(repeats):
        decode()
        decode_s.append(marks[1] - marks[0])
    progress(2, 2)
    return {
        "prefill_ms": 1000 * st.median(prefill_s),
        "decode_ms": 1000 * st.median(decode_s) / new_tokens,
        "prefill_tokens_per_s": prompt_tokens / st.median(prefill_s),
        "prefill_spread": prompt_tokens / min(prefill_s) - prompt_tokens / max(prefill_s),
        "decode_tokens_per_s": new_tokens / st.median(decode_s),
        "decode_spread": new_tokens / min(decode_s) - new_tokens / max(decode_s),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "repeats": repeats,
        "batch": 1,
    }


def plain_gemm_rate(seconds: float = 0.15, dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of PyTorch's own matmul at a middling size: what goes with times of models in plain PyTorch."""
    generator = torch.Generator().manual_seed(0)  # its own: measuring may change no run
    a, b = (torch.randn(1024, 1024, generator=generator).to(dtype) for _ in range(2))
    a @ b
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        a @ b
        count += 1
    return count * 2 * 1024**3 / (time.perf_counter() - start)


@products.fast()
def gemm_rate(seconds: float = 0.15, dtype: torch.dtype = torch.float32) -> float:
    """The same of the products that scoring and training have: the floor that plans are estimated from."""
    return plain_gemm_rate(seconds, dtype)


# -- widths ---------------------------------------------------------------------------------------------------------------

MULTIPLES = (1, 8, 16, 32, 64)
_ROWS, _CLOSE, _SLOW = 128, 0.95, 0.9  # tokens of a product; of the best rate; of its time, where it is worth saying


@dataclass(frozen=True)
class Width:
    """A size of a model, and the next wider one whose product takes clearly less time; None if there is none."""

    name: str
    size: int
    better: int | None
    ratio: float  # its time over that of the size


def _product_s(width: int, hidden: int, dtype: torch.dtype, seconds: float = 0.05) -> float:
    """The least seconds of [tokens, hidden] x [hidden, width]^T."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, hidden, generator=generator).to(dtype) for n in (_ROWS, width))
    torch.nn.functional.linear(x, w)
    best, until = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < until or best == math.inf:
        start = time.perf_counter()
        torch.nn.functional.linear(x, w)
        best = min(best, time.perf_counter() - start)
    return best


def slow_widths(shape: Shape, dtype: torch.dtype) -> list[Width]:
    """Every FFN width of the model, and the stem: whether a rounder, wider one would be faster."""
    hidden = shape.hidden_size
    sizes = [("hidden_size", hidden)] + [
        ("intermediate_size", f) for f in sorted({x.intermediate_size for x in shape.layers})
    ]
    out = []
    for name, size in sizes:
        own = _product_s(size, hidden, dtype)
        rounder = {-(-size // m) * m for m in MULTIPLES} - {size}
        times = {width: _product_s(width, hidden, dtype) for width in rounder}
        best = min(times, key=lambda width: times[width], default=None)
        found = best is not None and times[best] < _SLOW * own
        out.append(Width(name, size, best if found else None, times[best] / own if found and best is not None else 1.0))
    return out


def multiple(hidden: int, width: int, dtype: torch.dtype) -> int:
    """The least of `MULTIPLES` that FFN widths may be cut to at 95 % of the best rate, near three quarters of `width`."""
    rates = {}
    for m in MULTIPLES:
        near = max(1, width * 3 // 4 // m) * m
        if near % (2 * m) == 0 and near > m:
            near -= m  # a multiple of m and of nothing rounder
        rates[m] = near / _product_s(near, hidden, dtype)
    return next(m for m in MULTIPLES if rates[m] >= _CLOSE * max(rates.values()))
