"""Small files of others, read whole. What is no file, too large, no UTF-8, no JSON or no YAML is refused in one sentence.

Whatever reads a JSON or YAML file goes through here, so that what a parser can stumble over is known in one place: nesting
beyond its stack, whole numbers of thousands of digits, YAML's aliases that unfold to gigabytes, links that go round, pipes.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    from pydantic import ValidationError

_MOST_BYTES = 1 << 28  # of a file that is read whole; the largest that we write, records of long studies, are a tenth of it
_MOST_IDS = 1 << 24  # of a tokenizer; the largest there are have a quarter of a million
_DEEPEST = 100  # tables in tables; a study's file has six
_MOST_YAML = 1 << 22  # PyYAML takes a second a megabyte
_MOST_NODES = 1_000_000  # of YAML with its aliases unfolded


def first_line(error: BaseException) -> str:
    """What an error says, short and on one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def first_wrong(error: ValidationError, whole: str = "as a whole") -> str:
    """Where the first mistake is that pydantic found, and what; `whole` says where if it is of no field."""
    first = error.errors()[0]
    place, why = ".".join(map(str, first["loc"])) or whole, str(first["msg"]).removeprefix("Value error, ")
    return f"{place}: {why}" if place else why


def text_of(path: Path | str, mend: str = "", *, most_bytes: int = _MOST_BYTES) -> str:
    """The text of a regular file, without a byte order mark; `mend` says what to do about one that is none."""
    try:
        return bytes_of(path, mend, most_bytes=most_bytes).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}: {error.reason}){tail(mend)}") from error


def size_of(path: Path | str, mend: str = "") -> int:
    """Bytes of a regular file; UserError for a pipe or a device, which an opener would wait for."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path}: no file that can be read{tail(mend)}")
    return found.st_size


def bytes_of(path: Path | str, mend: str = "", *, most_bytes: int = _MOST_BYTES) -> bytes:
    """The bytes of a regular file, whose size is looked at before anything is read."""
    try:
        if (size := size_of(path, mend)) > most_bytes:
            raise UserError(f"{path}: {size:,} bytes, but a file of its kind has at most {most_bytes:,}{tail(mend)}")
        with open(path, "rb") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{path}: no such file{tail(mend)}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}{tail(mend)}") from error
    except ValueError as error:  # a name with a null character
        raise UserError(f"{path}: cannot be read: {first_line(error)}{tail(mend)}") from error


def tail(mend: str) -> str:
    """The end of a sentence: what to do, if anything is known."""
    return f"; {mend}" if mend else ""


def json_of(path: Path | str, mend: str = "") -> Any:
    """What a JSON file holds."""
    return parsed(bytes_of(path, mend), str(path), mend)


def parsed(text: str | bytes, where: str, mend: str = "") -> Any:
    """What JSON text says; `where` it stands."""
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        data = json.loads(text)
        if text.count("[") + text.count("{") > _DEEPEST and _is_deep(data):
            raise RecursionError
        _check_text(text, data)
        return data
    except RecursionError as error:
        raise UserError(f"{where}: not readable as JSON: nested too deeply{tail(mend)}") from error
    except ValueError as error:
        raise UserError(f"{where}: not readable as JSON: {first_line(error)}{tail(mend)}") from error


def _is_deep(data: Any) -> bool:
    """Whether plain data is nested beyond what its readers and writers can follow in their stacks."""
    level = [data]
    for _ in range(_DEEPEST):
        inside = (one for part in level for one in (part.values() if isinstance(part, dict) else part))
        level = [one for one in inside if isinstance(one, dict | list)]
        if not level:
            return False
    return True


def _check_text(written: str, data: Any) -> None:
    """UnicodeError for half a character, which an escape can say and no file can hold: it would fail where it is written."""
    if "\\u" in written.lower():
        json.dumps(data, ensure_ascii=False, default=str, skipkeys=True).encode("utf-8")


def table_of(path: Path | str, mend: str = "") -> dict[str, Any]:
    """What a JSON file holds, which must be an object."""
    data = json_of(path, mend)
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(data).__name__}{tail(mend)}")
    return data


def rows_of(content: bytes, where: str, mend: str = "") -> Iterator[tuple[int, Any]]:
    """The lines of JSONL that are not blank, each with its number, from 1; `where` they stand."""
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            yield number, parsed(line, f"{where}: line {number}", mend)


def check_tokenizer(path: Path) -> None:
    """UserError for a tokenizer.json at which the tokenizers library would take gigabytes, or end the process.

    It makes room for every id below the largest; and of a pair that is merged it takes the prefix off the second part, bytes of a
    character if there is no such prefix, and cannot say so.
    """
    data = bytes_of(path)
    long, prefixed = (re.search(text, data) for text in (rb":\s*[0-9]{8,}", rb'"continuing_subword_prefix"\s*:\s*"[^"]'))
    if not long and not prefixed:
        return
    told = parsed(data, str(path))
    model, added = (told.get(name) if isinstance(told, dict) else None for name in ("model", "added_tokens"))
    vocab = model.get("vocab") if isinstance(model, dict) else None
    ids = list(vocab.values()) if isinstance(vocab, dict) else []
    ids += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    if wrong := [one for one in ids if isinstance(one, int) and one >= _MOST_IDS]:
        raise UserError(f"{path}: has a token with the id {wrong[0]}, but ids end below {_MOST_IDS:,}; the file is corrupt")
    merges = model.get("merges") if isinstance(model, dict) else None
    prefix = model.get("continuing_subword_prefix") if isinstance(model, dict) else None
    for pair in merges if prefix and isinstance(merges, list) else ():
        second = pair.rpartition(" ")[2] if isinstance(pair, str) else pair[-1] if isinstance(pair, list) and pair else None
        if not isinstance(second, str) or not second.startswith(str(prefix)):
            raise UserError(
                f"{path}: merges {pair!r}, whose second part does not begin with '{prefix}'; the file is corrupt"
            )


@contextmanager
def refusing(what: str, mend: str = "") -> Iterator[None]:
    """What the tokenizers library raises over a file, as a UserError: bare Exceptions, and panics, which are not even those."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what}: {first_line(error)}{tail(mend)}") from error


def check_regular(folder: Path) -> None:
    """UserError for a pipe or a device in a folder that libraries will read from: they would wait for it, or never end."""
    for path in sorted(folder.iterdir()):
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise UserError(f"{path}: is a pipe or a device; a model's folder holds files")


def yaml_of(text: str, where: str, loader: Any = None) -> Any:
    """What YAML text says, by a safe loader; `where` it stands."""
    import yaml

    if len(text) > _MOST_YAML:
        raise UserError(f"{where}: {len(text):,} characters, but what people write has at most {_MOST_YAML:,}")
    made = (loader or yaml.SafeLoader)(_printable(text, where))
    try:
        node = made.get_single_node()
        if node is None:
            return None
        if _unfolded(node, {}) > _MOST_NODES:
            raise UserError(f"{where}: its aliases unfold to more than {_MOST_NODES:,} values; write them out")
        data = made.construct_document(node)
        if isinstance(data, dict | list) and _is_deep(data):
            raise RecursionError
        _check_text(text, data)
        return data
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise UserError(f"{where}: not readable as YAML{f' (line {mark.line + 1})' if mark else ''}") from error
    except RecursionError as error:
        raise UserError(f"{where}: not readable as YAML: nested too deeply") from error
    except (ValueError, TypeError, AttributeError, KeyError, IndexError) as error:  # 2020-99-99, !!int x: PyYAML's own
        raise UserError(f"{where}: not readable as YAML: {first_line(error)}") from error
    finally:
        made.dispose()


def _printable(text: str, where: str) -> str:
    import yaml

    if wrong := yaml.reader.Reader.NON_PRINTABLE.search(text):
        line = text.count("\n", 0, wrong.start()) + 1
        raise UserError(f"{where}: not readable as YAML (line {line}): holds the character U+{ord(wrong[0]):04X}")
    return text


def _unfolded(node: Any, known: dict[int, float]) -> float:
    """Values of a YAML node with its aliases written out; infinitely many of one that holds itself."""
    if id(node) not in known:
        known[id(node)] = float("inf")  # until it is counted
        parts = node.value if isinstance(node.value, list) else []
        pairs = (one for part in parts for one in (part if isinstance(part, tuple) else (part,)))
        known[id(node)] = 1 + sum(_unfolded(one, known) for one in pairs)
    return known[id(node)]
