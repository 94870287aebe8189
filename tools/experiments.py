"""Run one-shot grids on SmolLM2-135M: one record a run in results/oneshot.jsonl, skipping runs that are there.

Every run loads the source, cuts it, and scores the cut model in memory on WikiText-2 (the first 16 windows of 1,024) and
on C4 documents that no calibration reads (the last 100 of the file). Where little is removed the methods lie within what
16 windows can tell apart, so there WikiText-2 is scored on 80 windows as well.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunus import api, record
from prunus.builders import make_plan
from prunus.data.windows import Windows
from prunus.evaluation import perplexity
from prunus.findings import Findings, wanted
from prunus.network import offline
from prunus.oneshot import one_shot_
from prunus.planning import Request
from prunus.progress import Progress
from prunus.quickstart import default_source
from prunus.source import Source

C4, WIKITEXT = "c4/c4_sample1.jsonl", "wikitext2/wiki.test.raw"
EVALUATE = {
    "wikitext2": (WIKITEXT, api.EVALUATION),
    "c4-unseen": (C4, api.TextOptions(16, 1024, documents="-100:")),
}
MORE = {"wikitext2-80": (WIKITEXT, api.TextOptions(80, 1024))}
MORE_UP_TO = 0.1  # ratio
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
STRUCTURED = tuple(  # method by method, so that ratios share what was found on the dense model
    request
    for name in ("prunus", *RIVALS)
    for ratio in RATIOS
    for request in (
        *([Request(name, ratio, uniform=True, multiple_of=1)] if name == "prunus" else []),
        Request(name, ratio, multiple_of=1 if name == "slicegpt" else None),  # multiples of 1: equal within 0.5 %
    )
)
SEEDS = (None, 1, 2)  # None: the first windows of the file; else drawn from all documents that no evaluation reads
GRIDS = {"foundation": (FOUNDATION, (None,)), "sparse": (SPARSE, SEEDS), "structured": (STRUCTURED, SEEDS)}
FEW = {"sleb": 8}  # windows of methods that score by the whole model's loss, candidate by candidate


@dataclass
class Grid:
    """The runs' common things. What a run found on the dense model serves the next one that wants the same."""

    source: Source
    data: Path
    out: Path
    done: set[str]
    windows: dict[object, Windows] = field(default_factory=dict)
    found: tuple[object, Findings | None] = (None, None)  # the last, and what it was of

    def packed(self, file: str, options: api.TextOptions) -> Windows:
        """Windows of a file, cut once."""
        if (file, options) not in self.windows:
            self.windows[file, options] = options.pack(self.source.tokenizer(), str(self.data / file), False)
        return self.windows[file, options]

    def run(self, request: Request | None, seed: int | None) -> None:
        """One run, unless its record is there."""
        source = self.source
        close = request is not None and request.ratio is not None and request.ratio <= MORE_UP_TO
        texts = EVALUATE | MORE if close else EVALUATE
        evaluation = {name: self.packed(file, options) for name, (file, options) in texts.items()}
        plan = None if request is None else make_plan(source.config, source.anatomy, request)
        calibration = None
        if plan is not None and plan.needs_text:
            few = FEW.get(plan.method.name, api.CALIBRATION_WINDOWS)
            documents = None if seed is None else ":-100"
            calibration = self.packed(C4, api.TextOptions(few, api.CALIBRATION_SEQ_LEN, seed=seed, documents=documents))
        recipe: dict[str, Any] = {
            "command": "oneshot",
            "source": source.label,
            "source_sha256": source.sha256,
            "request": request.describe() if request else None,
            "calibration": calibration.provenance() if calibration else None,
            "evaluation": {name: w.provenance() for name, w in evaluation.items()},
            "dtype": "float32",
            "seed": seed,
        }
        if record.digest(recipe) in self.done:
            return
        figures: dict[str, Any] = {"params": source.anatomy.num_params, "block_params": source.anatomy.block_params}
        with Progress() as progress:
            model = source.load()
            if plan is not None:
                start = time.perf_counter()
                key = (wanted(plan), seed)
                shared = self.found[1] if self.found[0] == key and key[0] is not None else None
                outcome = one_shot_(plan, model, calibration, findings=shared, progress=progress)
                self.found = (key, outcome.findings)
                model, after = outcome.model, outcome.target.anatomy
                figures = {
                    "params": after.num_params,
                    "block_params": after.block_params,
                    "ratios": outcome.ratios,
                    "stages_s": outcome.seconds,
                    "prune_s": time.perf_counter() - start,
                    "shared": shared is not None,
                    "shape": after.shape.describe(),
                    "model_type": outcome.target.config.model_type,
                }
                del outcome
            for name, w in evaluation.items():
                scored = perplexity(model, w, progress=lambda d, t, n=name: progress(f"score {n}", d, t))
                figures[name] = scored.to_json()
        record.append(self.out, "oneshot", recipe, figures)
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
    grid = Grid(source, arguments.data, arguments.out, done)
    todo = [
        (request, seed)
        for name in arguments.grid
        for seed in GRIDS[name][1][: arguments.seeds]
        for request in GRIDS[name][0]
        if not (arguments.ratio and name == "structured" and request.ratio not in arguments.ratio)
        if not arguments.methods or (request and request.method in arguments.methods)
    ]
    for i, (request, seed) in enumerate(todo):
        print(f"[{i + 1}/{len(todo)}] {request.describe() if request else 'dense'} seed {seed}", file=sys.stderr)
        grid.run(request, seed)


if __name__ == "__main__":
    main()
