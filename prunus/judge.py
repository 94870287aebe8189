"""Which of two answers is better, by a judge of the user's choice: another model, or any program.

A judge sees every pair twice, once in each order, because judges favour a place (Zheng et al. 2023, "Judging LLM-as-a-Judge",
section 3.3). An answer wins if it wins in both orders; everything else is a tie.
"""

from __future__ import annotations

import json
import math
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from . import products
from .api import positions
from .errors import UserError, unknown
from .source import Source
from .tasks.paired import mcnemar

WINNERS = ("first", "second", "tie")
Z = 1.959964  # of a normal distribution: 95 % lie within
LETTERS = ("A", "B")
ASKED = """Two answers to the same request follow. Decide which of them is more helpful, more correct and clearer.

Request:
{prompt}

Answer A:
{first}

Answer B:
{second}

Which answer is better? Reply with the letter A or B alone."""


@dataclass(frozen=True)
class Pair:
    """Two answers to a prompt, in the order in which a judge sees them."""

    prompt: str
    first: str
    second: str


@dataclass(frozen=True)
class Verdicts:
    """What a judge said of one model's answers against another's, prompt by prompt: "win", "loss" or "tie"."""

    each: tuple[str, ...]
    swayed: int  # of the ties, those in which the order of the answers made the difference

    @property
    def win_rate(self) -> float:
        """Wins, and half of the ties, as a share of the prompts."""
        return (self.each.count("win") + self.each.count("tie") / 2) / len(self.each)

    def to_json(self) -> dict[str, Any]:
        """For records. `p`: the exact sign test over the prompts that were decided."""
        wins, losses, ties = (self.each.count(one) for one in ("win", "loss", "tie"))
        counts = {"prompts": len(self.each), "wins": wins, "losses": losses, "ties": ties, "swayed": self.swayed}
        rates = {"win_rate": self.win_rate, "interval": interval(self.win_rate, len(self.each)), "p": mcnemar(wins, losses)}
        return counts | rates | {"each": list(self.each)}


class Judge(Protocol):
    """Who decides."""

    @property
    def name(self) -> str:
        """For records and pages: nothing of the user's machine."""

    def check(self, prompts: Sequence[str], new_tokens: int) -> None:
        """UserError, before anything is written, for prompts that it could not judge."""

    def decide(self, pairs: Sequence[Pair], progress: Callable[[int, int], None]) -> list[str]:
        """One of `WINNERS` for each pair."""


@dataclass(frozen=True)
class Program:
    """A program that reads a JSON object with prompt, first and second on each line, and writes one with winner for each."""

    words: tuple[str, ...]

    @property
    def name(self) -> str:
        """Its file's name: what stands behind it may be a key."""
        return f"program:{Path(self.words[0]).name}"

    def check(self, prompts: Sequence[str], new_tokens: int) -> None:
        """UserError if there is no such program."""
        if shutil.which(self.words[0]) is None:
            raise UserError(
                f"judge: there is no program '{self.words[0]}' that could be run; give its path, or make it executable"
            )

    def decide(self, pairs: Sequence[Pair], progress: Callable[[int, int], None]) -> list[str]:
        """Asks all at once, so that the program may ask in parallel."""
        asked = "".join(json.dumps(asdict(pair)) + "\n" for pair in pairs)
        try:
            done = subprocess.run(self.words, input=asked, capture_output=True, text=True, encoding="utf-8", check=False)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"judge: {self.name} could not be run or read ({error})") from None
        if done.returncode:
            said = done.stderr.strip().splitlines()[-1:] or ["and says nothing"]
            raise UserError(f"judge: {self.name} ended with code {done.returncode}: {said[0]}")
        lines = [line for line in done.stdout.split("\n") if line.strip()]  # a reason may hold U+2028
        if len(lines) != len(pairs):
            raise UserError(
                f"judge: {self.name} was asked {len(pairs)} times and wrote {len(lines)} lines; write one for each"
            )
        progress(len(pairs), len(pairs))
        return [self._winner(line, i) for i, line in enumerate(lines, 1)]

    def _winner(self, line: str, number: int) -> str:
        try:
            said = json.loads(line)
        except (ValueError, RecursionError):
            said = None
        winner = said.get("winner") if isinstance(said, dict) else None
        if not isinstance(winner, str) or winner not in WINNERS:
            known = ", ".join(WINNERS)
            raise UserError(f'judge: line {number} of {self.name} is {line[:60]!r}; write {{"winner": ...}} with {known}')
        return str(winner)


@dataclass(frozen=True)
class Model:
    """A model that is asked for a letter: the one that it finds more likely has won."""

    source: Source
    dtype: str

    @property
    def name(self) -> str:
        """The source's label."""
        return f"model:{self.source.label}"

    def check(self, prompts: Sequence[str], new_tokens: int) -> None:
        """UserError if the longest question could be longer than what it sees at once, or if it does not know the letters."""
        self.source.anatomy.checked()
        self.source.check_dtype(self.dtype)
        tokenizer = self.source.tokenizer()
        self._letters(tokenizer)
        self._check_length(max(len(self._ids(tokenizer, Pair(prompt, "", ""))) for prompt in prompts) + 2 * new_tokens)

    @torch.no_grad()
    @products.fast()
    def decide(self, pairs: Sequence[Pair], progress: Callable[[int, int], None]) -> list[str]:
        """One forward pass a pair."""
        model, tokenizer = self.source.load(self.dtype), self.source.tokenizer()
        lead, first, second = self._letters(tokenizer)
        out = []
        for i, pair in enumerate(pairs, 1):
            ids = self._ids(tokenizer, pair) + lead
            self._check_length(len(ids))  # the answers may be more tokens to it than to those who wrote them
            logits: torch.Tensor = model(torch.tensor([ids]), logits_to_keep=1).logits[0, -1]
            margin = float(logits[first]) - float(logits[second])
            out.append("first" if margin > 0 else "second" if margin < 0 else "tie")
            progress(i, len(pairs))
        return out

    def _check_length(self, tokens: int) -> None:
        room = positions(self.source)
        if room is not None and tokens > room:
            raise UserError(
                f"judge: a question may have {tokens} tokens, and {self.source.label} sees {room}; lower --new-tokens"
            )

    def _ids(self, tokenizer: Any, pair: Pair) -> list[int]:
        asked = ASKED.format(**asdict(pair))
        if not tokenizer.chat_template:
            return list(tokenizer(f"{asked}\n\nThe better answer is").input_ids)
        said = [{"role": "user", "content": asked}]
        return list(tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=True)["input_ids"])

    def _letters(self, tokenizer: Any) -> tuple[list[int], int, int]:
        """The tokens with which both letters begin behind the question, and the first of each that is its own."""
        space = "" if tokenizer.chat_template else " "
        one, other = (tokenizer(f"{space}{letter}", add_special_tokens=False).input_ids for letter in LETTERS)
        for i, (a, b) in enumerate(zip(one, other, strict=False)):
            if a != b:
                return one[:i], a, b
        raise UserError(
            f"judge: to the tokenizer of {self.source.label} the letters A and B are the same; take another model"
        )


def judge(spec: str, dtype: str, *, online: bool = False) -> Judge:
    """`program:COMMAND` or `model:SOURCE`; UserError for what is neither."""
    kind, _, rest = spec.partition(":")
    if kind not in ("program", "model"):
        raise unknown("judge", kind, ("program", "model"), "write program:COMMAND or model:SOURCE")
    if kind == "model":
        return Model(Source.open(rest, online=online, quantized=True), dtype)
    try:
        words = tuple(shlex.split(rest))
    except ValueError as error:
        raise UserError(f"judge: '{rest}' is no command ({error})") from None
    if not words:
        raise UserError("judge: program: names none; write program:COMMAND")
    return Program(words)


def verdicts(
    by: Judge,
    prompts: Sequence[str],
    mine: Sequence[str],
    theirs: Sequence[str],
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Verdicts:
    """Every pair in both orders; answers that are the same are a tie, of which nobody is asked."""
    rows = list(zip(prompts, mine, theirs, strict=True))
    open_ = [i for i, (_, one, other) in enumerate(rows) if one != other]
    pairs = [Pair(*rows[i]) for i in open_] + [Pair(rows[i][0], rows[i][2], rows[i][1]) for i in open_]
    said = by.decide(pairs, progress) if pairs else []
    each, swayed = ["tie"] * len(rows), 0
    for i, here, there in zip(open_, said[: len(open_)], said[len(open_) :], strict=True):
        turned = {"first": "second", "second": "first", "tie": "tie"}[there]
        if here == turned:
            each[i] = {"first": "win", "second": "loss", "tie": "tie"}[here]
        else:
            swayed += 1
    return Verdicts(tuple(each), swayed)


def interval(rate: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval (1927) of a win rate over `count` prompts.

    It takes the variance of a rate without ties, rate (1 - rate), which is the most that it can be: with ties the interval is
    wider than it need be, never narrower.
    """
    weight = Z * Z / count
    middle = (rate + weight / 2) / (1 + weight)
    half = Z * math.sqrt(rate * (1 - rate) / count + weight / (4 * count)) / (1 + weight)
    return max(0.0, middle - half), min(1.0, middle + half)
