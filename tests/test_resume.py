"""Runs that are killed by SIGKILL anywhere, also inside a save, and gone on with: they end as the run that never was.

A run is a fork of this process; it kills itself at the k-th call of something that it cannot do without, or halfway through.
"""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pipeline
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import checkpoint as dcp
from training import SEQ, asked, data, other_data, run, tiny_shape

from prunus import record
from prunus.train import export, log, saved
from prunus.train import loop as loops
from prunus.train import run as runs

STEPS = 10


def rich(**more):
    """Moving shares of two domains, losses that count as spikes, the best and the last two checkpoints."""
    domains = [{"folder": str(data())}, {"folder": str(other_data())}]
    base = {
        "tokens": STEPS * 4 * SEQ, "optimizer__lr": 5e-4, "skip_spikes": 1.0001, "validate": {"every": 3, "sequences": 8},
        "data": {"domains": domains, "seq_len": SEQ, "mixing": {"references": {"tokens": 100.0, "backwards": 1.0}}},
        "save": {"every": 2, "keep": 2},
    }  # fmt: skip
    return asked(**{**base, **more})


def dropped():
    """Dropout draws from the generator at every step."""
    return rich(model__shape=tiny_shape() | {"attention_dropout": 0.1}, checkpoint_activations=True)


def sparse():
    folder, _, _ = pipeline.saved("sparse")
    return rich(model={"source": str(folder), "mask": str(folder)})


def pruned():
    """Cut at every other step, a model left on the way, scores that run on."""
    part = {"target": {"ratio": 0.4}, "pace": {"start": 0.1, "end": 0.9}, "slice_at": 0.1, "stops": [0.8]}
    return rich(prune=part)


RECIPES: dict[str, Callable] = {
    "float32": rich,
    "bfloat16": functools.partial(rich, precision="bfloat16", data__separate_documents=True),
    "autocast": functools.partial(rich, precision="bfloat16-autocast", save__every=3, save__keep=1),
    "dropout": dropped,
    "sparse": sparse,
    "pruned": pruned,
}


@pytest.fixture(autouse=True)
def a_part_a_line(monkeypatch):
    """So that logs have parts; with larger ones, where they end would hang on how many digits a speed has."""
    monkeypatch.setattr(log, "PART_BYTES", 1)


# -- where a run dies -----------------------------------------------------------------------------------------------------


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def half_a_tree(folder, *_, **__):
    for path in sorted(Path(folder).glob("*"))[::2]:
        path.unlink()
    die()


def half_a_text(path, text, *_, **__):
    path.write_bytes(text.encode()[: len(text) // 2])
    die()


def half_a_line(out, line):
    with (out / "log.jsonl").open("a") as file:
        file.write(json.dumps(line)[:20])
    die()


def after(real):
    def call(*arguments, **keywords):
        real(*arguments, **keywords)
        die()

    return call


WRITER = dcp.HuggingFaceStorageWriter
PLACES: dict[str, tuple[object, str, Callable[[Callable], Callable]]] = {
    "after gradients": (loops, "accumulate_", after),
    "before an update": (loops, "set_lr_", lambda real: die),
    "after a line": (log, "append", after),
    "in a line": (log, "append", lambda real: half_a_line),
    "in validation": (runs, "validate", after),
    "before a checkpoint's tensors": (dcp, "save", lambda real: die),
    "in a checkpoint's tensors": (WRITER, "finish", lambda real: die),
    "after a checkpoint's tensors": (dcp, "save", after),
    "in a text": (Path, "write_text", lambda real: half_a_text),
    "at fsync": (os, "fsync", lambda real: die),
    "before a rename": (Path, "rename", lambda real: die),
    "after a rename": (Path, "rename", after),
    "before a file takes its place": (Path, "replace", lambda real: die),
    "after a file took its place": (Path, "replace", after),
    "in a removal": (shutil, "rmtree", lambda real: half_a_tree),
    "in the record": (record, "append", after),
    "at the model": (runs, "export", after),
}
AT_ANY_TIME = "at any time"


@contextmanager
def calls(counted: Counter, place: str | None = None, at: int = 0) -> Iterator[None]:
    """Counts the calls of every place's function; at the `at`th of `place`, the process dies."""
    with mock.patch.object(export, "check_saved", return_value={}):  # a clean process costs seconds
        patches = []
        for name, (owner, attribute, death) in PLACES.items():
            real = getattr(owner, attribute)

            def call(*arguments, name=name, real=real, death=death, **keywords):
                counted[name] += 1
                return (death(real) if (name, counted[name]) == (place, at) else real)(*arguments, **keywords)

            patches.append(mock.patch.object(owner, attribute, call))
            patches[-1].start()
        try:
            yield
        finally:
            for patch in reversed(patches):
                patch.stop()


def forked(recipe, out: Path, place: str | None = None, at: int = 0, wait: float | None = None) -> bool:
    """Whether a process that works on the run was killed; with `wait`, after so many seconds."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            signal.alarm(100)
            with calls(Counter(), place, at):
                run(out, recipe)
            code = 0
        except BaseException:  # of a forked child, where nothing may reach pytest's own frames: told, and exit code 1
            traceback.print_exc()
        finally:
            os._exit(code)
    if wait is not None:
        time.sleep(wait)
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL), f"the run ended with {code} by itself"
    return code != 0


# -- how it ends ----------------------------------------------------------------------------------------------------------


@functools.cache
def straight(name: str) -> tuple[Path, Counter, float]:
    """(folder, calls of every place's function, seconds) of the run that was never stopped."""
    out, counted, since = pipeline.scratch() / f"straight-{name}", Counter(), time.monotonic()
    with calls(counted):
        run(out, RECIPES[name]())
    return out, counted, time.monotonic() - since


def without(plain, *names):
    return {name: value for name, value in plain.items() if name not in names}


def end(out: Path) -> dict[str, object]:
    """All that is left of a run, but for times."""
    last = saved.folder_of(out / "checkpoints", STEPS)
    tensors = {name: t for file in sorted(last.glob("*.safetensors")) for name, t in load_file(file).items()}
    state = saved.read_state(last)
    told = [json.loads(line) for line in log.lines(out)]
    figures = record.read(out / "record.jsonl")[-1]["figures"]
    return {
        "tensors": {name: (t.dtype, t.shape, t.view(torch.uint8).numpy().tobytes()) for name, t in tensors.items()},
        "state": without(state, "seconds", "files"),  # headers of the files have their fields in no fixed order
        "log": [without(line, "tokens_per_s", "share_of_peak", "seconds_left") for line in told],
        "ledger": (out / "ledger.json").read_bytes(),
        "figures": without(figures, "seconds", "share_of_peak"),
        "model": {path.name: path.read_bytes() for path in (out / "model").iterdir()},
        "files": sorted(str(path.relative_to(out)) for path in out.rglob("*")),
    }


def killed_it_ends_the_same(out: Path, name: str, deaths: list[tuple[str, float]]) -> int:
    """How often it died: at each place in turn, and, of its calls in a whole run, at the given share of them."""
    recipe, (whole, counted, seconds) = RECIPES[name](), straight(name)
    died = 0
    for place, share in deaths:
        if place == AT_ANY_TIME:
            died += forked(recipe, out, wait=share * seconds)
        else:
            died += forked(recipe, out, place, 1 + int(share * counted[place]))
    assert not forked(recipe, out)
    mine, theirs = end(out), end(whole)
    for part in theirs:
        assert mine[part] == theirs[part], part
    return died


@pytest.mark.parametrize(
    ("name", "deaths"),
    [
        (
            "float32",
            [("in a text", 0.0), ("after a line", 0.7)],
        ),  # the recipe; then a step whose checkpoint is not there yet
        ("bfloat16", [("in a checkpoint's tensors", 0.3), ("in a removal", 0.5)]),
        ("autocast", [("before a rename", 0.6), ("in the record", 0.0)]),
        ("pruned", [("at the model", 0.0), ("after gradients", 0.2)]),  # the one on the way; then between cuts
    ],
)
def test_killed_anywhere_it_ends_the_same(tmp_path, name, deaths):
    assert killed_it_ends_the_same(tmp_path / "run", name, deaths) == len(deaths)


def points() -> list[tuple[str, list[tuple[str, float]]]]:
    """Every place once and three moments, by chance in a run; half of the runs are killed a second time, anywhere."""
    drawn = random.Random(0)
    places = [*PLACES, *[AT_ANY_TIME] * 3]
    names = [list(RECIPES)[i % len(RECIPES)] for i in range(len(places))]
    drawn.shuffle(names)
    out = []
    for number, (name, place) in enumerate(zip(names, places, strict=True)):
        again = [(drawn.choice(places), drawn.random() / 2)] if number % 2 else []
        out.append((name, [(place, drawn.random()), *again]))
    return out


@pytest.mark.slow
@pytest.mark.parametrize(("name", "deaths"), points())
def test_killed_at_twenty_places_it_ends_the_same(tmp_path, name, deaths):
    assert len(points()) == 20
    died = killed_it_ends_the_same(tmp_path / "run", name, deaths)
    assert died or deaths[0][0] == AT_ANY_TIME


def test_the_state_is_rich():
    """Otherwise these tests would show less than they say."""
    out, counted, _ = straight("float32")
    state = saved.read_state(saved.folder_of(out / "checkpoints", STEPS))
    assert 0 < state["skipped"] < STEPS - 1 and len(state["mixing"]["history"]) > 1
    assert min(counted[place] for place in PLACES) > 0, counted
