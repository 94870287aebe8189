"""What is trained: a causal language model from token ids to a loss, without logits of all tokens at once.

Shapes: B sequences, T tokens, N = B * T, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from .. import products
from .loss import Likeliest, Mix, head_loss, head_nll

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")
Taught = Callable[..., Mix]  # ids [B, T], `at` of the first in the stream, and positions -> what the loss is mixed with


@dataclass
class Teacher:
    """A parent that is asked for its next-token distribution; it is never trained."""

    learner: Learner
    mix: float
    temperature: float
    top_k: int | None = None

    @torch.no_grad()
    def __call__(self, ids_BT: Tensor, *, at: int = 0, **positions: Tensor) -> Mix:
        """Its logits are made chunk by chunk, when the student's are."""
        hidden_ND = self.learner.hidden(ids_BT, **positions).flatten(0, 1)

        def logits(part: slice) -> Tensor:
            return self.learner.logits(hidden_ND[part])

        k, temperature = self.top_k, self.temperature
        if k is None:
            return Mix(logits, self.mix, temperature)
        return Mix(lambda part: Likeliest.of(logits(part), k, temperature), self.mix, temperature)


class Learner(nn.Module):
    """The model with its loss. One module, so that sharding finds every parameter inside one forward."""

    def __init__(self, model: PreTrainedModel, *, precision: str = "float32", compiled: bool = False) -> None:
        super().__init__()
        self.model = model
        self.precision = precision
        self.cap: float | None = getattr(model.config, "final_logit_softcapping", None)
        decoder: Any = model.get_decoder()
        self.decode = torch.compile(decoder, dynamic=False, options=products.compiler_options()) if compiled else decoder
        self.held: dict[str, nn.Parameter] = {}
        self.name_held_()

    def name_held_(self) -> None:
        """Note weights by name. A model that is shared out shows its parts only until it is first run: note them before."""
        self.held = dict(self.model.named_parameters())

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """What is updated, by name."""
        return {name: p for name, p in self.held.items() if p.requires_grad}

    def forward(
        self, ids_BT: Tensor, targets_BT: Tensor, *, teacher: Taught | None = None, at: int = 0, **positions: Tensor
    ) -> Tensor:
        """Sum over tokens of the loss in nats, float32 or wider. `at`: where in the stream the first sequence stands."""
        hidden_ND, targets_N = self.hidden(ids_BT, **positions).flatten(0, 1), targets_BT.flatten()
        mix = None if teacher is None else teacher(ids_BT, at=at, **positions)
        head: Any = self.model.get_output_embeddings()
        return head_loss(hidden_ND, head.weight, targets_N, bias_V=head.bias, cap=self.cap, mix=mix)

    @torch.no_grad()
    def nll(self, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Cross-entropy of every token in nats [B, T], float64."""
        hidden_ND = self.hidden(ids_BT).flatten(0, 1)
        head: Any = self.model.get_output_embeddings()
        return head_nll(hidden_ND, head.weight, targets_BT.flatten(), head.bias, self.cap).reshape(targets_BT.shape)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """What the head makes of hidden states, float32 or wider [N, V]; without gradients of the head."""
        head: Any = self.model.get_output_embeddings()
        raw = hidden_ND @ head.weight.detach().to(hidden_ND.dtype).T
        raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
        raw = raw if head.bias is None else raw + head.bias.detach()
        return raw if self.cap is None else self.cap * torch.tanh(raw / self.cap)

    def read(self, what: Callable[[PreTrainedModel], T]) -> T:
        """What a function finds when it runs the model; weights that are shared out are there for it."""
        return what(self.model)

    def hidden(self, ids_BT: Tensor, **positions: Tensor) -> Tensor:
        """What the head reads [B, T, D]."""
        mask = positions.get("attention_mask")
        if mask is not None and self.model.config._attn_implementation == "eager":  # which adds masks, and takes no bools
            dtype = self.model.dtype
            positions["attention_mask"] = torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
        autocast = self.precision == "bfloat16-autocast"
        with torch.autocast(ids_BT.device.type, torch.bfloat16) if autocast else nullcontext():
            return self.decode(input_ids=ids_BT, use_cache=False, **positions).last_hidden_state


def recompute_(model: PreTrainedModel) -> None:
    """Changes `model`: on the way back each block is computed anew from its input, so nothing inside it is kept."""
    enable: Any = getattr(model, "activation_checkpointing_enable", None)  # its name since transformers 5.2x
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


def boundaries(starts_BT: Tensor) -> dict[str, Tensor]:
    """Keywords that keep packed documents apart: positions that begin anew, and a mask [B, 1, T, T] (True: is seen).

    `starts_BT` is True at the first token of a document.
    """
    length = starts_BT.shape[1]
    document_BT = starts_BT.long().cumsum(1)
    place_T = torch.arange(length)
    first_BT = torch.where(starts_BT, place_T, 0).cummax(1).values
    causal_TT = place_T[:, None] >= place_T[None]
    same_BTT = document_BT[:, :, None] == document_BT[:, None, :]
    return {"position_ids": place_T - first_BT, "attention_mask": (same_BTT & causal_TT)[:, None]}
