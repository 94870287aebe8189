"""Pruning inside training: what goes, when, and that nothing else changes."""

from __future__ import annotations

import functools
import itertools
import json
import math
from unittest import mock

import numpy as np
import pipeline
import pytest
import test_train as training_tests
import tiny
import torch
from test_train import Killed, asked, weights

from prunus import show_train
from prunus.anatomy import Anatomy
from prunus.axes import kind_of
from prunus.distributed import ALONE
from prunus.errors import UserError
from prunus.keep import Keep
from prunus.ledger import Ledger
from prunus.train import estimate, export, searched
from prunus.train import recipe as recipes
from prunus.train.learner import Learner
from prunus.train.loop import Hook, Training, train_
from prunus.train.loss import IGNORED
from prunus.train.opening import cutting_of
from prunus.train.opening import prepare as opened
from prunus.train.optim import adamw, start_slots_
from prunus.train.run import execute
from prunus.train.schedule import Schedule
from prunus.train.shapes import config_of, fresh
from prunus.train.shrink.adaptive import Cosines, shares
from prunus.train.shrink.forecast import Forecast
from prunus.train.shrink.goal import Goal
from prunus.train.shrink.groups import Chooser, Standing
from prunus.train.shrink.pace import Pace
from prunus.train.shrink.part import PacePart, PrunePart, SaliencyPart
from prunus.train.shrink.pruner import Cutting, Pruner
from prunus.train.shrink.saliency import Saliency
from prunus.train_plots import Curve

SEQ = training_tests.SEQ
UPDATE = 4 * SEQ


def pruning(more=None, **part):
    part = {"target": {"ratio": 0.5}, "pace": {"start": 0.1, "end": 0.8}} | part
    return asked(**({"prune": part} | (more or {})))


def run(out, recipe, *hooks):
    """A run whose saved models are not looked at in a clean process, which costs seconds; others do."""
    with mock.patch.object(export, "check_saved", return_value={}):
        return execute(opened(recipe, out), hooks=hooks)


def log(out):
    return [json.loads(text) for text in (out / "log.jsonl").read_text().splitlines()]


def events(out):
    return [line for line in log(out) if "pruned" in line]


# -- the pace: closed forms -----------------------------------------------------------------------------------------------


def test_the_share_follows_the_curve_it_names():
    line = Pace(PacePart(start=0.2, end=0.6), 1000, 10)
    assert [line.share(t) for t in (0, 199, 200, 400, 600, 1000)] == pytest.approx([0, 0, 0, 0.5, 1, 1])
    cubic = Pace(PacePart(start=0, end=1, power=3), 1000, 10)
    assert cubic.share(500) == pytest.approx(1 - 0.5**3)
    rounds = Pace(PacePart(start=0, end=1, rounds=4), 1000, 10)
    assert [rounds.share(t) for t in (249, 250, 499, 500, 999, 1000)] == pytest.approx([0, 0.25, 0.25, 0.5, 0.75, 1])
    one = Pace(PacePart(start=0.3, end=0.3, rounds=1), 1000, 10)
    assert [one.share(t) for t in (299, 300)] == [0, 1]


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_what_goes_is_in_proportion_to_the_learning_rate(power):
    """Under a cosine to zero it is the integral of (1 + cos(pi t)) / 2 from start to end, to 1e-3 with 2,000 updates."""
    rate = Schedule("cosine", 3.0, 20_000, warmup=0, floor=0)
    pace = Pace(PacePart(kind="rate", start=0.1, end=0.9, power=power), 20_000, 10, rate)
    each = [pace.share(t) - pace.share(t - 10) for t in range(10, 20_001, 10)]
    assert sum(each) == pytest.approx(1) and pace.share(18_000) == 1 and pace.share(2000) == 0 and min(each) >= 0
    inside = [(gone, rate(t)) for t, gone in zip(range(10, 20_001, 10), each, strict=True) if 2000 < t <= 18_000]
    assert all(gone * inside[0][1] ** power == pytest.approx(inside[0][0] * r**power) for gone, r in inside)
    if power == 1:
        area = lambda t: (t + math.sin(math.pi * t) / math.pi) / 2  # noqa: E731
        for t in (0.3, 0.5, 0.8):
            assert pace.share(int(20_000 * t)) == pytest.approx((area(t) - area(0.1)) / (area(0.9) - area(0.1)), abs=1e-3)
    rounds = Pace(PacePart(kind="rate", start=0, end=1, rounds=2), 1000, 100, Schedule("constant", 1.0, 1000, warmup=0))
    assert [t for t in range(100, 1001, 100) if rounds.cuts(t - 100, t)] == [500, 1000]
    nothing = Pace(PacePart(kind="rate", start=0.42, end=0.45), 1000, 100)
    assert [nothing.share(t) for t in (400, 500)] == [0, 1]


def test_groups_go_after_whole_updates():
    """Two groups after every three updates, behind a beginning of 0.1 of 1,000 tokens in updates of 30 (so 120)."""
    pace = Pace(PacePart(kind="steps", start=0.1, prune=2, train=3), 1000, 30)
    assert [pace.groups(t) for t in (0, 120, 209, 210, 299, 300)] == [0, 0, 0, 2, 2, 4]
    assert pace.cuts(180, 210) and not pace.cuts(210, 240) and pace.most_groups == 2 * ((1000 - 120) // 90)


def test_updates_until_something_is_due():
    pace = Pace(PacePart(), 1000, 100)
    assert [pace.updates_until(tokens, lambda t: t >= 450) for tokens in (0, 300, 400, 500)] == [5, 2, 1, 1]
    assert pace.updates_until(0, lambda t: False) is None and pace.updates_until(1000, lambda t: True) is None


def test_a_curve_cuts_only_where_it_falls():
    pace = Pace(PacePart(start=0.2, end=0.6, rounds=2), 1000, 100)
    assert [t for t in range(100, 1001, 100) if pace.cuts(t - 100, t)] == [400, 600]


# -- saliency: against the naive formula ----------------------------------------------------------------------------------


class Watch(Hook):
    """Keeps every update's gradients, and micro-batches' own, in float64."""

    def __init__(self):
        self.updates, self.parts, self._last = [], [[]], None

    def _grads(self, run):
        return {n: p.grad.double().clone() for n, p in run.learner.trained.items()}

    def after_backward(self, run):
        now = self._grads(run)
        self.parts[-1].append(now if self._last is None else {n: g - self._last[n] for n, g in now.items()})
        self._last = now

    def before_clip(self, run):
        weights = {n: p.detach().double().clone() for n, p in run.learner.trained.items()}
        self.updates.append((weights, self._grads(run)))
        self.parts.append([])
        self._last = None


def watched(metric, matrices, average, axes, micro=2, updates=3, name="llama"):
    """(a Saliency that saw some updates with clipping on, what a Watch kept, the run)"""
    config = tiny.tiny_config(name)
    model = fresh(config, init="standard", seed=1, dtype=torch.float32).train()
    ids = torch.randint(0, config.vocab_size, (updates, 4, SEQ + 1), generator=torch.Generator().manual_seed(0))

    class Feed:
        def take(self, position, count):
            return type("B", (), {"ids": ids[position // 4]})

    optimizer = adamw(model.named_parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    start_slots_(optimizer, 0)
    learner, watch = Learner(model), Watch()
    anatomy = Anatomy.of(config)
    saliency = Saliency(
        SaliencyPart(metric=metric, matrices=matrices, average=average), anatomy, axes, learner.trained, ALONE
    )

    class See(Hook):
        def after_backward(self, run):
            saliency.see_part()

        def before_clip(self, run):
            saliency.see(run, UPDATE)

    schedule = Schedule("constant", 1e-2, 10**6, warmup=0)
    run = Training(learner, optimizer, Feed(), schedule, batch=4, micro=micro, clip=1e-4, hooks=(watch, See()))
    train_(run, updates)
    return saliency, watch, run


def naive(metric, w, g, fisher):
    if metric == "first":
        return (w * g).abs()
    return (w * g - 0.5 * w * w * fisher).abs() if metric == "second" else 0.5 * w * w * fisher


@pytest.mark.parametrize("metric", ["first", "second", "hessian"])
@pytest.mark.parametrize("matrices", ["output", "output+embedding", "all"])
@pytest.mark.parametrize("axes", [("kv_heads", "intermediate", "hidden"), ("intermediate",), ("kv_heads", "layers")])
@pytest.mark.parametrize("micro", [2, 4])
def test_units_are_worth_what_the_formula_says(metric, matrices, axes, micro):
    """Element by element in float64, from gradients before a clip that leaves a ten-thousandth of them. Float32 sums: 1e-5."""
    average = 0.8
    saliency, watch, run = watched(metric, matrices, average, axes, micro)
    anatomy = saliency.anatomy
    running = {}
    for k, (weight, gradient) in enumerate(watch.updates):
        parts = watch.parts[k] or [gradient]
        for name, tensor in anatomy.tensors.items():
            reads = name.endswith(("o_proj.weight", "down_proj.weight"))
            embeds = matrices == "output+embedding" and name == "model.embed_tokens.weight"
            if embeds or (tensor.is_matrix and (matrices == "all" or reads)):
                fisher = UPDATE * sum(part[name] ** 2 for part in parts)
                now = naive(metric, weight[name], gradient[name], fisher)
                running[name] = now if k == 0 else average * running[name] + (1 - average) * now
    table = saliency.table(run, Standing.of(anatomy).alive)
    for name, values in table.values.items():
        axis = anatomy.axes[name]
        for unit in range(axis.size):
            if name == "layers":
                own = [n for n in running if anatomy.tensors[n].layer == unit]
                counted = [n for n in own if any(kind_of(a.name) in ("kv_heads", "intermediate") and s.param == n
                                                for a in anatomy.axes.values() for s in a.spans)]  # fmt: skip
                expected = sum(float(running[n].sum()) for n in counted)
            else:
                spans = [s for s in axis.spans if s.param in running]
                expected = sum(float(running[s.param].index_select(s.dim, s.rows([unit])[0]).sum()) for s in spans)
            assert values[unit] == pytest.approx(expected, rel=1e-5), (name, unit)


def test_adams_own_moment_needs_no_gathering():
    saliency, watch, run = watched("adam", "output", 0.0, ("intermediate",), updates=4)
    name = "model.layers.1.mlp.down_proj.weight"
    second = torch.zeros_like(watch.updates[0][0][name])
    for _, gradients in watch.updates:
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        second = (
            0.95 * second + 0.05 * (gradients[name] * min(1.0, 1e-4 / (norm + 1e-6))) ** 2
        )  # clipped, as AdamW sees them
    w = run.learner.trained[name].detach().double()
    values = saliency.table(run, Standing.of(saliency.anatomy).alive).values["layers.1.intermediate"]
    assert values == pytest.approx((0.5 * w * w * second).sum(0).numpy(), rel=1e-4) and not saliency.saved()


# -- what goes: the worked example of the notes ---------------------------------------------------------------------------


def worked_example():
    """One layer, stem of two, two heads of one, FFN of three, vocabulary of four, tied: S^o and S^d as in the notes."""
    config = config_of(
        {
            "model_type": "llama", "vocab_size": 4, "hidden_size": 2, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2, "head_dim": 1, "intermediate_size": 3, "tie_word_embeddings": True,
        },
        0,
    )  # fmt: skip
    anatomy = Anatomy.of(config)
    out, down = torch.tensor([[0.4, 0.5], [4.0, 1.0]]), torch.tensor([[0.1, 0.4, 0.1], [3.0, 0.9, 2.0]])
    named = {n: torch.nn.Parameter(torch.zeros(t.shape)) for n, t in anatomy.tensors.items()}
    saliency = Saliency(SaliencyPart(average=0.0), anatomy, ("kv_heads", "intermediate", "hidden"), named, ALONE)
    saliency.held["model.layers.0.self_attn.o_proj.weight"].mean.copy_(out)
    saliency.held["model.layers.0.mlp.down_proj.weight"].mean.copy_(down)
    return anatomy, saliency


def test_units_of_the_worked_example():
    anatomy, saliency = worked_example()
    table = saliency.table(None, Standing.of(anatomy).alive)
    assert table.values["layers.0.kv_heads"] == pytest.approx([4.4, 1.5])
    assert table.values["layers.0.intermediate"] == pytest.approx([3.1, 1.3, 2.1])
    assert table.values["hidden"] == pytest.approx([1.5, 10.9])
    inner = table.values["layers.0.kv_heads"].sum() + table.values["layers.0.intermediate"].sum()
    assert inner == pytest.approx(table.values["hidden"].sum()) == pytest.approx(12.4)  # conservation


@pytest.mark.parametrize(
    ("per", "kind", "units"),
    [("none", "intermediate", {"layers.0.intermediate": (1,)}), ("params", "hidden", {"hidden": (0,)}),
     ("elements", "hidden", {"hidden": (0,)})],
)  # fmt: skip
def test_how_kinds_compare_decides(per, kind, units):
    """Plain sums take the channel (1.3 of 1.3, 1.5, 1.5); by parameters it is 1.5 / 25 against 1.5 / 8 and 1.3 / 6: with the norms'
    gains the stem channel owns 8 + 9 + 3 + 4 + ... = 24 + 1. By elements 1.5 / 5, 1.5 / 2, 1.3 / 2.
    """
    anatomy, saliency = worked_example()
    part = PrunePart(target={"params": 30}, per=per, floor={"kv_heads": 1, "intermediate": 1, "hidden": 1})
    goal = Goal.of(part, anatomy, 4)
    standing = Standing.of(anatomy)
    found = Chooser(part, goal, 4).next(standing, saliency.table(None, standing.alive), 0)
    assert found is not None and (found[0].kind, dict(found[0].units)) == (kind, units)


def test_a_layer_has_the_elements_of_its_counted_matrices():
    """Its o_proj and down_proj; and where a layer before it is dead, the last one is still there."""
    anatomy = Anatomy.of(tiny.tiny_config("llama"))
    named = {n: torch.nn.Parameter(torch.zeros(t.shape)) for n, t in anatomy.tensors.items()}
    saliency, standing = Saliency(SaliencyPart(), anatomy, ("layers", "intermediate"), named, ALONE), Standing.of(anatomy)
    table = saliency.table(None, standing.alive)
    own = sum(anatomy.tensors[n].numel for n in saliency.held if anatomy.tensors[n].layer == 1)
    assert table.elements({"layers": (1,)}, anatomy) == own > 0
    last = anatomy.shape.num_hidden_layers - 1
    standing.drop({"layers": (0,), f"layers.{last}.intermediate": (3, 5)})
    now = standing.with_layers
    assert table.elements({f"layers.{last}.intermediate": (0,)}, now) == anatomy.shape.hidden_size
    assert table.elements({"layers": (last,)}, now) == own - 2 * anatomy.shape.hidden_size


def test_what_goes_with_one_axis_leaves_the_others_sums():
    anatomy, saliency = worked_example()
    standing = Standing.of(anatomy)
    table = saliency.table(None, standing.alive)
    table.drop({"layers.0.intermediate": (1,)})
    assert table.values["hidden"] == pytest.approx([1.1, 10.0]) and table.values["layers.0.intermediate"][1] == np.inf
    table.drop({"hidden": (0,)})
    assert table.values["layers.0.kv_heads"] == pytest.approx([4.0, 1.0])
    assert table.values["layers.0.intermediate"][[0, 2]] == pytest.approx([3.0, 2.0])
    assert float(table.matrices["model.layers.0.mlp.down_proj.weight"].sum()) == pytest.approx(5.0)


def _kinds(anatomy):
    """Axes that may be cut while training."""
    kinds = [k for k in ("kv_heads", "intermediate", "hidden") if k not in anatomy.refused]
    return [k for k in kinds if k != "hidden" or anatomy.exactness("hidden") != "inexact"]


@pytest.mark.parametrize("name", ["llama_mha", "llama_gqa4", "qwen2", "phi3", "gpt_neox"])
@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("depth", [False, True])
def test_sums_kept_up_are_sums_made_anew(name, alike, depth):
    """A hundred groups, one after another: every unit's number is that of the matrices with all that went struck out."""
    config = tiny.tiny_config(name)
    anatomy = Anatomy.of(config)
    kinds = _kinds(anatomy) + (["layers"] if depth else [])
    named = {n: torch.nn.Parameter(torch.zeros(t.shape)) for n, t in anatomy.tensors.items()}
    saliency = Saliency(SaliencyPart(), anatomy, kinds, named, ALONE)
    generator = torch.Generator().manual_seed(3)
    for held in saliency.held.values():
        held.mean.copy_(torch.rand(held.mean.shape, generator=generator, dtype=torch.float64))
    part = PrunePart(
        target={"ratio": 0.6 if len(kinds) > 1 else 0.15}, axes=kinds, alike=alike, floor=dict.fromkeys(kinds, 1)
    )
    goal = Goal.of(part, anatomy, SEQ)
    standing, chooser = Standing.of(anatomy), Chooser(part, goal, SEQ)
    table = saliency.table(None, standing.alive)
    seen = set()
    for _ in range(100):
        found = chooser.next(standing, table, goal.value)
        if found is None:
            break
        seen.add(found[0].kind)
        standing.drop(found[0].units)
        table.drop(found[0].units)
    anew = saliency.table(None, standing.alive)
    assert seen <= set(kinds) and (len(seen) > 1 or len(kinds) == 1)
    for axis, values in table.values.items():
        assert values == pytest.approx(anew.values[axis], rel=1e-4, abs=1e-4), axis


# -- runs -----------------------------------------------------------------------------------------------------------------

PARTS = {
    "alike": {},
    "each by itself": {"alike": False, "axes": ["kv_heads", "intermediate"], "target": {"ratio": 0.4}},
    "depth": {"axes": ["layers", "intermediate"], "target": {"ratio": 0.4}},
    "sizes": {"target": {"hidden_size": 24, "intermediate_size": 12}},
    "ordered": {
        "target": {"hidden_size": 24, "intermediate_size": 12, "num_key_value_heads": 2},
        "order": ["hidden", "kv_heads", "intermediate"],
    },
    "params": {"target": {"params": 30_000}, "saliency": {"metric": "second", "average": 0.0}},
    "flops": {"target": {"flops": 70_000}, "per": "flops"},
    "kv bytes": {"target": {"kv_bytes": 200}, "axes": ["kv_heads"]},
    "steps": {"pace": {"kind": "steps", "start": 0.0, "prune": 6, "train": 1}},
    "once": {"pace": {"kind": "once", "samples": 10}, "saliency": {"metric": "hessian", "matrices": "all"}},
    "adaptive": {
        "allocate": "adaptive",
        "alike": False,
        "axes": ["kv_heads", "intermediate"],
        "target": {"ratio": 0.4},
        "pace": {"start": 0.0, "end": 0.75, "rounds": 3},
    },
    "embedding": {"saliency": {"matrices": "output+embedding"}, "slice_at": 0.1},
    "rate": {"pace": {"kind": "rate", "start": 0.1, "end": 0.9, "rounds": 3}},
    "rounds": {"pace": {"start": 0.1, "end": 0.9, "rounds": 2}, "saliency": {"metric": "adam"}},
}


def tied(**part):
    return pruning({"model__shape": training_tests.tiny_shape() | {"tie_word_embeddings": True}}, **part)


@functools.cache
def done(name):
    out = pipeline.scratch() / f"shrunk-{name.replace(' ', '-')}"
    return run(out, tied(**PARTS[name])), out


@pytest.mark.parametrize("name", PARTS)
def test_the_target_is_met_exactly(name):
    """Within the smallest group, and from above where sizes are asked for; the saved model is what the record says."""
    record, out = done(name)
    told, part = record["figures"]["pruning"], PARTS[name]
    anatomy = Anatomy.of(config_of(str(out / "model"), 0))
    assert told["met"] and told["measured"] <= told["target"] and anatomy.num_params == record["figures"]["params"]
    sizes = part.get("target", {})
    for field, size in sizes.items():
        if field in told["shape"]:
            assert told["shape"][field] == size
    goal = Goal.of(PrunePart(**({"target": {"ratio": 0.5}} | part)), Anatomy.of(training_config()), SEQ)
    assert goal.measure(anatomy) == told["measured"] and goal.value == told["target"]
    if "num_attention_heads" in told["shape"] and part.get("alike", True):
        assert all(not isinstance(v, list) for k, v in told["shape"].items()), told["shape"]  # layers alike


def training_config():
    return config_of(training_tests.tiny_shape() | {"tie_word_embeddings": True}, 0)


@pytest.mark.parametrize("name", PARTS)
def test_every_event_is_told(name):
    _, out = done(name)
    found = events(out)
    assert all(e["step"] == min(e["pruned"]["step"] + 1, 8) for e in found)  # told when its effect is known
    effects = [e["loss_after"] for e in found if e["pruned"]["step"] < 8]  # of a cut at the last update none is known
    assert found and all(math.isfinite(effect) for effect in effects)
    assert found[0]["pruned"]["gone"] >= 1
    assert [e["tokens"] for e in found] == sorted(e["tokens"] for e in found)
    gone: dict[str, set[int]] = {}
    for event in found:
        for axis, units in event["pruned"]["units"].items():
            assert not gone.setdefault(axis, set()) & set(units), "a unit goes once"
            gone[axis] |= set(units)
    source = Anatomy.of(training_config())
    left = {n: tuple(u for u in range(source.axes[n].size) if u not in units) for n, units in gone.items()}
    assert Keep(left).anatomy_after(source).num_params == found[-1]["pruned"]["params"]
    told = [line["params"] for line in log(out) if "lr" in line]
    assert told == sorted(told, reverse=True)


@pytest.mark.parametrize("name", PARTS)
def test_the_next_cut_is_told_beforehand(name, capsys):
    """What every logged update says of the next cut is what then happens; a run that cuts nothing says nothing of it."""
    _, out = done(name)
    updates = [line for line in log(out) if "lr" in line]
    steps = sorted({e["pruned"]["step"] for e in events(out)})
    for line in updates:
        later = [step for step in steps if step > line["step"]]
        assert line["next_cut"] == (later[0] - line["step"] if later else None), line["step"]
        show_train.line(line)
        said = capsys.readouterr().err
        assert "params alive" in said and ("next cut in" in said) == bool(later)
    show_train.line({name: value for name, value in updates[-1].items() if name != "next_cut"})
    said = capsys.readouterr().err
    assert "next cut" not in said and "alive" not in said


def test_an_order_is_an_order():
    _, out = done("ordered")
    kinds = [kind for event in events(out) for kind in event["pruned"]["groups"]]
    assert [kind for kind, _ in itertools.groupby(kinds)] == ["hidden", "kv_heads", "intermediate"]


def test_once_is_before_the_first_update_and_scored_on_the_ledger():
    record, out = done("once")
    (event,) = events(out)
    assert event["pruned"]["tokens"] == 0 and event["loss_before"] is None
    source = Anatomy.of(training_config())
    assert record["figures"]["flops"]["scoring"] == 3 * source.flops(SEQ) * 10
    assert record["figures"]["flops"]["train"] == 3 * Anatomy.of(config_of(str(out / "model"), 0)).flops(SEQ) * 32
    assert Ledger.read(out).flops == sum(record["figures"]["flops"].values())


def test_zeroed_is_sliced_along_the_way():
    """Sliced at every cut, or not before the target is met: the same losses and weights but for rounding (1e-4 after eight).

    Heads and channels alone: a cut stem folds its norms' gains, whose updates AdamW makes in another scale.
    """
    part = {"axes": ["kv_heads", "intermediate"], "target": {"ratio": 0.4}}
    outs = [pipeline.scratch() / f"sliced-at-{at}" for at in (0, 1)]
    for at, out in zip((0.0, 1.0), outs, strict=True):
        run(out, tied(slice_at=at, **part))
    one, other = (weights(out) for out in outs)
    assert [e["pruned"]["units"] for e in events(outs[0])] == [e["pruned"]["units"] for e in events(outs[1])]
    for a, b in zip(log(outs[0]), log(outs[1]), strict=True):
        assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), rel=1e-5)
    assert all((one[name] - other[name]).abs().max() < 1e-4 for name in one)


def test_a_cut_stem_changes_no_loss_at_the_slice():
    """The fold makes the sliced model the zeroed one: without updates (rate 0) losses are the same wherever it is sliced."""
    part = {"axes": ["hidden"], "target": {"hidden_size": 20}}
    outs = [pipeline.scratch() / f"stem-at-{at}" for at in (0, 1)]
    for at, out in zip((0.0, 1.0), outs, strict=True):
        run(out, pruning({"optimizer__lr": 1e-12, "model__shape": training_tests.tiny_shape()}, slice_at=at, **part))
    for a, b in zip(log(outs[0]), log(outs[1]), strict=True):
        assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), rel=1e-5)


@torch.no_grad()
def test_importance_is_what_blocks_turn_the_stream():
    """One minus the mean cosine over tokens of what enters and leaves a block, in training alone and while it looks."""
    model = tiny.grown(tiny.tiny_config("llama"))
    anatomy, ids = Anatomy.of(model.config), torch.arange(24).view(2, 12)
    learner = Learner(model)
    cosines = Cosines(learner, anatomy)
    streams = model.eval()(ids, output_hidden_states=True).hidden_states  # the last one is normed: its block is left out
    cosines.look(True)
    learner.nll(ids + 1, ids)  # validation
    learner(ids + 1, torch.full_like(ids, IGNORED))  # a process without a share of these
    learner(ids, ids)
    cosines.look(False)
    learner(ids + 1, ids)
    found = cosines.importance(ALONE)
    for layer in range(anatomy.shape.num_hidden_layers - 1):
        pairs = zip(streams[layer].flatten(0, 1).double(), streams[layer + 1].flatten(0, 1).double(), strict=True)
        mean = sum(float(a @ b / a.norm() / b.norm()) for a, b in pairs) / 24
        assert float(found[layer]) == pytest.approx(1 - mean, abs=1e-5)
    later = []
    for other in (ids + 1, ids):  # each update by itself, also where every one cuts
        before = cosines.importance(ALONE)
        cosines.look(True)
        assert torch.equal(cosines.importance(ALONE), before)
        learner(other, ids)
        later.append(cosines.importance(ALONE))
    assert not torch.equal(later[0], found) and torch.equal(later[1], found)


def test_a_cut_is_no_spike():
    """What was usual before it is forgotten: else a loss that a cut raised would be skipped for the rest of the run."""
    known = []

    class Watch(Hook):
        def before_clip(self, training):
            known.append(training.usual)

    out = pipeline.scratch() / "no-spike"
    run(out, pruning({"skip_spikes": 3.0}, pace={"start": 0.3, "end": 0.6, "rounds": 2}), Watch())
    cuts = {event["pruned"]["step"] for event in events(out)}
    assert len(cuts) == 2 and {step for step, usual in enumerate(known) if usual is None} == {0} | cuts


def test_adaptive_cuts_at_every_update_and_passes_stops():
    """Importance is that of the last update alone, whether it was sliced or not, stopped or not."""
    part = PARTS["adaptive"] | {"pace": {"start": 0.0, "end": 0.75}, "slice_at": 0.5, "stops": [0.9, 0.8]}
    whole, out = (pipeline.scratch() / f"adaptive-each-{name}" for name in ("whole", "stopped"))

    class Stop(Hook):
        def after_step(self, training):
            if training.step == 3:
                raise Killed

    record = run(whole, tied(**part))
    assert record["figures"]["pruning"]["met"] and sorted(p.name for p in (whole / "stops").iterdir()) == ["0.8", "0.9"]
    with pytest.raises(Killed):
        run(out, tied(**part), Stop())
    run(out, tied(**part))
    one, other = weights(whole), weights(out)
    assert one.keys() == other.keys() and all(one[n].equal(other[n]) for n in one)


def test_layers_that_turn_the_stream_less_give_more():
    anatomy = Anatomy.of(tiny.tiny_config("llama_mha"))
    named = {n: torch.nn.Parameter(torch.zeros(t.shape)) for n, t in anatomy.tensors.items()}
    saliency, standing = Saliency(SaliencyPart(), anatomy, ("kv_heads", "intermediate"), named, ALONE), Standing.of(anatomy)
    for held in saliency.held.values():
        held.mean.copy_(torch.arange(len(held.mean)).flip(0))  # the last units are worth least
    budget = round(0.7 * anatomy.block_params)
    table = saliency.table(None, standing.alive)
    gone = dict.fromkeys(range(3), 0)
    for group in shares(standing, anatomy, table, torch.tensor([0.9, 0.5, 0.1]).double(), budget, 1.0):
        ((name, units),) = group.units.items()
        axis = anatomy.axes[name]
        assert units == tuple(range(axis.size - len(units), axis.size))
        gone[axis.layer] += len(units) * anatomy.unit_params(name)
        standing.drop(group.units)
    assert gone[0] < gone[1] < gone[2] and 0 <= budget - standing.now.block_params < anatomy.unit_params(
        "layers.0.intermediate"
    )


def test_rounds_of_adaptive_shares():
    _, out = done("adaptive")
    rounds = events(out)
    assert [event["pruned"]["step"] for event in rounds] == [2, 4, 6]
    sizes = rounds[-1]["pruned"]["shape"]["intermediate_size"]
    assert isinstance(sizes, list) and len(set(sizes)) > 1


def test_a_group_may_pass_two_stops_and_the_last_update_may_cut():
    out = pipeline.scratch() / "close-stops"
    pace = {"start": 0.5, "end": 1.0, "rounds": 1}
    run(out, tied(target={"params": 25_000}, stops=[0.8, 0.799], axes=["intermediate", "hidden"], pace=pace))
    sizes = [Anatomy.of(config_of(str(out / "stops" / share / "model"), 0)).num_params for share in ("0.8", "0.799")]
    assert sizes[0] >= sizes[1] and max(sizes) <= 0.8 * Anatomy.of(training_config()).num_params
    (event,) = events(out)[-1:]
    assert event["pruned"]["step"] == 8 and event["loss_after"] is None
    curve = Curve.read(out)
    assert [f for *_, f in curve.updates] == [line["flops"] for line in log(out) if "lr" in line]


def test_every_cut_of_an_update_is_told():
    """Two stops passed in one round: three cuts, which share their effect; no group goes untold."""
    out = pipeline.scratch() / "stops-in-a-round"
    record = run(out, tied(target={"params": 20_000}, stops=[0.8, 0.7], pace={"start": 0.1, "end": 0.8, "rounds": 1}))
    told = [e["pruned"] for e in events(out)]
    assert len(told) == 3 and len({e["step"] for e in told}) == 1
    assert sum(sum(e["groups"].values()) for e in told) == told[-1]["gone"] == record["figures"]["pruning"]["groups"]


def test_layers_of_different_sizes_cannot_lose_the_same():
    config = config_of(str(done("each by itself")[1] / "model"), 0)
    with pytest.raises(UserError, match="set it to false"):
        Goal.of(PrunePart(target={"ratio": 0.1}), Anatomy.of(config), SEQ)


def test_an_enlarged_shape_comes_back():
    recipe = asked(
        model__enlarge=2.0,
        prune={"axes": ["intermediate"], "pace": {"start": 0.25, "end": 0.75, "power": 3.0, "rounds": 2},
               "saliency": {"matrices": "all"}},
    )  # fmt: skip
    out = pipeline.scratch() / "enlarged"
    told = run(out, recipe)["figures"]["pruning"]
    assert told["shape"]["intermediate_size"] == tiny.INTERMEDIATE and told["source_params"] > told["measured"]
    plain = run(pipeline.scratch() / "not-enlarged", asked())
    assert plain["figures"]["params"] == told["measured"]
    with pytest.raises(UserError, match=r"prune\.target is missing"):
        asked(prune={})
    with pytest.raises(UserError, match="enlarge widens a shape"):
        asked(model={"source": "x", "enlarge": 2.0})


@pytest.mark.parametrize("name", ["alike", "each by itself", "once", "steps", "params", "adaptive"])
def test_stopped_anywhere_it_goes_on_bit_for_bit(name):
    _, whole = done(name)
    for at in (2, 5):
        out = pipeline.scratch() / f"stopped-{name.replace(' ', '-')}-{at}"
        recipe = tied(**PARTS[name])

        class Stop(Hook):
            def after_step(self, training, at=at):
                if training.step == at:
                    raise Killed

        with pytest.raises(Killed):
            run(out, recipe, Stop())
        run(out, recipe)
        one, other = weights(whole), weights(out)
        assert one.keys() == other.keys() and all(one[n].equal(other[n]) for n in one)
        assert [e["pruned"] for e in events(whole)] == [e["pruned"] for e in events(out)]
        assert (whole / "ledger.json").read_bytes() == (out / "ledger.json").read_bytes()


def test_a_family_of_sizes_from_one_run():
    out = pipeline.scratch() / "family"
    record = execute(opened(tied(target={"params": 20_000}, stops=[0.8, 0.7]), out))  # each loads in a clean process
    source = record["figures"]["pruning"]["source_params"]
    assert sorted(p.name for p in (out / "stops").iterdir()) == ["0.7", "0.8"]
    for share in (0.8, 0.7):
        place = out / "stops" / f"{share:g}"
        anatomy = Anatomy.of(config_of(str(place / "model"), 0))
        assert 0 <= share * source - anatomy.num_params < anatomy.unit_params("hidden")  # the smallest group that is left
        assert 0 < Ledger.read(place).tokens < 8 * UPDATE
    on = asked(model={"source": str(out / "stops" / "0.7" / "model")})
    assert execute(opened(on, pipeline.scratch() / "family-on"))["figures"]["params"] == anatomy.num_params
    assert Ledger.read(pipeline.scratch() / "family-on").parent is not None


@pytest.mark.parametrize("name", tiny.CASES)
def test_every_family_shrinks_to_a_target(name):
    config = tiny.tiny_config(name)
    anatomy = Anatomy.of(config)
    kinds = _kinds(anatomy)
    model = fresh(config, init="standard", seed=1, dtype=torch.float32).train()
    ids = torch.randint(0, config.vocab_size, (6, 4, SEQ + 1), generator=torch.Generator().manual_seed(0))

    class Feed:
        def take(self, position, count):
            return type("B", (), {"ids": ids[position // 4]})

    recipe = pruning({"tokens": 6 * UPDATE}, axes=kinds, target={"ratio": 0.3 if len(kinds) > 1 else 0.15}, slice_at=0.1)
    asked_for = Cutting.of(recipe, config)
    assert asked_for is not None
    pruner, losses = Pruner(asked_for, recipe), []
    optimizer = adamw(model.named_parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    start_slots_(optimizer, 0)
    schedule = Schedule("constant", 1e-3, 10**6, warmup=0)
    training = Training(Learner(model), optimizer, Feed(), schedule, batch=4, micro=4, hooks=(pruner,))
    pruner.begin(training)
    train_(training, 6, lambda t: losses.append(t.last["loss"]))
    after = Anatomy.of(training.learner.model.config)
    assert pruner.done and after.num_params == pruner.target.anatomy.num_params < anatomy.num_params
    assert all(math.isfinite(loss) for loss in losses)
    for name_, p in training.learner.model.named_parameters():
        moments = training.optimizer.state[p]
        assert moments["exp_avg"].shape == p.shape and float(moments["exp_avg_sq"].sum()) > 0, name_


# -- wrong inputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"target": {}}, "give one of params"),
        ({"target": {"params": 10, "ratio": 0.5}}, "not several"),
        ({"target": {"params": 10**9}}, "is not below the"),
        ({"target": {"params": 10}}, "below the least shape's"),
        ({"target": {"hidden_size": 64}}, "above the source's 32"),
        ({"target": {"hidden_size": 16}, "axes": ["intermediate"]}, "which axes leaves out"),
        ({"allocate": "adaptive"}, "set alike to false"),
        ({"allocate": "adaptive", "alike": False}, "take hidden out of axes"),
        (
            {"allocate": "adaptive", "alike": False, "axes": ["intermediate"], "units": {"intermediate": 2}},
            "drop units and floor",
        ),
        ({"target": {"hidden_size": 16, "intermediate_size": 8}, "order": ["hidden"]}, "must name every axis"),
        ({"target": {"hidden_size": 16}, "floor": {"hidden": 8}}, "target says where every axis ends"),
        ({"stops": [0.8, 0.8]}, "that fall"),
        ({"per": "kv_bytes", "axes": ["intermediate"]}, "that costs anything by per: kv_bytes"),
        ({"order": ["hidden"]}, "order needs a target of sizes"),
        ({"axes": ["hidden", "hidden"]}, "names an axis twice"),
        ({"axes": ["heads"]}, "prune.axes.0"),
        ({"stops": [0.5, 0.7]}, "that fall"),
        ({"stops": [0.1]}, "lies below the target"),
        ({"stops": [0.8], "pace": {"kind": "once", "samples": 4}}, "stops are passed on the way"),
        ({"saliency": {"metric": "adam"}, "pace": {"kind": "once", "samples": 4}}, "knows nothing before the first update"),
        ({"pace": {"start": 0.9, "end": 0.5}}, "lies before start"),
        ({"pace": {"kind": "rate", "start": 0.9, "end": 0.5}}, "lies before start"),
        ({"pace": {"kind": "steps", "prune": 1, "train": 4}}, "at best, not to"),
        ({"pace": {"kind": "once", "samples": 1000}}, "are more than the 32"),
        ({"units": {"hidden": 0}}, "counts of at least 1"),
        ({"saliency": {"matrices": "output+embedding"}, "axes": ["intermediate"]}, "counts for hidden alone"),
        ({"saliency": {"matrices": "output+embedding", "metric": "obc"}}, "the embedding reads none"),
        ({"saliency": {"metric": "third"}}, "prune.saliency.metric"),
        ({"sallency": {}}, "did you mean 'saliency'"),
    ],
)
def test_wrong_pruning_is_refused_before_weights(part, said):
    with pytest.raises(UserError, match=said):
        opened(pruning(**part), pipeline.scratch() / "refused")


def test_target_params_means_the_cut_model_where_a_recipe_prunes():
    assert recipes.read("efficientllm", (), {"target_params": 10**8}).prune.target.params == 10**8
    assert recipes.read("scratch", (), {"target_params": 10**7}).model.target_params == 10**7


def test_what_cannot_go_with_pruning_is_refused():
    for more, said in (
        ({"optimizer__lr": "sweep"}, "sweep"),
        ({"lora": {}, "model": {"source": "x"}}, "exclude each other"),
    ):
        with pytest.raises(UserError, match=said):
            pruning(more)


def test_an_axis_that_cannot_be_cut_exactly_is_refused():
    for name, axes in (("gpt_neox", ["kv_heads"]), ("phi", ["hidden"])):
        part = PrunePart(target={"ratio": 0.2}, axes=axes)
        with pytest.raises(UserError, match=f"'{axes[0]}'"):
            Goal.of(part, Anatomy.of(tiny.tiny_config(name)), SEQ)


def test_sums_are_kept_as_small_as_can_be():
    """One number a unit where one axis cuts a matrix; the matrix where two do."""
    for axes, dims in ((("kv_heads", "intermediate"), {1}), (("kv_heads", "intermediate", "hidden"), {2})):
        saliency, _, _ = watched("first", "output", 0.5, axes)
        assert {held.mean.dim() for held in saliency.held.values()} == dims


# -- what cuts will save --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARTS)
def test_what_cuts_save_is_about_what_they_saved(name):
    """Against the FLOPs of the run. What differs is which axis gave way: 15 % at most here, and nothing where sizes are named
    and all goes at once, or where one axis alone goes.
    """
    recipe = tied(**PARTS[name])
    found = Forecast(cutting_of(recipe, training_config()), recipe)
    record, _ = done(name)
    spent = sum(record["figures"]["flops"].values())
    assert found.flops == pytest.approx(spent, rel=0.15)
    assert found.cutting.goal.measure(found.end) <= found.cutting.goal.value


@pytest.mark.parametrize("pace", [{"kind": "once", "samples": 8}, {"start": 0.25, "end": 0.75, "rounds": 2}])
def test_what_a_cut_to_sizes_saves_is_known(pace):
    """One axis, two rounds or one: the very FLOPs of the run, what is dead and not yet sliced included."""
    recipe = tied(axes=["intermediate"], target={"intermediate_size": 12}, pace=pace)
    record = run(pipeline.scratch() / f"forecast-{pace.get('rounds', 0)}", recipe)
    found = Forecast(cutting_of(recipe, training_config()), recipe)
    assert found.flops == sum(record["figures"]["flops"].values())
    assert found.groups == record["figures"]["pruning"]["groups"] == 12
    said = estimate.planned(recipe, rate=1e9)
    assert said["flops"] == pytest.approx(found.flops)
    whole = estimate.planned(
        asked(**{"model__shape": training_tests.tiny_shape() | {"tie_word_embeddings": True}}), rate=1e9
    )
    assert said["pruning"]["saved"] == pytest.approx(1 - found.flops / whole["flops"]) and whole["pruning"] is None
    assert said["hours"] == pytest.approx(found.flops / 1e9 / 3600)


def test_a_plan_says_about_where_it_cuts(capsys):
    show_train.plan(estimate.planned(tied(), rate=1e9))
    said = capsys.readouterr().out
    assert said.count("about ") == 6 and "less work than without" in said and "gave way alike" in said
    show_train.plan(estimate.planned(tied(pace={"kind": "once", "samples": 20}), rate=1e9))
    assert "more, scoring included, work than without" in capsys.readouterr().out
    show_train.plan(estimate.planned(asked(), rate=1e9))
    assert "about" not in capsys.readouterr().out


# -- the searched shape from scratch --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["alike", "each by itself"])
def test_the_searched_shape_is_trained_on_the_same_tokens(name, tmp_path):
    """Fresh weights, all else as in the run that cut: order, batches, rates, seed; no cut, source or teacher."""
    record, found = done(name)
    recipe = searched.recipe_of(found)
    its = recipes.parse(json.loads((found / "recipe.json").read_text()), "its")
    assert recipe.prune is None and recipe.teacher is None and recipe.model.source is None
    own = {"name", "model", "prune", "teacher", "lora"}
    assert {n: v for n, v in recipe.plain().items() if n not in own} == {
        n: v for n, v in its.plain().items() if n not in own
    }
    scratch = run(tmp_path / "scratch", recipe)
    one, other = (opened(r, tmp_path / "looked-at").feeds.training.take(0, 32).ids for r in (recipe, its))
    assert one.equal(other)
    rates = [[line["lr"] for line in log(out) if "lr" in line] for out in (tmp_path / "scratch", found)]
    assert rates[0] == rates[1] and len(rates[0]) == 8
    assert scratch["figures"]["params"] == record["figures"]["params"]
    assert Anatomy.of(config_of(str(tmp_path / "scratch"), 0)).shape == Anatomy.of(config_of(str(found), 0)).shape
    ledger = Ledger.read(tmp_path / "scratch")
    assert ledger.parent is None and ledger.tokens == Ledger.read(found).tokens


def test_where_no_shape_was_searched(tmp_path):
    _, found = done("alike")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "recipe.json").write_text(json.dumps(asked().plain()))
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "recipe.json").write_text((found / "recipe.json").read_text())
    option = "--from-scratch-at-searched-shape"
    for words, said in (
        ((option, tmp_path / "none"), "none: no such file or folder"),
        ((option, tmp_path), "holds no run of prunus; give the folder of one that pruned"),
        ((option, tmp_path / "plain"), "plain cut nothing"),
        ((option, tmp_path / "begun"), "this run is not finished, so it has no model yet"),
        (("scratch", option, found), "give either RECIPE or --from-scratch-at-searched-shape RUN"),
        ((), "give either RECIPE or"),
        ((option, found, "--source", "x"), "give either source"),
    ):
        code, _, err = pipeline.cli("train", *words, "--out", tmp_path / "out")
        assert code == 2 and said in err, err
    with mock.patch.object(export, "check_saved", return_value={"class": "x"}):
        code, out, err = pipeline.cli("train", option, found, "--tokens", "128", "--out", tmp_path / "out", "--json")
    assert code == 0 and json.loads(out)["figures"]["tokens"] == 128, err
