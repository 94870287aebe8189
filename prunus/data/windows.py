"""Fixed blocks of token windows: packed full, never padded, with their provenance.

Shapes: N windows, T tokens.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import UserError
from ..headers import sha256 as file_sha256
from .text import HUB, SEPARATOR, documents, select

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHARS_PER_TOKEN = 8  # more than any usual text; only says when to try tokenising what has been read so far
_TAIL = 64  # tokens at the end of a partial text that further text might have merged differently


@dataclass(frozen=True)
class Windows:
    """Token ids `ids_NT` (int64), what they came from, and how many UTF-8 bytes the predicted tokens stand for."""

    ids_NT: Tensor
    source: str
    documents: str | None
    seed: int | None
    sha256: str  # of the token ids as little-endian int64
    source_sha256: str | None
    num_bytes: int  # of the text under tokens 1..T-1 of every window

    @property
    def num_windows(self) -> int:
        """N."""
        return self.ids_NT.shape[0]

    @property
    def seq_len(self) -> int:
        """T."""
        return self.ids_NT.shape[1]

    @property
    def num_tokens(self) -> int:
        """N * T."""
        return self.ids_NT.numel()

    def provenance(self) -> dict[str, Any]:
        """What goes into records: everything but the ids."""
        data = {k: v for k, v in asdict(self).items() if k != "ids_NT"}
        return data | {"windows": self.num_windows, "seq_len": self.seq_len}

    def check_fits(self, vocab_size: int, what: str) -> None:
        """UserError if a token lies outside the model's vocabulary."""
        highest = int(self.ids_NT.max())
        if highest >= vocab_size:
            raise UserError(f"{what}: token {highest} does not exist in a vocabulary of {vocab_size}; wrong tokenizer")


def pack(
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    *,
    windows: int,
    seq_len: int,
    seed: int | None = None,
    docs: str | None = None,
    field: str = "text",
    online: bool = False,
) -> Windows:
    """Documents joined by a blank line, tokenised in one piece (no BOS), cut into the first `windows` full windows.

    With a `seed` the windows are drawn without replacement from all full windows of the text instead. UserError if the
    text is empty or too short.
    """
    needed = windows * seq_len
    text = _read(tokenizer, source, None if seed is not None else needed, docs, field, online)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    available = len(ids) // seq_len
    if available < windows:
        raise UserError(
            f"{source}: {len(ids):,} tokens of text, but {windows} windows of {seq_len} need {needed:,}; give more text or "
            "fewer windows"
        )
    chosen = list(range(windows))
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(available, generator=generator)[:windows].tolist()
    ids_NT = torch.tensor([ids[i * seq_len : (i + 1) * seq_len] for i in chosen], dtype=torch.int64)
    num_bytes = byte_level_bytes(tokenizer, ids_NT[:, 1:])
    if num_bytes is None:
        spans = ((offsets[i * seq_len + 1][0], offsets[(i + 1) * seq_len - 1][1]) for i in chosen)
        num_bytes = sum(len(text[start:end].encode()) for start, end in spans)
    path = None if source.startswith(HUB) else Path(source).expanduser()
    return Windows(
        ids_NT=ids_NT,
        source=source if path is None else path.name,
        documents=docs,
        seed=seed,
        sha256=hashlib.sha256(ids_NT.numpy().tobytes()).hexdigest(),
        source_sha256=None if path is None else file_sha256([path]),
        num_bytes=num_bytes,
    )


def byte_level_bytes(tokenizer: PreTrainedTokenizerBase, ids_NT: Tensor) -> int | None:
    """UTF-8 bytes that these tokens stand for; None if the tokenizer is not byte-level.

    A byte-level token is spelt with one character a byte, so the count is exact; offsets into the text are not, since some
    tokenizers leave leading spaces out of them.
    """
    from tokenizers.decoders import ByteLevel

    if not isinstance(tokenizer.backend_tokenizer.decoder, ByteLevel):
        return None
    added = {token.content: len(token.content.encode()) for token in tokenizer.added_tokens_decoder.values()}
    ids, counts = ids_NT.unique(return_counts=True)
    tokens = tokenizer.convert_ids_to_tokens(ids.tolist())
    return sum(added.get(token, len(token)) * n for token, n in zip(tokens, counts.tolist(), strict=True))


def _read(
    tokenizer: PreTrainedTokenizerBase, source: str, needed: int | None, which: str | None, field: str, online: bool
) -> str:
    """The text of enough documents for `needed` tokens (all of them for None)."""
    parts: list[str] = []
    size, ask = 0, (needed or 0) * 2
    for document in select(documents(source, field=field, online=online), which):
        if not document.strip():
            continue
        parts.append(document)
        size += len(document)
        if needed is not None and size >= ask:
            text = SEPARATOR.join(parts)
            if len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) >= needed + _TAIL:
                return text
            ask = min(size * 2, max(needed * _CHARS_PER_TOKEN, size + size // 2))
    if not parts:
        raise UserError(f"{source}: there is no text in it")
    return SEPARATOR.join(parts)
