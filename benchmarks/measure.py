"""What models cost to run, against the floor: of a prompt its products at the measured rate, of a token its bytes.

`prunus measure` on several models in turns (the table of EfficientLLM's appendix D.2; with `--train` the update times of the
comparison study's table 9), and beside every time the least that this machine could take by its measured rate and bandwidth.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from prunus import bench, measure, record
from prunus.anatomy import Anatomy
from prunus.source import Source

_BYTES = 256 << 20  # larger than any cache


def bandwidth(threads: int) -> float:
    """Bytes a second that are read: the best of five sums over a tensor that no cache holds."""
    with bench.on_threads(threads):
        data, best = torch.ones(_BYTES // 4), 0.0
        for _ in range(5):
            start = perf_counter()
            data.sum()
            best = max(best, _BYTES / (perf_counter() - start))
    return best


def rates(threads: list[int], dtype: str) -> dict[int, dict[str, float]]:
    """For each number of threads: operations and bytes a second."""
    found = {}
    for count in threads:
        with bench.on_threads(count):
            rate = measure.plain_gemm_rate(dtype=getattr(torch, dtype))
        found[count] = {"flops_per_s": rate, "bytes_per_s": bandwidth(count)}
    return found


def products(anatomy: Anatomy, context: int) -> tuple[float, float]:
    """FLOPs that run for a prompt, of whose tokens the last alone has logits, and for a token behind it."""
    head = 2 * anatomy.shape.vocab_size * anatomy.shape.hidden_size
    return anatomy.flops(context) - (context - 1) * head, anatomy.flops(context) / context


def beside_floor(row: dict[str, Any], found: dict[int, dict[str, float]], anatomy: Anatomy) -> list[dict[str, Any]]:
    """Each cell's times with how often the floor fits into them."""
    out = []
    for cell in row["cells"]:
        rate = found[cell["threads"]]
        prompt, token = (cell["batch"] * flops / rate["flops_per_s"] for flops in products(anatomy, cell["context"]))
        cache = cell["batch"] * cell["context"] * row["kv_bytes_per_token"]
        prompt_s, token_s = prompt, max((row["weight_bytes"] + cache) / rate["bytes_per_s"], token)
        out.append(
            {
                "threads": cell["threads"], "batch": cell["batch"], "context": cell["context"],
                "prompt_times_floor": cell["first_token_ms"]["median"] / 1000 / prompt_s,
                "token_times_floor": cell["decode_ms"]["median"] / 1000 / token_s,
            }
        )  # fmt: skip
    return out


def main() -> None:
    """Print a row a cell; append a record a model, and one of the floors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--threads", type=int, nargs="+", default=list(bench.usual_threads()))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--record", type=Path)
    a = parser.parse_args()
    asked = bench.Asked(
        tuple(a.threads), tuple(a.batches), tuple(a.contexts), repeats=a.repeats, train=a.train, dtype=a.dtype
    )
    found = bench.run(a.sources, asked, record=a.record)
    floors = rates(a.threads, a.dtype)
    opened = [Source.open(source, quantized=True).anatomy for source in a.sources]
    rows = {row["model"]: beside_floor(row, floors, one) for row, one in zip(found["models"], opened, strict=True)}
    for name, cells in rows.items():
        for cell in cells:
            print(
                f"{name:34}{cell['threads']} threads, batch {cell['batch']}, {cell['context']:4} tokens: prompt "
                f"{cell['prompt_times_floor']:5.2f} x its floor, token {cell['token_times_floor']:5.2f} x",
                flush=True,
            )
    if a.record is not None:
        recipe = {"command": "benchmarks/measure.py", "models": list(rows), "asked": {**vars(asked)}}
        record.append(a.record, "measure-floor", recipe, {"rates": {str(k): v for k, v in floors.items()}, "models": rows})


if __name__ == "__main__":
    main()
