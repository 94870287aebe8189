"""Zero-shot tasks, ours against lm-eval's own `HFLM` at its best batch size: seconds, and whether every score is the same.

One run, one model in memory, one dtype, the same items. HFLM's batch size is chosen by a short run of each. Building prompts and
tokens is lm-eval's in both, and counts in both.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from prunus import record
from prunus.network import offline
from prunus.source import Source
from prunus.tasks import harness, run
from prunus.tasks.local import named
from prunus.tasks.run import Asked, Result

TARGET = 2.0  # times as fast
BATCHES = (4, 8, 16, 32)
Make = Callable[..., Any]  # the model as lm-eval sees it


def timed(asked: Asked, load: Callable[[], Any], make: Make) -> tuple[dict[str, dict[str, Result]], dict[str, float]]:
    """Results of every task, run by itself, and the seconds of each."""
    found, seconds = {}, {}
    kept, harness.Shared = harness.Shared, make
    try:
        for name in asked.names:
            alone = Asked((name,), asked.rows, asked.limit)
            with tempfile.TemporaryDirectory() as cache:
                os.environ["PRUNUS_CACHE"] = cache  # nothing is known, and nothing is left behind
                start = time.perf_counter()
                found |= run.results(alone, load, {})
                seconds[name] = time.perf_counter() - start
    finally:
        harness.Shared = kept
    return found, seconds


def plain(batch: int) -> Make:
    """lm-eval's own."""
    from lm_eval.models.huggingface import HFLM

    return lambda model, tokenizer, *_: HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=batch)


def apart(ours: dict[str, Result], theirs: dict[str, Result]) -> dict[str, Any]:
    """The largest difference of a log-probability in nats, and whether all scores are the same."""
    worst = max(
        abs(a - b)
        for name in ours
        for mine, other in zip(ours[name].log_probs, theirs[name].log_probs, strict=True)
        for a, b in zip(mine, other, strict=True)
    )
    return {"log_prob": worst, "same_scores": all(ours[name].items == theirs[name].items for name in ours)}


def exactness(asked: Asked, load: Callable[[], Any], exact: Callable[[], Any], batch: int) -> dict[str, Any]:
    """How far log-probabilities of answers, ours and HFLM's in the same dtype, lie from those of a float64 model, in nats."""
    reference = timed(asked, exact, plain(1))[0]
    found = {"ours": timed(asked, load, harness.Shared)[0], "hflm": timed(asked, load, plain(batch))[0]}
    out: dict[str, Any] = {}
    for who, results in found.items():
        far = {
            name: max(
                abs(a - b)
                for mine, true in zip(results[name].log_probs, reference[name].log_probs, strict=True)
                for a, b in zip(mine, true, strict=True)
            )
            for name in asked.names
        }
        out[who] = far
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", required=True)
    parser.add_argument("--task-data", type=Path, required=True)
    parser.add_argument("--tasks", default="eight,mmlu,lambada")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--choose-by", type=int, default=8, help="items of every task that HFLM's batch size is chosen by")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--exact", type=int, default=0, help="only: so many items of every task against a float64 model")
    parser.add_argument("--record", type=Path)
    arguments = parser.parse_args()
    offline(online=False)
    source = Source.open(arguments.source)
    model, tokenizer = source.load(arguments.dtype), source.tokenizer()
    load = lambda: (model, tokenizer)  # noqa: E731
    names = named(arguments.tasks)
    if arguments.exact:
        some = Asked.of(names, arguments.task_data, arguments.exact, online=False)
        double = model.__class__(model.config).to(torch.float64).eval()
        double.load_state_dict(model.state_dict())
        far = exactness(some, load, lambda: (double, tokenizer), BATCHES[0])
        for who, by in far.items():
            print(f"{who}: at most {max(by.values()):.1e} nats from float64, {max(by, key=lambda name: by[name])}")
        if arguments.record:
            recipe = {
                "command": "benchmarks/evaluate.py --exact", "source_sha256": source.sha256, "tasks": list(names),
                "limit": arguments.exact, "dtype": arguments.dtype, "rows": some.notes(),
            }  # fmt: skip
            record.append(arguments.record, "evaluate-exact", json.loads(json.dumps(recipe)), far)
        return
    few = Asked.of(names, arguments.task_data, arguments.choose_by, online=False)
    asked = Asked.of(names, arguments.task_data, arguments.limit, online=False)
    tried = {size: sum(timed(few, load, plain(size))[1].values()) for size in BATCHES}
    best = min(tried, key=lambda size: tried[size])
    print("HFLM, a few items: " + ", ".join(f"batches of {size} {s:.1f} s" for size, s in tried.items()), flush=True)
    ours, our_seconds = timed(asked, load, harness.Shared)
    theirs, their_seconds = timed(asked, load, plain(best))
    for name in names:
        a, b = our_seconds[name], their_seconds[name]
        print(f"{name:<15} {a:7.1f} s   HFLM {b:7.1f} s   {b / a:5.2f} x", flush=True)
    ratio = sum(their_seconds.values()) / sum(our_seconds.values())
    difference = apart(ours, theirs)
    print(
        f"all: {ratio:.2f} x HFLM at batches of {best} ({'met' if ratio >= TARGET else 'MISSED'}: {TARGET:g}); {difference}"
    )
    if arguments.record:
        recipe = {
            "command": "benchmarks/evaluate.py", "source_sha256": source.sha256, "tasks": list(names), "limit": arguments.limit,
            "dtype": arguments.dtype, "batches": list(BATCHES), "target": TARGET, "rows": asked.notes(),
        }  # fmt: skip
        figures = {
            "ratio": ratio, "ours_s": our_seconds, "hflm_s": their_seconds, "hflm_batch": best,
            "hflm_tried_s": {str(size): s for size, s in tried.items()}, "apart": difference,
            "scores": {name: {m: s.to_json() for m, s in result.scores.items()} for name, result in ours.items()},
        }  # fmt: skip
        record.append(arguments.record, "evaluate-speed", json.loads(json.dumps(recipe)), figures)


if __name__ == "__main__":
    with torch.no_grad():
        main()
