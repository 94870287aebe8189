"""The `vocab` axis: tokens that a corpus hardly uses go, from the embedding, the head and the tokenizer alike.

A token stays for what it is (special, a byte) or for how often the corpus has it; with it stays everything that byte-pair
encoding makes it from. So text whose tokens all stay has the same tokens as before: of the merges that encoding chose not one
is gone, and one that is not there can only have been passed over. Other text falls back to smaller tokens, at worst to bytes.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import checkpoint, hf, record
from .cut import slice_plan, slice_tensors_
from .data.text import documents
from .errors import UserError, VerificationError
from .job import Progress, no_progress
from .keep import Keep
from .ledger import LEDGER, ledger_of
from .source import Source
from .verification import check_saved, probe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRIMMED = "trimmed.json"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # SentencePiece's byte fallback
_PROBE = 64  # tokens whose logits are compared
_CHUNK = 256  # documents that are tokenised together


@dataclass(frozen=True)
class Chosen:
    """Which tokens stay, and how much of the corpus they are."""

    kept: tuple[int, ...]  # ids before, sorted; the place of one is its id afterwards
    forced: int  # of them special tokens, bytes, and what others are made from
    tokens: int  # of the corpus
    covered: float  # share of them that is kept as it is


def counts_of(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], progress: Callable[[int], None]) -> Counter[int]:
    """How often each token stands in the texts."""
    found: Counter[int] = Counter()
    chunk: list[str] = []

    def flush() -> None:
        for ids in tokenizer(chunk, add_special_tokens=False)["input_ids"] if chunk else ():
            found.update(ids)
        chunk.clear()

    for i, text in enumerate(texts):
        chunk.append(text)
        if len(chunk) == _CHUNK:
            flush()
            progress(i + 1)
    flush()
    return found


def chosen(parts: Mapping[str, Any], counts: Mapping[int, int], coverage: float, always: Iterable[int]) -> Chosen:
    """The fewest tokens whose occurrences are `coverage` of all, and everything that must be there for them.

    `parts` is the tokenizer's JSON, `always` ids that models and generation configs name.
    """
    vocab: Mapping[str, int] = parts["model"]["vocab"]
    total = sum(counts.values())
    kept, seen = set[int](), 0
    for token, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if seen >= coverage * total:
            break
        kept.add(token)
        seen += count
    wanted = len(kept)
    kept |= {int(added["id"]) for added in parts.get("added_tokens") or ()} | set(always)
    if (unknown := parts["model"].get("unk_token")) in vocab:
        kept.add(vocab[unknown])
    kept |= _letters(vocab, parts)
    made = _made_from(parts)
    todo = list(kept)
    while todo:  # every way in which a merge can make a token, not one of them: encoding may take any
        for other in made.get(todo.pop(), ()):
            if other not in kept:
                kept.add(other)
                todo.append(other)
    covered = sum(count for token, count in counts.items() if token in kept)
    return Chosen(tuple(sorted(kept)), len(kept) - wanted, total, covered / total)


def _letters(vocab: Mapping[str, int], parts: Mapping[str, Any]) -> set[int]:
    """Tokens of one byte: what any text can be written with. Of a byte-level tokenizer, every token of one letter."""
    if parts["model"].get("byte_fallback"):
        return {i for token, i in vocab.items() if _BYTE.fullmatch(token)}
    from tokenizers import pre_tokenizers

    return {vocab[letter] for letter in pre_tokenizers.ByteLevel.alphabet() if letter in vocab}


def _merges(parts: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [tuple(m) if isinstance(m, list) else tuple(m.split(" ", 1)) for m in parts["model"]["merges"]]


def _made_from(parts: Mapping[str, Any]) -> dict[int, set[int]]:
    vocab, out = parts["model"]["vocab"], dict[int, set[int]]()
    for one, other in _merges(parts):
        out.setdefault(vocab[one + other], set()).update((vocab[one], vocab[other]))
    return out


def rewritten(
    tokenizer: PreTrainedTokenizerBase, parts: Mapping[str, Any], place: Mapping[int, int]
) -> PreTrainedTokenizerBase:
    """The tokenizer with the tokens of `place` (id before -> after) alone, and the merges that make them."""
    from transformers import AutoTokenizer

    data = json.loads(json.dumps(parts))
    vocab, model = parts["model"]["vocab"], data["model"]
    model["vocab"] = {token: place[i] for token, i in vocab.items() if i in place}
    there = model["vocab"]
    model["merges"] = [[a, b] for a, b in _merges(parts) if a in there and b in there and a + b in there]
    for added in data.get("added_tokens") or ():
        added["id"] = place[added["id"]]
    _renumber(data.get("post_processor"), place)
    with tempfile.TemporaryDirectory() as folder, hf.quiet():
        tokenizer.save_pretrained(folder)
        path = Path(folder, "tokenizer.json")
        path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
        config = Path(folder, "tokenizer_config.json")
        told = json.loads(config.read_text(encoding="utf-8"))
        if "added_tokens_decoder" in told:
            told["added_tokens_decoder"] = {str(place[int(i)]): value for i, value in told["added_tokens_decoder"].items()}
        config.write_text(json.dumps(told), encoding="utf-8")
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _renumber(part: Any, place: Mapping[int, int]) -> None:
    """Changes ids in a post-processor's templates, wherever they stand."""
    if isinstance(part, dict):
        for name, value in part.items():
            if name == "ids" and isinstance(value, list):
                part[name] = [place[i] for i in value]
            elif name in ("sep", "cls") and isinstance(value, list) and len(value) == 2 and isinstance(value[1], int):
                part[name] = [value[0], place[value[1]]]
            else:
                _renumber(value, place)
    elif isinstance(part, list):
        for value in part:
            _renumber(value, place)


def _named_ids(config: Any) -> dict[str, Any]:
    """Fields of a config that name tokens."""
    return {
        name: value
        for name, value in config.to_dict().items()
        if name.endswith(("token_id", "token_ids")) and (isinstance(value, int) or (isinstance(value, list) and value))
    }


def _ids(values: Iterable[Any]) -> set[int]:
    return {i for value in values for i in (value if isinstance(value, list) else [value]) if isinstance(i, int) and i >= 0}


def trim(
    source: Source,
    texts: Sequence[str],
    coverage: float,
    out: Path,
    *,
    field: str = "text",
    dtype: str = "float32",
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Write the checkpoint with fewer tokens, tokenizer and all, and prove it.

    VerificationError if text of the corpus that has kept tokens alone is read as other tokens, or the logits of what stays differ.
    """
    if not 0 < coverage <= 1:
        raise UserError(f"coverage: {coverage:g} is no share of a text; give more than 0 and at most 1, such as 0.999")
    if not texts:
        raise UserError("text: nothing to count tokens in; give --text FILE, of the kind that the model will read")
    source.check_dtype(dtype)
    if (source.path / checkpoint.EXTRA / "mask.safetensors").is_file():
        raise UserError(
            "trim: single weights of this checkpoint are cut, and its mask would be lost; trim first, then cut weights"
        )
    checkpoint.check_own(out, TRIMMED, "trim", overwrite=overwrite, needed_bytes=source.anatomy.weight_bytes(4))
    tokenizer, anatomy = source.tokenizer(), source.anatomy
    backend: Any = tokenizer
    parts = json.loads(backend.backend_tokenizer.to_str())
    if parts["model"]["type"] != "BPE":
        raise UserError(f"tokenizer: it is of type {parts['model']['type']}; only byte-pair encoding (BPE) can be rewritten")

    def read() -> Iterable[str]:
        return (text for one in texts for text in documents(one, field=field) if text.strip())

    counts = counts_of(tokenizer, read(), lambda done: progress("count", done, 0))
    if not counts:
        raise UserError("text: there is no token in it; give more")
    model = source.load(dtype)
    configs = (model.config, model.generation_config)
    picked = chosen(parts, counts, coverage, _ids(v for c in configs for v in _named_ids(c).values()))
    if len(picked.kept) >= anatomy.shape.vocab_size:
        raise UserError(f"coverage: {coverage:g} of this text needs every token; give less, or other text")
    place = {old: new for new, old in enumerate(picked.kept)}
    smaller = rewritten(tokenizer, parts, place)
    checked, asked = _same_tokens(tokenizer, smaller, read(), place)
    keep = Keep({"vocab": picked.kept}).validated(anatomy)
    target = hf.target_for(model.config, anatomy, keep)
    for name, value in _named_ids(model.config).items():
        setattr(
            target.config, name, [place.get(i, i) for i in value] if isinstance(value, list) else place.get(value, value)
        )
    generation = model.generation_config
    for name, value in _named_ids(generation).items():
        setattr(generation, name, [place.get(i, i) for i in value] if isinstance(value, list) else place.get(value, value))
    probed = torch.tensor([asked[:_PROBE]])
    with torch.no_grad():
        wanted = model(input_ids=probed).logits[..., list(picked.kept)]
    cut = hf.build(target.config, slice_tensors_(dict(hf.weights(model, anatomy)), slice_plan(anatomy, keep)), generation)
    with torch.no_grad():
        found = cut(input_ids=torch.tensor([[place[i] for i in asked[:_PROBE]]])).logits
    difference = float((found - wanted).abs().max())
    if not difference <= 1e-4 * max(1.0, float(wanted.abs().max())):
        raise VerificationError(f"trim: logits of the tokens that stay differ by {difference:.3g}; nothing was written")
    with checkpoint.staged(out, overwrite=overwrite) as stage:
        try:
            checkpoint.write_folder(cut, smaller, stage, lambda made, folder: made.save_pretrained(folder))
            if (told := ledger_of(source.path)) is not None:
                shutil.copyfile(told, stage / LEDGER)
        except OSError as error:
            raise UserError(f"{out}: cannot be written: {error}") from error
        after = keep.anatomy_after(anatomy)
        made = {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "source": {"name": source.label, "sha256": source.sha256},
            "texts": [Path(text).name for text in texts], "coverage": coverage, "corpus_tokens": picked.tokens,
            "covered": picked.covered, "vocab_before": anatomy.shape.vocab_size, "vocab": after.shape.vocab_size,
            "forced": picked.forced, "params_before": anatomy.num_params, "params": after.num_params,
            "same_lines": checked, "keep": keep.to_json()["keep"]["vocab"],
            "verified": check_saved(stage, probe(cut)) | {"max_difference_to_source": difference}, "versions": record.versions(),
        }  # fmt: skip
        (stage / TRIMMED).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return {"out": str(out)} | made


def _same_tokens(
    before: PreTrainedTokenizerBase, after: PreTrainedTokenizerBase, texts: Iterable[str], place: Mapping[int, int]
) -> tuple[int, list[int]]:
    """(how many lines have kept tokens alone, some kept tokens); VerificationError where one of them is read otherwise."""
    same, some = 0, list[int]()
    for text in (line for one in texts for line in one.splitlines() if line.strip()):
        ids = before(text, add_special_tokens=False)["input_ids"]
        some += [i for i in ids if i in place][:_PROBE] if len(some) < _PROBE else []
        if all(i in place for i in ids):
            if after(text, add_special_tokens=False)["input_ids"] != [place[i] for i in ids]:
                raise VerificationError(f"trim: '{text[:40]}' is read as other tokens than before; nothing was written")
            same += 1
    return same, some
