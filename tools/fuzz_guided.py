"""Bad headers, JSON and YAML, led by what code they reach: atheris (pip install atheris) beside the seeds of tools/fuzz.py.

python tools/fuzz_guided.py gguf runs/guided -max_total_time=600        # what follows the folder is libFuzzer's
"""

from __future__ import annotations

import os
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
with atheris.instrument_imports(include=["prunus.headers", "prunus.reading"]):
    from prunus import headers, reading
from prunus.errors import UserError

_HEADER = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
_GGUF = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a" + struct.pack("<II", 4, 7)
FIRST = {  # a whole one of each, to begin with
    "safetensors": struct.pack("<Q", len(_HEADER)) + _HEADER + bytes(8), "gguf": _GGUF, "json": b'{"a": [1, "\\ud83d\\udc08"]}',
    "yaml": b"a: &a {x: [1, 2.5, null]}\nb: *a\nc: {<<: *a, d: 2020-01-01}\n? [1]\n: !!binary aGk=\n",
}  # fmt: skip


def reader(kind: str, path: Path) -> Callable[[bytes], object]:
    """What reads bytes of a kind; headers are read from `path`."""

    def file(read: Callable[[Path], object]) -> Callable[[bytes], object]:
        return lambda data: (path.write_bytes(data), read(path))

    return {
        "safetensors": file(headers.safetensors_entries),
        "gguf": file(headers.gguf_metadata),
        "json": lambda data: reading.parsed(data, "x"),
        "yaml": lambda data: reading.yaml_of(data.decode("utf-8", "replace"), "x"),
    }[kind]


def main() -> None:
    kind, corpus, *rest = sys.argv[1:]
    Path(corpus, kind).mkdir(parents=True, exist_ok=True)
    Path(corpus, kind, "first").write_bytes(FIRST[kind])
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as work:
        read = reader(kind, Path(work) / "x")

        def one(data: bytes) -> None:
            try:
                read(data)
            except UserError as error:
                if len(str(error).splitlines()) != 1:
                    raise RuntimeError("a refusal is not one sentence") from error

        atheris.Setup([sys.argv[0], str(Path(corpus, kind)), "-rss_limit_mb=2048", "-timeout=20", *rest], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
