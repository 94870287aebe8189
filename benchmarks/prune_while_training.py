"""What pruning costs a training run, each figure against its target: steps without a cut, cuts, speed and memory afterwards.

One run measures all. Steps take turns with and without the pruner on one model, so that nothing but the pruner differs; what is
compared is the median of the paired differences. Memory is the peak of processes of their own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from train import AUTOCAST, Feed

from prunus import heap, record
from prunus.anatomy import Anatomy
from prunus.distributed import ALONE
from prunus.network import offline
from prunus.train import recipe as recipes
from prunus.train.assembly import learner_of, optimizer_of
from prunus.train.loop import Hook, Training, train_
from prunus.train.recipe import Recipe
from prunus.train.schedule import Schedule
from prunus.train.shapes import config_of, fresh
from prunus.train.shrink.cutting import Cutting
from prunus.train.shrink.pruner import Pruner

SETTINGS = {"smollm2-135m": (4, 2, 256), "nano": (8, 4, 256)}  # sequences of an update, of a micro-batch, tokens of each
TARGETS = {"step": 1.03, "cut": 1.0, "speed": 0.97, "memory": 1.05}
UPDATES = 400  # of the run that the recipes speak of; few of them are made
NONE = {"start": 1.0, "end": 1.0}  # a pace that watches and cuts nothing here
EVERY = {"start": 0.0, "end": 1.0}  # one that cuts at every update
METRICS: Mapping[str, Mapping[str, Any]] = {  # row -> saliency
    "second, output (efficientllm)": {"metric": "second", "matrices": "output", "average": 0.9},
    "first, all (adapt-pruner)": {"metric": "first", "matrices": "all", "average": 0.9},
    "adam": {"metric": "adam", "matrices": "output"},
}


def recipe_of(shape: str, precision: str, prune: Mapping[str, Any]) -> Recipe:
    """A recipe of which only sizes, precision and cuts matter here."""
    sequences, micro, length = SETTINGS[shape]
    data = {
        "model": {"shape": shape, "tokenizer": "."},
        "data": {"domains": [{"folder": "."}], "seq_len": length},
        "tokens": UPDATES * sequences * length,
        "batch_tokens": sequences * length,
        "micro_batch": micro,
        "precision": precision,
        "prune": {"target": {"ratio": 0.3}, **prune},
    }
    return recipes.parse(data, "benchmark")


def training_of(recipe: Recipe, config: Any) -> Training:
    """Fresh weights of a config, always the same sequences, and nothing that rides along."""
    model = fresh(config, init="standard", seed=0, dtype=torch.float32)
    learner = learner_of(recipe, model, Anatomy.of(config), ALONE)
    size = (recipe.sequences, recipe.data.seq_len + 1)
    ids = torch.randint(0, config.vocab_size, size, generator=torch.Generator().manual_seed(0))
    rate = float(recipe.optimizer.lr)
    return Training(
        learner, optimizer_of(recipe, learner, rate), Feed(ids), Schedule("constant", rate, 10**12), recipe.sequences,
        recipe.micro_batch,
    )  # fmt: skip


def pruner_of(recipe: Recipe, training: Training) -> Pruner:
    """What cuts it."""
    cutting = Cutting.of(recipe, training.learner.model.config)
    assert cutting is not None
    pruner = Pruner(cutting, recipe)
    pruner.begin(training)
    return pruner


def seconds(training: Training) -> float:
    """Of one update."""
    start = time.perf_counter()
    train_(training, training.step + 1)
    return time.perf_counter() - start


def paired(one: Callable[[], float], other: Callable[[], float], pairs: int) -> dict[str, Any]:
    """Medians of both, and of the ratio of pairs, other to one; each pair begins with what the last ended with."""
    one(), other()
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(pairs):
        for side in (0, 1) if i % 2 else (1, 0):
            times[side].append((one, other)[side]())
    ratios = sorted(b / a for a, b in zip(*times, strict=True))
    return {
        "without_s": statistics.median(times[0]), "with_s": statistics.median(times[1]),
        "ratio": statistics.median(ratios), "ratios": [ratios[0], ratios[-1]],
    }  # fmt: skip


# -- what is measured -----------------------------------------------------------------------------------------------------


def watching(shape: str, precision: str, metric: str, pairs: int) -> dict[str, Any]:
    """A step that watches and does not cut, over the same step without a pruner."""
    recipe = recipe_of(shape, precision, {"pace": NONE, "saliency": METRICS[metric]})
    training = training_of(recipe, config_of(shape, 0))
    pruner = pruner_of(recipe, training)

    def with_(*hooks: Hook) -> float:
        training.hooks = hooks
        return seconds(training)

    return paired(with_, lambda: with_(pruner), pairs)


class Timed(Hook):
    """A pruner whose decisions are timed: (seconds, whether it cut, whether it sliced) of every update."""

    def __init__(self, pruner: Pruner) -> None:
        self.pruner = pruner
        self.after_backward, self.before_clip = pruner.after_backward, pruner.before_clip  # type: ignore[method-assign]
        self.seen: list[tuple[float, bool, bool]] = []

    def after_step(self, run: Training) -> None:
        """Where it cuts."""
        groups, model, start = self.pruner.groups, run.learner.model, time.perf_counter()
        self.pruner.after_step(run)
        self.seen.append((time.perf_counter() - start, self.pruner.groups > groups, run.learner.model is not model))


def cutting(shape: str, precision: str, updates: int, *, sliced: bool) -> dict[str, Any]:
    """A cut over the update that it comes behind; `sliced`: each is sliced at once."""
    recipe = recipe_of(shape, precision, {"pace": EVERY, "slice_at": 0.0 if sliced else 1.0})
    training = training_of(recipe, config_of(shape, 0))
    timed = Timed(pruner_of(recipe, training))
    seconds(training)
    training.hooks = (timed,)
    whole = [seconds(training) for _ in range(updates)]
    found = [(s, w - s) for (s, cut, was_sliced), w in zip(timed.seen, whole, strict=True) if cut and was_sliced == sliced]
    assert found, "nothing was cut"
    cut_s, step_s = (statistics.median(column) for column in zip(*found, strict=True))
    worst = max(cut / step for cut, step in found)
    return {"cut_s": cut_s, "step_s": step_s, "ratio": cut_s / step_s, "worst": worst, "cuts": len(found)}


def afterwards(shape: str, precision: str, pairs: int) -> dict[str, Any]:
    """Tokens a second behind the last slice, over those of a fresh run of that shape."""
    recipe = recipe_of(shape, precision, {"pace": {"start": 0.0, "end": 1.5 / UPDATES}})
    training = training_of(recipe, config_of(shape, 0))
    pruner = pruner_of(recipe, training)
    training.hooks = (pruner,)
    while not pruner.done:
        seconds(training)
    other = training_of(recipe, pruner.target.config)
    found = paired(lambda: seconds(training), lambda: seconds(other), pairs)
    tokens = recipe.batch_tokens
    return {
        "tokens_per_s": tokens / found["without_s"], "fresh_tokens_per_s": tokens / found["with_s"], "ratio": found["ratio"],
        "params": pruner.target.anatomy.num_params,
    }  # fmt: skip


def _peak(told: Connection, shape: str, precision: str, prune: Mapping[str, Any] | None, updates: int) -> None:
    """In a process of its own: bytes at its peak."""
    offline(online=False)
    warnings.filterwarnings("ignore")
    with heap.kept():
        recipe = recipe_of(shape, precision, prune or {})
        training = training_of(recipe, config_of(shape, 0))
        if prune is not None:
            training.hooks = (pruner_of(recipe, training),)
        train_(training, updates)
    told.send(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def peak(shape: str, precision: str, prune: Mapping[str, Any] | None, updates: int) -> int:
    """Bytes at the peak of a run of some updates; `prune` None: a plain one."""
    mine, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_peak, args=(theirs, shape, precision, prune, updates))
    process.start()
    theirs.close()
    found = int(mine.recv())
    process.join()
    return found


def memory(shape: str, precision: str, updates: int) -> dict[str, Any]:
    """Peaks of a plain run, of one that watches, and of one that cuts and slices at every update, libraries included."""
    watched = {"pace": NONE, "saliency": METRICS["second, output (efficientllm)"]}
    found = {
        "plain": peak(shape, precision, None, updates),
        "watching": peak(shape, precision, watched, updates),
        "slicing": peak(shape, precision, watched | {"pace": EVERY, "slice_at": 0.0}, updates),
    }
    return {f"{name}_bytes": size for name, size in found.items()} | {
        name: found[name] / found["plain"] for name in ("watching", "slicing")
    }


# -- the run --------------------------------------------------------------------------------------------------------------


@contextmanager
def _quiet() -> Iterator[None]:
    offline(online=False)
    warnings.filterwarnings("ignore")
    with heap.kept():
        yield


def _say(name: str, value: float, target: float, detail: str, *, least: bool = False) -> None:
    met = value >= target if least else value <= target
    bound = "at least" if least else "at most"
    print(f"{name:<46} {value:6.3f}   {bound} {target:<5g} {'met' if met else 'MISSED':<7} {detail}", flush=True)


def measured(shape: str, precision: str, pairs: int) -> dict[str, Any]:
    """All figures, printed as they are known."""
    figures: dict[str, Any] = {"memory": memory(shape, precision, 3)}
    for name in ("watching", "slicing"):
        found = figures["memory"]
        sizes = f"{found[f'{name}_bytes'] / 1e9:.2f} GB, plain {found['plain_bytes'] / 1e9:.2f} GB"
        _say(f"peak memory, {name}", found[name], TARGETS["memory"], sizes)
    figures["step"] = {}
    for metric in METRICS:
        found = figures["step"][metric] = watching(shape, precision, metric, pairs)
        spread = f"{found['with_s']:.3f} s, plain {found['without_s']:.3f} s; pairs {found['ratios'][0]:.3f} to "
        _say(f"step, {metric}", found["ratio"], TARGETS["step"], f"{spread}{found['ratios'][1]:.3f}")
    for name, sliced in (("cut", False), ("cut_sliced", True)):
        found = figures[name] = cutting(shape, precision, pairs, sliced=sliced)
        detail = (
            f"{found['cut_s']:.3f} s of {found['step_s']:.3f} s a step; the worst of {found['cuts']} {found['worst']:.2f}"
        )
        _say(f"a cut{' and its slice' if sliced else ''}, in steps", found["ratio"], TARGETS["cut"], detail)
    found = figures["speed"] = afterwards(shape, precision, pairs)
    detail = f"{found['tokens_per_s']:,.0f} tokens/s, fresh {found['fresh_tokens_per_s']:,.0f}"
    _say("speed behind the last slice, of a fresh run's", found["ratio"], TARGETS["speed"], detail, least=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="smollm2-135m", choices=list(SETTINGS))
    parser.add_argument("--precision", default="float32", choices=["float32", AUTOCAST])
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--record", type=Path)
    arguments = parser.parse_args()
    with _quiet():
        figures = measured(arguments.shape, arguments.precision, arguments.pairs)
    if arguments.record:
        about = {
            "command": "benchmarks/prune_while_training.py", "shape": arguments.shape, "precision": arguments.precision,
            "batch": SETTINGS[arguments.shape], "pairs": arguments.pairs, "targets": TARGETS,
        }  # fmt: skip
        record.append(arguments.record, "prune-speed", json.loads(json.dumps(about)), figures)


if __name__ == "__main__":
    main()
