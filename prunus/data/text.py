"""Documents from text, JSONL, Parquet or a `datasets` name, streamed."""

from __future__ import annotations

import io
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError, unknown
from ..reading import bytes_of, parsed, text_of
from ..reading import rows_of as json_lines

HUB = "datasets:"  # datasets:NAME[:CONFIG[:SPLIT[:FIELD]]]
TEXT_SUFFIXES = ("", ".txt", ".text", ".md", ".raw", ".rst")
JSONL_SUFFIXES = (".jsonl", ".ndjson")
PARQUET_SUFFIXES = (".parquet",)
SEPARATOR = "\n\n"


def documents(source: str, *, field: str = "text", separator: str | None = None, online: bool = False) -> Iterator[str]:
    """Yield the documents of `source` one by one.

    A plain text file is one document, its blank lines dropped (WikiText's raw files space every line), or, with a
    `separator` such as ``<|endoftext|>``, many, as they stand; each line of a JSONL file and each row of a Parquet file is
    one. UserError names the file, the line and what is wrong there.
    """
    if source.startswith(HUB):
        yield from _hub(source, online)
        return
    path = Path(source).expanduser()
    if not path.is_file():
        raise UserError(f"{source}: no such text file; give a .txt, .jsonl or .parquet file, or {HUB}NAME")
    suffix = path.suffix.lower()
    if suffix in JSONL_SUFFIXES:
        yield from _jsonl(path, field)
    elif suffix in PARQUET_SUFFIXES:
        yield from _parquet(path, field)
    elif suffix in TEXT_SUFFIXES and separator is not None:
        yield from _separated(path, separator)
    elif suffix in TEXT_SUFFIXES:
        yield "\n".join(line for line in _lines(path) if line.strip())
    else:
        raise unknown("kind of text file", suffix, [*TEXT_SUFFIXES[1:], *JSONL_SUFFIXES, *PARQUET_SUFFIXES])


def rows_of(path: Path, what: str, *, line: str | None = None) -> list[Any]:
    """Rows of a .json list or of a .jsonl file; with `line`, each line of any other file as an object with that field alone.

    UserError, which begins with `what`, for a file that cannot be read so; a .json file that is no list has no rows.
    """
    try:
        if not path.is_file():
            raise UserError(f"{path}: no such file or folder")
        if path.suffix.lower() in JSONL_SUFFIXES:
            return [row for _, row in json_lines(bytes_of(path), str(path))]
        text = text_of(path)
        if line is not None and path.suffix.lower() != ".json":  # no splitlines: text may hold other breaks, as U+2028
            return [{line: one} for one in io.StringIO(text, newline=None).read().split("\n") if one.strip()]
        found = parsed(text, str(path))
    except UserError as error:
        raise UserError(f"{what}: {error}") from error
    return found if isinstance(found, list) else []


def select(docs: Iterator[str], which: str | None) -> Iterator[str]:
    """The documents of a slice such as ``:100``, ``50:`` or ``-100:`` (Python's meaning); all of them for None."""
    if which is None:
        return docs
    span = slice_of(which)
    if (span.start or 0) < 0 or (span.stop or 0) < 0:
        return iter(list(docs)[span])
    return itertools.islice(docs, span.start, span.stop)


def slice_of(which: str) -> slice:
    """What ``-100:`` means; UserError for what is no slice."""
    start, colon, stop = which.partition(":")
    try:
        first, last = (int(part) if part else None for part in (start, stop))
    except ValueError:
        colon = ""
    if not colon:
        raise UserError(f"documents: '{which}' is no slice; write for example :100, 50:80 or -100:")
    return slice(first, last)


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig", newline=None) as file:  # the mark that Windows writes first is no text
            for number, line in enumerate(file, 1):
                if "\0" in line:
                    raise UserError(f"{path}: line {number} holds a NUL byte; this is a binary file, not text")
                yield line.rstrip("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start} of a block: {error.reason})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def is_plain(source: str) -> bool:
    """Whether it is plain text, which alone may have a separator."""
    return not source.startswith(HUB) and Path(source).suffix.lower() in TEXT_SUFFIXES


def check(source: str, *, separator: str | None = None, online: bool = False) -> Path | None:
    """The file of `source`, None for a hub data set; UserError, before any work, if no text can be read from it."""
    if separator is not None and (not separator.strip() or "\n" in separator):
        raise UserError(f"separator: {separator!r} is not a mark within one line, such as <|endoftext|>")
    if source.startswith(HUB):
        next(iter(documents(source, online=online)), None)
        return None
    path = Path(source).expanduser()
    if not path.exists():
        raise UserError(f"{source}: no such file or folder; give a .txt, .jsonl or .parquet file, or {HUB}NAME")
    if not path.is_file() or path.suffix.lower() not in (*TEXT_SUFFIXES, *JSONL_SUFFIXES, *PARQUET_SUFFIXES):
        raise UserError(f"{source}: is no text; give a .txt, .jsonl or .parquet file, or {HUB}NAME")
    if separator is not None and not is_plain(source):
        raise UserError(f"separator: {source} has its own documents; only plain text is separated by a mark")
    if not os.access(path, os.R_OK):
        raise UserError(f"{source}: cannot be read: no right to")
    if path.stat().st_size == 0:
        raise UserError(f"{source}: there is no text in it")
    return path


def count(source: str, *, separator: str | None = None) -> int | None:
    """About how many documents there are, for showing progress; None where only reading them would tell."""
    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    if source.startswith(HUB):
        return None
    if suffix in PARQUET_SUFFIXES:
        try:
            import pyarrow.parquet as pq

            return pq.ParquetFile(path).metadata.num_rows
        except (ImportError, OSError, ValueError):  # reading it will say what is wrong
            return None
    mark = "\n" if suffix in JSONL_SUFFIXES else separator
    if mark is None:
        return 1
    with path.open("rb") as file:
        return sum(line.count(mark.encode()) for line in file) + 1


def _separated(path: Path, separator: str) -> Iterator[str]:
    parts: list[str] = []
    for line in _lines(path):
        first, *rest = line.split(separator)
        parts.append(first)
        for part in rest:
            yield "\n".join(parts).strip("\n")
            parts = [part]
    yield "\n".join(parts).strip("\n")


def _jsonl(path: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: line {number} is not JSON ({error})") from error
        yield _field(row, field, f"{path}: line {number}")


def _field(row: Any, field: str, where: str) -> str:
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        have = f"it has {', '.join(map(repr, list(row)[:6]))}" if isinstance(row, dict) else f"it is {type(row).__name__}"
        raise UserError(f"{where} has no text under '{field}'; {have} (--field names another)")
    text = row[field]
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise UserError(f"{where} holds half a surrogate pair, which is no text; mend the file")
    return text


def _parquet(path: Path, field: str) -> Iterator[str]:
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError(f"{path}: reading Parquet needs pyarrow; pip install 'prunus[data]'") from error
    import pyarrow

    try:
        file = pq.ParquetFile(path)
        if field not in file.schema_arrow.names:
            have = ", ".join(file.schema_arrow.names[:6])
            raise UserError(f"{path} has no column '{field}'; it has {have} (--field names another)")
        rows = (value for batch in file.iter_batches(columns=[field]) for value in batch.column(0).to_pylist())
        for number, value in enumerate(rows):
            yield _field({field: value}, field, f"{path}: row {number}")
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from error


def _hub(source: str, online: bool) -> Iterator[str]:
    name, config, split, field = (*source.removeprefix(HUB).split(":"), "", "", "")[:4]
    if not online:
        raise UserError(f"{source}: a hub data set is read over the network; --online allows it")
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{source}: needs the datasets library; pip install 'prunus[data]'") from error
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{source}: the data set cannot be opened: {str(error).splitlines()[0][:200]}") from error
    for number, row in enumerate(rows):
        yield _field(dict(row), field or "text", f"{source}: row {number}")
