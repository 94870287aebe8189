"""Where the cut falls: exactly as many as asked for, by rank, whatever the ties."""

from __future__ import annotations

import itertools
import math
import statistics as st

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as hs
from pipeline import lowest

from prunus import allocate
from prunus.allocate import (
    Curve,
    adaptive_ratios,
    contiguous,
    global_budget,
    kept_in_matrix,
    kept_in_rows,
    kept_n_of_m,
    least_error,
    standardised,
    to_counts,
    top,
)
from prunus.criteria import Scores
from prunus.errors import UserError

FEW = hs.integers(0, 3).map(float)  # many ties
MATRICES = hs.integers(1, 6).flatmap(
    lambda rows: hs.integers(1, 12).flatmap(
        lambda columns: hs.lists(hs.lists(FEW, min_size=columns, max_size=columns), min_size=rows, max_size=rows)
    )
)
SPARSITIES = hs.floats(0.01, 0.99)

# -- weights ------------------------------------------------------------------------------------------------------------


@given(MATRICES, SPARSITIES)
def test_rows_lose_exactly_their_lowest(matrix, sparsity):
    """7.2: int(s * in) a row, ties by index; the reference is Python's stable sort."""
    kept = kept_in_rows(torch.tensor(matrix), sparsity).tolist()
    for scores, row in zip(matrix, kept, strict=True):
        gone = set(lowest(scores, int(sparsity * len(scores))))
        assert row == [j not in gone for j in range(len(scores))]


@given(MATRICES, SPARSITIES)
def test_a_matrix_loses_exactly_its_lowest(matrix, sparsity):
    kept = kept_in_matrix(torch.tensor(matrix), sparsity)
    flat = [v for row in matrix for v in row]
    gone = set(lowest(flat, round(sparsity * len(flat))))
    assert kept.flatten().tolist() == [i not in gone for i in range(len(flat))]
    assert kept.shape == (len(matrix), len(matrix[0]))


def test_random_rows_lose_exactly_their_lowest():
    scores = torch.rand(64, 48, generator=torch.Generator().manual_seed(0))
    for sparsity in (0.1, 0.5, 0.77):
        kept = kept_in_rows(scores, sparsity)
        for row, values in zip(kept, scores, strict=True):
            assert sorted((~row).nonzero().flatten().tolist()) == sorted(lowest(values.tolist(), int(sparsity * 48)))


@pytest.mark.parametrize("value", [0.0, 1.0, 3e30])
def test_equal_scores_lose_exactly_half(value):
    """B11: `score <= sorted[k]` would take everything, and 51 of 100 distinct ones."""
    equal = torch.full((10, 10), value)
    assert int((~kept_in_matrix(equal, 0.5)).sum()) == 50
    assert (~kept_in_rows(equal, 0.5)).sum(1).tolist() == [5] * 10
    assert int((~kept_in_matrix(torch.arange(100.0).reshape(10, 10), 0.5)).sum()) == 50


def test_magnitude_by_hand():
    """2.1 'Check': of 1, -3, 2 and 0.5 the first and the last go."""
    kept = kept_in_matrix(torch.tensor([[1.0, 3.0], [2.0, 0.5]]), 0.5)
    assert kept.tolist() == [[False, True], [True, False]]


def test_selection_leaves_its_scores_alone():
    scores = torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
    copy = scores.clone()
    kept_in_rows(scores, 0.5), kept_in_matrix(scores, 0.5), kept_n_of_m(scores, 2, 4)
    assert torch.equal(scores, copy)


@given(hs.integers(1, 7), hs.integers(1, 7), hs.integers(1, 4), hs.integers(1, 4), hs.data())
def test_n_of_m_is_exact(n, extra, rows, groups, data):
    """X24, also with ties: the n best of every m stay, the lower index first."""
    m = n + extra
    flat = data.draw(hs.lists(FEW, min_size=rows * groups * m, max_size=rows * groups * m))
    scores = torch.tensor(flat).reshape(rows, groups * m)
    kept = kept_n_of_m(scores, n, m).reshape(rows, groups, m)
    assert (kept.sum(-1) == n).all()
    for row in range(rows):
        for group in range(groups):
            values = scores.reshape(rows, groups, m)[row, group].tolist()
            best = sorted(range(m), key=lambda j: -values[j])[:n]
            assert sorted(kept[row, group].nonzero().flatten().tolist()) == sorted(best)


# -- units --------------------------------------------------------------------------------------------------------------


@given(hs.lists(FEW, min_size=1, max_size=12), hs.integers(0, 12))
def test_the_best_units(scores, count):
    best = sorted(range(len(scores)), key=lambda i: -scores[i])[:count]
    assert top(torch.tensor(scores), count) == tuple(sorted(best))


def test_ties_among_many_go_to_the_lower_index():
    """An unstable sort of a dozen numbers happens to be stable; one of a hundred is not."""
    scores = torch.randint(0, 3, (200,), generator=torch.Generator().manual_seed(0)).float()
    best = sorted(range(200), key=lambda i: -float(scores[i]))
    for count in (1, 30, 100, 150):
        assert top(scores, count) == tuple(sorted(best[:count]))


def test_counts_name_only_what_is_cut():
    scores = Scores({"hidden": torch.tensor([1.0, 3, 2]), "layers.0.intermediate": torch.tensor([5.0, 4])})
    keep = to_counts(scores, {"hidden": 2, "layers.0.intermediate": 2})
    assert keep.units == {"hidden": (1, 2)}


def test_scores_are_standardised_over_their_channels():
    """FLAP: with the spread of the channels where it is known, else with that of the units themselves."""
    raw = {"layers.0.kv_heads": [1.0, 2, 6], "layers.0.intermediate": [4.0, 4, 7, 9]}
    scores = Scores({k: torch.tensor(v) for k, v in raw.items()}, {"layers.0.kv_heads": (2.5, 0.5)})
    found = standardised(scores)
    assert found["layers.0.kv_heads"].tolist() == [(v - 2.5) / 0.5 for v in raw["layers.0.kv_heads"]]
    values = raw["layers.0.intermediate"]
    expected = [(v - st.fmean(values)) / st.pstdev(values) for v in values]
    assert found["layers.0.intermediate"].tolist() == pytest.approx(expected, rel=1e-12)


def test_a_layer_without_spread_is_not_divided_by_nothing():
    found = standardised(Scores({"layers.0.intermediate": torch.ones(3)}, {"layers.0.intermediate": (1.0, 0.0)}))
    assert found["layers.0.intermediate"].tolist() == [0, 0, 0]


AXES = ["layers.0.kv_heads", "layers.0.intermediate", "layers.1.kv_heads", "layers.1.intermediate"]


@hs.composite
def budgets(draw):
    """Values with ties on four axes, two costs, a multiple for the channels, and a budget."""
    floats = draw(hs.sampled_from([FEW, FEW.map(lambda v: v * 0.1), hs.floats(-3, 3)]))
    values = {name: draw(hs.lists(floats, min_size=1, max_size=14 if "inter" in name else 4)) for name in AXES}
    head, channel = draw(hs.integers(5, 60)), draw(hs.integers(1, 7))
    costs = {name: channel if "inter" in name else head for name in AXES}
    multiple = draw(hs.integers(1, 5))
    total = sum(costs[n] * len(v) for n, v in values.items())
    return values, costs, multiple, draw(hs.integers(0, total))


def step(name, multiple):
    return multiple if "inter" in name else 1


def straight(costs, values):
    """Price lists of units that cost the same, however many there are."""
    return {name: [n * costs[name] for n in range(len(v) + 1)] for name, v in values.items()}


@settings(max_examples=300)
@given(budgets())
def test_a_global_budget_is_met_and_used(case):
    values, costs, multiple, budget = case
    floor = sum(costs[n] * min(step(n, multiple), len(v)) for n, v in values.items())
    tensors = {n: torch.tensor(v, dtype=torch.float64) for n, v in values.items()}
    if floor > budget:
        with pytest.raises(UserError, match=rf"ratio: the least that can stay .* costs {floor:,} .* leaves {budget:,}"):
            global_budget(tensors, straight(costs, values), budget, multiple_of={"intermediate": multiple})
        return
    keep = global_budget(tensors, straight(costs, values), budget, multiple_of={"intermediate": multiple})
    kept = {n: list(keep.units.get(n, range(len(v)))) for n, v in values.items()}
    cost = sum(costs[n] * len(k) for n, k in kept.items())
    assert cost <= budget
    cheapest = math.inf
    for name, units in kept.items():
        size, by = len(values[name]), step(name, multiple)
        assert len(units) >= min(by, size)  # the floor
        assert len(units) == size or len(units) % by == 0
        order = sorted(range(size), key=lambda i, v=values[name]: -v[i])
        assert units == sorted(order[: len(units)])  # a prefix of the ranking
        if len(units) < size:
            cheapest = min(cheapest, costs[name] * min(by, size - len(units)))
    assert budget - cost < cheapest


def test_a_remainder_is_kept_among_ties():
    """Six scores of 0.1 have a mean of 0.09999999999999999, so the remainder of one must not be looked at before them."""
    keep = global_budget(
        {"layers.0.intermediate": torch.full((13,), 0.1, dtype=torch.float64)},
        {"layers.0.intermediate": range(14)},
        13,
        multiple_of={"intermediate": 6},
    )
    assert keep.units == {}


@settings(max_examples=100)
@given(budgets())
def test_more_budget_keeps_more_where_units_cost_the_same(case):
    values, costs, _, budget = case
    costs = dict.fromkeys(costs, 3)
    assume(budget >= 3 * len(values))
    tensors = {n: torch.tensor(v, dtype=torch.float64) for n, v in values.items()}
    less, more = (
        global_budget(tensors, straight(costs, values), b, multiple_of={}).units for b in (budget, budget + 3)
    )  # fmt: skip
    for name, v in values.items():
        assert set(less.get(name, range(len(v)))) <= set(more.get(name, range(len(v))))


def test_units_are_ranked_together():
    """Equal costs: the best of all axes stay, beyond the best of each."""
    values = {"layers.0.intermediate": torch.tensor([5.0, 4, 3]), "layers.1.intermediate": torch.tensor([2.0, 1, 9])}
    keep = global_budget(values, straight(dict.fromkeys(values, 10), values), 40, multiple_of={})
    assert keep.units == {"layers.1.intermediate": (2,)}  # 9, 5, 4, 3
    keep = global_budget(values, straight(dict.fromkeys(values, 10), values), 29, multiple_of={})
    assert keep.units == {"layers.0.intermediate": (0,), "layers.1.intermediate": (2,)}


def test_a_unit_that_does_not_fit_is_passed_over():
    values = {"layers.0.kv_heads": torch.tensor([9.0, 8]), "layers.0.intermediate": torch.tensor([7.0, 1, 0])}
    costs = {"layers.0.kv_heads": 10, "layers.0.intermediate": 2}
    keep = global_budget(values, straight(costs, values), 15, multiple_of={})  # 10 + 2, then 8 does not fit into 3, 1 does
    assert keep.units == {"layers.0.kv_heads": (0,), "layers.0.intermediate": (0, 1)}


@settings(max_examples=200)
@given(budgets(), hs.data())
def test_a_budget_is_met_where_prices_bend(case, data):
    values, _, multiple, _ = case
    prices = {
        name: [0, *sorted(data.draw(hs.lists(hs.integers(0, 60), min_size=len(v), max_size=len(v))))]
        for name, v in values.items()
    }
    floor = sum(prices[n][min(step(n, multiple), len(v))] for n, v in values.items())
    budget = data.draw(hs.integers(floor, sum(listed[-1] for listed in prices.values())))
    tensors = {n: torch.tensor(v, dtype=torch.float64) for n, v in values.items()}
    keep = global_budget(tensors, prices, budget, multiple_of={"intermediate": multiple})
    kept = {n: len(keep.units.get(n, v)) for n, v in values.items()}
    cost = sum(prices[name][n] for name, n in kept.items())
    open_axes = [n for n, v in values.items() if kept[n] < len(v)]
    nexts = [prices[n][min(kept[n] + step(n, multiple), len(values[n]))] - prices[n][kept[n]] for n in open_axes]
    assert cost <= budget and budget - cost < min(nexts, default=math.inf)


# -- layers -------------------------------------------------------------------------------------------------------------


@given(hs.lists(hs.floats(0, 20), min_size=1, max_size=8), hs.integers(1, 4))
def test_the_cheapest_run_goes(losses, run):
    """The loss itself is compared: a removal that improves on the dense model is taken (B2). Ties go to the first."""
    count = len(losses) + run - 1
    assume(run < count)
    start = losses.index(min(losses))
    assert contiguous(losses, run, count).units == {"layers": tuple([*range(start), *range(start + run, count)])}


def test_a_run_whose_loss_is_no_number_is_not_chosen():
    """In float16 a removal can overflow; that is the worst of losses, not the best."""
    assert contiguous([2.0, math.nan, 1.0, math.inf], 1, 4).units == {"layers": (0, 1, 3)}


# -- shares of layers -----------------------------------------------------------------------------------------------------


def test_adapt_pruner_s_example():
    """Section 2.15: cosines .9, .95, .99, base .2, A .1; the importance is 1 - cos, as good as -cos."""
    cosines = torch.tensor([0.9, 0.95, 0.99], dtype=torch.float64)
    for importance in (-cosines, 1 - cosines):
        shares = adaptive_ratios(importance, [1000] * 3, [0.9] * 3, 600, 0.1)
        assert shares == pytest.approx([0.1, 0.2 + 0.1 / 14, 0.2 + 1.3 / 14], abs=1e-9)


@pytest.mark.parametrize("importance", [[0.1, 0.5, 0.2], [0.3, 0.3, 0.3], [0.1, 0.1, 0.1], [0.0, 0.0, 0.0]])
def test_without_amplitude_or_difference_all_layers_lose_alike(importance):
    """0.1 * 3 is no exact sum: what rounding leaves of a centred constant must not be blown up to 1."""
    amplitude = 0.0 if len(set(importance)) > 1 else 0.2
    shares = adaptive_ratios(torch.tensor(importance, dtype=torch.float64), [100, 300, 200], [1.0] * 3, 150, amplitude)
    assert shares == pytest.approx([0.25] * 3, abs=1e-12)


@given(
    hs.lists(hs.tuples(hs.floats(0, 2), hs.integers(1, 10**6), hs.floats(0.3, 1)), min_size=1, max_size=12),
    hs.floats(0, 1),
    hs.floats(0, 1.5),
)
def test_shares_take_exactly_what_is_asked(layers, ratio, amplitude):
    """Whatever is clipped: the sum is met, shares lie in their bounds, and inside them they differ by A * Ihat."""
    values, sizes, most = (list(column) for column in zip(*layers, strict=True))
    removed = round(ratio * sum(m * s for m, s in zip(most, sizes, strict=True)))
    assume(removed <= sum(m * s for m, s in zip(most, sizes, strict=True)))
    importance = torch.tensor(values, dtype=torch.float64)
    shares = adaptive_ratios(importance, sizes, most, removed, amplitude)
    assert sum(x * s for x, s in zip(shares, sizes, strict=True)) == pytest.approx(removed, abs=1e-6)
    assert all(0 <= x <= m for x, m in zip(shares, most, strict=True))
    centred = importance - importance.mean()
    if float(centred.abs().max()) < 1e-9:
        return
    free = [i for i, (x, m) in enumerate(zip(shares, most, strict=True)) if 1e-9 < x < m - 1e-9]
    bases = [shares[i] + amplitude * float(centred[i] / centred.abs().max()) for i in free]
    assert max(bases, default=0.0) - min(bases, default=0.0) < 1e-9
    for i, x in enumerate(shares):  # who is clipped would lie beyond its bound
        for base in bases[:1]:
            wanted = base - amplitude * float(centred[i] / centred.abs().max())
            assert x == pytest.approx(min(max(wanted, 0.0), most[i]), abs=1e-9)


# -- error curves -----------------------------------------------------------------------------------------------------------


@hs.composite
def programmes(draw):
    """A few small curves, in general neither falling nor convex, and a budget."""
    curves, prices = {}, {}
    for name in draw(hs.lists(hs.sampled_from(AXES), min_size=1, max_size=4, unique=True)):
        sizes = tuple(sorted(draw(hs.sets(hs.integers(1, 12), min_size=1, max_size=5))))
        error = tuple(draw(hs.one_of(FEW, hs.floats(0, 3))) for _ in sizes)
        curves[name] = Curve(sizes, error)
        steps = draw(hs.lists(hs.integers(0, 9), min_size=sizes[-1], max_size=sizes[-1]))  # in general not alike
        prices[name] = [0, *itertools.accumulate(steps)]
    most = sum(prices[name][-1] for name in curves)
    return curves, prices, draw(hs.integers(-5, most + 5))


def cost_of(prices, sizes):
    return sum(prices[name][size] for name, size in sizes.items())


def error_of(curves, sizes):
    return sum(curves[name].error[curves[name].sizes.index(size)] for name, size in sizes.items())


def least_by_hand(curves, prices, budget):
    """The least sum of errors of all combinations that fit; infinite if none does."""
    combinations = (
        dict(zip(curves, chosen, strict=True)) for chosen in itertools.product(*(c.sizes for c in curves.values()))
    )
    return min((error_of(curves, s) for s in combinations if cost_of(prices, s) <= budget), default=math.inf)


@settings(max_examples=300)
@given(programmes())
def test_the_programme_is_the_best_of_all_combinations(case):
    curves, prices, budget = case
    best = least_by_hand(curves, prices, budget)
    if best == math.inf:
        with pytest.raises(UserError, match=rf"ratio: even the smallest sizes cost more than the {budget:,} that"):
            least_error(curves, prices, budget)
        return
    sizes = least_error(curves, prices, budget)
    assert set(sizes) == set(curves) and cost_of(prices, sizes) <= budget
    assert error_of(curves, sizes) == pytest.approx(best, abs=1e-12)


@settings(max_examples=200)
@given(programmes(), hs.integers(1, 30))
def test_a_coarser_grain_never_exceeds_the_budget(case, states):
    """Costs rounded up lose at most a grain an axis; where not even the smallest sizes fit so, they are what is left."""
    curves, prices, budget = case
    assume(least_by_hand(curves, prices, budget) < math.inf)
    exact = math.gcd(*(prices[name][size] for name, curve in curves.items() for size in curve.sizes)) or 1
    grain = exact * max(1, math.ceil(budget / exact / states))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocate, "_MOST_STATES", states)
        sizes = least_error(curves, prices, budget)
    assert cost_of(prices, sizes) <= budget
    rounded_away = grain * (len(curves) + 1) if grain > exact else 0
    assert error_of(curves, sizes) <= least_by_hand(curves, prices, budget - rounded_away) + 1e-12


def test_prices_in_thousands_are_counted_in_thousands():
    """A grain of their own: then a budget of ten millions is ten thousand steps, and nothing is rounded."""
    sizes = (0, 1, 2, 3)
    curves = {name: Curve(sizes, tuple((3 - n) * weight for n in sizes)) for name, weight in (("a", 3.0), ("b", 2.0))}
    prices = {"a": [n * 3_000_000 for n in sizes], "b": [n * 2_000_000 for n in sizes]}
    found = least_error(curves, prices, 10_000_000)
    assert cost_of(prices, found) <= 10_000_000
    assert error_of(curves, found) == least_by_hand(curves, prices, 10_000_000)
    prices = {name: [price // 1000 * 1001 for price in listed] for name, listed in prices.items()}
    found = least_error(curves, prices, 10_010_000)
    assert error_of(curves, found) == least_by_hand(curves, prices, 10_010_000)


def test_of_equal_errors_the_smaller_size_stays():
    curves = {"a": Curve((1, 2, 3), (0.5, 0.5, 0.5))}
    assert least_error(curves, {"a": [0, 1, 2, 3]}, 3) == {"a": 1}


def test_masks_are_masks():
    scores = torch.tensor([[3.0, 1.0, 2.0, 4.0]])
    for mask in (kept_n_of_m(scores, 2, 4), kept_in_rows(scores, 0.5), kept_in_matrix(scores, 0.5)):
        assert mask.dtype == torch.bool and mask.tolist() == [[True, False, False, True]]
