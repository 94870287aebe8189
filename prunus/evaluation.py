"""Loss on token windows: perplexity and bits per byte. Windows are stated, never estimated.

Shapes: N windows, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import products
from .data.windows import Windows
from .distributed import ALONE, World

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Perplexity:
    """Total negative log-likelihood in nats of `num_predictions` tokens that stand for `num_bytes` bytes of text."""

    nll: float
    num_predictions: int
    num_bytes: int
    window_nll: tuple[float, ...]  # nats of each window, for paired comparison
    num_words: int = 0

    @property
    def perplexity(self) -> float:
        """exp of the mean loss of a token; infinite where that overflows."""
        return _exp(self.nll / self.num_predictions)

    @property
    def word_perplexity(self) -> float | None:
        """exp of the mean loss of a word, as white space parts them; comparable between tokenizers. None without words."""
        return _exp(self.nll / self.num_words) if self.num_words else None

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers."""
        return self.nll / math.log(2) / self.num_bytes

    def to_json(self) -> dict[str, Any]:
        """The figures that go into records."""
        return {
            "perplexity": _finite(self.perplexity),
            "word_perplexity": _finite(self.word_perplexity),
            "bits_per_byte": _finite(self.bits_per_byte),
            "loss": _finite(self.nll / self.num_predictions),
            "predictions": self.num_predictions,
            "bytes": self.num_bytes,
            "words": self.num_words,
        }


def _finite(value: float | None) -> float | None:
    """None where it is no number that JSON has: infinite, or that of a model whose logits are."""
    return value if value is not None and math.isfinite(value) else None


def _exp(mean: float) -> float:
    return math.exp(mean) if mean < 700 else math.inf


def token_nll(logits_TV: Tensor, ids_T: Tensor) -> float:
    """Sum over t of -log p(id_{t+1} | ids_{<=t}) in nats: softmax in float32, summed in float64."""
    losses = torch.nn.functional.cross_entropy(logits_TV[:-1].float(), ids_T[1:], reduction="none")
    return float(losses.double().sum())


@torch.no_grad()
@products.fast()
def perplexity(
    model: PreTrainedModel, windows: Windows, *, progress: Callable[[int, int], None] = lambda done, total: None
) -> Perplexity:
    """Score every window by itself, the tokens of it that count; logits of one window at a time are held."""
    nll = []
    for i, ids_T in enumerate(windows.ids_NT):
        before = windows.first_predicted(i) - 1
        logits = model(input_ids=ids_T[None], use_cache=False, logits_to_keep=windows.seq_len - before).logits
        nll.append(token_nll(logits[0], ids_T[before:]))
        progress(i + 1, windows.num_windows)
    return Perplexity(sum(nll), windows.num_predictions, windows.num_bytes, tuple(nll), windows.num_words)


@torch.no_grad()
@products.fast()
def mean_loss(model: PreTrainedModel, ids_NT: Tensor, world: World = ALONE) -> float:
    """Nats a token over some windows, T - 1 predictions each; logits of one window at a time are held.

    `ids_NT` are the windows of all processes, which share them out.
    """
    own = world.own(ids_NT)
    total = sum(token_nll(model(input_ids=ids_T[None], use_cache=False).logits[0], ids_T) for ids_T in own)
    return world.total(total) / (ids_NT.shape[0] * (ids_NT.shape[1] - 1))
