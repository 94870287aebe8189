"""A tokenizer in the terms of a GGUF file. llama.cpp splits text by rules that it knows by name: only such are written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NORMAL, CONTROL, USER, UNUSED = 1, 3, 4, 5  # llama.cpp's kinds of tokens

_LLAMA3 = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|"
    "\\s+(?!\\S)|\\s+"
)
_QWEN2 = _LLAMA3.replace("\\p{N}{1,3}", "\\p{N}")
# (regular expressions that text is split by first, whether digits are split one by one, whether GPT-2's rule follows) -> name
RULES: Mapping[tuple[tuple[str, ...], bool, bool], str] = {
    ((), False, True): "gpt-2",
    ((), True, True): "smollm",
    ((_LLAMA3,), False, False): "llama-bpe",
    ((_QWEN2,), False, False): "qwen2",
}


@dataclass(frozen=True)
class Vocabulary:
    """Byte-level BPE: tokens by id with their kinds, merges by rank, and the name of the rule that text is split by."""

    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    rule: str
    special: dict[str, int]  # bos, eos, unk, pad
    adds_bos: bool
    chat_templates: Mapping[str, str]  # by name; the one that is used unless another is asked for is "default"

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
        """A tokenizer for a model of `size` tokens; UserError if llama.cpp would split text another way."""
        told = json.loads(tokenizer.backend_tokenizer.to_str())
        if told["model"]["type"] != "BPE" or told["model"].get("byte_fallback"):
            fallback = " with byte fallback" if told["model"].get("byte_fallback") else ""
            raise UserError(f"gguf: the tokenizer is {told['model']['type']}{fallback}; only byte-level BPE is written")
        if told.get("normalizer") not in (None, {"type": "NFC"}):
            raise UserError(f"gguf: the tokenizer normalises text ({told['normalizer']['type']}), which llama.cpp would not")
        rule = RULES.get(_split(told.get("pre_tokenizer")))
        if rule is None:
            raise UserError(f"gguf: the tokenizer splits text by a rule that is none of {', '.join(RULES.values())}")
        tokens, kinds = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
        for token, i in told["model"]["vocab"].items():
            tokens[i], kinds[i] = token, NORMAL
        for added in told.get("added_tokens", ()):
            tokens[added["id"]], kinds[added["id"]] = added["content"], CONTROL if added["special"] else USER
        merges = [m if isinstance(m, str) else " ".join(m) for m in told["model"]["merges"]]
        special = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
        adds = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        known = {name: i for name, i in special.items() if i is not None}
        told = getattr(tokenizer, "chat_template", None) or {}
        templates = told if isinstance(told, dict) else {"default": told}
        return cls(tokens, kinds, merges, rule, known, adds, templates)


def _split(rule: Any) -> tuple[tuple[str, ...], bool, bool]:
    """What a pre-tokenizer does, in the terms of `RULES`; something that is no key of it for any other."""
    steps = [] if rule is None else rule["pretokenizers"] if rule["type"] == "Sequence" else [rule]
    patterns: list[str] = []
    digits = gpt2 = False
    for step in steps:
        if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"] and "Regex" in step["pattern"]:
            patterns.append(step["pattern"]["Regex"])
        elif step["type"] == "Digits" and step["individual_digits"] and not patterns:
            digits = True
        elif step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            gpt2 = bool(step.get("use_regex", True))
        else:
            patterns.append(step["type"])
    return tuple(patterns), digits, gpt2
