"""Run one-shot grids on SmolLM2-135M: one record a run in results/oneshot.jsonl, skipping runs that are there.

Every run loads the source, cuts it, and scores the cut model in memory on WikiText-2 (the first 16 windows of 1,024) and
on C4 documents that no calibration reads (the last 100 of the file).
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from pathlib import Path
from typing import Any

from prunus import api, record
from prunus.evaluation import perplexity
from prunus.network import offline
from prunus.planning import Plan, Request
from prunus.progress import Progress
from prunus.quickstart import default_source
from prunus.source import Source

C4, WIKITEXT = "c4/c4_sample1.jsonl", "wikitext2/wiki.test.raw"
EVALUATE = {
    "wikitext2": (WIKITEXT, api.EVALUATION),
    "c4-unseen": (C4, api.TextOptions(16, 1024, documents="-100:")),
}
FOUNDATION = (
    None,  # the dense model
    Request("flap", 0.2),
    Request("flap", 0.2, uniform=True),
    Request("flap", 0.5),
    Request("wanda", 0.5),
    Request("wanda", pattern="2:4"),
    Request("magnitude", 0.5),
    Request("minitron-width", 0.2),
    Request("minitron-width", 0.2, compensate="gain"),
    Request("minitron-depth", 0.2),
)
SPARSE = tuple(
    Request(name, **size)
    for name in ("wanda", "sparsegpt", "prunus-sparse")
    for size in ({"ratio": 0.5}, {"pattern": "2:4"})
)
RATIOS = (0.2, 0.5, 0.3, 0.1)
RIVALS = ("flap", "shortgpt", "minitron-width", "wanda-sp", "llm-pruner", "adapt-pruner", "slicegpt", "sleb")
STRUCTURED = tuple(
    request
    for ratio in RATIOS
    for request in (
        Request("prunus", ratio),
        Request("prunus", ratio, uniform=True),
        *(Request(name, ratio, multiple_of=1 if name == "slicegpt" else None) for name in RIVALS),  # equal within 0.5 %
    )
)
SEEDS = (None, 1, 2)  # None: the first windows of the file; else drawn from all documents that no evaluation reads
GRIDS = {"foundation": (FOUNDATION, (None,)), "sparse": (SPARSE, SEEDS), "structured": (STRUCTURED, SEEDS)}
FEW = {"sleb": 8}  # windows of methods that score by the whole model's loss, candidate by candidate


def run(source: Source, request: Request | None, data: Path, out: Path, done: set[str], seed: int | None = None) -> None:
    count = FEW.get(request.method, api.CALIBRATION_WINDOWS) if request else 0
    text = api.TextOptions(count, api.CALIBRATION_SEQ_LEN, seed=seed, documents=None if seed is None else ":-100")
    tokenizer = source.tokenizer()
    windows = {name: text_options.pack(tokenizer, str(data / f), False) for name, (f, text_options) in EVALUATE.items()}
    calibration = None
    if request is not None and Plan.make(source.config, source.anatomy, request).needs_text:
        calibration = text.pack(tokenizer, str(data / C4), False)
    recipe: dict[str, Any] = {
        "command": "oneshot",
        "source": source.label,
        "source_sha256": source.sha256,
        "request": request.describe() if request else None,
        "calibration": calibration.provenance() if calibration else None,
        "evaluation": {name: w.provenance() for name, w in windows.items()},
        "dtype": "float32",
        "seed": seed,
    }
    if record.digest(recipe) in done:
        return
    with Progress() as progress:
        start = time.perf_counter()
        figures: dict[str, Any] = {"params": source.anatomy.num_params, "block_params": source.anatomy.block_params}
        if request is None:
            model = source.load()
        else:
            result = api.prune(
                str(source.path),
                calibration=str(data / C4) if calibration else None,
                text=text,
                progress=progress,
                **vars(request),
            )
            model, after = result.model, result.outcome.target.anatomy
            figures = {
                "params": after.num_params,
                "block_params": after.block_params,
                "ratios": result.ratios,
                "stages_s": result.outcome.seconds,
                "shape": after.shape.describe(),
                "model_type": result.outcome.target.config.model_type,
            }
        figures["prune_s"] = time.perf_counter() - start
        for name, w in windows.items():
            scored = perplexity(model, w, progress=lambda d, t, n=name: progress(f"score {n}", d, t))
            figures[name] = scored.to_json()
    record.append(out, "oneshot", recipe, figures)
    del model
    gc.collect()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with c4/ and wikitext2/")
    parser.add_argument("--out", type=Path, default=Path("results/oneshot.jsonl"))
    parser.add_argument("--grid", choices=[*GRIDS], nargs="*", default=[*GRIDS])
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many of a grid's calibration seeds to run")
    parser.add_argument("--ratio", type=float, nargs="*", help="of the structured grid only these ratios")
    parser.add_argument("--methods", nargs="*", help="only these methods")
    arguments = parser.parse_args()
    offline(online=False)
    source = Source.open(default_source())
    done = {r["recipe_hash"] for r in record.read(arguments.out)} if arguments.out.exists() else set()
    todo = [
        (request, seed)
        for grid in arguments.grid
        for seed in GRIDS[grid][1][: arguments.seeds]
        for request in GRIDS[grid][0]
        if not (arguments.ratio and grid == "structured" and request.ratio not in arguments.ratio)
        if not arguments.methods or (request and request.method in arguments.methods)
    ]
    for i, (request, seed) in enumerate(todo):
        print(f"[{i + 1}/{len(todo)}] {request.describe() if request else 'dense'} seed {seed}", file=sys.stderr)
        run(source, request, arguments.data, arguments.out, done, seed)


if __name__ == "__main__":
    main()
