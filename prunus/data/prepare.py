"""Text to prepared data: read once, tokenised in parallel, written in order, taken up again where a killed run was."""

from __future__ import annotations

import fcntl
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import BaseModel, Field

from ..errors import UserError
from ..headers import sha256
from ..place import check_own, staged_files
from ..reading import text_of
from ..sealed import sealed, stamp, unsealed
from .encode import Coding, Encoded, die_with_parent, encode, limits
from .shards import DTYPES, MANIFEST, PROGRESS, RANGE_NAME, SMALL_VOCAB, TOKENIZER, Manifest, Origin, Shard
from .text import HUB, check, count, documents
from .tokenizer import fingerprint, num_ids
from .writer import RangeWriter, range_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLITS: Mapping[str, float | None] = {"validation": 0.01, "parent": 0.495, "retrain": None}
SHARD_TOKENS = 1 << 27
CHECKPOINT_TOKENS = 1 << 22  # a killed run loses the work of this many tokens at most
_BATCH_CHARS = 1 << 19  # text that goes to a process at a time
_AHEAD = 3  # batches under way for each process

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Text:
    """A source of documents: a file or `datasets:NAME`."""

    source: str
    field: str = "text"
    separator: str | None = None
    licence: str | None = None
    online: bool = False

    def check(self) -> None:
        """UserError, before any work, if it cannot be read."""
        check(self.source, separator=self.separator, online=self.online)

    def documents(self) -> Iterator[str]:
        """All of its documents."""
        return documents(self.source, field=self.field, separator=self.separator, online=self.online)

    @property
    def path(self) -> Path | None:
        """The file, unless it is on the hub."""
        return None if self.source.startswith(HUB) else Path(self.source).expanduser()

    def origin(self) -> Origin:
        """What the manifest says of it; reads the whole file once."""
        path = self.path
        return Origin(
            source=path.name if path else self.source,
            sha256=sha256([path]) if path else None,
            bytes=path.stat().st_size if path else None,
            field=self.field,
            separator=self.separator,
            licence=self.licence,
        )


def prepare(
    sources: Sequence[Text],
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    shard_tokens: int = SHARD_TOKENS,
    processes: int = 1,
    splits: Mapping[str, float | None] = SPLITS,
    progress: Report | None = None,
    checkpoint_tokens: int = CHECKPOINT_TOKENS,
) -> Manifest:
    """Write the documents of all sources, in their order, as token shards; each document to the range its hash names.

    The same sources, tokenizer, splits and shard size give the same bytes, whatever the number of processes and however
    often the work was cut short. A folder that is finished is checked and left as it is.
    """
    shares = check_splits(splits)
    if shard_tokens < 1 or processes < 1:
        raise UserError(f"shard_tokens and processes are {shard_tokens} and {processes}; both must be 1 or more")
    if not sources:
        raise UserError("sources: there is none; name a text file or datasets:NAME")
    for text in sources:
        text.check()
    check_folder(out)
    vocab_size, found = num_ids(tokenizer), _stamps(sources)
    work = Manifest(
        tokenizer_sha256=fingerprint(tokenizer),
        vocab_size=vocab_size,
        eos_token_id=int(tokenizer.eos_token_id),
        dtype="uint16" if vocab_size < SMALL_VOCAB else "uint32",
        splits=shares,
        shard_tokens=shard_tokens,
        sources=[text.origin() for text in sources],
        ranges={name: [] for name in shares},
        versions={name: version(name) for name in ("prunus", "tokenizers")},
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _locked(out):
            if (out / MANIFEST).exists():
                return _finished(out, work)
            state = _begin(out, work, tokenizer)
            ranges = [RangeWriter(out, name, work, state["ranges"][name]) for name in work.ranges]
            try:
                manifest = _run(sources, out, work, state, ranges, processes, checkpoint_tokens, progress)
                for text, before, after in zip(sources, found, _stamps(sources), strict=True):
                    if before != after:
                        raise UserError(f"{text.source}: was changed while it was read; leave it alone, and run this again")
                manifest.write(out)
                (out / PROGRESS).unlink()
                return manifest
            except UserError as error:
                if not isinstance(error.__cause__, OSError):  # the text must change, so this work cannot be gone on with
                    _discard(out, work)
                raise
    except OSError as error:
        raise UserError(f"{error.filename or out}: cannot be written: {error.strerror or error}") from error


def check_splits(splits: Mapping[str, float | None]) -> dict[str, float]:
    """Shares by range, the one that is None filled up to 1; UserError if they are no shares."""
    for name, share in splits.items():
        if not RANGE_NAME.fullmatch(name):
            raise UserError(f"split: '{name}' is no name for a range; use small letters, digits and _")
        if share is not None and not 0 < share <= 1:
            raise UserError(f"split: {name}={share:g} is no share; shares lie above 0 and add up to 1")
    given = sum(share for share in splits.values() if share is not None)
    rest = [name for name, share in splits.items() if share is None]
    if not splits or len(rest) > 1:
        raise UserError(f"split: {' and '.join(rest) or 'no range'}: give every range a share, and at most one the rest")
    if (rest and given >= 1) or (not rest and abs(given - 1) > 1e-9):
        raise UserError(f"split: the shares add up to {given:g}; {'leave some for the rest' if rest else 'make it 1'}")
    return {name: 1 - given if share is None else float(share) for name, share in splits.items()}


def check_folder(out: Path) -> None:
    """UserError if the folder cannot be written or holds what is not ours."""
    if out.exists() or out.is_symlink():
        if not out.is_dir():
            raise UserError(f"{out}: already exists and is no folder; give another --out")
        if any(not path.name.startswith(".") for path in out.iterdir()) and not (
            (out / MANIFEST).exists() or (out / PROGRESS).exists()
        ):
            raise UserError(f"{out}: already exists and holds no prepared data; give another --out")
    place = out.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{out}: no right to write in {place}")


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """One process a folder; the lock goes with the process, however it ends."""
    check_own(out)
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise UserError(f"{out}: another prunus data prepare is at work there; wait, or give another --out") from error
    finally:
        os.close(folder)


# -- where the work is --------------------------------------------------------------------------------------------------


def _asked(work: Manifest) -> dict[str, Any]:
    """What must be the same for a folder to be gone on with."""
    asked = work.model_dump(include={"tokenizer_sha256", "eos_token_id", "splits", "shard_tokens", "sources"})
    for source in asked["sources"]:
        del source["documents"]
    return asked


_CALLED = {
    "tokenizer_sha256": "another tokenizer",
    "eos_token_id": "another end-of-text token",
    "splits": "other splits",
    "shard_tokens": "another shard size",
    "sources": "other sources, or sources that have changed since",
}


def _same(out: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for key, called in _CALLED.items():
        if before.get(key) != now[key] or (key == "splits" and list(before[key]) != list(now[key])):
            raise UserError(f"{out}: already exists, made with {called}; give another --out")


def _finished(out: Path, work: Manifest) -> Manifest:
    manifest = Manifest.read(out)
    (out / PROGRESS).unlink(missing_ok=True)  # a kill may have come between writing the one and removing the other
    _same(out, _asked(manifest), _asked(work))
    for which in manifest.ranges:
        manifest.check_files(out, which)
    return manifest


_Count = Annotated[int, Field(ge=0)]


class _Range(BaseModel):
    """`RangeWriter.state`."""

    shards: list[Shard]
    open: tuple[_Count, _Count, _Count] | tuple[_Count, _Count, _Count, str, str]


class _Begun(BaseModel):
    """`progress.json`."""

    asked: dict[str, Any]
    read: list[_Count]
    done: list[_Count]
    ranges: dict[str, _Range]


def _begin(out: Path, work: Manifest, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The state to go on from, written down if it is the first."""
    path = out / PROGRESS
    for left in out.glob(".*.partial-*.json"):  # of a run that was killed while it wrote one
        left.unlink()
    if path.exists():
        try:
            state = unsealed(text_of(path))
            begun = _Begun.model_validate(state)
        except ValueError as error:
            raise UserError(f"{path}: is broken; remove the folder and begin again") from error
        _same(out, begun.asked, _asked(work))
        if begun.ranges.keys() != work.ranges.keys() or not len(begun.read) == len(begun.done) == len(work.sources):
            raise UserError(f"{path}: is broken; remove the folder and begin again")
    else:
        state = {"asked": _asked(work), "read": [0] * len(work.sources), "done": [0] * len(work.sources)}
        state["ranges"] = {name: {"shards": [], "open": [0, 0, 0]} for name in work.ranges}
        _save(out, state)
    with staged_files(out / TOKENIZER) as (stage,):
        stage.write_text(tokenizer.backend_tokenizer.to_str(), encoding="utf-8")
    return state


def _save(out: Path, state: Mapping[str, Any]) -> None:
    with staged_files(out / PROGRESS) as (stage,), stage.open("w", encoding="utf-8") as file:
        file.write(sealed(state))
        file.flush()
        os.fsync(file.fileno())


def _discard(out: Path, work: Manifest) -> None:
    for path in [file for which in work.ranges for file in range_files(out, which)] + [out / TOKENIZER, out / PROGRESS]:
        path.unlink(missing_ok=True)
    if not any(out.iterdir()):
        out.rmdir()


def _tell(progress: Report, expected: int | None, done: int) -> None:
    """A text of unknown length is always one document from its end."""
    progress("prepare", done, done + 1 if expected is None else max(done, expected))


# -- the work -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Batch:
    source: int
    read: int  # documents read of that source, this batch included
    texts: list[str]


def _batches(sources: Sequence[Text], read: Sequence[int]) -> Iterator[_Batch]:
    for i, text in enumerate(sources):
        texts, size, count = [], 0, read[i]
        for document in itertools.islice(text.documents(), read[i], None):
            texts.append(document)
            size, count = size + len(document), count + 1
            if size >= _BATCH_CHARS:
                yield _Batch(i, count, texts)
                texts, size = [], 0
        yield _Batch(i, count, texts)


def _encoded(coding: Coding, batches: Iterator[_Batch], processes: int) -> Iterator[tuple[_Batch, Encoded]]:
    """Every batch with its tokens, in order; no more than a few batches are held at a time."""
    if processes == 1:
        for batch in batches:
            yield batch, encode(coding, batch.texts)
        return
    # spawned, not forked: the libraries that are loaded here run threads, which a fork would leave with locks held
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=die_with_parent)
    try:
        under_way: deque[tuple[_Batch, Any]] = deque()
        for batch in batches:
            under_way.append((batch, pool.submit(encode, coding, batch.texts)))
            if len(under_way) >= _AHEAD * processes:
                first, future = under_way.popleft()
                yield first, future.result()
        for batch, future in under_way:
            yield batch, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _run(
    sources: Sequence[Text],
    out: Path,
    work: Manifest,
    state: dict[str, Any],
    ranges: list[RangeWriter],
    processes: int,
    checkpoint_tokens: int,
    progress: Report | None,
) -> Manifest:
    coding = Coding(
        out / TOKENIZER, work.tokenizer_sha256, work.eos_token_id, DTYPES[work.dtype], limits(list(work.splits.values()))
    )
    counted = [count(text.source, separator=text.separator) for text in sources] if progress is not None else [None]
    expected = None if None in counted else sum(n or 0 for n in counted)
    tokens = 0
    try:
        for batch, got in _encoded(coding, _batches(sources, state["read"]), processes):
            ends = np.cumsum(got.lengths)
            for i in np.flatnonzero(got.lengths).tolist():
                ranges[got.ranges[i]].add(got.ids[ends[i] - got.lengths[i] : ends[i]], int(got.text_bytes[i]))
            state["read"][batch.source] = batch.read
            state["done"][batch.source] += int(np.count_nonzero(got.lengths))
            tokens += len(got.ids)
            if tokens >= checkpoint_tokens:
                tokens = 0
                for written in ranges:
                    written.flush()
                _save(out, state | {"ranges": {r.name: r.state() for r in ranges}})
            if progress is not None:
                _tell(progress, expected, sum(state["read"]))
        if not sum(state["done"]):
            raise UserError(f"{', '.join(text.source for text in sources)}: there is no text in it")
        for written in ranges:
            written.close()
    finally:
        for written in ranges:
            written.release()
    origins = [o.model_copy(update={"documents": n}) for o, n in zip(work.sources, state["done"], strict=True)]
    return work.model_copy(update={"sources": origins, "ranges": {r.name: r.shards for r in ranges}})


def _stamps(sources: Sequence[Text]) -> list[tuple[int, int, int] | None]:
    return [None if text.path is None else stamp(text.path) for text in sources]
