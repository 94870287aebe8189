"""The chunked loss of the head against autograd on all logits, value and gradients, in every form."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.utils._python_dispatch import TorchDispatchMode

from prunus.train import loss as module
from prunus.train.loss import IGNORED, Likeliest, Mix, head_loss, head_nll

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


class Made(TorchDispatchMode):
    """Notes the shapes of what is computed."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.shapes |= {tuple(out.shape)} if isinstance(out, torch.Tensor) else set()
        return out


def test_logits_of_all_tokens_are_never_made():
    hidden, weight, _, targets = data()
    with Made() as made:
        head_loss(hidden, weight, targets)
    assert {shape[0] for shape in made.shapes if shape[1:] == (V,)} == {4, 3, D}, "chunks of tokens; and the weight, turned"


def test_nll_of_every_token():
    hidden, weight, bias, targets = data()
    want = cross_entropy((2 * torch.tanh((hidden @ weight.T + bias) / 2)).float(), targets, reduction="none").double()
    assert (head_nll(hidden, weight, targets, bias, 2.0) - want).abs().max() < 1e-6


# -- a teacher that names its likeliest tokens only -----------------------------------------------------------------------


def lumped(logits, teacher, k, temperature):
    """Token by token, in Python's own sums: the KL over k + 1 outcomes, times the square of the temperature."""
    out = []
    for z, y in zip(logits, teacher, strict=True):
        q, p = torch.softmax(z / temperature, 0), torch.softmax(y / temperature, 0).tolist()
        likeliest = sorted(range(len(p)), key=lambda i: -p[i])[:k]
        others = [i for i in range(len(p)) if i not in likeliest]
        terms = [p[i] * (math.log(p[i]) - q[i].log()) for i in likeliest]
        if others:
            rest = sum(p[i] for i in others)
            terms.append(rest * (math.log(rest) - sum(q[i] for i in others).log()))
        out.append(temperature**2 * sum(terms))
    return torch.stack(out)


def taught(logits, k, temperature):
    return lambda part: Likeliest.of(logits[part], k, temperature)


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize(("mix", "temperature"), [(1.0, 1.0), (0.3, 2.5)])
@pytest.mark.parametrize("k", [1, 5, V - 1, V])
def test_likeliest_tokens_and_the_tail(cap, mix, temperature, k):
    """Against a loop and autograd. The teacher's tail is 1 less the others, to 1e-16: relative to 1e-3 that is 1e-13."""
    hidden, weight, bias, targets = data()
    targets[[0, 5, 10]] = IGNORED
    teacher = torch.randn(N, V, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    logits = hidden @ weight.T + bias
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    soft = (lumped(logits, teacher, k, temperature) * (targets != IGNORED)).sum()
    hard = cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED)
    want = mix * soft + (1 - mix) * hard
    ours = head_loss(
        hidden, weight, targets, bias_V=bias, cap=cap, mix=Mix(taught(teacher, k, temperature), mix, temperature)
    )
    assert float(ours.detach()) == pytest.approx(float(want.detach()), rel=1e-12)
    leaves = (hidden, weight, bias)
    for mine, theirs in zip(torch.autograd.grad(3 * ours, leaves), torch.autograd.grad(3 * want, leaves), strict=True):
        assert (mine - theirs).abs().max() < 1e-12


def test_all_tokens_are_the_whole_divergence():
    hidden, weight, _, targets = data()
    teacher = torch.randn(N, V, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    found = [
        head_loss(hidden, weight, targets, mix=Mix(how, 1.0, 2.0))
        for how in (lambda part: teacher[part], taught(teacher, V, 2.0))
    ]
    a, b = ([x.detach(), *torch.autograd.grad(x, (hidden, weight))] for x in found)
    assert all((x - y).abs().max() < 1e-12 for x, y in zip(a, b, strict=True))


def test_three_tokens_by_hand():
    """p = (1/2, 1/4, 1/4), q = 1/3 each, one token named: 1/2 log(3/2) + 1/2 log(3/4); the tail's two share one pull."""
    p = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64)
    loss, grad = module._mixed(
        torch.zeros(1, 3, dtype=torch.float64), torch.zeros(1).long(), Mix(taught(p.log(), 1, 1.0)), slice(1)
    )
    assert float(loss) == pytest.approx(0.5 * math.log(1.5) + 0.5 * math.log(0.75), rel=1e-14)
    assert grad[0].tolist() == pytest.approx([-1 / 6, 1 / 12, 1 / 12], rel=1e-14)


@pytest.mark.parametrize("sign", [1, -1])
def test_tails_of_next_to_nothing(sign):
    """A teacher and a student that are sure, of the same or of opposite tokens: float32 is right, and nothing is NaN.

    The student's tail is e^-200, which float32 rounds to 0; as a logarithm it has seven digits all the same.
    """
    teacher = torch.tensor([[100.0, 90.0, -100.0, -101.0]])
    z = sign * torch.tensor([[100.0, 95.0, -100.0, -100.5]])
    for k in (1, 2, 3, 4):
        loss, grad = module._mixed(z, torch.zeros(1).long(), Mix(taught(teacher, k, 1.0)), slice(1))
        wide = z.double().requires_grad_()
        want = lumped(wide, teacher.double(), k, 1.0).sum()
        (theirs,) = torch.autograd.grad(want, wide)
        assert float(loss) == pytest.approx(float(want.detach()), rel=1e-6, abs=2e-5)  # 1e-7 of a tail, times log q = 200
        assert (grad - theirs).abs().max() < 1e-6


def test_rounded_logarithms_are_made_a_distribution():
    """Float16 may carry k probabilities past 1: no tail is negative, and a student that agrees feels no pull."""
    logs = torch.tensor([[0.5, 0.3, 0.2]]).log() + 4e-4
    assert float(logs.exp().sum()) > 1
    for logits in (logs, torch.cat([logs, torch.tensor([[-30.0]])], 1)):
        few = Likeliest(torch.tensor([[0, 1, 2]]), logs)
        loss, grad = module._mixed(logits.clone(), torch.zeros(1).long(), Mix(lambda part, few=few: few), slice(1))
        assert abs(float(loss)) < 1e-6 and grad.abs().max() < 1e-6


def test_likeliest_are_asked_for_chunk_by_chunk():
    hidden, weight, _, targets = data()
    teacher, asked = torch.zeros(N, V, dtype=torch.float64), []
    head_loss(hidden, weight, targets, mix=Mix(lambda part: asked.append(part) or taught(teacher, 2, 1.0)(part)))
    assert [part.start for part in asked] == [0, 4, 8]
