"""Measured speed of a model in memory, on this machine: prefill and decode, warm-up first, medians and spread."""

from __future__ import annotations

import statistics as st
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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


def gemm_rate(seconds: float = 0.15) -> float:
    """FLOP/s of this machine's float32 matmul at a middling size: the floor that plans are estimated from."""
    generator = torch.Generator().manual_seed(0)  # its own: measuring may change no run
    a, b = (torch.randn(1024, 1024, generator=generator) for _ in range(2))
    a @ b
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        a @ b
        count += 1
    return count * 2 * 1024**3 / (time.perf_counter() - start)
