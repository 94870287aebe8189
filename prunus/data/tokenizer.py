"""Tokenizers for prepared data: opened, trained, and told apart by what they do to text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..reading import check_regular, check_tokenizer, refusing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END = "<|endoftext|>"
BYTES = 256  # the alphabet of a byte-level tokenizer
_ENCODES = ("normalizer", "pre_tokenizer", "model", "added_tokens")  # the parts that decide which ids a text has


def open_tokenizer(name: str, *, online: bool = False) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a folder or a hub name; UserError if there is none or it has no end-of-text token."""
    from transformers import AutoTokenizer

    folder = Path(name).expanduser()
    if not online and not folder.exists():
        raise UserError(f"{name}: no such file or folder; give a folder with tokenizer.json (--online allows a hub name)")
    if folder.exists() and not (folder / "tokenizer.json").is_file():
        raise UserError(f"{name}: there is no tokenizer.json in it; give a model's folder, or one of prunus data tokenizer")
    if folder.exists():
        check_regular(folder)
        check_tokenizer(folder / "tokenizer.json")
    with refusing(f"{name}: the tokenizer cannot be read"):
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder) if folder.exists() else name, local_files_only=not online, trust_remote_code=False
        )
    if not tokenizer.is_fast:
        raise UserError(f"{name}: the tokenizer has no tokenizer.json; save a fast one into the folder")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{name}: the tokenizer has no eos_token, which documents must end with; name one in its config")
    return tokenizer


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what decides a text's ids: vocabulary, merges, normaliser, pre-tokeniser, added tokens and end token.

    Not of the file: saving a tokenizer again may lay it out differently, and templates, padding and BOS rules do not touch
    prepared data.
    """
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    data = {name: parts.get(name) for name in _ENCODES} | {"eos": tokenizer.eos_token_id}
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def num_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """Highest id + 1, added tokens included."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def train_tokenizer(documents: Iterator[str], vocab_size: int, what: str = "the text") -> PreTrainedTokenizerBase:
    """A byte-level BPE of exactly `vocab_size` tokens, digits single; one special token both begins, ends and pads.

    Any text has tokens, and they decode to it again. UserError if the size is too small or the text too poor for it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size <= BYTES:
        raise UserError(f"vocab_size: {vocab_size} is too small; {BYTES} bytes and {END} alone are {BYTES + 1} tokens")
    made: Any = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    seen = False

    def texts() -> Iterator[str]:
        nonlocal seen
        for document in documents:
            if document.strip():
                seen = True
                yield document

    made.train_from_iterator(texts(), trainer)
    if not seen:
        raise UserError(f"{what}: there is no text in it")
    if made.get_vocab_size() != vocab_size:
        got = made.get_vocab_size()
        raise UserError(
            f"vocab_size: the text gives {got:,} tokens only, not {vocab_size:,}; give more text or ask for fewer"
        )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=END, eos_token=END, pad_token=END)
