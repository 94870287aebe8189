"""The model as it was before a cut teaches what is left of it."""

from __future__ import annotations

import copy
import functools
import json

import pipeline
import pytest
import torch
from shrinking import SEQ, UPDATE, events, log, pruning, run, training_config
from training import Killed, KilledAt, asked, weights

from prunus.anatomy import Anatomy
from prunus.errors import UserError
from prunus.hf import Target
from prunus.keep import Keep
from prunus.train import estimate
from prunus.train import recipe as recipes
from prunus.train.learner import Learner
from prunus.train.loop import Hook
from prunus.train.opening import cutting_of
from prunus.train.shapes import fresh
from prunus.train.shrink.forecast import Forecast
from prunus.train.shrink.snapshot import Snapshot

ROUNDS = {"start": 0.2, "end": 0.7, "rounds": 3}
PARTS = {
    "rounds": {"pace": ROUNDS, "slice_at": 0.0},
    "at every update": {"slice_at": 0.1, "alike": False, "axes": ["kv_heads", "intermediate"], "target": {"ratio": 0.4}},
    "once": {"pace": {"kind": "once", "samples": 8}},
}


def taught(teacher=None, **part):
    return pruning({"teacher": {"snapshot": True, "mix": 0.5, **(teacher or {})}}, **part)


class Watch(Hook):
    """Forward FLOPs of a sequence of whoever teaches, and of the model, at every update."""

    def __init__(self):
        self.teachers, self.models = [], []

    def before_clip(self, training):
        flops = lambda learner: Anatomy.of(learner.model.config).flops(SEQ)  # noqa: E731
        self.teachers.append(flops(training.teacher.learner) if training.teacher else 0)
        self.models.append(flops(training.learner))


@functools.cache
def done(name):
    out, watch = pipeline.scratch() / f"snapshot-{name.replace(' ', '-')}", Watch()
    return out, run(out, taught(**PARTS[name]), watch), watch


@pytest.mark.parametrize("mix", [0.25, 1.0])
def test_a_snapshot_of_the_model_itself_leaves_its_share_of_the_cross_entropy(mix):
    """KL(p || p) = 0, and so is its gradient: loss and gradients are 1 - mix times those of cross-entropy."""
    model = fresh(training_config(), init="standard", seed=3, dtype=torch.float32)
    recipe = taught({"mix": mix, "temperature": 2.0}, pace=ROUNDS)
    training = type("Run", (), {"learner": Learner(copy.deepcopy(model)), "teacher": None, "step": 3, "usual": 1.0})
    Snapshot(recipe).take_(training, Target(model.config, Anatomy.of(model.config)), Keep())
    assert not any(p.requires_grad for p in training.teacher.learner.model.parameters())
    ids = torch.randint(0, model.config.vocab_size, (3, SEQ + 1), generator=torch.Generator().manual_seed(0))
    losses, gradients = [], []
    for teacher in (None, training.teacher):
        loss = training.learner(ids[:, :-1], ids[:, 1:], teacher=teacher)
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append({n: p.grad.clone() for n, p in training.learner.trained.items()})
        training.learner.zero_grad()
    assert losses[1] == pytest.approx((1 - mix) * losses[0], abs=1e-4)
    for name, whole in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], (1 - mix) * whole, rtol=1e-4, atol=1e-4)
    with torch.no_grad():  # a copy: what the model becomes is none of its business
        next(training.learner.parameters()).zero_()
    assert bool(next(training.teacher.learner.model.parameters()).any())


def test_one_is_taken_before_the_first_cut_and_after_every_slice():
    """Rounds after updates 4, 5 and 6, each sliced: until then no teacher, then the model as it was before the last round."""
    out, _, watch = done("rounds")
    at = [event["pruned"]["step"] for event in events(out)]
    first = watch.models[0]
    assert len(at) == 3 and watch.teachers[: at[0]] == [0] * at[0]
    for step, before in zip(range(at[0], len(watch.models)), watch.teachers[at[0] :], strict=True):
        last = max(cut for cut in at if cut <= step)
        assert before == watch.models[last - 1]
    assert first > watch.models[-1]
    out, _, lazy = done("at every update")
    sizes = sorted(set(lazy.teachers) - {0}, reverse=True)
    assert sizes[0] == lazy.models[0] and lazy.teachers == sorted(lazy.teachers, key=lambda n: (n > 0, -n))
    assert 1 < len(sizes) < len(events(out))
    assert done("once")[2].teachers == [first] * 8


@pytest.mark.parametrize("name", PARTS)
def test_its_flops_are_on_the_ledger(name):
    out, record, watch = done(name)
    flops = sum(watch.teachers) * UPDATE // SEQ
    assert record["figures"]["flops"]["teacher"] == flops > 0
    ledger = json.loads((out / "ledger.json").read_text())
    assert f'"teacher": {flops}' in json.dumps(ledger)


def test_plans_count_it():
    """Exactly, where the axes that give way are known."""
    recipe = taught(axes=["intermediate"], target={"intermediate_size": 12}, pace=ROUNDS, slice_at=0.0)
    watch = Watch()
    record = run(pipeline.scratch() / "snapshot-planned", recipe, watch)
    found = Forecast(cutting_of(recipe, training_config()), recipe)
    assert found.flops == pytest.approx(sum(record["figures"]["flops"].values()), rel=0.02)
    plain = recipe.model_copy(update={"teacher": None})
    assert estimate.planned(recipe, rate=1e9)["flops"] > estimate.planned(plain, rate=1e9)["flops"]
    anatomy = Anatomy.of(training_config())
    more = estimate.estimate(recipe, anatomy, rate=1e9).weights - estimate.estimate(plain, anatomy, rate=1e9).weights
    assert more == 4 * anatomy.num_params


@pytest.mark.parametrize("name", PARTS)
def test_stopped_anywhere_it_goes_on_bit_for_bit(name, tmp_path):
    whole, record, _ = done(name)
    for at in (3, 7):
        out = tmp_path / str(at)

        recipe = taught(**PARTS[name])
        with pytest.raises(Killed):
            run(out, recipe, KilledAt(at))
        again = run(out, recipe)
        one, other = weights(whole), weights(out)
        assert one.keys() == other.keys() and all(one[n].equal(other[n]) for n in one)
        assert [line.get("loss") for line in log(whole)] == [line.get("loss") for line in log(out)]
        assert (whole / "ledger.json").read_bytes() == (out / "ledger.json").read_bytes()
        assert record["figures"]["flops"] == again["figures"]["flops"]


def test_what_cannot_teach_is_refused():
    with pytest.raises(UserError, match=r"give source, the parent that teaches, cache, .* or else snapshot alone"):
        taught({"source": "parent"})
    with pytest.raises(UserError, match="give source, the parent that teaches"):
        asked(teacher={"snapshot": False})
    with pytest.raises(UserError, match=r"teacher\.snapshot is the model before a cut; give prune, without masks"):
        asked(teacher={"snapshot": True})
    sizes = {"target": {"intermediate_size": 12}, "axes": ["intermediate"]}
    with pytest.raises(UserError, match=r"teacher\.snapshot is the model before a cut"):
        asked(teacher={"snapshot": True}, prune={**sizes, "masks": {}})


def test_a_teacher_that_is_not_named_is_the_model_that_is_cut():
    """Of a recipe that prunes a checkpoint; elsewhere somebody must be named."""
    recipe = recipes.read("prunus", (), {"model.source": "somewhere"})
    assert recipe.teacher.source == recipe.model.source == "somewhere"
    assert recipes.read("prunus", (), {"teacher.source": "other"}).teacher.source == "other"
    assert recipes.read("prunus", (), {"teacher": {"snapshot": True}}).teacher.source is None
    with pytest.raises(UserError, match="teacher: give source, the parent that teaches"):
        recipes.read("continue", (), {"teacher": {"mix": 0.5}})
    with pytest.raises(UserError, match="teacher: give source, the parent that teaches"):
        recipes.read("idea-prune", (), {"teacher": {"mix": 0.5}})  # its model has no weights yet
