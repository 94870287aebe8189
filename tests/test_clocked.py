"""Milliseconds as the price of units while a model trains."""

from __future__ import annotations

import json

import pipeline
import pytest
import tiny
from shrinking import events, pruning, run, tied
from test_train import SEQ, Killed, weights

from prunus import latency
from prunus.anatomy import Anatomy
from prunus.distributed import ALONE
from prunus.errors import UserError
from prunus.keep import Keep
from prunus.latency import Timing
from prunus.train.loop import Hook
from prunus.train.shrink.clocked import check_clock, price_of
from prunus.train.shrink.goal import Goal, shrunk
from prunus.train.shrink.part import PrunePart


def clock(config, anatomy, layer, dtype, prompt_tokens):
    """Attention takes far longer than its parameters say, so that heads are what costs."""
    own, hidden = anatomy.shape.layers[layer], anatomy.shape.hidden_size
    ms = 1.0 + 0.5 * hidden * own.num_key_value_heads + 0.001 * hidden * own.intermediate_size
    return Timing(10 * ms, ms), Timing(20.0 * hidden, 2.0 * hidden)


@pytest.fixture
def fake(monkeypatch, tmp_path):
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(latency, "measured", clock)


def test_between_what_was_measured_are_straight_lines(fake, tmp_path):
    """A product of sizes is straight along each: exact at every size, in layers that differ, too."""
    config = tiny.tiny_config("llama_mha")
    anatomy = Anatomy.of(config)
    part = PrunePart(target={"ratio": 0.5}, per="decode_ms", floor={"intermediate": 5})
    goal = Goal.of(part, anatomy, SEQ)
    price = price_of(part, goal, config, anatomy, tmp_path, "float32", ALONE)
    assert price is not None and price.layer.shape == (3, 3, 3)
    assert price_of(PrunePart(target={"ratio": 0.5}), goal, config, anatomy, tmp_path, "float32", ALONE) is None
    for sizes in ({}, {"hidden": 9}, {"kv_heads": 3, "intermediate": 6}, {"hidden": 31, "intermediate": 23, "kv_heads": 7}):
        there = shrunk(anatomy, sizes)
        expected = (
            sum(clock(config, there, i, "", 0)[0].decode_ms for i in range(tiny.LAYERS)) + 2.0 * there.shape.hidden_size
        )
        assert price(there) == pytest.approx(1e6 * expected, rel=1e-9)


def test_a_noisy_clock_makes_nothing_free(monkeypatch, tmp_path):
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(latency, "measured", lambda *_: (Timing(1.0, 1.0), Timing(1.0, 1.0)))
    config = tiny.tiny_config("llama_mha")
    anatomy = Anatomy.of(config)
    part = PrunePart(target={"ratio": 0.5}, per="prefill_ms")
    price = price_of(part, Goal.of(part, anatomy, SEQ), config, anatomy, tmp_path, "float32", ALONE)
    for kind in ("hidden", "kv_heads", "intermediate"):
        assert price(shrunk(anatomy, {kind: 7})) < price(shrunk(anatomy, {kind: 8}))


def test_a_run_goes_by_the_clock_and_goes_on_by_the_same_one(fake, monkeypatch):
    part = {"axes": ["kv_heads", "intermediate"], "target": {"ratio": 0.3}, "per": "decode_ms"}
    one, two = pipeline.scratch() / "clocked", pipeline.scratch() / "clocked-on"
    assert run(one, tied(**part))["figures"]["pruning"]["met"]
    (table,) = json.loads((one / "latency.json").read_text())["tables"].values()
    assert len(table["entries"]) == 9 + 1  # three by three sizes, and all that is no layer

    class Stop(Hook):
        def after_step(self, training):
            if training.step == 3:
                raise Killed

    with pytest.raises(Killed):
        run(two, tied(**part), Stop())
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
    with pytest.raises(UserError, match=r"prune\.per"):
        pruning(per="seconds")
