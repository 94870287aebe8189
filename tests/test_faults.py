"""Commands that are killed, stopped, starved and deceived: nothing is harmed, nothing half-written is believed, and they go on.

The short form; `tools/faults.py` does hundreds, and records them. tests/test_resume.py kills training at named places.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import faults
import pipeline
import pytest
import training
from faults import COMMANDS, SAVING, SLOW, Calls, Disturbance, disturb, fresh, outcome, reference, refusal, start

from prunus import heap, place, record
from prunus.data.prepare import Text, prepare
from prunus.errors import UserError
from prunus.sealed import sealed, unsealed
from prunus.source import Source
from prunus.study import run as studies
from prunus.train import saved

# -- killed, and asked to stop ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "what",
    [
        Disturbance("prepare", signal.SIGKILL, 0.6, "replace", before=True),
        Disturbance("prepare", signal.SIGTERM, 0.5, "fsync"),
        Disturbance("prune", signal.SIGKILL, 0.99, "rename", before=True),
        Disturbance("prune", signal.SIGINT, 0.6, "write_text"),
        Disturbance("prune in another's place", signal.SIGKILL, 0.5, "unlink"),  # when the old one is half gone
        Disturbance("train", signal.SIGKILL, 0.6, "write_text", before=True),
        Disturbance("train", signal.SIGTERM, 0.7),
        Disturbance("evaluate", signal.SIGKILL, 0.5),
        Disturbance("study", signal.SIGKILL, 0.6),  # its steps end with it
        Disturbance("export to gguf", signal.SIGKILL, 0.0, "write_text", before=True),
        Disturbance("report", signal.SIGKILL, 0.0, "replace", before=True),
    ],
    ids=str,
)
def test_disturbed_it_ends_as_if_nothing_had_been(what):
    assert not disturb(what).faults


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_disturbed_at_twenty_moments(name):
    found = [
        (what, disturb(what).faults) for what in itertools.islice(faults.drawn(name, seed=1), 2 if name in SLOW else 20)
    ]
    assert not [one for one in found if one[1]]


def test_a_step_is_killed_with_its_study():
    """Else the same command would find it at work on what it goes on with."""
    reads, writes = os.pipe()
    if not (parent := os.fork()):
        if not os.fork():
            studies._end_with_parent()
            os.write(writes, b"begun")
            time.sleep(60)
        time.sleep(60)
    os.close(writes)
    with os.fdopen(reads, "rb") as pipe:
        assert pipe.read(5) == b"begun"
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
        since = time.monotonic()
        assert pipe.read() == b"" and time.monotonic() - since < 30  # the last one that held it is gone


# -- what is not what it was -------------------------------------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_json_tells_every_flipped_bit(tmp_path):
    text = sealed({"step": 12, "best": {"loss": 0.1}, "rng": "0a" * 5})
    assert unsealed(text) == {"step": 12, "best": {"loss": 0.1}, "rng": "0a" * 5} == unsealed(json.dumps(unsealed(text)))
    for place_ in range(len(text) - 1):
        for bit in range(7):
            flipped = text[:place_] + chr(ord(text[place_]) ^ (1 << bit)) + text[place_ + 1 :]
            try:
                data = unsealed(flipped)
            except ValueError:
                continue
            assert {name: data[name] for name in ("step", "best", "rng")} == unsealed(text)  # the seal's own name


@pytest.fixture
def run(tmp_path):
    """A training run that was killed, and whose checkpoints are there."""
    out = tmp_path / "run"
    with pytest.raises(training.Killed):
        training.run(out, hooks=(training.KilledAt(7),))
    return out


@pytest.mark.parametrize("damage", ["state", "tensors", "short"])
def test_a_checkpoint_that_was_changed(run, damage):
    folder = saved.folder_of(run / "checkpoints", 6)
    tensors = next(folder.glob("*.safetensors"))
    if damage == "state":
        text = (folder / saved.STATE).read_text()
        (folder / saved.STATE).write_text(text.replace('"skipped": 0', '"skipped": 1'))
    elif damage == "tensors":
        flip(tensors, -9)
    else:
        os.truncate(tensors, tensors.stat().st_size - 4)
    with pytest.raises(UserError, match=r"step-00000006.*delete the folder to go on from (the one|the checkpoint) before"):
        training.run(run)
    shutil.rmtree(folder)
    training.run(run)
    assert training.same(training.weights(run), training.weights(training.finished()))


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def test_tokens_that_were_changed_are_not_trained_on(tmp_path):
    data = copied(training.data(), tmp_path / "tokens")
    recipe = training.asked(data__domains=[{"folder": str(data)}])
    flip(shard := next(data.glob("retrain-*[0-9].bin")), 100)
    with pytest.raises(UserError, match=rf"{shard.name}: was changed since it was written"):
        training.run(tmp_path / "run", recipe)


class Meanwhile(training.Hook):
    """Something happens behind an update."""

    def __init__(self, what):
        self.what = what

    def after_step(self, run):
        if run.step == 5:
            self.what()


@pytest.mark.parametrize("how", ["flipped", "short", "gone"])
def test_tokens_that_change_while_they_are_read(tmp_path, how):
    data = copied(training.data(), tmp_path / "tokens")
    recipe = training.asked(data__domains=[{"folder": str(data)}])
    shard = next(data.glob("retrain-*[0-9].bin"))
    kept = shard.read_bytes()
    change = {"flipped": lambda: flip(shard, 100), "short": lambda: os.truncate(shard, 10), "gone": shard.unlink}[how]
    with pytest.raises(UserError, match=rf"{shard.name}: was changed while it was read"):
        training.run(tmp_path / "run", recipe, hooks=(Meanwhile(change),))
    shard.write_bytes(kept)
    training.run(tmp_path / "run", recipe)
    assert training.same(training.weights(tmp_path / "run"), training.weights(training.finished()))


def test_tokens_that_are_only_touched_are_read_on(tmp_path):
    data = copied(training.data(), tmp_path / "tokens")
    recipe = training.asked(data__domains=[{"folder": str(data)}])
    training.run(tmp_path / "run", recipe, hooks=(Meanwhile(next(data.glob("retrain-*[0-9].bin")).touch),))
    assert training.same(training.weights(tmp_path / "run"), training.weights(training.finished()))


def test_a_run_does_not_go_on_with_other_tokens(tmp_path):
    data = copied(training.data(), tmp_path / "tokens")
    recipe = training.asked(data__domains=[{"folder": str(data)}])
    with pytest.raises(training.Killed):
        training.run(tmp_path / "run", recipe, hooks=(training.KilledAt(7),))
    shutil.rmtree(data)
    text = tmp_path / "more.jsonl"
    text.write_text(pipeline.text_file().read_text() + '{"text": "one more"}\n')
    prepare([Text(str(text))], pipeline.tokenizer(), data, splits={"validation": 0.2, "parent": 0.3, "retrain": None})
    with pytest.raises(UserError, match=r"step-00000006: was trained on what data.domains held then"):
        training.run(tmp_path / "run", recipe)


def test_text_that_changes_while_it_is_prepared(tmp_path):
    text = tmp_path / "a.jsonl"
    text.write_text(pipeline.text_file().read_text())

    def progress(*_):
        with text.open("a") as file:
            file.write('{"text": "more"}\n')

    with pytest.raises(UserError, match=r"a.jsonl: was changed while it was read; leave it alone"):
        prepare([Text(str(text))], pipeline.tokenizer(), tmp_path / "out", progress=progress)
    assert not (tmp_path / "out").exists()


def test_half_a_shard_that_was_changed(tmp_path):
    """What a killed prepare goes on from."""
    faults.imported()
    at = fresh("prepare")
    ended = start("prepare", at, Calls(("fsync", reference("prepare").ended.calls["fsync"] // 2, signal.SIGKILL, False)))
    assert ended.code == -signal.SIGKILL
    half = max(at.glob("out/.*[0-9].bin.partial"), key=lambda path: path.stat().st_size)
    flip(half, 0)
    ended = start("prepare", at)
    assert ended.code == 2 and f"{half.name}: was changed since it was written (SHA-256)" in refusal(ended.said)


def test_weights_that_are_not_those_that_were_written(tmp_path):
    folder = copied(pipeline.saved("per-layer")[0], tmp_path / "cut")
    assert Source.open(str(folder)).sha256
    flip(folder / "model.safetensors", -9)
    with pytest.raises(UserError, match=r"cut: its weights are not those that prunus wrote there"):
        Source.open(str(folder)).sha256  # noqa: B018
    (folder / "prunus.json").unlink()
    opened = Source.open(str(folder))
    os.utime(folder / "model.safetensors")
    with pytest.raises(UserError, match=r"cut: its weights were changed while they were read"):
        opened.sha256  # noqa: B018


# -- two at once ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["train", "study", "compare"])
def test_two_at_work_on_one_folder(name):
    reference(name)
    at = fresh(name)
    folder = at / {"train": "run", "study": "study", "compare": "out"}[name]
    with place.locked(folder, mark=name != "compare"):
        ended = start(name, at)
    assert ended.code == 2 and "another process is at work there; wait for it" in refusal(ended.said)
    assert not folder.exists()  # nothing came in
    again = start(name, at)
    assert again.code == 0 and outcome(at) == reference(name).outcome


# -- the clock, and memory ----------------------------------------------------------------------------------------------------


def jumping() -> None:
    """The time of day goes back and forth by years; what only ever runs forward does so."""
    times = itertools.cycle([0.0, 4e9, 1e9])
    time.time = lambda: next(times)
    time.time_ns = lambda: int(next(times)) * 10**9


@pytest.mark.parametrize("name", ["prepare", "train"])
def test_the_clock_jumps(name):
    whole, at = reference(name), fresh(name)
    ended = start(name, at, first=jumping)
    assert ended.code == 0 and outcome(at) == whole.outcome, ended.said[-3000:]
    if name == "train":
        figures = record.read(at / "run" / "record.jsonl")[-1]["figures"]
        assert 0 < figures["seconds"] < 600


@pytest.mark.parametrize(("name", "mend"), [("train", "lower micro_batch"), ("prune", "lower --windows")])
def test_memory_runs_out(name, mend):
    """Wherever it does: nothing half-written, and what to lower."""
    whole, at = reference(name), fresh(name)

    def first() -> None:
        import torch

        def full(*_, **__):
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:115] DefaultCPUAllocator: can't allocate memory: you tried to"
            )

        torch.nn.functional.scaled_dot_product_attention = full

    ended = start(name, at, first=first)
    assert ended.code == 1 and f"out of memory: {mend}" in refusal(ended.said)
    assert not faults.half(at, whole.outcome, {})
    again = start(name, at)
    assert again.code == 0 and outcome(at) == whole.outcome


def test_weights_that_cannot_fit_are_not_read(monkeypatch):
    monkeypatch.setattr(heap, "free_bytes", lambda: 1000)
    with pytest.raises(UserError, match=r"its weights take .* GB in float32, but 0.00 GB of memory are free; use --dtype"):
        Source.open(str(pipeline.folder())).load()
    monkeypatch.setattr(heap, "free_bytes", lambda: None)
    Source.open(str(pipeline.folder())).load()


def test_what_a_run_lacks_is_said_before_it_begins(monkeypatch):
    from prunus.train.estimate import too_large
    from prunus.train.opening import opened

    run = opened(training.asked(), Path("nowhere"))
    assert too_large(run) is None
    monkeypatch.setattr(heap, "free_bytes", lambda: 1000)
    assert "it needs 0.0 GB of 0.0 GB a device; lower" in too_large(run)


def test_free_memory_is_known():
    free = heap.free_bytes()
    assert free is not None and 0 < free
    code = (
        "import resource; from prunus import heap; resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31)); "
        "print(heap.free_bytes() < 2**31)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr


def test_the_harness_sees_what_it_should():
    """Otherwise these tests would show less than they say."""
    whole = reference("prune")
    assert all(whole.ended.calls[kind] for kind in ("replace", "rename", "unlink", "mkdir", "write_text"))
    assert set(whole.ended.calls) <= set(SAVING)
    at = fresh("prune")
    shutil.copytree(whole.folder / "out", at / "out")
    assert not faults.half(at, whole.outcome, {})
    flip(at / "out" / "model.safetensors", -9)
    assert len(faults.half(at, whole.outcome, {})) == 1 and outcome(at) != whole.outcome
