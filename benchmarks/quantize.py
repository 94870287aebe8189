"""What fewer bits cost and bring, every form of one checkpoint in one run: perplexity, bytes, milliseconds of a prompt and a token.

torchao's folders run in PyTorch, ONNX graphs in ONNX Runtime; all are written anew from one folder. Forms take turns on the
clock, in an order that turns too.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from prunus import api, bench, quantize, record
from prunus.data.windows import Windows
from prunus.evaluation import perplexity
from prunus.export import onnx_file
from prunus.network import offline
from prunus.source import Source

WIKITEXT = "wikitext2/wiki.test.raw"
Timed = Callable[[], tuple[float, float]]


def graph_perplexity(session: onnx_file.Session, windows: Windows) -> float:
    """exp of the mean loss of every token but each window's first, as `prunus eval` has it."""
    total = count = 0.0
    for ids_T in windows.ids_NT:
        logits, _ = session(ids_T[None].numpy(), session.start(1))
        losses = torch.nn.functional.cross_entropy(torch.from_numpy(logits[0, :-1]).double(), ids_T[1:], reduction="sum")
        total, count = total + float(losses), count + len(ids_T) - 1
    return float(np.exp(total / count))


def graph_s(session: onnx_file.Session, ids_BT: np.ndarray, new_tokens: int) -> tuple[float, float]:
    """As `bench.generate_s`: seconds to the first token, and of one after it."""
    start = perf_counter()
    logits, past = session(ids_BT, session.start(len(ids_BT)))
    token = logits[:, -1:].argmax(-1)
    first = perf_counter()
    for _ in range(new_tokens):
        logits, past = session(token, past)
        token = logits[:, -1:].argmax(-1)
    return first - start, (perf_counter() - first) / new_tokens


def forms(source: Source, work: Path, windows: Windows, context: int) -> list[tuple[dict[str, Any], Timed]]:
    """(what it is, how it is timed), one after another made, scored, and kept open."""
    found: list[tuple[dict[str, Any], Timed]] = []
    ids = torch.randint(0, source.anatomy.shape.vocab_size, (1, context), generator=torch.Generator().manual_seed(0))

    def torch_form(name: str, opened: Source, dtype: str) -> None:
        model = opened.load(dtype)
        size = sum(file.stat().st_size for file in opened.weight_files) if opened.is_quantized else None
        row = {
            "form": name,
            "engine": "PyTorch",
            "bytes": size or source.anatomy.weight_bytes(4 if dtype == "float32" else 2),
        }
        found.append(
            (row | {"perplexity": perplexity(model, windows).perplexity}, partial(bench.generate_s, model, ids, 16))
        )
        print(found[-1][0], flush=True)

    torch_form("float32", source, "float32")
    torch_form("bfloat16", source, "bfloat16")
    for scheme in quantize.SCHEMES:
        out = work / scheme
        quantize.quantize(quantize.Plan.of(source, scheme), out)
        torch_form(scheme, Source.open(str(out), quantized=True), "bfloat16")
    for kind in onnx_file.KINDS:
        out = work / f"{kind}.onnx"
        told = onnx_file.export(onnx_file.Plan.of(source, kind), out)
        session = onnx_file.Session(out)
        row = {
            "form": kind,
            "engine": "ONNX Runtime",
            "bytes": told["bytes"],
            "perplexity": graph_perplexity(session, windows),
        }
        found.append((row, partial(graph_s, session, ids.numpy(), 16)))
        print(row, flush=True)
    return found


def main() -> None:
    """Print a row a form, and append one record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", required=True, help="a folder")
    parser.add_argument("--data", type=Path, required=True, help="folder with wikitext2/")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--record", type=Path)
    asked = parser.parse_args()
    offline(online=False)
    source = Source.open(asked.source)
    options = api.TextOptions(asked.windows, 1024)
    windows = options.pack(source.tokenizer(), str(asked.data / WIKITEXT), False)
    with tempfile.TemporaryDirectory() as work, bench.on_threads(asked.threads):
        made = forms(source, Path(work), windows, asked.context)
        times = bench.in_turns([timed for _, timed in made], asked.repeats)
    rows = []
    for (row, _), seconds in zip(made, times, strict=True):
        first, each = (bench.spread([1000 * s[k] for s in seconds]) for k in (0, 1))
        rows.append(row | {"prompt_ms": first, "token_ms": each})
        print(
            f"{row['engine']:13}{row['form']:10}{row['bytes'] / 1e6:8.1f} MB  perplexity {row['perplexity']:8.3f}  prompt "
            f"{first['median']:7.1f} ms  token {each['median']:6.2f} ms",
            flush=True,
        )
    if asked.record is not None:
        recipe = {
            "command": "quantize-speed", "source": source.label, "source_sha256": source.sha256, "text": windows.provenance(),
            "threads": asked.threads, "context": asked.context, "repeats": asked.repeats,
        }  # fmt: skip
        record.append(asked.record, "quantize-speed", recipe, {"params": source.anatomy.num_params, "forms": rows})


if __name__ == "__main__":
    main()
