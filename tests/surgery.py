"""prunus on tiny models, for tests, which hold it against loops in float64 over plain forward passes.

Tolerances: the library takes activations in float32,
where a product of 80 tokens is off by some 1e-7; least squares on them (condition 1e3 to 1e4, damped) by some 1e-5.
"""

from __future__ import annotations

import copy
import itertools
import math
import statistics

import pipeline
import tiny
import torch
from pipeline import plan_for
from test_taylor import CHANNELS_ALONE

from prunus.job import Job
from prunus.oneshot import one_shot_

WINDOWS = pipeline.windows(5)
CLOSE = 1e-5  # the families' norms compute in float32, so gradients agree to some 1e-7 of their size
FITTED = 1e-4  # errors of least squares on float32 sums
DAMP = 0.02  # of the median variance, for what the windows did not show
# GQA with 1, 2 and 4 query heads a group, MQA, tied and untied, biases, parallel blocks, norms behind sub-layers, fused ones
CASES = [
    "llama", "llama_tied", "llama_mha", "llama_gqa4", "llama_mqa", "llama_bias", "qwen2", "phi", "gpt_neox", "gemma2",
    "olmo2", "phi3",
]  # fmt: skip


def seen(config):
    """The text's windows, and three eighths as many of the vocabulary in random order."""
    length = WINDOWS.ids_NT.shape[1]
    generator = torch.Generator().manual_seed(0)
    vocabulary = [torch.randperm(config.vocab_size, generator=generator) for _ in range(9)]
    return torch.cat([WINDOWS.ids_NT, torch.cat(vocabulary)[: 2 * length].view(2, length)])


def ratio_for(case):
    """Where only channels can go there is less to take."""
    return 0.15 if case in CHANNELS_ALONE else 0.35


def job_for(model, batch_size=2, **request):
    plan = plan_for(model, method="prunus", **({"ratio": 0.15, "multiple_of": 1} | request))
    return Job(plan, model, dict(model.named_parameters()), WINDOWS, batch_size)


def prune(case_or_model, ratio=None, **request):
    """(outcome, the dense model)."""
    model = pipeline.model(case_or_model) if isinstance(case_or_model, str) else case_or_model
    consumed = copy.deepcopy(model)
    ratio = ratio or ratio_for(case_or_model)
    plan = plan_for(consumed, method="prunus", ratio=ratio, **({"multiple_of": 1} | request))
    return one_shot_(plan, consumed, WINDOWS, batch_size=2), model


def readers(anatomy):
    """(axis, the module that reads it) in the order in which they are cut."""
    names = [f"layers.{i}.{kind}" for i in range(tiny.LAYERS) for kind in ("kv_heads", "intermediate")]
    axes = [anatomy.axes[name] for name in names if name in anatomy.axes]
    return [(axis, anatomy.reader(axis.name).param.removesuffix(".weight")) for axis in axes]


def naive_gradients(model, ids, modules):
    """Module -> g of every token [N, T, D]: one window's summed loss of drawn tokens, plain autograd over the whole model."""
    model = copy.deepcopy(model)
    seen = {}
    for name in modules:
        model.get_submodule(name).register_forward_hook(lambda _, __, out, n=name: seen.__setitem__(n, out))
    found = {name: [] for name in modules}
    for ids_T in ids:
        logits = model(input_ids=ids_T[None], use_cache=False).logits[0].double()
        loss = torch.nn.functional.cross_entropy(logits[:-1], naive_draw(logits, ids_T), reduction="sum")
        for name, gradient in zip(modules, torch.autograd.grad(loss, [seen[name] for name in modules]), strict=True):
            found[name].append(gradient[0].double())
    return {name: torch.stack(gradients) for name, gradients in found.items()}


def naive_fisher(model, ids, modules):
    """Module -> E[g g^T], token by token."""
    tokens = len(ids) * (ids.shape[1] - 1)
    return {
        name: sum(torch.outer(g_D, g_D) for g_D in g_NTD.flatten(0, 1)) / tokens
        for name, g_NTD in naive_gradients(model, ids, modules).items()
    }


def naive_draw(logits_TV, ids_T):
    """Down each position's probabilities until they add up to the window's luck there."""
    luck = torch.rand(len(ids_T) - 1, generator=torch.Generator().manual_seed(sum(ids_T.tolist()))).tolist()
    up_to = [itertools.accumulate(logits_V.softmax(-1).tolist()) for logits_V in logits_TV[:-1]]
    return torch.tensor([next(i for i, sum_ in enumerate(sums) if sum_ >= u) for sums, u in zip(up_to, luck, strict=True)])


def naive_curve(x, weight, fisher, unit_rows, affine):
    """Size -> nats a token: units go by trial, what is left is solved anew by lstsq on the activations themselves.

    The damping is rows of its own under them. As in the library a twentieth of the units that go goes between two trials.
    """
    return naive_removal(x, weight, fisher, unit_rows, affine)[0]


def naive_removal(x, weight, fisher, unit_rows, affine):
    """`naive_curve`, and the units in the order in which they go, the last one too."""
    tokens = len(x)
    z = x - x.mean(0) if affine else x
    z = damped(z, DAMP * float(z.square().sum(0).median()))
    target = z @ weight.T

    def nats(units):
        inputs = torch.cat([unit_rows[u] for u in units])
        e_ND = z[:, inputs] @ torch.linalg.lstsq(z[:, inputs], target).solution - target
        return float(torch.einsum("nd,de,ne->", e_ND, fisher, e_ND)) / 2 / tokens

    alive, found, order = list(range(len(unit_rows))), {len(unit_rows): 0.0}, []
    at_once = math.ceil((len(alive) - 1) / 20)
    while len(alive) > 1:
        tried = {u: nats([v for v in alive if v != u]) for u in alive}
        for u in sorted(alive, key=lambda u, tried=tried: tried[u])[: min(at_once, len(alive) - 1)]:
            alive.remove(u)
            order.append(u)
            found[len(alive)] = nats(alive)
    return found, order + alive


def damped(z, square):
    return torch.cat([z, math.sqrt(square) * torch.eye(z.shape[1], dtype=z.dtype)])


def naive_prices(x_NTC, g_NTD, weight, fisher, unit_rows, affine):
    """Size -> nats a token, as `naive_curve` and judged by windows that the refit was not fitted to, two thirds.

    Each half of the windows is refitted size by size, with lstsq; the other half's errors are taken token by token. Of every
    fourth token the loss along its own gradient (which is kept in bfloat16) is held against that of all gradients; the whole is
    multiplied by the mean ratio.
    """
    in_order = sorted(range(len(x_NTC)), key=lambda w: WINDOWS.ids_NT[w].numpy().tobytes())
    x_NTC, g_NTD = x_NTC[in_order], g_NTD[in_order]
    count, length, units = len(x_NTC), x_NTC.shape[1], len(unit_rows)
    inside = naive_curve(x_NTC.flatten(0, 1), weight, fisher, unit_rows, affine)
    outside, exact, apart = ([0.0] * units for _ in range(3))
    for half in (0, 1):
        x = x_NTC[half::2].flatten(0, 1)
        mean = x.mean(0) * affine
        _, order = naive_removal(x, weight, fisher, unit_rows, affine)
        others = [w for w in range(count) if w % 2 != half]
        for gone in range(1, units):
            stay = torch.cat([unit_rows[u] for u in order[gone:]])
            z = damped(x - mean, 1e-4 * float((x - mean).square().sum(0).mean()))
            solution = torch.linalg.lstsq(z[:, stay], z @ weight.T).solution
            for w in others:
                e_TD = (x_NTC[w] - mean) @ weight.T - (x_NTC[w] - mean)[:, stay] @ solution
                outside[gone] += 0.5 * float(torch.einsum("td,de,te->", e_TD, fisher, e_TD)) / 2 / len(others) / length
                for t in range(w // 2 % 4, length - 1, 4):
                    lost = float(e_TD[t] @ g_NTD[w, t].bfloat16().double())
                    exact[gone] += math.sqrt(1 + lost**2) - 1
                    apart[gone] += float(e_TD[t] @ fisher @ e_TD[t]) / 2
    places = range(max(1, round(units / 32)), max(1, min(round(0.75 * units), units - 1)) + 1)
    together = statistics.geometric_mean(exact[k] / apart[k] for k in places)
    prices, most = {units: 0.0}, 0.0
    for gone in range(1, units):
        both = (inside[units - gone] + 2 * outside[gone]) / 3
        most = max(most, both * together)
        prices[units - gone] = most
    return prices
