"""What models write behind the same prompts, for the eye: greedy, so that the same command shows the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import products
from .data.text import rows_of
from .errors import UserError
from .place import staged_files
from .tables import cell, fenced, win_rate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FIELDS = ("prompt", "instruction", "text")  # of a JSON object that holds a prompt


def prompts(path: Path, first: int | None = None) -> tuple[str, ...]:
    """Prompts of a file, or the first of them: lines of text, or objects of a .jsonl or .json file; UserError if there are none."""
    if first is not None and first < 1:
        raise UserError(f"first: {first} prompts are none; give at least 1")
    found = rows_of(path, "prompts", line="prompt")
    if not found:
        raise UserError(f"prompts: {path} has none; give a line, or an object with {' or '.join(FIELDS)}, for each")
    return tuple(_prompt(row, f"{path}, prompt {i}") for i, row in enumerate(found[:first], 1))


def _prompt(row: Any, place: str) -> str:
    value = next((row[name] for name in FIELDS if name in row), None) if isinstance(row, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"prompts: {place} has no {', '.join(FIELDS[:-1])} or {FIELDS[-1]} with text in it")
    return value


def write_page(path: Path, models: Sequence[Mapping[str, Any]], asked: Sequence[str], *, new_tokens: int) -> None:
    """A Markdown page: under every prompt what each model wrote, and what a judge said of it.

    `models` are rows of `appraise`. Texts stand in fences that nothing in them can close.
    """
    lines = [f"# {len(asked)} prompts, {len(models)} models", "", f"Greedy, at most {new_tokens} tokens.", ""]
    for other, said in models[0].get("judged", {}).items():
        lines += [f"{_plain(models[0]['model'])} against {_plain(other)}: {win_rate(said)}.", ""]
    for i, prompt in enumerate(asked):
        lines += [f"## {i + 1}", "", *fenced(prompt), ""]
        for row in models:
            lines += [f"**{_plain(row['model'])}**", "", *fenced(row["written"][i]), ""]
        for other, said in models[0].get("judged", {}).items():
            lines += [f"{_plain(models[0]['model'])} against {_plain(other)}: {said['each'][i]}", ""]
    with staged_files(path) as (stage,):
        stage.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def _plain(name: str) -> str:
    return cell(name.replace("*", "").replace("`", ""))


def check_chat(tokenizer: PreTrainedTokenizerBase, label: str) -> None:
    """UserError for a tokenizer that cannot speak as a chat."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(f"chat: the tokenizer of {label} has no chat template; drop --chat")


def check_lengths(
    tokenizer: PreTrainedTokenizerBase, asked: Sequence[str], label: str, most: int | None, *, new_tokens: int, chat: bool
) -> None:
    """UserError for a prompt behind which the model would leave the `most` positions that it knows; None: any."""
    if most is None:
        return
    for i, prompt in enumerate(asked, 1):
        size = _read(tokenizer, prompt, chat).shape[1]
        if size + new_tokens > most:
            raise UserError(
                f"prompts: prompt {i} has {size} tokens, and with {new_tokens} new ones leaves the {most} positions that {label} "
                "knows; shorten it, or lower --new-tokens"
            )


def _read(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool) -> torch.Tensor:
    """Token ids of a prompt [1, T], as an answer in a chat is asked for if `chat`."""
    if not chat:
        return tokenizer(prompt, return_tensors="pt", verbose=False)["input_ids"]
    said = [{"role": "user", "content": prompt}]
    made: Any = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return made["input_ids"]


@torch.no_grad()
@products.fast()
def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[str],
    *,
    new_tokens: int,
    chat: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """What the model writes greedily behind each prompt, at most `new_tokens` tokens; as an answer in a chat if `chat`."""
    out = []
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    for i, prompt in enumerate(asked):
        ids = _read(tokenizer, prompt, chat)
        made: Any = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            max_length=None,
            do_sample=False,
            pad_token_id=pad,
        )
        out.append(str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)))
        progress(i + 1, len(asked))
    return out
