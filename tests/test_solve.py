"""Least squares and SparseGPT against naive float64 formulas.

Tolerances: the library solves in float32 (SparseGPT) on Gram matrices of condition about 1e4 after damping, so weights of
order 1 agree to a few 1e-6; refits are float64 and agree to 1e-8.
"""

from __future__ import annotations

import math

import pytest
import torch

from prunus.eliminate import eliminate, stay_after_swaps, stay_one_by_one
from prunus.solve import (
    _GRADUAL,
    _ITERATIONS,
    _RHO,
    admm,
    factor,
    inverse_upper,
    refit,
    sparsegpt,
)


def problem(inputs=64, outputs=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(400, inputs, generator=g) @ torch.randn(inputs, inputs, generator=g)
    return torch.randn(outputs, inputs, generator=g), x


def error(weight, other, gram):
    d = (weight - other).double()
    return float(torch.trace(d @ gram.double() @ d.T))


def naive_sparsegpt(weight, gram, *, sparsity=None, pattern=None, block=128):
    """The paper's loop, column by column, in float64."""
    w, n = weight.double().clone(), weight.shape[1]
    h = gram.double()
    h = h + 0.01 * h.diagonal().mean() * torch.eye(n, dtype=torch.double)
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    kept = torch.ones_like(w, dtype=torch.bool)
    for a in range(0, n, block):
        b = min(a + block, n)
        if sparsity is not None:
            score = (w[:, a:b] / u.diagonal()[a:b]) ** 2
            gone = score.reshape(-1).argsort()[: round(sparsity * score.numel())]
            flat = torch.ones(score.numel(), dtype=torch.bool)
            flat[gone] = False
            kept[:, a:b] = flat.view_as(score)
        for j in range(a, b):
            if pattern is not None and j % pattern[1] == 0:
                score = (w[:, j : j + pattern[1]] / u.diagonal()[j : j + pattern[1]]) ** 2
                kept[:, j : j + pattern[1]].scatter_(1, score.argsort(1)[:, : pattern[1] - pattern[0]], False)
            q = w[:, j] * kept[:, j]
            w[:, j:] -= torch.outer((w[:, j] - q) / u[j, j], u[j, j:])
            w[:, j] = q
    return w, kept


@pytest.mark.parametrize("block", [16, 24, 128])
@pytest.mark.parametrize("kind", [{"sparsity": 0.5}, {"sparsity": 0.3}, {"pattern": (2, 4)}, {"pattern": (4, 8)}])
def test_sparsegpt_is_the_paper_s_loop(kind, block):
    weight, x = problem()
    expected, kept = naive_sparsegpt(weight, x.T @ x, block=block, **kind)
    [(got, mask)] = sparsegpt([weight], inverse_upper(x.T @ x), block=block, **kind)
    assert torch.equal(mask, kept)
    assert (got - expected).abs().max() < 2e-5
    assert bool((got[~mask] == 0).all())


def test_closed_form_case():
    """H = [[2, 1], [1, 2]], w = [1, 1], column 0 removed: w = [0, 1.5] and the loss rises by w0^2 / [H^-1]_00 = 1.5."""
    gram = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    weight = torch.ones(1, 2)
    [(got, _)] = sparsegpt([weight], inverse_upper(gram, damp=0.0), masks=[torch.tensor([[False, True]])])
    assert got.tolist() == [[0.0, pytest.approx(1.5, abs=1e-6)]]
    assert error(weight, got, gram) == pytest.approx(1.5, abs=1e-5)


def test_identity_hessian_is_magnitude():
    weight, _ = problem(inputs=16)
    [(got, kept)] = sparsegpt([weight], inverse_upper(torch.eye(16)), sparsity=0.5)
    assert float(weight[kept].abs().min()) >= float(weight[~kept].abs().max())
    assert torch.equal(got, weight * kept)


@pytest.mark.parametrize("kind", [{"sparsity": 0.5}, {"pattern": (2, 4)}])
def test_the_update_never_worsens_the_layer(kind):
    weight, x = problem()
    gram = x.T @ x
    [(got, kept)] = sparsegpt([weight], inverse_upper(gram), **kind)
    assert error(weight, got, gram) < error(weight, weight * kept, gram)


def test_matrices_of_one_input_are_pruned_as_if_alone():
    weight, x = problem()
    inverse = inverse_upper(x.T @ x)
    together = sparsegpt([weight[:11], weight[11:]], inverse, sparsity=0.5)
    for part, rows in zip(together, (weight[:11], weight[11:]), strict=True):
        [(alone, kept)] = sparsegpt([rows], inverse, sparsity=0.5)
        assert torch.equal(part[1], kept)
        assert (part[0] - alone).abs().max() < 1e-5


def test_ties_lose_exactly_half():
    [(_, kept)] = sparsegpt([torch.ones(6, 8)], inverse_upper(torch.eye(8)), sparsity=0.5)
    assert int(kept.sum()) == 24
    [(_, kept)] = sparsegpt([torch.ones(6, 8)], inverse_upper(torch.eye(8)), pattern=(2, 4))
    assert bool((kept.view(6, 2, 4).sum(-1) == 2).all())


def test_dead_inputs_are_removed():
    weight, x = problem(inputs=16)
    x[:, 3] = 0
    [(got, _)] = sparsegpt([weight], inverse_upper(x.T @ x), sparsity=0.25)
    assert bool((got[:, 3] == 0).all())
    assert bool(torch.isfinite(got).all())


def test_damping_escalates_and_says_so():
    singular = torch.ones(6, 6)
    found = factor(singular, damp=0.0)
    assert found.escalated
    assert found.damp > 0
    assert bool(torch.isfinite(found.lower).all())
    assert not factor(torch.eye(6)).escalated
    with pytest.raises(ArithmeticError, match="no Cholesky factor"):
        factor(torch.full((3, 3), math.nan))


def test_refit_is_least_squares():
    """Against torch.linalg.lstsq on the kept columns; damping 1e-12 is below the comparison."""
    weight, x = problem(inputs=24)
    x = x.double()
    kept = torch.arange(0, 24, 2)
    expected = torch.linalg.lstsq(x[:, kept], x @ weight.double().T).solution.T
    got = refit(weight, x.T @ x, kept, damp=1e-12)
    assert (got - expected).abs().max() < 1e-8


def test_refit_to_dense_inputs_uses_the_cross_moment():
    """With other inputs at run time the best weights map those to what the dense inputs gave."""
    weight, z = problem(inputs=24)
    z = z.double()
    x = z + 0.3 * torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    kept = torch.arange(0, 24, 3)
    expected = torch.linalg.lstsq(x[:, kept], z @ weight.double().T).solution.T
    got = refit(weight, x.T @ x, kept, cross=z.T @ x, damp=1e-12)
    assert (got - expected).abs().max() < 1e-8


def test_refit_never_worsens_the_layer():
    weight, x = problem(inputs=24)
    gram, kept = x.T @ x, torch.arange(5, 24)
    plain = torch.zeros_like(weight)
    plain[:, kept] = weight[:, kept]
    repaired = torch.zeros_like(weight, dtype=torch.double)
    repaired[:, kept] = refit(weight, gram, kept)
    assert error(weight, repaired, gram) < error(weight, plain, gram)


# -- ADMM -----------------------------------------------------------------------------------------------------------------


def best_on_mask(weight, gram, kept):
    """Row by row the least squares on the inputs that stay."""
    out = torch.zeros(weight.shape, dtype=torch.double)
    h = gram.double()
    for i, row in enumerate(weight.double()):
        s = kept[i].nonzero().squeeze(1)
        out[i, s] = torch.linalg.solve(h[s][:, s], h[s] @ row)
    return out


def naive_admm(weight, gram, *, sparsity=None, pattern=None):
    """Boza's algorithm in its own terms: inputs of norm 1, the mask grows by a cubic schedule, then rests; float64."""
    norms = gram.double().diagonal().sqrt()
    norms = torch.where(norms == 0, 1.0, norms)
    g = gram.double() / norms.outer(norms) + 0.01 * torch.eye(len(norms), dtype=torch.double)
    w0 = weight.double() * norms * (gram.diagonal() > 0)
    w, u = w0.clone(), torch.zeros_like(w0)
    for step in range(_ITERATIONS):
        if step <= _GRADUAL:
            share, scores = 1 - (1 - step / _GRADUAL) ** 3, (w + u).abs()
            if pattern is not None:  # the n best of every m stay whatever happens
                of_m = scores.view(-1, pattern[1])
                of_m.scatter_(1, of_m.argsort(1, descending=True)[:, : pattern[0]], math.inf)
            goes = (sparsity if pattern is None else 1 - pattern[0] / pattern[1]) * share
            gone = scores.reshape(-1).argsort()[: round(goes * scores.numel())]
            kept = torch.ones(scores.numel(), dtype=torch.bool)
            kept[gone] = False
            kept = kept.view_as(scores)
        z = torch.where(kept, w + u, 0.0)
        u = u + w - z
        # the minimiser of |X (w - w0)|^2 / 2 + rho / 2 |w - z + u|^2, row by row
        w = torch.linalg.solve(g + _RHO * torch.eye(len(norms), dtype=torch.double), (w0 @ g + _RHO * (z - u)).T).T
    return torch.where(kept, w + u, 0.0) / norms, kept


@pytest.mark.parametrize("kind", [{"sparsity": 0.5}, {"sparsity": 0.3}, {"pattern": (2, 4)}, {"pattern": (4, 8)}])
def test_admm_is_its_loop(kind):
    weight, x = problem()
    expected, kept = naive_admm(weight, x.T @ x, **kind)
    [(got, mask)] = admm([weight], x.T @ x, **kind)
    assert int((mask != kept).sum()) <= 4  # of 2560: float32 steps tip what lies at the threshold
    rows = (mask == kept).all(1)
    assert (got - expected)[rows].abs().max() < 1e-3 * expected.abs().max()


def test_admm_closed_form_case():
    """H = [[2, 1], [1, 2]], w = [3, 1], half goes: the second, the first takes over 1 / (2 + damping) of it, 3.495.

    The steps on the last mask halve what is left of the way: ten of them leave a thousandth of the half that it moves.
    """
    gram = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    [(got, kept)] = admm([torch.tensor([[3.0, 1.0]])], gram, sparsity=0.5)
    assert kept.tolist() == [[True, False]]
    assert got.tolist() == [[pytest.approx(3 + 1 / 2.02, abs=1e-3), 0.0]]


@pytest.mark.parametrize("kind", [{"sparsity": 0.5}, {"sparsity": 0.3}, {"pattern": (2, 4)}, {"pattern": (4, 8)}])
def test_admm_settles_on_the_least_squares_of_its_mask(kind):
    weight, x = problem()
    gram = x.T @ x
    [(got, kept)] = admm([weight], gram, **kind)
    assert not bool(got[~kept].any())
    if "sparsity" in kind:
        assert int((~kept).sum()) == round(kind["sparsity"] * weight.numel())
    else:
        n, m = kind["pattern"]
        assert bool((kept.unflatten(1, (-1, m)).sum(-1) == n).all())
    damped = gram.double() + 0.01 * torch.diag(gram.diagonal().double())  # what it solves: damping is of each input's norm
    best = error(weight, best_on_mask(weight, damped, kept), damped)
    # ten steps on the last mask: within a twentieth of the optimum on it, and far below what zeroing alone leaves
    assert best <= error(weight, got, damped) <= 1.05 * best
    assert error(weight, got, damped) < 0.5 * error(weight, weight * kept, damped)


@pytest.mark.parametrize("kind", [{"sparsity": 0.5}, {"pattern": (2, 4)}])
def test_admm_beats_sparsegpt_on_the_layer(kind):
    weight, x = problem(seed=3)
    gram = x.T @ x
    [(ours, _)], [(theirs, _)] = admm([weight], gram, **kind), sparsegpt([weight], inverse_upper(gram), **kind)
    assert error(weight, ours, gram) < error(weight, theirs, gram)


def test_admm_of_independent_inputs_is_wanda_s_mask_and_leaves_the_weights():
    """With a diagonal Gram matrix nothing can make up for anything, so all that is left of the steps is their transient.

    It halves with every step on the last mask (rho is the diagonal), ten of them leave a thousandth of a weight, and near the
    threshold it may have tipped a choice: the masks differ only where a score is within a fiftieth of it.
    """
    weight, _ = problem()
    norms = torch.rand(64, generator=torch.Generator().manual_seed(1)) + 0.1
    [(got, kept)] = admm([weight], torch.diag(norms.square()), sparsity=0.5)
    scores = weight.abs() * norms
    threshold = float(scores.median())
    clear = (scores - threshold).abs() > 0.02 * threshold
    assert float(clear.float().mean()) > 0.95
    assert torch.equal(kept[clear], (scores > threshold)[clear])
    torch.testing.assert_close(got[clear], (weight * kept)[clear], rtol=2e-3, atol=1e-6)


def test_admm_matrices_of_one_input_do_not_see_each_other_and_dead_inputs_go():
    weight, x = problem()
    x = x.clone()
    x[:, 5] = 0
    gram = x.T @ x
    together = admm([weight[:16], weight[16:]], gram, sparsity=0.5)
    for part, (got, kept) in zip((weight[:16], weight[16:]), together, strict=True):
        [(alone, mask)] = admm([part], gram, sparsity=0.5)
        assert torch.equal(mask, kept)
        torch.testing.assert_close(alone, got, rtol=1e-4, atol=1e-5)  # products of other heights round otherwise
        assert not bool(got[:, 5].any())


# -- units that go one after another --------------------------------------------------------------------------------------


def least_squares_error(weight, x, stays):
    """||X W^T - X_S W'^T||^2 of the best W' on the inputs that stay, by torch.linalg.lstsq on X itself."""
    target = x @ weight.T
    if not len(stays):
        return float(target.square().sum())
    return float((x[:, stays] @ torch.linalg.lstsq(x[:, stays], target).solution - target).square().sum())


def units_of(size, inputs=24):
    """Units whose inputs are not neighbours: what is theirs is said by `rows` alone."""
    return torch.randperm(inputs, generator=torch.Generator().manual_seed(3)).view(-1, size)


@pytest.mark.parametrize("step", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("size", [1, 3])
def test_elimination_adds_up_to_least_squares(size, step):
    """After every unit, in the middle of a step too; damping 1e-13 is below the comparison."""
    weight, x = problem(inputs=24)
    weight, x, rows = weight.double(), x.double(), units_of(size)
    found = eliminate(weight, x.T @ x, rows, 2, damp=1e-13, step=step)
    assert sorted({*range(len(rows))} - set(found.order.tolist())) and len(found.order) == len(rows) - 2
    for n in range(1, len(found.order) + 1):
        stays = rows[[u for u in range(len(rows)) if u not in found.order[:n]]].reshape(-1)
        assert float(found.added[:n].sum()) == pytest.approx(least_squares_error(weight, x, stays), rel=1e-6)


@pytest.mark.parametrize("step", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("size", [1, 3])
def test_elimination_takes_the_cheapest(size, step):
    """Every unit is tried by itself against torch.linalg.lstsq; costs are looked at again after each step."""
    weight, x = problem(inputs=24)
    weight, x, rows = weight.double(), x.double(), units_of(size)
    alive, order = list(range(len(rows))), []
    at_once = math.ceil((len(rows) - 2) * step)
    while len(alive) > 2:
        tried = {u: least_squares_error(weight, x, rows[[v for v in alive if v != u]].reshape(-1)) for u in alive}
        goes = sorted(alive, key=lambda u, tried=tried: tried[u])[: min(at_once, len(alive) - 2)]
        order += goes
        alive = [u for u in alive if u not in goes]
    assert eliminate(weight, x.T @ x, rows, 2, damp=1e-13, step=step).order.tolist() == order


def test_elimination_by_hand():
    """Algorithms 7.4: H = [[2, 1], [1, 2]], w = [1, 1]; either unit costs w^2 / [H^-1]_jj = 1.5."""
    gram = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    found = eliminate(torch.ones(1, 2), gram, torch.tensor([[0], [1]]), 1, damp=0.0)
    assert len(found.order) == 1 and found.added.tolist() == [pytest.approx(1.5, abs=1e-12)]


@pytest.mark.parametrize("size", [1, 3])
def test_dead_units_go_first_and_for_nothing(size):
    """However large their weights are: damping must not give them a price."""
    weight, x = problem(inputs=24)
    rows = units_of(size)
    weight[:, rows[5]] *= 1e4
    x[:, rows[5]] = 0
    found = eliminate(weight, x.T @ x, rows, 1)
    assert found.order[0] == 5 and found.added[0] == 0 and bool((found.added[1:] > 0).all())
    nothing = eliminate(weight, torch.zeros(24, 24), rows, 1)
    assert nothing.order.tolist() == list(range(len(rows) - 1, 0, -1)) and not nothing.added.any()  # the first stays


def test_one_of_two_equal_channels_goes_free():
    weight, x = problem(inputs=24)
    x[:, 17] = x[:, 4]
    found = eliminate(weight, x.T @ x, torch.arange(24)[:, None], 1, damp=1e-9, step=0.01)
    # the damping is all that two equal channels cost
    assert found.order[0] in (4, 17) and found.added[0] < 1e-4 * found.added[1]
    assert len({4, 17} & set(found.order[:2].tolist())) == 1  # the other is needed all the more


def test_elimination_changes_nothing_and_can_keep_all():
    weight, x = problem(inputs=24)
    gram = x.T @ x
    before = weight.clone(), gram.clone()
    eliminate(weight, gram, units_of(3), 2)
    assert torch.equal(weight, before[0]) and torch.equal(gram, before[1])
    found = eliminate(weight, gram, units_of(3), 8)
    assert (found.order.dtype, found.added.dtype) == (torch.int64, torch.float64) and len(found.order) == 0


# -- which units stay -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3])
def test_ziplm_takes_one_unit_after_another(size):
    """Each removal tried against torch.linalg.lstsq; damped Gram matrices are activations with rows of their own."""
    weight, x = problem(inputs=24)
    rows = units_of(size)
    damped = torch.cat([x.double(), math.sqrt(1e-3 * float(x.double().square().sum(0).mean())) * torch.eye(24)])
    alive = list(range(len(rows)))
    while len(alive) > len(rows) // 3:
        tried = {
            u: least_squares_error(weight.double(), damped, rows[[v for v in alive if v != u]].reshape(-1)) for u in alive
        }
        alive.remove(min(alive, key=lambda u, tried=tried: tried[u]))
    assert stay_one_by_one(weight, x.double().T @ x.double(), rows, len(rows) // 3) == tuple(alive)


def test_elimination_after_many_removals_is_as_exact_as_at_the_start():
    """Units that went stay in the matrices for a while: neither they nor what is taken out later may be heard of again."""
    weight, x = problem(inputs=64)
    rows = torch.randperm(64, generator=torch.Generator().manual_seed(1)).view(-1, 1)
    one, all_ = (eliminate(weight, (x.T @ x).double(), rows, 5, damp=1e-12, step=step) for step in (0.0, 1.0))
    assert sorted(one.order.tolist()) == sorted(set(one.order.tolist())) and len(one.order) == len(all_.order) == 59
    stays = rows[sorted({*range(64)} - set(one.order.tolist()))].reshape(-1)
    expected = least_squares_error(weight.double(), x.double(), stays)
    assert float(one.added.sum()) == pytest.approx(expected, rel=1e-5)
    assert float(one.added.sum()) < float(all_.added.sum())  # looking again pays


@pytest.mark.parametrize("size", [1, 3])
def test_removals_that_wait_are_removals(monkeypatch, size):
    """Carried out one by one, a few together, or never: the same units for the same errors, to rounding."""
    weight, x = problem(inputs=48)
    gram, rows = (x.T @ x).double(), units_of(size, 48)
    found = []
    for together in (1, 5, 10**6):
        monkeypatch.setattr("prunus.eliminate._TOGETHER", together)
        found.append(eliminate(weight, gram, rows, 2, damp=1e-9, step=0.0))
    for other in found[1:]:
        assert torch.equal(other.order, found[0].order)
        torch.testing.assert_close(other.added, found[0].added, rtol=1e-8, atol=0)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [1, 2])
def test_after_swaps_no_swap_helps(size, seed):
    """Every swap of two units, against torch.linalg.lstsq; and what was swapped is better than where it began."""
    weight, x = problem(inputs=12, outputs=5, seed=seed)
    weight, x = weight.double(), x.double()
    rows = units_of(size, 12)
    gram = x.T @ x
    stays = stay_after_swaps(weight, gram, rows, len(rows) // 2, damp=1e-12)
    start = sorted({*range(len(rows))} - set(eliminate(weight, gram, rows, len(rows) // 2, damp=1e-12).order.tolist()))

    def error(units):
        return least_squares_error(weight, x, rows[sorted(units)].reshape(-1))

    assert list(stays) == sorted(set(stays)) and len(stays) == len(rows) // 2
    assert error(stays) <= error(start) * (1 + 1e-9)
    for out in stays:
        for into in {*range(len(rows))} - set(stays):
            assert error({*stays, into} - {out}) >= error(stays) * (1 - 1e-6)


def test_swaps_find_what_elimination_misses():
    """Three inputs, the third the sum of the others and a little noise: the third goes for next to nothing, and then one more
    must go. Its return instead of both is worth it: y = x1 + x2 is nearly x3."""
    x = torch.randn(400, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = 0.05 * torch.randn(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = torch.cat([x, (x.sum(1) + noise)[:, None]], 1)
    weight = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64)
    rows = torch.arange(3)[:, None]
    assert stay_one_by_one(weight, x.T @ x, rows, 1) in ((0,), (1,))
    assert stay_after_swaps(weight, x.T @ x, rows, 1, swaps=0) in ((0,), (1,))
    assert stay_after_swaps(weight, x.T @ x, rows, 1) == (2,)


@pytest.mark.parametrize("choose", [stay_one_by_one, stay_after_swaps])
def test_dead_and_equal_units_are_chosen_against(choose):
    weight, x = problem(inputs=24)
    weight[:, 5] *= 100
    x[:, 5], x[:, 17] = 0, x[:, 4]
    stays = choose(weight, x.T @ x, torch.arange(24)[:, None], 16)
    assert 5 not in stays and len({4, 17} & set(stays)) < 2
    assert choose(weight, x.T @ x, torch.arange(24)[:, None], 24) == tuple(range(24))
    assert choose(weight, torch.zeros(24, 24), torch.arange(24)[:, None], 2) == (0, 1)
