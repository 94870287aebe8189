"""What a training step costs: our loop against a bare eager loop and the Hugging Face Trainer, taking turns in one run.

Each has a process of its own, so that nobody's settings or leftovers in memory are another's.

Same model, batch, precision and optimizer settings. A figure is the best of `--repeats` stretches of `--steps` updates, after
one of each. Rows: `plain` (nothing compiled), `compiled` (its start-up stated), and with `--options` what each option of a
recipe costs or gains; then what a run does besides its steps: reading, logging, the ledger.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from held_for_backward import kept_bytes

from prunus import heap, measure, products, record
from prunus.anatomy import Anatomy
from prunus.data.order import Domain, Stream
from prunus.ledger import Data, Stage
from prunus.network import offline
from prunus.train import cache, lora
from prunus.train.learner import Learner, Taught, Teacher, recompute_
from prunus.train.loop import Sparse, Training, train_
from prunus.train.optim import adamw, start_slots_
from prunus.train.parts import LoraPart
from prunus.train.schedule import Schedule
from prunus.train.shapes import config_of, fresh

SETTINGS = {"nano": (8, 256), "smollm2-135m": (2, 256)}  # sequences of an update, tokens of each
LR, BETAS, EPS, DECAY, CLIP = 1e-3, (0.9, 0.95), 1e-8, 0.1, 1.0
AUTOCAST = "bfloat16-autocast"
Steps = Callable[[int], None]


class Feed:
    """The same sequences again and again: reading costs nothing, so that what is timed is the step."""

    def __init__(self, ids: torch.Tensor) -> None:
        self.ids = ids

    def take(self, position: int, count: int) -> Feed:
        """All of them."""
        return self


def model_of(shape: str, dtype: torch.dtype = torch.float32) -> Any:
    return fresh(config_of(shape, 1), init="standard", seed=0, dtype=dtype).train()


def ours(
    shape: str,
    ids: torch.Tensor,
    precision: str = "float32",
    *,
    compiled: bool = False,
    recomputed: bool = False,
    micro: int | None = None,
    documents: int = 0,
    sparse: bool = False,
    adapters: bool = False,
    taught: str | None = None,
    multiplied: str | None = None,
) -> Steps:
    """`steps -> updates`; what an option needs is in place before the first."""
    if multiplied is not None:
        os.environ[products.CHOICE] = multiplied
    model = model_of(shape, torch.bfloat16 if precision == "bfloat16" else torch.float32)
    anatomy = Anatomy.of(model.config)
    if adapters:
        lora.attach_(model, anatomy, LoraPart(), 0)
        model.train()
    if recomputed:
        recompute_(model)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = adamw(named.items(), lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    start_slots_(optimizer, 0)
    learner = Learner(model, precision=precision, compiled=compiled)
    starts = None
    if documents:
        flags = torch.zeros(ids[:, :-1].shape, dtype=torch.bool)
        flags[:, :: ids.shape[1] // documents] = True

        def starts(batch: Any) -> torch.Tensor:
            return flags

    hooks: tuple[Sparse, ...] = ()
    if sparse:
        kept = {n: torch.rand(t.shape) < 0.5 for n, t in anatomy.tensors.items() if t.is_matrix and t.layer is not None}
        hooks = (Sparse(named, kept),)
    run = Training(
        learner, optimizer, Feed(ids), Schedule("cosine", LR, 10**9), len(ids), micro or len(ids), CLIP,
        None if taught is None else TEACHERS[taught](shape, ids), starts, None, hooks,
    )  # fmt: skip
    return lambda count: train_(run, run.step + count)


def _asked(shape: str, top_k: int | None) -> Teacher:
    return Teacher(Learner(model_of(shape)), 1.0, 1.0, top_k)


def _remembered(shape: str, ids: torch.Tensor) -> Taught:
    """What is read from files of the size that `prunus teach` writes."""
    folder = Path(tempfile.mkdtemp(prefix="prunus-bench-"))
    size = (len(ids), ids.shape[1] - 1, TOP_K)
    vocab_size = config_of(shape, 1).vocab_size
    for path, array in zip(
        cache.files(folder, 0),
        (np.random.default_rng(0).integers(0, vocab_size, size), np.full(size, np.log(0.9 / TOP_K))),
        strict=True,
    ):
        np.save(path, array.astype(cache.ids_dtype(vocab_size) if path.name.startswith("ids") else cache.LOGS))
    manifest = cache.Manifest.model_construct(
        shards=[cache.Shard.model_construct(sequences=len(ids))], top_k=TOP_K, temperature=1.0, vocab_size=vocab_size
    )
    known = cache.Remembered(cache.Cache(folder, manifest), 1.0)
    return lambda ids_BT, *, at=0, **positions: known(ids_BT, at=0)


TOP_K = 64
TEACHERS: Mapping[str, Callable[[str, torch.Tensor], Taught]] = {
    "asked": lambda shape, ids: _asked(shape, None),
    "asked, likeliest": lambda shape, ids: _asked(shape, TOP_K),
    "remembered": _remembered,
}


def bare(shape: str, ids: torch.Tensor, precision: str) -> Steps:
    """The loop that anybody would write."""
    model = model_of(shape)
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS)

    def steps(count: int) -> None:
        for _ in range(count):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == AUTOCAST):
                logits = model(input_ids=ids[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()

    return steps


def trainer(shape: str, ids: torch.Tensor, precision: str) -> Steps | None:
    """The Hugging Face Trainer; None where it cannot be imported (it needs accelerate)."""
    try:
        from transformers import Trainer, TrainingArguments
    except ImportError:
        return None
    model = model_of(shape)
    rows = [{"input_ids": row[:-1], "labels": row[:-1]} for row in ids]
    folder = tempfile.mkdtemp(prefix="prunus-bench-")

    def steps(count: int) -> None:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=count, per_device_train_batch_size=len(ids), learning_rate=LR, weight_decay=DECAY,
            adam_beta1=BETAS[0], adam_beta2=BETAS[1], max_grad_norm=CLIP, report_to=[], save_strategy="no", logging_steps=10**9,
            disable_tqdm=True, use_cpu=True, bf16=precision == AUTOCAST, lr_scheduler_type="cosine",
        )  # fmt: skip
        Trainer(model=model, args=arguments, train_dataset=rows * count).train()

    return steps


OPTIONS: Mapping[str, Mapping[str, Any]] = {  # row -> what a recipe sets for it
    "precision: bfloat16-autocast": {"precision": AUTOCAST},
    "precision: bfloat16": {"precision": "bfloat16"},
    "micro_batch: half": {"micro": 4},
    "checkpoint_activations": {"recomputed": True},
    "data.separate_documents": {"documents": 4},
    "model.mask": {"sparse": True},
    "teacher: of its own size": {"taught": "asked"},
    f"teacher.top_k: {TOP_K}": {"taught": "asked, likeliest"},
    f"teacher.cache: top {TOP_K}": {"taught": "remembered"},
    "lora": {"adapters": True},
}


def ids_of(shape: str) -> torch.Tensor:
    """What is trained on [B, T + 1]."""
    sequences, length = SETTINGS[shape]
    vocab_size = config_of(shape, 1).vocab_size
    return torch.randint(0, vocab_size, (sequences, length + 1), generator=torch.Generator().manual_seed(0))


def row(told: Connection, kind: str, shape: str, precision: str, chosen: Mapping[str, Any]) -> None:
    """A process of one row: it is asked for steps and says their seconds, or for 0 and says the bytes that one step keeps."""
    offline(online=False)
    warnings.filterwarnings("ignore")
    ids = ids_of(shape)
    with heap.kept() if kind == "ours" else nullcontext():  # as `prunus train` does
        if kind == "ours":
            steps: Steps | None = ours(shape, ids, **{"precision": precision, **chosen})
        else:
            steps = (bare if kind == "bare" else trainer)(shape, ids, precision)
        told.send(steps is not None)
        while steps is not None and (count := told.recv()) is not None:
            start = time.perf_counter()
            if count:
                steps(count)
                told.send(time.perf_counter() - start)
            else:
                told.send(kept_bytes(lambda: steps(1)))


class Row:
    """A row as seen from outside."""

    def __init__(self, *asked: Any) -> None:
        self.told, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("spawn").Process(target=row, args=(theirs, *asked), daemon=True)
        self.process.start()
        theirs.close()
        self.stands = self.told.recv()

    def ask(self, count: int) -> float:
        """Seconds of `count` steps; bytes kept for 0."""
        self.told.send(count)
        return self.told.recv()

    def end(self) -> None:
        """The process goes."""
        if self.stands:
            self.told.send(None)
        self.process.join()


def alternated(runs: Mapping[str, Row], steps: int, repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """(best seconds of a step, seconds to the end of the first step), the runs taking turns."""
    first = {name: run.ask(1) for name, run in runs.items()}
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats):
        for name, run in runs.items():
            best[name] = min(best[name], run.ask(steps) / steps)
    return best, first


class Held:
    """Ids in a file, mapped into memory as shards are."""

    def __init__(self, path: Path, num_tokens: int) -> None:
        np.random.default_rng(0).integers(0, 4096, num_tokens).astype("<u2").tofile(path)
        self.ids = np.memmap(path, "<u2", "r")

    @property
    def num_tokens(self) -> int:
        """How many there are."""
        return len(self.ids)

    def __getitem__(self, span: slice) -> np.ndarray:
        return self.ids[span].astype(np.int64)

    def document_starts(self, first: int, end: int) -> np.ndarray:
        """None: the benchmark's documents are where `documents` says."""
        return np.arange(first, first)


def bookkeeping(sequences: int, length: int, updates: int = 300) -> dict[str, float]:
    """Seconds an update, of what a run does besides the step: reading sequences, one line of the log, the ledger."""
    with tempfile.TemporaryDirectory(prefix="prunus-bench-") as folder:
        place = Path(folder)
        stream = Stream([Domain("text", Held(place / "ids.bin", 2 * updates * sequences * length))], length, 0)
        start = time.perf_counter()
        ranges = [stream.take(step * sequences, sequences).ranges for step in range(updates)]
        reading = time.perf_counter() - start
        line = {
            "step": 1,
            "tokens": 1,
            "loss": 1.5,
            "lr": LR,
            "grad_norm": 0.1,
            "skipped": 0.0,
            "params": 1,
            "tokens_per_s": 1.5,
        }
        start = time.perf_counter()
        for _ in range(updates):
            with (place / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
        logging = time.perf_counter() - start
        data = {"text": Data(manifest="0", range="retrain", splits={}, sources=[])}
        stage = Stage(name="bench", params=1, seed=0, seq_len=length, positions=(0, updates), history=[], data=data)
        start = time.perf_counter()
        for each in ranges:
            stage.consume(each)
        ledger = time.perf_counter() - start
    return {"reading": reading / updates, "log": logging / updates, "ledger": ledger / updates}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--precisions", nargs="*", default=["float32"], choices=["float32", AUTOCAST])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--options", action="store_true", help="also what each option costs, on nano")
    parser.add_argument("--record", type=Path)
    arguments = parser.parse_args()
    offline(online=False)
    warnings.filterwarnings("ignore")
    for shape in arguments.shapes:
        for precision in arguments.precisions:
            options = arguments.options and shape == "nano" and precision == "float32"
            figures = measured(shape, precision, arguments, options=options)
            if arguments.record:
                recipe = {"command": "benchmarks/train.py", "shape": shape, "precision": precision, "batch": SETTINGS[shape]}
                record.append(arguments.record, "train-speed", json.loads(json.dumps(recipe)), figures)


def measured(shape: str, precision: str, arguments: argparse.Namespace, *, options: bool) -> dict[str, Any]:
    """All rows of one shape, printed as they are known."""
    sequences, length = SETTINGS[shape]
    flops = 3 * Anatomy.of(config_of(shape, 1)).flops(length) * sequences
    asked: dict[str, tuple[str, Mapping[str, Any]]] = {
        "bare loop": ("bare", {}),
        "plain": ("ours", {}),
        "Trainer": ("Trainer", {}),
    }
    if not arguments.no_compile:
        asked["compiled"] = ("ours", {"compiled": True})
    if products.library() == products.ONEDNN:
        asked["products: torch"] = ("ours", {"multiplied": products.TORCH})
    if options:
        asked |= {name: ("ours", chosen) for name, chosen in OPTIONS.items()}
    started = {name: Row(kind, shape, precision, chosen) for name, (kind, chosen) in asked.items()}
    runs = {name: one for name, one in started.items() if one.stands}
    best, first = alternated(runs, arguments.steps, arguments.repeats)
    peak = measure.gemm_rate()
    kept = {name: int(run.ask(0)) for name, run in runs.items() if name not in ("Trainer", "compiled")}
    for one in started.values():
        one.end()
    besides = bookkeeping(sequences, length)
    for name, seconds in best.items():
        print(
            f"{shape:<13} {precision:<18} {name:<29} {sequences * length / seconds:8,.0f} tokens/s   "
            f"{best['bare loop'] / seconds:5.2f} x bare   {flops / seconds / peak:5.1%} of peak   first {first[name]:.0f} s"
            + (f"   kept {kept[name] / 2**20:,.0f} MiB" if name in kept else ""),
            flush=True,
        )
    print(f"{shape:<13} besides steps: {sum(besides.values()) / best['plain']:.2%} of a plain one")
    return {
        "tokens": sequences * length, "step_s": best, "first_step_s": first, "kept_bytes": kept, "besides_s": besides,
        "gemm_flops_per_s": peak, "step_flops": flops,
    }  # fmt: skip


if __name__ == "__main__":
    main()
