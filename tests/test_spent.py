"""Products are counted as they run."""

from __future__ import annotations

import cutter
import pipeline
import pytest
import torch

from prunus.anatomy import Anatomy
from prunus.combination import planned
from prunus.oneshot import one_shot_
from prunus.planning import Request
from prunus.spent import Flops


@pytest.mark.parametrize("case", ["llama", "llama_mqa", "phi_qk", "gpt_neox", "gemma2"])
def test_a_forward_pass_is_what_the_anatomy_says(case):
    """Eager attention (softcaps) and fused attention alike; twice that on the way back, where scores are not made again."""
    model = pipeline.model(case, dtype=torch.float32)
    ids = torch.zeros(3, 16, dtype=torch.int64)
    expected = 3 * Anatomy.of(model.config).flops(16)
    with Flops() as spent:
        out = model(input_ids=ids, use_cache=False).logits
    assert spent.total == expected
    with Flops() as spent:
        out.sum().backward()
    assert 2 * expected <= spent.total <= 2.25 * expected


def test_all_kinds_of_products():
    a, b = torch.zeros(5, 2, 3), torch.zeros(5, 3, 4)
    with Flops() as spent:
        a @ b  # bmm
        a[0] @ b[0]  # mm
        a[0] @ b[0, :, 0]  # mv
        torch.addmm(torch.zeros(4), a[0], b[0])
        torch.baddbmm(torch.zeros(5, 2, 4), a, b)
        torch.zeros(2, 4).addmm_(a[0], b[0])
        torch.zeros(5, 2, 4).baddbmm_(a, b)
        torch.mm(a[0], b[0], out=torch.empty(2, 4))
        a + 1
    assert spent.total == 2 * 2 * 3 * 4 * (5 + 1 + 1 + 5 + 1 + 5 + 1) + 2 * 2 * 3


@pytest.mark.parametrize("name", ["shortgpt", "minitron-depth", "sleb"])
def test_passes_alone_cost_what_the_plan_foretold(name):
    model = pipeline.model("llama")
    plan = planned(model.config, Anatomy.of(model.config), Request(**cutter.cases()[name]))
    foretold = plan.scoring_flops(cutter.WINDOWS.num_windows, cutter.WINDOWS.seq_len)
    assert one_shot_(plan, model, cutter.WINDOWS, batch_size=2).flops == foretold


def test_parts_add_up():
    parts = [cut(pipeline.model("llama"), method) for method in ("shortgpt", "shortgpt+magnitude")]
    assert parts[0].flops == parts[1].flops > 0


def cut(model, method):
    more = {"sparsity": 0.5} if "+" in method else {}
    plan = planned(model.config, Anatomy.of(model.config), Request(method=method, ratio=0.3, **more))
    return one_shot_(plan, model, cutter.WINDOWS, batch_size=2)
