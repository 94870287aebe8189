"""Our models behind lm-eval's interface: its prompts, its tokens, its scores; only log-likelihoods are computed another way.

Imports lm-eval, so nothing imports this before a task is to be run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UserError
from ..train.learner import Learner
from .tree import Answer, Sequence_, answers, batches, trees

TOKENS = 4096  # of a batch, padding included
Request = tuple[tuple[str, str], list[int], list[int]]  # texts, tokens of the context, tokens of the continuation


class Known:
    """Answers on disk, a line each as they come, so that a killed evaluation goes on where it was."""

    def __init__(self, path: Path) -> None:
        self.path, self.answers = path, {}
        if path.is_file():
            self.answers = dict(self._read(path.read_text(encoding="utf-8")))

    def _read(self, text: str) -> Iterator[tuple[str, Answer]]:
        for line in text.splitlines():
            try:
                key, log_prob, greedy = json.loads(line)
            except (ValueError, TypeError, RecursionError):  # the last line of a process that was killed
                continue
            yield key, Answer(log_prob, greedy)

    def add(self, found: dict[str, Answer]) -> None:
        """Keep them, here and on disk."""
        self.answers |= found
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" + "\n".join(json.dumps([key, a.log_prob, a.greedy]) for key, a in found.items()))

    @staticmethod
    def key(sequence: Sequence_) -> str:
        """What an answer depends on besides the model."""
        data = np.array([sequence.continuation, *sequence.tokens], dtype=np.int64).tobytes()
        return hashlib.blake2b(data, digest_size=16).hexdigest()


class Shared(HFLM):
    """A causal model in memory that reads what requests share only once."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        known: Known,
        progress: Callable[[int, int], None],
        *,
        tokens: int = TOKENS,
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=1)
        self.learner, self.known, self.said, self.tokens = Learner(model), known, progress, tokens

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        sequences = [self._sequence(context, continuation) for _, context, continuation in requests]
        keys = [Known.key(sequence) for sequence in sequences]
        left = dict(zip(keys, sequences, strict=True))  # a request that is made twice is answered once
        open_keys = [key for key in left if key not in self.known.answers]
        asked = [left[key] for key in open_keys]
        found = trees(asked)
        window = getattr(self.learner.model.config, "sliding_window", None)
        if window is not None and any(len(sequence.read) > window for sequence in asked):
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)  # a tree's mask knows of no window
        total, done = sum(len(tree) for tree in found), 0
        for batch in batches(found, self.tokens):
            own = answers(self.learner, batch, asked)
            self.known.add({open_keys[index]: answer for index, answer in own.items()})
            done += sum(len(tree) for tree in batch)
            self.said(done, total)
        return [(a.log_prob, a.greedy) for a in (self.known.answers[key] for key in keys)]

    def _sequence(self, context: list[int], continuation: list[int]) -> Sequence_:
        """As lm-eval cuts them: the model reads at most `max_length` tokens, the last ones."""
        if len(continuation) > self.max_length:
            raise UserError(
                f"tasks: one answer has {len(continuation)} tokens, and the model reads {self.max_length} at most; leave its task "
                "out"
            )
        return Sequence_(tuple((context + continuation)[-(self.max_length + 1) :]), len(continuation))
