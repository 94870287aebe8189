"""What a training step costs: our loop against a bare eager loop and the Hugging Face Trainer, alternating in one run.

Same model, batch, precision and optimizer settings; ratios are of the best of `--repeats` stretches of `--steps` updates, after
a warm-up of each. Rows: plain (uncompiled), compiled (start-up stated), and what each option costs or gains on `nano`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from prunus import measure, record
from prunus.anatomy import Anatomy
from prunus.network import offline
from prunus.train.learner import Learner, boundaries
from prunus.train.loop import Training, train_
from prunus.train.optim import adamw, start_slots_
from prunus.train.schedule import Schedule
from prunus.train.shapes import config_of, fresh

SETTINGS = {"nano": (8, 256), "smollm2-135m": (2, 256)}  # sequences of an update, tokens of each
LR, BETAS, EPS, DECAY, CLIP = 1e-3, (0.9, 0.95), 1e-8, 0.1, 1.0


class Feed:
    """The same sequences again and again: reading costs nothing, so that what is timed is the step."""

    def __init__(self, ids: torch.Tensor) -> None:
        self.ids = ids

    def take(self, position: int, count: int) -> Feed:
        """All of them."""
        return self


def model_of(shape: str) -> Any:
    return fresh(config_of(shape, 1), init="standard", seed=0, dtype=torch.float32).train()


def ours(shape: str, ids: torch.Tensor, precision: str, **options: Any) -> Callable[[int], None]:
    """`steps -> updates`; what an option needs is in place before the first."""
    model = model_of(shape)
    if options.get("checkpointed"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = adamw(model.named_parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
    start_slots_(optimizer, 0)
    learner = Learner(model, precision=precision, compiled=bool(options.get("compiled")))
    starts = None
    if options.get("separate"):
        flags = torch.zeros(ids[:, :-1].shape, dtype=torch.bool)
        flags[:, :: ids.shape[1] // 4] = True
        starts = lambda batch: flags  # noqa: E731
        assert boundaries(flags)
    run = Training(
        learner,
        optimizer,
        Feed(ids),
        Schedule("cosine", LR, 10**9),
        len(ids),
        options.get("micro", len(ids)),
        CLIP,
        None,
        starts,
    )

    def steps(count: int) -> None:
        train_(run, run.step + count)

    return steps


def bare(shape: str, ids: torch.Tensor, precision: str) -> Callable[[int], None]:
    """The loop that anybody would write."""
    model = model_of(shape)
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS)

    def steps(count: int) -> None:
        for _ in range(count):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16-autocast"):
                logits = model(input_ids=ids[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()

    return steps


def trainer(shape: str, ids: torch.Tensor, precision: str) -> Callable[[int], None] | None:
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
            disable_tqdm=True, use_cpu=True, bf16=precision == "bfloat16-autocast", lr_scheduler_type="cosine",
        )  # fmt: skip
        Trainer(model=model, args=arguments, train_dataset=rows * count).train()

    return steps


def alternated(
    runs: dict[str, Callable[[int], None]], steps: int, repeats: int
) -> tuple[dict[str, float], dict[str, float]]:
    """(best seconds of a step, seconds to the end of the first step), the runs taking turns."""
    first = {}
    for name, run in runs.items():
        start = time.perf_counter()
        run(1)
        first[name] = time.perf_counter() - start
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run(steps)
            best[name] = min(best[name], (time.perf_counter() - start) / steps)
    return best, first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--precisions", nargs="*", default=["float32"], choices=["float32", "bfloat16-autocast"])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--options", action="store_true", help="also the cost of each option on nano")
    parser.add_argument("--record", type=Path)
    arguments = parser.parse_args()
    offline(online=False)
    warnings.filterwarnings("ignore")
    for shape in arguments.shapes:
        sequences, length = SETTINGS[shape]
        config = config_of(shape, 1)
        ids = torch.randint(0, config.vocab_size, (sequences, length + 1), generator=torch.Generator().manual_seed(0))
        flops = 3 * Anatomy.of(config).flops(length) * sequences
        for precision in arguments.precisions:
            runs = {"bare loop": bare(shape, ids, precision), "plain": ours(shape, ids, precision)}
            if (theirs := trainer(shape, ids, precision)) is not None:
                runs["Trainer"] = theirs
            if not arguments.no_compile:
                runs["compiled"] = ours(shape, ids, precision, compiled=True)
            if arguments.options and shape == "nano":
                runs["separate documents"] = ours(shape, ids, precision, separate=True)
                runs["checkpoint activations"] = ours(shape, ids, precision, checkpointed=True)
                runs["two micro-batches"] = ours(shape, ids, precision, micro=-(-sequences // 2))
            best, first = alternated(runs, arguments.steps, arguments.repeats)
            peak = measure.gemm_rate()
            for name, seconds in best.items():
                print(
                    f"{shape:<14} {precision:<18} {name:<24} {sequences * length / seconds:8,.0f} tokens/s   "
                    f"{best['bare loop'] / seconds:5.2f} x bare   {flops / seconds / peak:5.1%} of peak  first {first[name]:.0f} s",
                    flush=True,
                )
            if arguments.record:
                recipe = {
                    "command": "benchmarks/train.py",
                    "shape": shape,
                    "precision": precision,
                    "batch": [sequences, length],
                }
                figures = {"step_s": best, "first_step_s": first, "gemm_flops_per_s": peak, "step_flops": flops}
                record.append(arguments.record, "train-speed", recipe, json.loads(json.dumps(figures)))


if __name__ == "__main__":
    main()
