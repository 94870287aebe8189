"""prunus: what an error costs, and what each size costs."""

from __future__ import annotations

import pipeline
import pytest
import tiny
import torch
from surgery import CLOSE, DAMP, FITTED, WINDOWS, job_for, naive_fisher, naive_gradients, naive_prices, readers

from prunus.curves import _heard, _together, error_curves, output_gradients, root_of
from prunus.job import Job
from prunus.surgeon import _at_levels
from prunus.taylor import drawn

# -- what an error costs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", sorted(tiny.CASES))
def test_the_fisher_matrix_of_every_family_is_its_formula(case):
    model = pipeline.model(case)
    job = job_for(model)
    found = output_gradients(job).fisher
    modules = [module for _, module in readers(job.plan.anatomy)]
    assert set(found) == {f"{module}.weight" for module in modules}
    for name, expected in naive_fisher(model, WINDOWS.ids_NT, modules).items():
        got = found[f"{name}.weight"]
        assert got.dtype == torch.float64 and float(expected.abs().max()) > 1e-6
        torch.testing.assert_close(got, expected, rtol=CLOSE, atol=CLOSE * float(expected.abs().max()), msg=name)


def test_the_fisher_matrix_does_not_depend_on_the_batch():
    model = pipeline.model("llama")
    for name, one in output_gradients(job_for(model, batch_size=1)).fisher.items():
        all_ = output_gradients(job_for(model, batch_size=5)).fisher[name]
        torch.testing.assert_close(one, all_, rtol=CLOSE, atol=CLOSE * float(one.abs().max()))


def test_drawn_tokens_are_as_frequent_as_the_model_says():
    """Of 20,000 draws each token's share is within four standard errors of its probability; the same window draws the same."""
    share_V = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05])
    logits_PV, ids_T = share_V.log().expand(20_000, -1), torch.arange(20_001)
    tokens = drawn(logits_PV, ids_T)
    found_V = tokens.bincount(minlength=5) / len(tokens)
    assert ((found_V - share_V).abs() <= 4 * (share_V * (1 - share_V) / len(tokens)).sqrt()).all()
    assert torch.equal(tokens, drawn(logits_PV, ids_T)) and not torch.equal(tokens, drawn(logits_PV, ids_T + 1))


def test_the_root_of_a_fisher_matrix():
    """R^T R = F, and of a matrix that rounding made indefinite it is what is not negative."""
    g = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    root = root_of(g.T @ g)
    torch.testing.assert_close(root.T @ root, g.T @ g, rtol=1e-12, atol=1e-12)
    assert torch.isfinite(root_of(torch.diag(torch.tensor([1.0, -1e-9]).double()))).all()


# -- what each size costs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compensate", ["affine", "least-squares"])
@pytest.mark.parametrize("case", ["llama_gqa4", "llama_mha", "qwen2", "gemma2", "phi"])
@torch.no_grad()
def test_error_curves_are_removal_and_refit_judged_elsewhere(case, compensate):
    """A heard token's gradient is kept in eight bits, which moves its share in the whole by some 0.1 %."""
    model = pipeline.model(case)
    job = job_for(model, ratio=0.35, compensate=compensate)
    gradients = output_gradients(job)
    curves = error_curves(job, gradients)
    pairs = readers(job.plan.anatomy)
    assert list(curves) == [axis.name for axis, _ in pairs]
    modules = [module for _, module in pairs]
    inputs = pipeline.inputs_of(model, WINDOWS.ids_NT, modules)
    with torch.enable_grad():
        naive = naive_gradients(model, WINDOWS.ids_NT, modules)
    for axis, module in pairs[2:4]:  # of the middle layer
        weight = model.get_submodule(module).weight.double()
        rows = [torch.tensor(tiny.spans_rows(job.plan.anatomy.reader(axis.name), [u])) for u in range(axis.size)]
        x_NTC, affine = inputs[module].view(*WINDOWS.ids_NT.shape, -1), compensate == "affine"
        expected = naive_prices(x_NTC, naive[module], weight, gradients.fisher[f"{module}.weight"], rows, affine)
        curve = curves[axis.name]
        assert curve.sizes == tuple(sorted(expected)) == tuple(range(1, axis.size + 1))
        assert curve.error == pytest.approx([expected[size] for size in curve.sizes], rel=2e-3, abs=1e-9)
        assert list(curve.error) == sorted(curve.error, reverse=True) and curve.error[-1] == 0


def test_curves_do_not_depend_on_the_batch():
    model = pipeline.model("llama")
    one, five = (job_for(model, batch_size=size) for size in (1, 5))
    for name, curve in error_curves(one, output_gradients(one)).items():
        other = error_curves(five, output_gradients(five))[name]
        assert curve.error == pytest.approx(other.error, rel=2e-3)


def test_the_curve_of_two_channels_by_hand():
    """Without the other, channel j's part that the other cannot tell is lost: v_j (1 - rho^2), times w_j^T F w_j / 2 nats.

    v_j is what was seen and a fiftieth of the median, here the lower; rho is smaller for it. One window has none to judge it.
    """
    model = pipeline.model("llama", num_hidden_layers=1, intermediate_size=2)
    windows = pipeline.windows(1)
    job, module = Job(job_for(model).plan, model, dict(model.named_parameters()), windows), "model.layers.0.mlp.down_proj"
    gradients = output_gradients(job)
    x = pipeline.inputs_of(model, windows.ids_NT, [module])[module].flatten(0, 1)
    v, cov = x.var(0, correction=0), torch.cov(x.T, correction=0)[0, 1]
    v = v + DAMP * v.min()
    rho = cov / v.prod().sqrt()
    w = model.get_submodule(module).weight.detach()
    nats = [float(v[j] * (1 - rho**2) * (w[:, j] @ gradients.fisher[f"{module}.weight"] @ w[:, j])) / 2 for j in (0, 1)]
    curve = error_curves(job, gradients)["layers.0.intermediate"]
    assert curve.sizes == (1, 2)
    assert curve.error == pytest.approx([min(nats), 0.0], rel=FITTED)


def test_what_goes_together_is_a_mean_ratio():
    """Of 64 units, of 2 to 48 gone; what costs nothing tells nothing."""
    apart = torch.arange(1, 65).double() ** 1.5
    exact = 3 * apart
    exact[0], exact[48:] = 1e9, 1e9
    assert _together(exact, apart) == pytest.approx(3)
    exact[1:25] *= 4
    assert _together(exact, apart) == pytest.approx(3 * 4 ** (24 / 47))
    assert _together(torch.zeros(4).double(), torch.ones(4).double()) == 1


def test_a_quarter_of_all_tokens_is_heard_in_both_halves():
    """Never the last one, behind which nothing is drawn; first tokens as often as others."""
    heard = [(window % 2, t) for window in range(16) for t in range(17)[_heard(window, 17)]]
    assert sorted(heard) == sorted((half, t) for half in (0, 1) for t in range(16) for _ in range(2))
    assert [len(range(n)[_heard(6, n)]) for n in (2, 3, 4)] == [1, 1, 1]


def test_curves_have_the_sizes_that_the_plan_may_give():
    """Chunks of `multiple_of`, the whole, and nothing below one chunk."""
    model = pipeline.model("llama", intermediate_size=130)
    job = job_for(model, multiple_of=2)
    curves = error_curves(job, output_gradients(job))
    assert curves["layers.1.intermediate"].sizes == tuple(range(1, 131))
    sizes = _at_levels(job.plan, "layers.1.intermediate", curves["layers.1.intermediate"]).sizes
    assert sizes[0] == 2 and sizes[-1] == 130 and all(n % 2 == 0 for n in sizes) and 20 < len(sizes) <= 49
    assert curves["layers.1.kv_heads"].sizes == (1, 2, 3, 4)
    assert job.plan.prices.unit("layers.1.intermediate") == 3 * tiny.HIDDEN  # the output's biases are nobody's
    assert job.plan.prices.unit("layers.1.kv_heads") == job.plan.anatomy.unit_params("layers.1.kv_heads")
