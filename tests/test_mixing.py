"""Dynamic batch loading: the published formula, kept finite, with floors and a state that comes back bit for bit."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus.data.mixing import FLOOR, Mixer
from prunus.errors import UserError

HALVES, REFERENCES = {"a": 0.5, "b": 0.5}, {"a": 1.8, "b": 1.5}


def naive(weights, losses, references, temperature=1.0, floor=0.0):
    """Sheared LLaMA, algorithm 1; the scale under which shares of at least the floor add up to 1, by bisection."""
    alpha = {k: w * math.exp(max(losses[k] - references[k], 0) / temperature) for k, w in weights.items()}
    low, high = 0.0, 1 / max(alpha.values())
    for _ in range(200):
        scale = (low + high) / 2
        low, high = (low, scale) if sum(max(floor, a * scale) for a in alpha.values()) > 1 else (scale, high)
    return {k: max(floor, a * low) for k, a in alpha.items()}


def test_the_closed_form():
    """Losses 2 and 1 over references 1.8 and 1.5: e^0.2 to e^0, so .5498 and .4502. Unclipped it would be .668 and .332."""
    mixer = Mixer(HALVES, REFERENCES, floor=0.0)
    row = mixer.update({"a": 2.0, "b": 1.0})
    share = math.exp(0.2) / (math.exp(0.2) + 1)
    assert mixer.weights == pytest.approx({"a": share, "b": 1 - share}, rel=1e-15)
    assert [round(w, 4) for w in mixer.weights.values()] == [0.5498, 0.4502]
    assert row["a"] == {"loss": 2.0, "excess": pytest.approx(0.2), "weight": mixer.weights["a"]} and row["b"]["excess"] == 0
    floored = Mixer(HALVES, REFERENCES)
    floored.update({"a": 2.0, "b": 1.0})
    assert floored.weights == mixer.weights  # a floor that nobody reaches moves nothing


losses_st = st.lists(st.floats(0, 20), min_size=3, max_size=3)


@settings(max_examples=80, deadline=None)
@given(st.lists(losses_st, min_size=1, max_size=6), st.floats(0.05, 5), st.sampled_from([0.0, 1e-4, 0.05]))
def test_the_plain_formula(steps, temperature, floor):
    weights, references = {"a": 0.5, "b": 0.3, "c": 0.2}, {"a": 2.0, "b": 1.0, "c": 3.0}
    mixer = Mixer(weights, references, temperature=temperature, floor=floor)
    for listed in steps:
        losses = dict(zip("abc", listed, strict=True))
        before = dict(mixer.weights)
        mixer.update(losses)
        # relative 1e-9: exp(a)/exp(b) against exp(a - b) with a up to 400
        assert mixer.weights == pytest.approx(naive(before, losses, references, temperature, floor), rel=1e-9, abs=1e-12)
        assert sum(mixer.weights.values()) == pytest.approx(1, abs=1e-12)
        assert min(mixer.weights.values()) >= floor * (1 - 1e-9)


def test_huge_losses_do_not_overflow():
    mixer = Mixer(HALVES, REFERENCES)
    mixer.update({"a": 1e6, "b": 1.0})
    assert mixer.weights["b"] == pytest.approx(FLOOR) and math.isfinite(mixer.weights["a"])


def test_a_domain_that_drew_nothing_keeps_its_share():
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    mixer = Mixer(weights, dict.fromkeys("abc", 1.0))
    mixer.update({"a": 3.0, "b": None, "c": 1.0})
    assert mixer.weights["b"] == pytest.approx(0.3, rel=1e-12)
    assert mixer.weights["a"] > 0.5 and sum(mixer.weights.values()) == pytest.approx(1, abs=1e-12)
    mixer = Mixer(weights, dict.fromkeys("abc", 1.0))
    mixer.update({"a": 3.0, "c": 1.0})  # not named at all: the same
    assert mixer.weights["b"] == pytest.approx(0.3, rel=1e-12)
    before = dict(mixer.weights)
    for losses in ({}, dict.fromkeys("abc")):
        row = mixer.update(losses)
        assert mixer.weights == before and row["a"]["excess"] is None
    assert mixer.num_updates == 3


def test_floors_hold_for_ever():
    mixer = Mixer({"a": 0.4, "b": 0.4, "c": 0.2}, dict.fromkeys("abc", 1.0), floor=0.05)
    for _ in range(200):
        mixer.update({"a": 9.0, "b": 1.0, "c": None})
    assert mixer.weights == pytest.approx({"a": 0.75, "b": 0.05, "c": 0.2})
    for _ in range(60):
        mixer.update({"a": 1.0, "b": 2.0, "c": 1.0})  # a domain at its floor comes back
    assert mixer.weights["b"] == pytest.approx(0.9)


def test_shares_stay_where_no_domain_has_excess():
    weights = {"a": 0.7, "b": 0.299, "c": 0.001}
    mixer = Mixer(weights, dict.fromkeys("abc", 1.0))
    for _ in range(500):
        mixer.update(dict.fromkeys("abc", 0.5))
    assert mixer.weights == pytest.approx(weights, rel=1e-12)


def test_temperature_tempers():
    warm, cold = Mixer(HALVES, REFERENCES, temperature=10.0), Mixer(HALVES, REFERENCES, temperature=0.1)
    for mixer in (warm, cold):
        mixer.update({"a": 2.0, "b": 1.5})
    assert 0.5 < warm.weights["a"] < 0.51 and cold.weights["a"] > 0.85


def test_the_state_comes_back_bit_for_bit():
    mixer = Mixer({"a": 0.5, "b": 0.3, "c": 0.2}, {"a": 1.1, "b": 2.2, "c": 3.3}, temperature=0.7, floor=0.01)
    for i in range(20):
        mixer.update({"a": 2 + i % 3, "b": None if i % 4 else 3.0, "c": 4 - i / 10})
    back = Mixer.from_state(json.loads(json.dumps(mixer.state())))
    assert back.state() == mixer.state()
    for each in (mixer, back):
        each.update({"a": 1.7, "b": 2.3, "c": 3.9})
    assert back.state() == mixer.state()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": {"a": 0.5, "b": 0.6}}, "weights: 0.5, 0.6 are no shares"),
        ({"references": {"a": 1.0}}, "references: domain 'b' has no reference loss"),
        ({"references": {"a": 1.0, "b": float("nan")}}, "references: domain 'b' has no reference loss"),
        ({"references": REFERENCES | {"bb": 1.0}}, "unknown domain 'bb'"),
        ({"temperature": 0.0}, "temperature: 0 is not above 0"),
        ({"floor": 0.5}, "floor: 0.5 is more than a domain's share, or 2 domains have no room for it"),
        ({"floor": -0.1}, "floor: -0.1"),
    ],
)
def test_mixers_that_cannot_be(change, message):
    arguments = {"weights": HALVES, "references": REFERENCES} | change
    with pytest.raises(UserError, match=message):
        Mixer(arguments.pop("weights"), arguments.pop("references"), **arguments)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_losses_that_are_no_numbers(loss):
    mixer = Mixer(HALVES, REFERENCES)
    with pytest.raises(UserError, match=r"losses: that of domain 'a' is (nan|inf); training has diverged"):
        mixer.update({"a": loss, "b": 1.0})
    with pytest.raises(UserError, match="unknown domain 'aa'"):
        mixer.update({"aa": 1.0})
    assert mixer.weights == HALVES
