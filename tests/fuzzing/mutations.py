"""Changes of files that a seed decides: values, names and shapes of plain data, bytes, headers, and what a path is."""

from __future__ import annotations

import copy
import itertools
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import yaml

# A value that a reader did not think of is nearly always one of these.
HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 7, 2**31, -(2**31), 2**32, 2**63 - 1, 2**63, 2**64, -(2**64), 10**30, 10**400,
    0.0, -0.0, 0.5, -0.5, 1e-320, 1e308, -1e308, float("nan"), float("inf"), float("-inf"),
    "", " ", "\n", "\t", "\0", "a\0b", "a\nb", "\ud800", "\u202egnp", "0", "-1", "1e999", "nan", "null", "é" * 300,
    "x" * 70_000,
    ".", "..", "../..", "../../../../tmp/x", "/", "/etc/passwd", "/dev/zero", "~", "~root", "~nobody/x", "-",
    "--help", "a/b", "a\\b", "C:\\x",
    "<script>alert(1)</script>", "]]>", "`rm`", "${HOME}", "%s%n", "{0}", "{{ 7*7 }}", "|", "[x](javascript:0)", "'",
    '"', "; drop table runs",
    "llama", "float32", "float64", "int8", "auto", "hub/name", "datasets:x", "0-5,7", "0-9999999", "5-0", "1:2",
    "2:4", "999999999-999999999",
    [], [[]], [None], [0], [-1], [1, 2, 3], ["a", "a"], [[1, 2], [2, 1]], [0.5, 0.5], list(range(3000)),
    {}, {"": 0}, {"a": None}, {"0": [1]}, {"__class__": "x"}, {"a" * 5000: 1}, {"é\0": {}},
)  # fmt: skip


def deep(levels: int, *, tables: bool) -> Any:
    """Lists in lists, or tables in tables."""
    out: Any = 0
    for _ in range(levels):
        out = {"a": out} if tables else [out]
    return out


def hostile(rng: Random) -> Any:
    """A value that nobody expects."""
    if rng.random() < 0.03:
        return deep(rng.choice((5, 60, 150)), tables=rng.random() < 0.5)
    return copy.deepcopy(rng.choice(HOSTILE))


def places(data: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value of plain data; of long lists, to the first and last ones."""
    out = [at]
    if isinstance(data, dict):
        for key in data:
            out += places(data[key], (*at, key))
    elif isinstance(data, list):
        shown = range(len(data)) if len(data) <= 12 else (0, 1, 2, len(data) // 2, len(data) - 1)
        for i in shown:
            out += places(data[i], (*at, i))
    return out


def _put(data: Any, way: tuple[Any, ...], value: Any) -> Any:
    if not way:
        return value
    at = data
    for step in way[:-1]:
        at = at[step]
    at[way[-1]] = value
    return data


def _get(data: Any, way: tuple[Any, ...]) -> Any:
    for step in way:
        data = data[step]
    return data


def changed(data: Any, rng: Random) -> Any:
    """Plain data with one to four things wrong, or right by chance."""
    data = copy.deepcopy(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        ways = places(data)
        way = rng.choice(ways)
        old = _get(data, way)
        what = rng.randrange(8)
        if what == 0 and way:  # gone
            parent = _get(data, way[:-1])
            del parent[way[-1]]
        elif what == 1 and isinstance(old, dict) and old:  # of another name, or one more
            key = rng.choice(list(old))
            value = old.pop(key) if rng.random() < 0.7 else old[key]
            old[
                rng.choice((str(key) + "x", str(key).upper(), str(key)[:-1], "..", "", "\0", "a/b", str(hostile(rng))[:50]))
            ] = value
        elif what == 2 and isinstance(old, list) and old:  # longer, shorter, in another order
            old[:] = rng.choice((old * 2, old[:-1], old[::-1], old[1:], old[:1] * 50))
        elif what == 3 and isinstance(old, int | float):  # a little off, or much
            near = abs(old) < 1e290  # none of what follows is too large
            data = _put(
                data, way, rng.choice((old + 1, old - 1, -old, old * 10**9, float(old), str(old), [old])) if near else 0
            )
        elif what == 4:  # what stands elsewhere
            data = _put(data, way, copy.deepcopy(_get(data, rng.choice(ways))))
        else:
            data = _put(data, way, hostile(rng))
    return data


def as_json(data: Any, rng: Random) -> bytes:
    """JSON as others might write it."""
    text = json.dumps(data, ensure_ascii=rng.random() < 0.7)
    if rng.random() < 0.03 and text.startswith("{") and len(text) > 2:  # a name twice
        text = text[:-1] + "," + text[1:]
    return text.encode("utf-8", "surrogatepass")


def json_file(old: bytes, rng: Random) -> bytes:
    """A changed JSON file."""
    if rng.random() < 0.2:
        return raw(old, rng)
    return as_json(changed(json.loads(old), rng), rng)


def jsonl_file(old: bytes, rng: Random) -> bytes:
    """A changed file of JSON lines."""
    if rng.random() < 0.2:
        return raw(old, rng)
    lines = old.splitlines()
    i = rng.randrange(len(lines))
    lines[i] = as_json(changed(json.loads(lines[i]), rng), rng)
    return rng.choice((b"\n", b"\n", b"\r\n", b"\n\n", b"\xe2\x80\xa8")).join(lines)


_YAML = (
    "a: &a [x, x]\n" + "\n".join(f"{c}: &{c} [{', '.join([f'*{p}'] * 9)}]" for p, c in itertools.pairwise("abcdefghijk")),
    "&a [*a]", "name: &a {model: *a}", "[" * 3000, "{a: " * 3000, "!!python/object/apply:os.system [id]",
    "!!python/name:os.system",
    "name: 2020-99-99", "name: 2020-01-01", "tokens: 1_000", "tokens: 190:20:30", "tokens: 0x", "tokens: !!int ''",
    "tokens: !!float 'x'",
    "? [a, b]\n: 1", "? {a: 1}\n: 1", "1: 2", "null: 3", "name: !!set {a, b}", "name: !!binary 'x'",
    "name: !!binary '////'", "- - - a", "a: b: c", "%YAML 9.9\n---\na: 1",
    "a: 1\n---\nb: 2", "*x", "<<: 3", "<<: [1, 2]", "name: !!omap [a: 1, a: 2]", "name: !!pairs 3", "name: !x y",
    "\t- a", "name: 'x", "name: .nan", "=: 1", "name: !!timestamp x",
    "name: !!timestamp '2020-01-01 25:61:61'", "name: '\\x'", 'name: "\\ud800"', "true: 1", "name: !!bool maybe",
    "!!null x: 1", "name: |\n  x\n y",
)  # fmt: skip


def yaml_file(old: bytes, rng: Random) -> bytes:
    """A changed YAML file."""
    roll = rng.random()
    if roll < 0.15:
        return raw(old, rng)
    if roll < 0.25:
        return rng.choice((b"", old)) + b"\n" + rng.choice(_YAML).encode()
    data = changed(yaml.safe_load(old), rng)
    if rng.random() < 0.3:
        return as_json(data, rng)  # of which nearly all is YAML too
    try:
        return yaml.safe_dump(data, sort_keys=False, allow_unicode=True).encode("utf-8", "surrogatepass")
    except (yaml.YAMLError, RecursionError):
        return as_json(data, rng)


_RAW: tuple[bytes, ...] = (
    b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf{}", b"{", b"[]", b"{}", b"null", b"3", b'"x"', b"NaN", b"\n" * 100,
    b"\0" * 5000, b"{}" * 2, b"[" * 100_000,
    b'{"a":' * 50_000, b"1" * 6000, b"-", b"\x80\x02cos\nsystem\nq\0.", b"PK\x03\x04", b"GGUF", b"\x1f\x8b\x08",
    b'{"a": 1e99999}', b'{"a": ' + b"9" * 5000 + b"}",
)  # fmt: skip


def raw(old: bytes, rng: Random) -> bytes:
    """Bytes cut, turned, doubled, put in; or another thing altogether."""
    what, n = rng.randrange(9), len(old)
    i, j = sorted((rng.randrange(n + 1), rng.randrange(n + 1)))
    if what == 0:
        return rng.choice(_RAW)
    if what == 1:
        return old[:i]
    if what == 2:
        return old[:i] + old[j:]
    if what == 3:
        return old[:i] + old[i : min(j, i + 200)] * 2 + old[i:]
    if what == 4:
        return old[:i] + rng.randbytes(rng.choice((1, 8, 100))) + old[i:]
    if what == 5:
        return old[:i] + rng.choice(_RAW)[:2000] + old[i:]
    if what == 6:
        try:
            return old.decode().encode(rng.choice(("utf-16", "utf-32-le", "utf-8-sig")))
        except UnicodeDecodeError:
            return old[::-1]
    out = bytearray(old)
    for _ in range(rng.choice((1, 1, 3, 30))):
        if out:
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def safetensors_file(old: bytes, rng: Random) -> bytes:
    """A changed safetensors file: mostly its header, whose length is often made to fit again."""
    (length,) = struct.unpack("<Q", old[:8])
    head, body = old[8 : 8 + length], old[8 + length :]
    roll = rng.random()
    if roll < 0.1:
        return raw(old[: 8 + length], rng) + body
    if roll < 0.2:
        return (
            struct.pack("<Q", rng.choice((0, 1, 7, length - 1, length + 1, 2**31, 2**63 - 1, 2**64 - 1, len(old)))) + old[8:]
        )
    if roll < 0.3:
        return old[: 8 + length] + rng.choice((body[:-1], body + b"\0", b"", body * 2, raw(body[-400:], rng)))
    data = json.loads(head)
    if roll < 0.6:
        names = [name for name in data if name != "__metadata__"]
        name = rng.choice(names)
        entry, (start, end) = data[name], data[name]["data_offsets"]
        other = data[rng.choice(names)]["data_offsets"]
        what = rng.randrange(6)
        if what == 0:
            entry["data_offsets"] = rng.choice(
                (
                    [end, start],
                    other,
                    [start, end + 1],
                    [-8, end],
                    [start, 2**63],
                    [0, 0],
                    [start + 1, end + 1],
                    [start],
                    [start, end, end],
                )
            )
        elif what == 1:
            entry["dtype"] = rng.choice(
                ("F64", "F16", "BF16", "I64", "U8", "F8_E4M3", "F4", "", "x", None, 3, ["F32"], "f32")
            )
        elif what == 2:
            entry["shape"] = rng.choice(
                (
                    [],
                    [0],
                    [2**31, 2**31],
                    [2**32, 2**32, 0],
                    entry["shape"][::-1],
                    [*entry["shape"], 1],
                    [-1, -1],
                    [2.5],
                    [True],
                    ["8"],
                    [10**30],
                    [1] * 300,
                    [0, 10**18],
                )
            )
        elif what == 3:
            data[name + "\0"] = data.pop(name)
        elif what == 4:
            data["__metadata__"] = hostile(rng)
        else:
            data = {f"t{i}": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, len(body)]} for i in range(3)}
    else:
        data = changed(data, rng)
    text = as_json(data, rng)
    return struct.pack("<Q", len(text)) + text + body


def gguf_file(old: bytes, rng: Random) -> bytes:
    """A changed GGUF file: mostly counts, lengths, kinds and names in its header."""
    header = min(len(old), 9000)
    roll = rng.random()
    if roll < 0.15:
        return raw(old[:header], rng) + old[header:]
    if roll < 0.3:
        return old[: rng.randrange(len(old))]
    out = bytearray(old)
    for _ in range(rng.choice((1, 1, 2, 5))):
        keys = [i for i in range(8, header - 8) if 0 < int.from_bytes(out[i : i + 8], "little") < 200]  # lengths and counts
        if roll < 0.7 and keys:
            value = rng.choice(
                (0, 1, 2, 8, 9, 100, 2**31, 2**32, 2**60, 2**61, 2**63 - 1, 2**63, 2**64 - 1, len(old), 10**9)
            )
            struct.pack_into("<Q", out, rng.choice(keys), value)
        elif roll < 0.85:
            struct.pack_into(
                "<I", out, rng.randrange(4, header - 4), rng.choice((0, 1, 4, 5, 8, 9, 12, 13, 255, 2**31, 2**32 - 1))
            )
        else:
            struct.pack_into(
                "<f", out, rng.randrange(4, header - 4), rng.choice((0.0, -1.0, float("nan"), float("inf"), 1e38))
            )
    return bytes(out)


def text_file(old: bytes, rng: Random) -> bytes:
    """A changed text."""
    return raw(old, rng)


FORMS: dict[str, Callable[[bytes, Random], bytes]] = {
    ".json": json_file, ".jsonl": jsonl_file, ".yaml": yaml_file, ".safetensors": safetensors_file,
    ".gguf": gguf_file, ".bin": raw, ".txt": text_file,
}  # fmt: skip


def game_(path: Path, rng: Random) -> None:
    """Changes what `path` is: no file, a folder, a link that goes round, out or to an endless file, a pipe that nobody fills."""
    path.unlink()
    what = rng.randrange(7)
    if what == 1:
        path.mkdir()
    elif what == 2:
        path.symlink_to(path.name)
    elif what == 3:
        path.symlink_to("/dev/zero")
    elif what == 4:
        path.symlink_to("/etc/hostname")
    elif what == 5:
        os.mkfifo(path)
    elif what == 6:
        path.symlink_to("nowhere/at/all")


def mutate_(files: list[Path], rng: Random) -> None:
    """Changes one or two of the files."""
    for path in dict.fromkeys(rng.choice(files) for _ in range(rng.choice((1, 1, 1, 1, 2)))):
        if rng.random() < 0.02:
            game_(path, rng)
            continue
        old = path.read_bytes()
        path.unlink()  # it may be a hard link to the specimen
        path.write_bytes(FORMS.get(path.suffix, raw)(old, rng))
