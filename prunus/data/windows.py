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
    num_bytes: int  # of the text under the predicted tokens
    num_words: int = 0  # of the same text, as white space parts them
    stride: int | None = None  # tokens from one window's start to the next, where they overlap

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

    def first_predicted(self, window: int) -> int:
        """The first token of a window that counts: with a stride, what the window before has told already is only read."""
        return 1 if self.stride is None or window == 0 else self.seq_len - self.stride

    @property
    def num_predictions(self) -> int:
        """Tokens that count."""
        return sum(self.seq_len - self.first_predicted(i) for i in range(self.num_windows))

    def provenance(self) -> dict[str, Any]:
        """What goes into records: where the ids are from, a stride where there is one."""
        left_out = {"ids_NT", "num_words"} | ({"stride"} if self.stride is None else set())
        data = {k: v for k, v in asdict(self).items() if k not in left_out}
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
    windows: int | None,
    seq_len: int,
    seed: int | None = None,
    docs: str | None = None,
    field: str = "text",
    stride: int | None = None,
    online: bool = False,
) -> Windows:
    """Documents joined by a blank line, tokenised in one piece (no BOS), cut into the first `windows` full windows; None: all.

    With a `seed` the windows are drawn without replacement from all full windows of the text instead. With a `stride` below
    `seq_len` each begins so many tokens behind the one before, and only its last `stride` tokens are predicted. UserError if the
    text is empty or too short.
    """
    step = stride or seq_len
    needed = None if windows is None else (windows - 1) * step + seq_len
    text = _read(tokenizer, source, None if seed is not None else needed, docs, field, online)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    available = max(0, (len(ids) - seq_len) // step + 1)
    wanted = max(1, available) if windows is None else windows
    if available < wanted:
        raise UserError(
            f"{source}: {len(ids):,} tokens of text, but {wanted} windows of {seq_len} need {needed or seq_len:,}; give more text "
            "or fewer windows"
        )
    chosen = list(range(wanted))
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(available, generator=generator)[:wanted].tolist()
    ids_NT = torch.tensor([ids[i * step : i * step + seq_len] for i in chosen], dtype=torch.int64)
    fresh = [1 if stride is None or k == 0 else seq_len - stride for k in range(wanted)]
    spans = [
        (offsets[i * step + first][0], offsets[i * step + seq_len - 1][1]) for i, first in zip(chosen, fresh, strict=True)
    ]
    if stride is not None:  # one piece of text: parts of a word that windows share out are no words
        spans = [(spans[0][0], spans[-1][1])]
    under = [text[start:end] for start, end in spans]
    num_bytes = byte_level_bytes(tokenizer, torch.cat([row[first:] for row, first in zip(ids_NT, fresh, strict=True)]))
    if num_bytes is None:
        num_bytes = sum(len(part.encode()) for part in under)
    path = None if source.startswith(HUB) else Path(source).expanduser()
    return Windows(
        ids_NT=ids_NT,
        source=name_of(source),
        documents=docs,
        seed=seed,
        sha256=hashlib.sha256(ids_NT.numpy().tobytes()).hexdigest(),
        source_sha256=None if path is None else file_sha256([path]),
        num_bytes=num_bytes,
        num_words=sum(len(part.split()) for part in under),
        stride=stride,
    )


def name_of(source: str) -> str:
    """What records call a text: no folders of the user's machine."""
    return source if source.startswith(HUB) else Path(source).expanduser().name


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
