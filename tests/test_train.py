"""Training runs: against a bare loop, stopped anywhere and gone on with bit for bit, their checkpoints refused if damaged."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from unittest import mock

import pipeline
import pytest
import tiny
import torch
from training import (
    SEQ,
    Killed,
    asked,
    data,
    finished,
    flip,
    killed_saying,
    other_data,
    run,
    same,
    weights,
)

from prunus import record
from prunus.errors import UserError
from prunus.ledger import Ledger
from prunus.place import locked
from prunus.train import export, saved
from prunus.train import run as runs
from prunus.train.learner import Learner, boundaries
from prunus.train.loop import Hook, Training, train_
from prunus.train.opening import prepare as opened
from prunus.train.optim import adamw, start_slots_, steps_done
from prunus.train.run import execute
from prunus.train.schedule import Schedule
from prunus.train.shapes import fresh

# -- the loop -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro", [1, 3, 4])
def test_the_loop_is_a_bare_loop(micro):
    """Against autograd on all logits, torch's own clipping and AdamW, in float64: only the order of sums differs."""
    config = tiny.tiny_config("llama")
    ours, theirs = (fresh(config, init="standard", seed=3, dtype=torch.float64) for _ in range(2))
    ids = torch.randint(0, config.vocab_size, (6, 4, SEQ + 1), generator=torch.Generator().manual_seed(0))

    class Feed:
        def take(self, position, count):
            return type("B", (), {"ids": ids[position // 4]})

    schedule = Schedule("cosine", 0.01, 6 * 4 * SEQ)
    optimizer = adamw(ours.named_parameters(), lr=1.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    training = Training(Learner(ours), optimizer, Feed(), schedule, batch=4, micro=micro, clip=0.5)
    losses = []
    train_(training, 6, lambda t: losses.append(t.last["loss"]))
    decay = [p for p in theirs.parameters() if p.dim() >= 2]
    rest = [p for p in theirs.parameters() if p.dim() < 2]
    plain = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], betas=(0.9, 0.95), foreach=False
    )
    for step in range(6):
        logits = theirs(input_ids=ids[step][:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[step][:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        for group in plain.param_groups:
            group["lr"] = schedule((step + 1) * 4 * SEQ)
        plain.step()
        plain.zero_grad()
        assert losses[step] == pytest.approx(float(loss.detach()), rel=1e-6)  # norms compute in float32
    for name, p in theirs.named_parameters():
        assert (p - ours.get_parameter(name)).abs().max() < 1e-5, name


def test_gradients_that_nothing_clips(tmp_path):
    with mock.patch.object(export, "check_saved", return_value={}):
        for name, clip in (("none", None), ("high", 1e9), ("low", 1e-3)):
            execute(opened(asked(optimizer__clip=clip, save__every=0, validate__every=0), tmp_path / name))
    free, high, low = (weights(tmp_path / name) for name in ("none", "high", "low"))
    assert same(free, high) and not same(free, low)


def test_documents_kept_apart_are_documents_alone():
    """Two documents in one sequence, each as if the other were not there."""
    model = tiny.grown(tiny.tiny_config("llama"))
    learner = Learner(model)
    ids = tiny.tokens(1, 12, seed=1)
    starts = torch.zeros(1, 12, dtype=torch.bool)
    starts[0, [0, 5]] = True
    packed = learner.hidden(ids, **boundaries(starts))
    for first, end in ((0, 5), (5, 12)):
        alone = learner.hidden(ids[:, first:end])
        assert (packed[:, first:end] - alone).abs().max() < 1e-6


def test_gradients_are_whole_and_unclipped_at_the_seam():
    norms = []

    class Look(Hook):
        def before_clip(self, training):
            norms.append(torch.stack([p.grad.norm() for p in training.learner.parameters()]).norm())

        def after_step(self, training):
            assert all(p.grad is None for p in training.learner.parameters())

    out = pipeline.scratch() / "seam"
    recipe = asked(optimizer__clip=1e-3, save__every=0, validate__every=0)
    execute(opened(recipe, out), hooks=(Look(),))
    told = [
        line["grad_norm"] for line in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if "grad_norm" in line
    ]
    assert len(norms) == 8 and told == pytest.approx([float(n) for n in norms], rel=1e-5) and min(told) > 1e-2


def test_losses_that_are_no_number_change_nothing():
    model = fresh(tiny.tiny_config("llama"), init="standard", seed=0, dtype=torch.float32)
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[0] = torch.inf
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    feed = type("F", (), {"take": lambda self, position, count: type("B", (), {"ids": tiny.tokens(2, 9)})})()
    optimizer = adamw(model.named_parameters(), lr=1.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    training = Training(Learner(model), optimizer, feed, Schedule("constant", 0.1, 100), batch=2, micro=2)
    with pytest.raises(
        UserError, match=r"the loss of step 1 is no number; the checkpoint before stands: lower optimizer\.lr"
    ):
        train_(training, 3)
    assert all(p.equal(before[name]) for name, p in model.named_parameters()) and training.step == 0


def test_spikes_are_passed_over_and_counted(tmp_path):
    recipe = asked(skip_spikes=1.0000001, optimizer__lr=0.5, save__every=0, validate__every=0, schedule__warmup=0.0)
    figures = run(tmp_path / "run", recipe)["figures"]
    lines = [json.loads(text) for text in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert figures["skipped"] == sum(line["skipped"] for line in lines) > 0


# -- stopped and gone on; test_resume.py kills runs everywhere -----------------------------------------------------------


_CHILD = """
import sys, pathlib, torch
torch.set_num_threads(1)
from prunus.train import opening, recipe, run
import json
asked = recipe.parse(json.loads(pathlib.Path(sys.argv[1]).read_text()), "child")
def say(line):
    print(line["step"], flush=True)
try:
    run.execute(opening.prepare(asked, pathlib.Path(sys.argv[2])), say=say)
except run.StoppedError as stop:
    sys.exit(stop.code)
"""


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (signal.SIGTERM, 143),
        *(pytest.param(*rest, marks=pytest.mark.slow) for rest in ((signal.SIGINT, 130), (signal.SIGKILL, -9))),
    ],
)
def test_a_real_process_is_killed(tmp_path, kind, code):
    """SIGTERM and Ctrl-C save where they stand; after SIGKILL the last checkpoint counts. The end is the same, bit for bit."""
    recipe = asked(tokens=60 * 4 * SEQ, data__epochs=3, save__every=20, validate__every=0)
    straight = pipeline.scratch() / "straight-long"
    if not straight.exists():
        run(straight, recipe)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.plain()))
    command = [sys.executable, "-c", _CHILD, str(tmp_path / "recipe.json"), str(tmp_path / "run")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PRUNUS_CACHE": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment) as child:
        for line in child.stdout:
            if int(line) == 31:
                child.send_signal(kind)
                break
        child.stdout.read()
    assert child.returncode == code
    steps = saved.steps(tmp_path / "run" / "checkpoints")
    assert steps and (steps[-1] % 20 == 0) == (kind == signal.SIGKILL or steps[-1] % 20 == 0)
    run(tmp_path / "run", recipe)
    assert same(weights(tmp_path / "run"), weights(straight))


def test_a_finished_run_is_not_run_again(monkeypatch):
    before = record.read(finished() / "record.jsonl")
    monkeypatch.setattr(runs, "train_", lambda *a: pytest.fail("nothing is left to do"))
    assert run(finished()) == before[-1]


def test_two_processes_on_one_run():
    with locked(finished()), pytest.raises(UserError, match="another process is at work there"):
        run(finished())


def test_shares_follow_the_losses_and_come_back_after_a_kill(tmp_path):
    """The domain whose reference it is far above gets more; stopped between two changes, the run ends the same."""
    recipe = asked(
        data={
            "domains": [{"folder": str(data())}, {"folder": str(other_data())}], "seq_len": SEQ,
            "mixing": {"references": {"tokens": 100.0, "backwards": 1.0}},
        },
        validate={"every": 2, "sequences": 8}, tokens=12 * 4 * SEQ,
    )  # fmt: skip
    run(tmp_path / "straight", recipe)
    lines = [json.loads(text) for text in (tmp_path / "straight" / "log.jsonl").read_text().splitlines()]
    shares = [line["mixing"]["backwards"]["weight"] for line in lines if "mixing" in line]
    assert len(shares) == 6 and shares == sorted(shares) and shares[-1] > 0.9

    with pytest.raises(Killed):
        run(tmp_path / "run", recipe, say=killed_saying(7))
    run(tmp_path / "run", recipe)
    assert same(weights(tmp_path / "run"), weights(tmp_path / "straight"))
    ledger = Ledger.read(tmp_path / "run" / "ledger.json")
    consumed = {name: spans.size for name, spans in ledger.stages[0].consumed.items()}
    assert sum(consumed.values()) == 12 * 4 * SEQ and consumed["backwards"] > 2 * consumed["tokens"]


# -- checkpoints ----------------------------------------------------------------------------------------------------------


def test_the_last_and_the_best_stay():
    steps = saved.steps(finished() / "checkpoints")
    state = saved.read_state(saved.folder_of(finished() / "checkpoints", steps[-1]))
    assert steps[-2:] == [6, 8] and set(steps) == {6, 8, int(state["best"]["step"])} and state["tokens"] == 8 * 4 * SEQ


def test_moments_come_back(tmp_path):
    model = fresh(tiny.tiny_config("llama"), init="standard", seed=0, dtype=torch.float32)
    optimizer = adamw(model.named_parameters(), lr=1.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    start_slots_(optimizer, 17)
    assert steps_done(optimizer) == 17


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: next(folder.glob("*.safetensors")).unlink(),
            "is missing; delete the folder to go on from the checkp",
        ),
        (
            lambda folder: flip(next(folder.glob("*.safetensors"))),
            "changed since it was written; delete the folder to go on",
        ),
        (lambda folder: (folder / "state.json").write_text("{"), "not readable as JSON"),
    ],
)
def test_damaged_checkpoints_are_refused(tmp_path, damage, message):
    with pytest.raises(Killed):
        run(tmp_path / "run", asked(), say=killed_saying(5))
    folder = saved.folder_of(tmp_path / "run" / "checkpoints", 4)
    damage(folder)
    with pytest.raises(UserError, match=message):
        run(tmp_path / "run", asked())
