"""The chunked loss of the head against autograd on all logits, value and gradients, in every form."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from prunus.train import loss as module
from prunus.train.loss import IGNORED, Mix, head_loss, head_nll

N, D, V = 11, 6, 17


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 4)


def data(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator, dtype=dtype).requires_grad_()
    bias = torch.randn(V, generator=generator, dtype=dtype).requires_grad_()
    targets = torch.randint(0, V, (N,), generator=generator)
    return hidden, weight, bias, targets


def naive(hidden, weight, bias, targets, cap, mix, teacher):
    logits = hidden @ weight.T + (0 if bias is None else bias)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    hard = cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED)
    if mix is None:
        return hard
    t = mix.temperature
    counted = (targets != IGNORED)[:, None]
    soft = kl_div(log_softmax(logits / t, 1), log_softmax(teacher / t, 1), reduction="none", log_target=True)
    return mix.mix * t * t * (soft * counted).sum() + (1 - mix.mix) * hard


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("mixed", [None, (1.0, 1.0), (0.3, 2.5)])
def test_value_and_gradients(cap, with_bias, ignored, mixed):
    hidden, weight, bias, targets = data()
    bias = bias if with_bias else None
    if ignored:
        targets[[0, 5, 10]] = IGNORED
    teacher = torch.randn(N, V, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    mix = None if mixed is None else Mix(lambda part: teacher[part], *mixed)
    leaves = [x for x in (hidden, weight, bias) if x is not None]
    want = naive(hidden, weight, bias, targets, cap, mix, teacher)
    ours = head_loss(hidden, weight, targets, bias_V=bias, cap=cap, mix=mix)
    assert float(ours.detach()) == pytest.approx(float(want.detach()), rel=1e-12)
    for mine, theirs in zip(torch.autograd.grad(3 * ours, leaves), torch.autograd.grad(3 * want, leaves), strict=True):
        assert (mine - theirs).abs().max() < 1e-12


def test_the_chunk_does_not_matter(monkeypatch):
    values = set()
    for chunk in (1, 3, 11, 512):
        monkeypatch.setattr(module, "CHUNK", chunk)
        hidden, weight, _, targets = data()
        values.add(round(float(head_loss(hidden, weight, targets).detach()), 12))
    assert len(values) == 1


def test_bfloat16_states_and_float32_weights():
    """As under autocast: products in bfloat16, sums and softmax in float32; 8 bits of mantissa leave half a percent."""
    hidden, weight, _, targets = data(torch.float32)
    want = cross_entropy(hidden @ weight.T, targets, reduction="sum")
    narrow = hidden.detach().bfloat16().requires_grad_()
    ours = head_loss(narrow, weight, targets)
    assert ours.dtype == torch.float32 and float(ours.detach()) == pytest.approx(float(want.detach()), rel=0.02)
    mine = torch.autograd.grad(ours, [narrow, weight])
    theirs = torch.autograd.grad(want, [hidden, weight])
    assert mine[0].dtype == torch.bfloat16 and mine[1].dtype == torch.float32
    for a, b in zip(mine, theirs, strict=True):
        assert (a.float() - b).abs().max() < 0.03 * b.abs().max()


def test_a_teacher_that_is_the_student_teaches_nothing():
    hidden, weight, _, targets = data()
    logits = (hidden @ weight.T).detach()
    ours = head_loss(hidden, weight, targets, mix=Mix(lambda part: logits[part]))
    assert abs(float(ours.detach())) < 1e-12
    assert all(g.abs().max() < 1e-12 for g in torch.autograd.grad(ours, [hidden, weight]))


def test_no_product_holds_all_logits(monkeypatch):
    seen = []
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **k: seen.append(tuple(a.shape)) or real(a, b, **k))
    hidden, weight, _, targets = data()
    head_loss(hidden, weight, targets)
    assert {rows for rows, _ in seen} == {4, 3}


def test_nll_of_every_token():
    hidden, weight, bias, targets = data()
    want = cross_entropy((2 * torch.tanh((hidden @ weight.T + bias) / 2)).float(), targets, reduction="none").double()
    assert (head_nll(hidden, weight, targets, bias, 2.0) - want).abs().max() < 1e-6
