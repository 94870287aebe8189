"""Errors of scores and of differences, against closed forms and naive references."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunus.tasks.paired import Difference, Score, mcnemar, mean_difference, mean_of, means

ITEMS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60)


def test_a_score_and_its_error():
    score = Score.of([1, 0, 0, 1, 1])
    assert (score.mean, score.items) == (0.6, 5) and score.error == pytest.approx(math.sqrt(0.6 * 0.4 / 5))
    assert Score.of([1.0] * 4).error == 0


def test_the_papers_errors():
    """As the study prints them, in points: WinoGrande 1.3, ARC-c 1.4, HellaSwag 0.4, OBQA 2.2 (appendix E)."""
    for rows, accuracy, printed in ((1267, 0.7, 1.3), (1172, 0.4, 1.4), (10042, 0.75, 0.4), (500, 0.45, 2.2)):
        right = round(rows * accuracy)
        assert round(100 * Score.of([1] * right + [0] * (rows - right)).error, 1) == printed


@given(ITEMS)
def test_a_difference_of_pairs(items):
    """Its error is that of the mean of the items' own differences, with N below (not N - 1)."""
    one, other = zip(*items, strict=True)
    found = Difference.of(list(map(float, one)), list(map(float, other)))
    apart = np.subtract(one, other, dtype=float)
    assert found.mean == pytest.approx(apart.mean())
    assert found.error == pytest.approx(apart.std() / math.sqrt(len(items)), abs=1e-12)
    assert found.within_noise == (abs(found.mean) < Score.of(list(map(float, other))).error)
    back = Difference.of(list(map(float, other)), list(map(float, one)))
    assert (back.mean, back.p) == (pytest.approx(-found.mean), found.p)


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (1, 0), (5, 5), (9, 2), (0, 12), (130, 90), (700, 650)])
def test_mcnemar_counts_coins(won, lost):
    """Exactly, by fractions: twice the lower tail of a fair coin, at most 1."""
    count = won + lost
    tail = sum(math.comb(count, k) for k in range(min(won, lost) + 1))
    expected = min(Fraction(1), Fraction(2 * tail, 2**count))
    assert mcnemar(won, lost) == pytest.approx(float(expected), rel=1e-9)


def test_means_of_tasks():
    scores = {"a": Score(0.5, 0.03, 100), "b": Score(0.7, 0.04, 50), "c": Score(0.1, 0.5, 4)}
    found = means(scores, {"two": ("a", "b"), "gone": ("a", "d")})
    assert list(found) == ["two"] and found["two"] == mean_of([scores["a"], scores["b"]])
    assert found["two"].mean == pytest.approx(0.6) and found["two"].error == pytest.approx(0.025)
    apart = [Difference(0.02, 0.01, None, False), Difference(0.04, 0.01, None, False)]
    whole = mean_difference(apart, found["two"])
    assert whole.mean == pytest.approx(0.03) and whole.error == pytest.approx(math.sqrt(2) / 200)
    assert whole.p == pytest.approx(math.erfc(0.03 / whole.error / math.sqrt(2))) and not whole.within_noise
