"""Prepared data for tests: small texts, and what their shards must hold, worked out the plain way."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pipeline

from prunus.data.prepare import Text, prepare

SPLITS = {"validation": 0.2, "parent": 0.4, "retrain": None}
SHARES = (0.2, 0.4, 0.4)


def texts(count: int = 80, seed: int = 0) -> list[str]:
    """Different documents of 3 to 30 words, some with line breaks and letters of several bytes."""
    generator = np.random.default_rng(seed)
    vocabulary = " ".join(pipeline.corpus()).split()
    out = []
    for i in range(count):
        words = generator.choice(vocabulary, size=int(generator.integers(3, 30)))
        out.append(f"{seed}-{i} " + ("\n" if i % 5 == 0 else " ").join(words))
    return out


def jsonl(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents), encoding="utf-8")
    return path


def made(folder: Path, documents: list[str], **options: Any) -> Any:
    """(manifest, folder) of prepared documents."""
    source = jsonl(folder / "source.jsonl", documents)
    out = folder / "data"
    options = {"splits": SPLITS, "shard_tokens": 200} | options
    return prepare([Text(str(source))], pipeline.tokenizer(), out, **options), out


def range_of(text: str, shares: tuple[float, ...] = SHARES) -> int:
    """The first range whose cumulated share lies above the hash, as a fraction of 2^64."""
    number = int.from_bytes(hashlib.blake2b(" ".join(text.split()).encode(), digest_size=8).digest(), "little")
    where, end = number / 2**64, 0.0
    for i, share in enumerate(shares[:-1]):
        end += share
        if where < end:
            return i
    return len(shares) - 1


def ids_of(text: str, tokenizer: Any = None) -> list[int]:
    tokenizer = tokenizer or pipeline.tokenizer()
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones too."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
