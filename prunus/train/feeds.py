"""Where a run's sequences come from, and what it has to say of them: opened before any weight is read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..data.mixing import Mixer
from ..data.order import Batch, Chain, Domain, Stream
from ..data.overlap import text_overlap
from ..data.shards import Shards
from ..data.text import documents, select
from ..data.tokenizer import fingerprint
from ..distributed import leads
from ..errors import UserError
from ..ledger import SWEEP, Data, Ledger, Stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..source import Source
    from .parts import DataPart
    from .recipe import Recipe

VALIDATION = "validation"


@dataclass
class Feeds:
    """The training stream, and the sequences that the loss is watched on."""

    training: Stream | Chain
    validation: Stream
    validation_sequences: int
    notes: tuple[str, ...] = ()
    mixer: Mixer | None = None

    @classmethod
    def open(cls, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Feeds:
        """UserError for shards that are missing, of another tokenizer, or too few for the budget."""
        part, key = recipe.data, fingerprint(tokenizer)
        training = _training(part, key, whole=leads())  # one process is enough to hash files
        training.check_budget(recipe.steps * recipe.sequences)
        validation = Stream(_domains(part, VALIDATION, key, whole=leads()), part.seq_len, seed=0)
        notes = [note for text in part.evaluation for note in overlap_notes(text, [one.folder for one in part.domains])]
        mixer = None
        if part.mixing is not None:
            shares = {domain.name: domain.weight for domain in training.domains}
            asked = part.mixing
            mixer = Mixer(shares, asked.references, temperature=asked.temperature, floor=asked.floor)
            assert isinstance(training, Stream)
            notes += _short(training, mixer, recipe.steps * recipe.sequences)
        return cls(training, validation, min(recipe.validate_.sequences, validation.num_sequences), tuple(notes), mixer)

    def remix_(self, position: int, losses: Mapping[str, float]) -> dict[str, Any]:
        """Changes the stream: shares from `position` on by the domains' losses. Returns what happened, for the log."""
        assert self.mixer is not None and isinstance(self.training, Stream)
        told = self.mixer.update({name: losses.get(name) for name in self.mixer.weights})
        self.training.reweight(position, self.mixer.weights)
        return told

    def mixing_state(self) -> dict[str, Any] | None:
        """What a run that goes on must know of the shares."""
        return None if self.mixer is None else {"mixer": self.mixer.state(), "history": self.training.history}

    def remember_(self, state: Mapping[str, Any] | None) -> None:
        """Changes the stream and the mixer: as they stood when `mixing_state` was told."""
        if state is not None:
            assert isinstance(self.training, Stream)
            self.mixer = Mixer.from_state(state["mixer"])
            self.training.replay(state["history"])

    def starts(self, batch: Any) -> Tensor:
        """First tokens of documents among what is read, bool [B, T]; a sequence's first token starts one."""
        segments = self.training.segments(batch)[:, :-1]
        return torch.cat([torch.ones_like(segments[:, :1], dtype=torch.bool), segments[:, 1:] != segments[:, :-1]], 1)

    @property
    def parts(self) -> dict[str, dict[str, int]]:
        """Seed and tokens of each of several ranges; nothing where there is one, which the recipe's seed orders."""
        return self.training.parts if isinstance(self.training, Chain) else {}

    def identity(self) -> dict[str, Any]:
        """What records keep of the data."""
        return {domain.name: _identity(domain) for domain in self.training.domains}

    def ledger(
        self,
        recipe: Recipe,
        sequences: int,
        flops: dict[str, int],
        params: int,
        source: Source | None,
        beginnings: Sequence[int] = (),
        teacher_cache: str | None = None,
    ) -> dict[str, Any]:
        """The run's ledger: what the first `sequences` of the stream were, what it cost, and the parent's own.

        `beginnings`: sequences of each that was trained on to find the rate; a stage of its own, before the other.
        `teacher_cache`: where the teacher's words were read, once for every sequence, whoever read them how often.
        """
        stages = []
        free = () if teacher_cache is None else ("teacher",)
        own = (recipe.name, [sequences], (), self.training)
        for name, counts, unspent, feed in ((SWEEP, beginnings, free, self._begun), own):
            if not sum(counts):
                continue
            stage = Stage(
                name=name,
                params=params,
                seed=recipe.data.seed,
                seeds={name: part["seed"] for name, part in self.parts.items()},
                seq_len=recipe.data.seq_len,
                positions=(0, max(counts)),
                history=feed.history,
                data={domain: Data(**identity) for domain, identity in self.identity().items()},
                teacher_cache=teacher_cache,
            )
            for count in counts:
                for batch in _batches(feed, count):
                    stage.consume(batch.ranges)
            for kind, spent in flops.items():
                if kind in unspent:
                    continue
                stage.spend(kind, spent * sum(counts) // sequences)  # type: ignore[arg-type]
            stages.append(stage)
        made = Ledger(stages=stages) if source is None else Ledger.after(source.path, source.label, stages)
        return made.model_dump(mode="json")

    @property
    def _begun(self) -> Stream | Chain:
        """The training stream as every beginning reads it: before the losses had a say in its shares."""
        return self.training if isinstance(self.training, Chain) else self.training.begun()


_TOGETHER = 1024  # sequences whose ranges are looked up at a time


def _short(stream: Stream, mixer: Mixer, sequences: int) -> list[str]:
    """A word of warning, as no share is known beforehand, if the largest that a domain can come to would use it up."""
    most = (1 - mixer.floor * (len(stream.domains) - 1)) * sequences
    return [
        f"data.mixing: domain '{domain.name}' may be used up, which would end the run: its share can rise to "
        f"{most * stream.seq_len:,.0f} tokens, and it holds {size * stream.epochs * stream.seq_len:,} (data.epochs is "
        f"{stream.epochs}); {math.ceil(most / size)} epochs would do"
        for domain, size in zip(stream.domains, stream.sizes.tolist(), strict=True)
        if most > size * stream.epochs
    ]


def _batches(feed: Stream | Chain, sequences: int) -> Iterator[Batch]:
    for first in range(0, sequences, _TOGETHER):
        yield feed.take(first, min(_TOGETHER, sequences - first))


def _training(part: DataPart, key: str | None, *, whole: bool = False) -> Stream | Chain:
    """What is trained on, in its order."""
    if isinstance(part.range, str):
        return Stream(_domains(part, part.range, key, whole=whole), part.seq_len, part.seed, part.epochs)
    streams = {}
    for name, asked in part.range.items():
        seed = part.seed if asked.seed is None else asked.seed
        stream = Stream(_domains(part, name, key, whole=whole), part.seq_len, seed, part.epochs)
        streams[name] = (stream, asked.tokens // part.seq_len)
    return Chain(streams)


def _domains(part: DataPart, which: str, key: str | None, *, whole: bool = False) -> list[Domain]:
    out = []
    for place, domain in enumerate(part.domains):
        folder = Path(domain.folder).expanduser()
        try:
            shards = Shards.open(folder, which, tokenizer=key, whole=whole)
        except UserError as error:
            raise UserError(f"data.domains.{place}: {error}") from error
        out.append(Domain(domain.name or folder.name, shards, domain.weight))
    total = sum(domain.weight for domain in out)
    return [Domain(domain.name, domain.shards, domain.weight / total) for domain in out]


def _identity(domain: Domain) -> dict[str, Any]:
    assert isinstance(domain.shards, Shards)
    return domain.shards.identity()


def check_budget(recipe: Recipe) -> None:
    """UserError, before there is a model or a tokenizer, for tokens that are missing or too few."""
    _training(recipe.data, None).check_budget(recipe.steps * recipe.sequences)


def overlap_notes(text: str, folders: Sequence[str], which: str | None = None) -> list[str]:
    """A word of warning if much of an evaluation text, or of a slice of its documents, lies in prepared training text."""
    from ..data.shards import prepared_documents

    notes = []
    for folder in folders:
        theirs = prepared_documents(folder)
        if theirs is None:
            continue
        found = text_overlap(select(documents(text), which), theirs)
        if warning := found.warning(Path(text).name, Path(folder).name):
            notes.append(warning)
    return notes
