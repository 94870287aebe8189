"""Milliseconds as the price of units while a model trains."""

from __future__ import annotations

import json

import numpy as np
import pipeline
import pytest
import tiny
from shrinking import events, pruning, run, tied, training_config
from training import SEQ, Killed, KilledAt, weights

from prunus import latency, show_train
from prunus.anatomy import Anatomy
from prunus.distributed import ALONE
from prunus.errors import UserError
from prunus.keep import Keep
from prunus.latency import Timing
from prunus.source import Source
from prunus.train.estimate import UNCLOCKED, planned
from prunus.train.opening import prepare
from prunus.train.run import execute
from prunus.train.shrink.clocked import TABLE, check_clock, clocks_of, table_of
from prunus.train.shrink.goal import Goal, measure_of, shrunk
from prunus.train.shrink.groups import Chooser, Standing
from prunus.train.shrink.part import PrunePart
from prunus.train.shrink.saliency import Table


def clock(config, anatomy, layer, dtype, prompt_tokens):
    """Attention takes far longer than its parameters say, so that heads are what costs."""
    own, hidden = anatomy.shape.layers[layer], anatomy.shape.hidden_size
    ms = 1.0 + 0.5 * hidden * own.num_key_value_heads + 0.001 * hidden * own.intermediate_size
    return Timing(10 * ms, ms), Timing(20.0 * hidden, 2.0 * hidden)


def by_hand(anatomy):
    """Milliseconds of a token more."""
    layers = range(anatomy.shape.num_hidden_layers)
    return sum(clock(None, anatomy, i, "", 0)[0].decode_ms for i in layers) + 2.0 * anatomy.shape.hidden_size


def clocks(part, config, out):
    anatomy = Anatomy.of(config)
    return clocks_of(part, anatomy, table_of(part, config, anatomy, "float32", out))


@pytest.fixture
def fake(monkeypatch, tmp_path):
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(latency, "measured", clock)


def test_between_what_was_measured_are_straight_lines(fake, tmp_path):
    """A product of sizes is straight along each: exact at every size, in layers that differ, too."""
    config = tiny.tiny_config("llama_mha")
    anatomy = Anatomy.of(config)
    part = PrunePart(target={"ratio": 0.5}, per="decode_ms", floor={"intermediate": 5})
    price = clocks(part, config, tmp_path)["decode_ms"]
    assert price.layer.shape == (3, 3, 3)
    assert not clocks(PrunePart(target={"ratio": 0.5}), config, tmp_path)
    for sizes in ({}, {"hidden": 9}, {"kv_heads": 3, "intermediate": 6}, {"hidden": 31, "intermediate": 23, "kv_heads": 7}):
        there = shrunk(anatomy, sizes)
        assert price(there) == pytest.approx(1e6 * by_hand(there), rel=1e-9)


def test_a_noisy_clock_makes_nothing_free(monkeypatch, tmp_path):
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(latency, "measured", lambda *_: (Timing(1.0, 1.0), Timing(1.0, 1.0)))
    config = tiny.tiny_config("llama_mha")
    anatomy = Anatomy.of(config)
    part = PrunePart(target={"ratio": 0.5}, per="prefill_ms")
    price = clocks(part, config, tmp_path)["prefill_ms"]
    for kind in ("hidden", "kv_heads", "intermediate"):
        assert price(shrunk(anatomy, {kind: 7})) < price(shrunk(anatomy, {kind: 8}))


def test_a_run_goes_by_the_clock_and_goes_on_by_the_same_one(fake, monkeypatch):
    part = {"axes": ["kv_heads", "intermediate"], "target": {"ratio": 0.3}, "per": "decode_ms"}
    one, two = pipeline.scratch() / "clocked", pipeline.scratch() / "clocked-on"
    assert run(one, tied(**part))["figures"]["pruning"]["met"]
    (table,) = json.loads((one / "latency.json").read_text())["tables"].values()
    assert len(table["entries"]) == 9 + 1  # three by three sizes, and all that is no layer

    with pytest.raises(Killed):
        run(two, tied(**part), KilledAt(3))
    monkeypatch.setattr(latency, "measured", None)  # as if it went on elsewhere
    monkeypatch.setattr(latency, "key", None)
    run(two, tied(**part))
    assert all(weights(one)[n].equal(w) for n, w in weights(two).items())
    by_params = pipeline.scratch() / "not-clocked"
    run(by_params, tied(**part | {"per": "params"}))
    kinds = [[kind for e in events(out) for kind in e["pruned"]["groups"]] for out in (one, by_params)]
    assert kinds[0] != kinds[1] and "kv_heads" in kinds[0]


def test_layers_that_differ_are_refused():
    anatomy = Anatomy.of(tiny.tiny_config("llama_mha"))
    uneven = Keep({"layers.1.intermediate": tuple(range(7))}).anatomy_after(anatomy)
    with pytest.raises(UserError, match="whose layers are alike"):
        check_clock(PrunePart(target={"ratio": 0.5}, alike=False, per="decode_ms"), uneven)
    with pytest.raises(UserError, match=r"prune\.target\.prefill_ms needs a source"):
        check_clock(PrunePart(target={"prefill_ms": 1}, alike=False), uneven)
    with pytest.raises(UserError, match=r"prune\.per"):
        pruning(per="seconds")


# -- as the target ---------------------------------------------------------------------------------------------------------

MS = by_hand(Anatomy.of(training_config()))  # of the model that is trained


def test_milliseconds_are_a_measure_like_any(fake, tmp_path):
    """A clock by a formula: the goal is met by less than a group, whatever the price is."""
    config = training_config()
    anatomy = Anatomy.of(config)
    part = PrunePart(target={"decode_ms": 0.6 * MS}, per="prefill_ms", stops=[0.9, 0.7])
    found = clocks(part, config, tmp_path)
    assert set(found) == {"decode_ms", "prefill_ms"}
    goal = Goal.of(part, anatomy, SEQ, found)
    assert goal.plain(goal.source) == pytest.approx(MS) and goal.plain(goal.value) == pytest.approx(0.6 * MS)
    assert goal.value == round(0.6 * MS * 1e9) and goal.stops == (round(0.9 * goal.source), round(0.7 * goal.source))
    assert measure_of("decode_ms", SEQ, found)(shrunk(anatomy, {"hidden": 9})) == goal.measure(
        shrunk(anatomy, {"hidden": 9})
    )
    standing, chooser = Standing.of(anatomy), Chooser(part, goal, SEQ, found)
    table, last = (
        Table({name: np.arange(1.0, len(own) + 1) for name, own in standing.alive.items()}, anatomy, {}, {}, ALONE),
        [],
    )
    while goal.measure(standing.now) > goal.value:
        group, _ = chooser.next(standing, table, goal.value)
        standing.drop(group.units)
        table.drop(group.units)
        last = [group.units]
    back = Standing.of(anatomy)
    back.drop({name: tuple(np.flatnonzero(~own).tolist()) for name, own in standing.alive.items()})
    for name, units in last[0].items():
        back.alive[name][list(units)] = True
    assert goal.measure(back.now) > goal.value >= goal.measure(standing.now)
    assert by_hand(standing.now) == pytest.approx(goal.plain(goal.measure(standing.now)), rel=1e-9)


def test_no_unit_of_a_small_model_is_free(monkeypatch, fake, tmp_path):
    """A clock that tells no sizes apart: a thousandth a step remains, and a single channel's part of it counts."""
    monkeypatch.setattr(latency, "measured", lambda *_: (Timing(1e-3, 1e-3), Timing(1e-3, 1e-3)))
    config = training_config()
    anatomy = Anatomy.of(config)
    part = PrunePart(target={"decode_ms": 1.0}, alike=False)
    measure = measure_of("decode_ms", SEQ, clocks(part, config, tmp_path))
    one = Keep({"layers.0.intermediate": tuple(range(1, anatomy.shape.layers[0].intermediate_size))})
    assert measure(one.anatomy_after(anatomy)) < measure(anatomy)


def test_a_run_ends_at_its_milliseconds_and_goes_on_by_the_same_clock(fake, monkeypatch):
    part = {"target": {"decode_ms": 0.75 * MS}, "stops": [0.9], "pace": {"start": 0.1, "end": 0.8, "rounds": 4}}
    one, two = pipeline.scratch() / "by-the-clock", pipeline.scratch() / "by-the-clock-on"
    told = run(one, tied(**part))["figures"]["pruning"]
    assert told["met"] and told["measure"] == "decode_ms" and told["target"] == pytest.approx(0.75 * MS)
    anatomy = Anatomy.of(Source.open(str(one / "model")).config)
    assert told["measured"] == pytest.approx(by_hand(anatomy)) and 0.7 * MS < told["measured"] <= 0.75 * MS
    assert 0 < told["clock_ms"] < MS  # the real clock's
    left = [e["pruned"]["measure"] for e in events(one)]
    assert left == sorted(left, reverse=True) and left[-1] == told["measured"]
    stop = Anatomy.of(Source.open(str(one / "stops" / "0.9" / "model")).config)
    assert 0.85 * MS < by_hand(stop) <= 0.9 * MS

    with pytest.raises(Killed):
        run(two, tied(**part), KilledAt(3))
    monkeypatch.setattr(latency, "measured", None)  # as if it went on elsewhere
    monkeypatch.setattr(latency, "key", None)
    run(two, tied(**part))
    assert all(weights(one)[n].equal(w) for n, w in weights(two).items())


@pytest.mark.parametrize(
    ("part", "sentence"),
    [
        ({"target": {"decode_ms": 2 * MS}}, r"prune\.target: .* ms is not below the .* ms of the source"),
        ({"target": {"decode_ms": 0.01}}, r"prune\.target: 0\.01 ms is below the least shape's .* ms"),
        ({"target": {"decode_ms": 0.8 * MS}, "stops": [0.9, 0.7]}, r"prune\.stops: 0\.7 .* below the target of .* ms"),
        (
            {"target": {"decode_ms": 0.5 * MS}, "pace": {"kind": "steps", "prune": 1, "train": 4, "start": 0.5}},
            r"prune\.pace: .* takes the model to .* ms at best",
        ),
    ],
)
def test_what_the_clock_puts_out_of_reach_is_refused_and_leaves_no_run(fake, monkeypatch, tmp_path, part, sentence):
    recipe = tied(**part)
    opened = prepare(recipe, tmp_path / "run")  # nothing is known yet
    monkeypatch.setattr("prunus.train.assembly.fresh", None)  # no weight is made
    with pytest.raises(UserError, match=sentence):
        execute(opened)
    prepare(tied(target={"decode_ms": 0.8 * MS}), tmp_path / "run")  # the folder is free
    assert not (tmp_path / "run" / TABLE).exists()


def test_milliseconds_and_another_measure_are_refused():
    for target in (
        {"decode_ms": 1, "params": 5},
        {"decode_ms": 1, "prefill_ms": 1},
        {"decode_ms": 0},
        {"hidden_size": 2, "prefill_ms": 1},
    ):
        with pytest.raises(UserError, match=r"prune\.target"):
            pruning(target=target)
    with pytest.raises(UserError, match="give a target of params or ratio"):
        pruning(target={"decode_ms": 1}, allocate="adaptive", alike=False, axes=["intermediate"])


def test_a_plan_says_what_it_can(fake, monkeypatch, capsys):
    recipe = tied(target={"decode_ms": 0.75 * MS})
    with monkeypatch.context() as nothing:
        nothing.setattr(latency, "measured", None)
        before = planned(recipe, rate=1e9)
    assert before["pruning"] == {"unknown": UNCLOCKED}
    show_train.plan(before)
    assert "cuts: not counted" in capsys.readouterr().out
    after = planned(recipe, rate=1e9, latency=True)
    assert 0 < after["pruning"]["saved"] < 1 and after["hours"] < before["hours"]
    monkeypatch.setattr(latency, "measured", None)
    assert planned(recipe, rate=1e9) == after  # from this machine's table
    with pytest.raises(UserError, match="is not below"):
        planned(tied(target={"decode_ms": 2 * MS}), rate=1e9)
    show_train.plan(after)
    assert "cuts: to about" in capsys.readouterr().out
