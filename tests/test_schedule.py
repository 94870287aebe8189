"""Learning rates at points where they are known, and one curve over several stages."""

from __future__ import annotations

import pytest

from prunus.train.schedule import Schedule


def test_schedules_by_hand():
    """X21: the ends are exact; half way down a cosine is the mean of peak and floor."""
    cosine = Schedule("cosine", 2.0, 1000, warmup=0.1, floor=0.1)
    assert cosine(50) == 1.0 and cosine(100) == 2.0 and cosine(1000) == pytest.approx(0.2, abs=1e-12)
    assert cosine(550) == pytest.approx(1.1, abs=1e-12)
    wsd = Schedule("wsd", 2.0, 1000, warmup=0.1, floor=0.1, decay=0.2)
    assert wsd(100) == wsd(799) == wsd(800) == 2.0 and wsd(900) == pytest.approx(1.1) and wsd(1000) == pytest.approx(0.2)
    assert Schedule("constant", 2.0, 1000)(999) == 2.0


def test_rates_at_the_ends_of_the_curve():
    """Without a warm-up the first rate is the peak; behind the end the floor stays; a decay never reaches into the warm-up."""
    for kind in ("cosine", "wsd", "constant"):
        assert Schedule(kind, 2.0, 1000, warmup=0)(0) == 2.0
        assert Schedule(kind, 2.0, 1000, start=40)(0) == pytest.approx(1.6)  # of a warm-up of 50
        end = 2.0 if kind == "constant" else 0.5
        assert (
            Schedule(kind, 2.0, 1000, floor=0.25)(1000) == Schedule(kind, 2.0, 1000, floor=0.25)(1300) == pytest.approx(end)
        )
    late = Schedule("wsd", 2.0, 1000, warmup=0.5, floor=0.25, decay=0.8)
    assert late(250) == 1.0 and late(500) == 2.0 and late(750) == pytest.approx(1.25) and late(1000) == pytest.approx(0.5)
    assert Schedule("wsd", 1.0, 100, warmup=1.0)(100) == Schedule("cosine", 1.0, 100, warmup=1.0)(100) == 1.0


def test_one_cosine_over_two_stages():
    whole = Schedule("cosine", 1.0, 1000)
    second = Schedule("cosine", 1.0, 1000, start=400)
    assert [second(n) for n in range(0, 601, 50)] == [whole(400 + n) for n in range(0, 601, 50)]
