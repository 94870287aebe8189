"""Layers and sub-layers that go: scores and losses against naive models with zeroed outputs, searches against brute force."""

from __future__ import annotations

import copy
import json
import math
from itertools import pairwise

import pipeline
import pytest
import tiny
import torch
from pipeline import plan_for

from prunus import api, depth
from prunus.anatomy import Anatomy
from prunus.depth import Part, greedy, keep_without, losses_without, lowest, within_budget
from prunus.errors import UserError
from prunus.hf import SUBLAYERS
from prunus.job import Job
from prunus.oneshot import one_shot_
from prunus.planning import sublayer_costs
from prunus.statistics import Sweep

WINDOWS = pipeline.windows(5)
CASES = [
    "llama",
    "llama_tied",
    "llama_gqa4",
    "qwen2",
    "qwen3",
    "gemma2",
    "olmo",
    "olmo2",
    "phi",
    "phi3",
    "smollm3",
    "gpt_neox",
]
TIGHT = 1e-5  # losses go through float32's softmax
OUTPUTS = {"phi": ("self_attn.dense", "mlp.fc2"), "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h")}
NO_LISTS = {case: {"layer_types": None} for case in ("qwen2", "gemma2")} | {"smollm3": {"no_rope_layers": None}}
NONE = {"options": {"protect": "0,0"}}
PERPLEXITY = {"options": {"score": "perplexity", "protect": "0,0"}}


def blocks(model):
    return model.get_submodule(Anatomy.of(model.config).family.blocks)


def silence_(model, layer, sublayer):
    """The naive removal: what a sub-layer writes into the stream becomes zero."""
    outputs = OUTPUTS.get(model.config.model_type, ("self_attn.o_proj", "mlp.down_proj"))
    linear = blocks(model)[layer].get_submodule(outputs[SUBLAYERS.index(sublayer)])
    with torch.no_grad():
        for p in linear.parameters():
            p.zero_()


def without(model, units):
    """A copy without (layer, sub-layer) pairs; a layer alone means both."""
    out = copy.deepcopy(model)
    for unit in units:
        for sublayer in SUBLAYERS if isinstance(unit, int) else unit[1:]:
            silence_(out, unit if isinstance(unit, int) else unit[0], sublayer)
    return out


def mean_loss(model, ids=WINDOWS.ids_NT):
    """Nats a token, position by position."""
    log_p = tiny.logits_of(model, ids).double().log_softmax(-1)
    return -log_p[:, :-1].gather(-1, ids[:, 1:, None]).mean().item()


def prune(model, method, windows=WINDOWS, batch_size=2, **request):
    consumed = copy.deepcopy(model)
    return one_shot_(plan_for(consumed, method=method, **request), consumed, windows, batch_size=batch_size)


def kept_layers(outcome):
    return outcome.keep.units["layers"]


def job_for(model, method="shortgpt", ratio=0.34, windows=WINDOWS, batch_size=2, **request):
    return Job(
        plan_for(model, method=method, ratio=ratio, **request), model, dict(model.named_parameters()), windows, batch_size
    )


def same_model(outcome, naive, exact=1e-9):
    outcome.model.set_attn_implementation("eager")
    logits = tiny.logits_of(outcome.model, WINDOWS.ids_NT)
    torch.testing.assert_close(logits, tiny.logits_of(naive, WINDOWS.ids_NT), rtol=exact, atol=exact)
    cached = tiny.greedy_cached(outcome.model, WINDOWS.ids_NT[:1, :5], 4)
    assert torch.equal(cached, tiny.greedy_by_hand(naive, WINDOWS.ids_NT[:1, :5], 4))


# -- searches -----------------------------------------------------------------------------------------------------------


def test_the_lowest_go_and_ties_go_to_the_lower_index():
    assert lowest([3.0, 1.0, 2.0], 2) == [1, 2]
    assert lowest([1.0, 0.0, 1.0, 0.0], 3) == [1, 3, 0]
    assert lowest([math.inf, math.nan, -math.inf], 2) == [2, 0]


def test_what_is_no_number_is_never_chosen():
    assert lowest([math.nan, 5.0], 1) == [1]
    with pytest.raises(UserError, match=r"scores: 2 must go, but only 1 of 2 candidates have a score that is a number; try"):
        lowest([math.nan, 5.0], 2)


def test_greedy_sees_what_is_gone():
    """Section 2.10: 1 and 2 do the same job. Either is free to remove, both together are not; 3 always costs a little."""

    def loss(gone):
        return 10.0 * ({1, 2} <= gone) + 0.5 * (3 in gone)

    def losses(ready, gone):
        return [loss({*gone, unit}) for unit in ready]

    rounds = greedy(lambda gone: [u for u in (1, 2, 3) if u not in gone][: 3 * (len(gone) < 2)], losses)
    assert [r.gone for r in rounds] == [1, 3]
    assert [r.losses[r.chosen] for r in rounds] == [0.0, 0.5]
    assert list(rounds[1].candidates) == [2, 3] and list(rounds[1].losses) == [10.0, 0.5]
    assert [(1, 2, 3)[i] for i in lowest(losses((1, 2, 3), []), 2)] == [1, 2]  # one shot removes both


@pytest.mark.parametrize("case", ["llama", "gemma2", "phi", "gpt_neox"])
@pytest.mark.parametrize("sublayers", ["both", "attention", "mlp"])
@pytest.mark.parametrize("seed", range(4))
def test_the_budget_is_met_within_one_smallest_sub_layer_whatever_the_losses(case, sublayers, seed):
    config = pipeline.config(case, num_hidden_layers=7, **NO_LISTS.get(case, {}))
    anatomy = Anatomy.of(config)
    generator = torch.Generator().manual_seed(seed)
    for ratio in (0.08, 0.15, 0.2, 0.33, 0.5, 0.7, 0.85):
        unit = max(anatomy.unit_params(f"layers.0.{kind}") for kind in SUBLAYERS if sublayers in (kind, "both"))
        possible = sum(
            anatomy.unit_params(f"layers.{i}.{k}") for i in range(7) for k in SUBLAYERS if sublayers in (k, "both")
        )
        if not unit <= ratio * anatomy.block_params <= possible - unit:
            continue
        plan = plan_for(config, method="sublayer-greedy", ratio=ratio, options={"sublayers": sublayers})
        free = [Part(int(n.split(".")[1]), 1, (n.split(".")[2],)) for n in sublayer_costs(plan)]
        rounds = greedy(
            lambda gone, a=(anatomy, free, plan.budget): within_budget(a[0], a[1], gone, a[2]),
            lambda ready, gone: torch.rand(len(ready), generator=generator).tolist(),
        )
        keep = keep_without(anatomy, [r.gone for r in rounds]).validated(anatomy)
        after = keep.anatomy_after(anatomy)
        assert after.block_params <= plan.budget and after.shape.num_hidden_layers
        last = [r.gone for r in rounds[:-1]]
        before = keep_without(anatomy, last).anatomy_after(anatomy).block_params
        smallest = min(
            before - keep_without(anatomy, [*last, p]).anatomy_after(anatomy).block_params for p in free if p not in last
        )
        assert after.block_params > plan.budget - smallest


# -- shortgpt -----------------------------------------------------------------------------------------------------------


def streams(model, ids):
    """(in, out) of every block in one plain forward of the whole model."""
    seen, handles = [], []
    for block in blocks(model):
        handles.append(
            block.register_forward_hook(
                lambda _, args, out: seen.append((args[0], out[0] if isinstance(out, tuple) else out))
            )
        )
    tiny.logits_of(model, ids)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("case", CASES)
def test_block_influence_is_its_formula(case):
    model = pipeline.model(case)
    expected = []
    for before, after in streams(model, WINDOWS.ids_NT):
        cosine = (before * after).sum(-1) / before.norm(dim=-1) / after.norm(dim=-1)
        expected.append(1 - float(cosine.mean()))
    outcome = prune(model, "shortgpt", ratio=0.5)
    assert outcome.scores.values["layers"].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    gone = pipeline.lowest(expected, 2)
    assert kept_layers(outcome) == tuple(i for i in range(3) if i not in gone)
    same_model(outcome, without(model, gone))


@pytest.mark.parametrize("planted", [0, 1, 2])
def test_a_block_that_does_nothing_has_no_influence(planted):
    model = without(pipeline.model("llama", dtype=torch.float32), [planted])
    outcome = prune(model, "shortgpt", ratio=0.34)
    assert abs(float(outcome.scores.values["layers"][planted])) < 1e-6  # float32's rounding of a cosine of 1
    assert kept_layers(outcome) == tuple(i for i in range(3) if i != planted)


def test_a_block_that_rotates_every_token_by_60_degrees_has_influence_one_half():
    class Rotate(torch.nn.Module):
        def forward(self, hidden_states, **_):
            a, b = hidden_states.chunk(2, -1)
            turned = torch.cat([-b, a], -1)  # by 90 degrees
            return 0.5 * hidden_states + math.sqrt(3) / 2 * turned

    model = pipeline.model("llama", dtype=torch.float32)
    model.model.layers[1] = Rotate()
    job = job_for(model)
    assert depth.block_influence(job)[1] == pytest.approx(0.5, abs=1e-6)


def test_block_influence_of_a_bfloat16_model_is_not_rounded_to_bfloat16():
    """B2 (f): in bfloat16 a cosine has steps of 1/256 below 1, and small distances come out as zero."""
    model = pipeline.model("llama", dtype=torch.bfloat16)
    with torch.no_grad():
        for block in blocks(model):
            block.self_attn.o_proj.weight.mul_(0.05)
            block.mlp.down_proj.weight.mul_(0.05)
    values = depth.block_influence(job_for(model))
    assert all(0 < value < 1 / 256 for value in values) and len({round(v, 7) for v in values}) == 3


# -- shortened-llama ----------------------------------------------------------------------------------------------------


def naive_taylor(model, ids, abs_first=False):
    """Sum over a layer's parameters of |w * sum over windows of g|, by plain autograd over the whole model."""
    model = copy.deepcopy(model)
    per_window, count = [], len(ids)
    for ids_T in ids:
        model.zero_grad()
        logits = model(input_ids=ids_T[None], use_cache=False).logits[0].double()
        (torch.nn.functional.cross_entropy(logits[:-1], ids_T[1:]) / count).backward()
        per_window.append([[p.detach().double() * p.grad.double() for p in block.parameters()] for block in blocks(model)])
    out = []
    for layer in range(len(blocks(model))):
        products = [torch.stack([w[layer][t] for w in per_window]) for t in range(len(per_window[0][layer]))]
        out.append(sum(float((x.abs().sum(0) if abs_first else x.sum(0).abs()).sum()) for x in products))
    return out


@pytest.mark.parametrize("case", [*CASES, "llama_bias"])
def test_taylor_is_its_formula(case):
    model = pipeline.model(case)
    expected = naive_taylor(model, WINDOWS.ids_NT)
    for batch_size in (5, 2):
        outcome = prune(model, "shortened-llama", ratio=0.34, batch_size=batch_size, **NONE)
        assert outcome.scores.values["layers"].tolist() == pytest.approx(expected, rel=TIGHT)
        assert kept_layers(outcome) == tuple(i for i in range(3) if i != expected.index(min(expected)))
    other = naive_taylor(model, WINDOWS.ids_NT, abs_first=True)
    assert all(a > 1.2 * b for a, b in zip(other, expected, strict=True))  # the order of abs and sum is at stake


@pytest.mark.parametrize("planted", [0, 2])
def test_a_dead_layer_has_a_taylor_score_of_exactly_zero(planted):
    model = without(pipeline.model("llama", dtype=torch.float32), [planted])
    outcome = prune(model, "shortened-llama", ratio=0.34, **NONE)
    scores = outcome.scores.values["layers"].tolist()
    assert scores[planted] == 0.0 and min(s for i, s in enumerate(scores) if i != planted) > 0
    assert kept_layers(outcome) == tuple(i for i in range(3) if i != planted)


def test_taylor_leaves_no_gradients_and_no_flags():
    model = pipeline.model("llama")
    for p in model.parameters():
        p.requires_grad_(False)
    job = job_for(model, "shortened-llama", **NONE)
    depth.layer_taylor(job)
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert job.plan.free_layers == range(3)


def test_taylor_in_bfloat16_is_near_float32():
    exact = pipeline.model("llama_tied", dtype=torch.float32)
    rounded = copy.deepcopy(exact).to(torch.bfloat16)
    values = [depth.layer_taylor(job_for(m, "shortened-llama", **NONE)) for m in (exact, rounded)]
    assert values[1] == pytest.approx(values[0], rel=0.05)


@pytest.mark.parametrize("case", CASES)
def test_perplexity_is_deletion(case):
    model = pipeline.model(case)
    expected = [mean_loss(without(model, [i])) for i in range(3)]
    outcome = prune(model, "shortened-llama", ratio=0.67, **PERPLEXITY)
    assert outcome.losses == pytest.approx(expected, rel=TIGHT)
    gone = pipeline.lowest(expected, 2)
    assert kept_layers(outcome) == tuple(i for i in range(3) if i not in gone)
    same_model(outcome, without(model, gone))


@pytest.mark.parametrize("score", ["taylor", "perplexity"])
def test_the_first_four_and_last_two_layers_stay(score):
    model = without(pipeline.model("llama", num_hidden_layers=9), [0, 3, 7, 8])  # these would go first
    outcome = prune(model, "shortened-llama", target={"num_hidden_layers": 6}, options={"score": score})
    assert kept_layers(outcome) == (0, 1, 2, 3, 7, 8)
    one = prune(model, "shortened-llama", target={"num_hidden_layers": 8}, options={"score": score})
    assert set(range(9)) - set(kept_layers(one)) < {4, 5, 6}
    bare = prune(model, "shortened-llama", target={"num_hidden_layers": 5}, options={"score": score, "protect": "0,0"})
    assert score == "perplexity" or kept_layers(bare) == (1, 2, 4, 5, 6)


# -- sleb ---------------------------------------------------------------------------------------------------------------


def naive_greedy(model, units, rounds):
    """(removed, losses of the removed) by copies of the whole model."""
    gone, losses = [], []
    for _ in range(rounds):
        tried = {unit: mean_loss(without(model, [*gone, unit])) for unit in units if unit not in gone}
        best = min(tried, key=lambda unit: tried[unit])
        gone.append(best)
        losses.append(tried[best])
    return gone, losses


@pytest.mark.parametrize("case", CASES)
def test_sleb_is_naive_greed(case):
    model = pipeline.model(case, num_hidden_layers=6, **NO_LISTS.get(case, {}))
    gone, losses = naive_greedy(model, range(1, 5), 3)
    for batch_size in (5, 2):
        outcome = prune(model, "sleb", target={"num_hidden_layers": 3}, batch_size=batch_size)
        assert outcome.losses == pytest.approx(losses, rel=TIGHT)
        assert kept_layers(outcome) == tuple(i for i in range(6) if i not in gone)
    rounds = outcome.measured["losses"]["rounds"]
    assert [r["removed"] for r in rounds] == [f"layers.{i}" for i in gone]
    assert [len(r["losses"]) for r in rounds] == [4, 3, 2]
    same_model(outcome, without(model, gone))


@pytest.mark.parametrize("case", ["llama", "gemma2", "gpt_neox"])
def test_one_greedy_removal_is_brute_force(case):
    model = pipeline.model(case)
    expected = [mean_loss(without(model, [i])) for i in range(3)]
    outcome = prune(model, "sleb", ratio=0.34, **NONE)
    assert kept_layers(outcome) == tuple(i for i in range(3) if i != expected.index(min(expected)))
    assert kept_layers(outcome) == kept_layers(prune(model, "shortened-llama", ratio=0.34, **PERPLEXITY))
    assert kept_layers(outcome) == kept_layers(prune(model, "minitron-depth", ratio=0.34))


def two_that_do_one_job():
    """Layers 1 and 2 both write 10 e0, which the final norm makes one e0; 0, 3 and 4 each write what matters a little.

    With x the share of e0 in the normed stream, the logit of the one token that ever comes is about sqrt(32) x: without 1
    or without 2 nothing changes, without both the prediction is gone.
    """
    model = pipeline.model("llama_bias", num_hidden_layers=5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "o_proj.bias", "down_proj.bias", "lm_head.weight")):
                p.zero_()
            elif "embed" in name:
                p.mul_(0.01)
        model.model.norm.weight.fill_(1.0)
        for layer, (coordinate, size, worth) in enumerate([(1, 3, 0.6), (0, 10, 1), (0, 10, 1), (2, 3, 0.4), (3, 3, 0.6)]):
            model.model.layers[layer].mlp.down_proj.bias[coordinate] = size
            model.lm_head.weight[7, coordinate] = worth
    base = pipeline.windows(3)
    return model, type(base)(torch.full((3, 16), 7), "one token", None, None, "2" * 64, None, 48)


def test_two_layers_that_do_one_job_do_not_both_go():
    """Section 2.10's check: scored one by one both go, greedy search takes one of them and then another layer."""
    model, windows = two_that_do_one_job()
    alone = prune(model, "shortened-llama", windows, target={"num_hidden_layers": 3}, **PERPLEXITY)
    assert kept_layers(alone) == (0, 3, 4)
    for options in ({}, NONE):
        one_by_one = prune(model, "sleb", windows, target={"num_hidden_layers": 3}, **options)
        assert kept_layers(one_by_one) == (0, 2, 4)  # of two equal layers the first goes
        assert one_by_one.losses[-1] == pytest.approx(mean_loss(one_by_one.model, windows.ids_NT), rel=1e-4)
        assert 4 * one_by_one.losses[-1] < mean_loss(alone.model, windows.ids_NT)


@pytest.mark.parametrize("planted", [0, 4])
def test_the_first_and_last_layer_are_barriers(planted):
    model = without(pipeline.model("llama", num_hidden_layers=5), [planted])
    windows = learnt(model)
    assert planted in kept_layers(prune(model, "sleb", windows, ratio=0.2))
    assert planted not in kept_layers(prune(model, "sleb", windows, ratio=0.2, **NONE))
    assert {0, 4} == set(kept_layers(prune(model, "sleb", windows, ratio=0.6)))


def learnt(model):
    """Windows whose every token is the model's own best guess, so that a change of the model costs loss."""
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    ids = tiny.greedy_by_hand(model, tiny.tokens(4, 2, vocab=pipeline.VOCAB), 14)
    base = pipeline.windows(4)
    return type(base)(ids, "greedy", None, None, "1" * 64, None, ids.numel())


def test_a_loss_that_is_no_number_is_never_chosen(monkeypatch):
    from prunus import depth

    model, real = pipeline.model("llama", num_hidden_layers=5), depth.losses_without

    def broken(job, parts, gone=(), tick=None):
        found = real(job, parts, gone, tick)
        return [math.nan if part.first == best else loss for part, loss in zip(parts, found, strict=True)]

    best = naive_greedy(model, range(1, 4), 1)[0][0]
    monkeypatch.setattr(depth, "losses_without", broken)
    outcome = prune(model, "sleb", target={"num_hidden_layers": 3})
    assert best in kept_layers(outcome)
    assert outcome.measured["losses"]["rounds"][0]["losses"][f"layers.{best}"] is None


# -- sub-layers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sublayers", ["both", "attention", "mlp"])
def test_losses_without_sub_layers_are_those_of_silenced_ones(case, sublayers):
    model = pipeline.model(case)
    kinds = SUBLAYERS if sublayers == "both" else (sublayers,)
    parts = [Part(i, 1, (kind,)) for i in range(3) for kind in kinds]
    job = job_for(model, "sublayer-greedy", ratio=0.2, options={"sublayers": "both"})
    for gone in ([], [Part(1, 1, ("mlp",))], [Part(0), Part(2, 1, ("attention",))]):
        absent = [(p.first, *p.sublayers) for p in gone]
        left = [p for p in parts if p not in gone]
        expected = [mean_loss(without(model, [*absent, (p.first, *p.sublayers)])) for p in left]
        assert losses_without(job, left, gone) == pytest.approx(expected, rel=TIGHT)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sublayers", ["both", "attention", "mlp"])
def test_sub_layers_go_one_by_one(case, sublayers):
    """Against greed by copies: the order, the losses, and the model that comes out, also with a cache."""
    model = pipeline.model(case)
    kinds = SUBLAYERS if sublayers == "both" else (sublayers,)
    anatomy = Anatomy.of(model.config)
    smallest = min(anatomy.unit_params(f"layers.0.{kind}") for kind in kinds)
    if sublayers == "both":
        ratio = (anatomy.unit_params("layers.0.attention") + 1.5 * smallest) / anatomy.block_params
    else:
        ratio = 1.5 * smallest / anatomy.block_params  # two of three
    outcome = prune(model, "sublayer-greedy", ratio=ratio, options={"sublayers": sublayers})
    order = [r["removed"].split(".")[1:] for r in outcome.measured["losses"]["rounds"]]
    gone = [(int(i), kind) for i, kind in order]
    if sublayers != "both":
        assert (gone, outcome.losses) == (
            naive_greedy(model, [(i, kinds[0]) for i in range(3)], 2)[0],
            pytest.approx(naive_greedy(model, [(i, kinds[0]) for i in range(3)], 2)[1], rel=TIGHT),
        )
    for r, unit in zip(outcome.measured["losses"]["rounds"], gone, strict=True):
        assert min(r["losses"].values()) == r["loss"] == r["losses"][f"layers.{unit[0]}.{unit[1]}"]
    after = sum(p.numel() for p in blocks(outcome.model).parameters())
    assert outcome.target.anatomy.block_params == after <= (1 - ratio) * anatomy.block_params
    same_model(outcome, without(model, gone))
    whole = len({i for i, _ in gone}) < len(gone)
    assert outcome.model.config.model_type == f"pruned_{model.config.model_type}" or whole


def test_a_layer_that_loses_both_sub_layers_goes_whole():
    """Layer 1 does nothing, so both its parts go first; what comes out is a stock model of two layers."""
    model = without(pipeline.model("llama"), [1])
    windows = learnt(model)
    outcome = prune(model, "sublayer-greedy", windows, ratio=0.33)
    assert outcome.keep.units == {"layers": (0, 2)} and outcome.target.is_stock
    assert outcome.model.config.model_type == "llama" and len(outcome.losses) == 2
    same_model(outcome, model)


def test_a_layer_that_goes_whole_takes_what_its_sub_layers_share():
    """Phi's one norm feeds both sub-layers, and is counted when the second of them goes."""
    config = pipeline.config("phi")
    anatomy = Anatomy.of(config)
    shared = 2 * tiny.HIDDEN
    mlp, attention = (anatomy.unit_params(f"layers.0.{kind}") for kind in ("mlp", "attention"))
    assert anatomy.block_params == 3 * (mlp + attention + shared)
    gone = [Part(0, 1, ("mlp",)), Part(0, 1, ("attention",))]
    assert keep_without(anatomy, gone[:1]).anatomy_after(anatomy).block_params == anatomy.block_params - mlp
    assert keep_without(anatomy, gone).anatomy_after(anatomy).block_params == 2 * anatomy.block_params // 3


def test_the_smallest_is_what_is_left_for_a_small_rest():
    """An MLP would overshoot by more than an attention sub-layer's size, so only the attention may go."""
    config = pipeline.config("llama", intermediate_size=160)
    anatomy = Anatomy.of(config)
    attention, mlp = (anatomy.unit_params(f"layers.0.{kind}") for kind in SUBLAYERS)
    assert mlp > 2 * attention
    parts = [Part(i, 1, (kind,)) for i in range(3) for kind in SUBLAYERS]
    small = within_budget(anatomy, parts, [], anatomy.block_params - attention)
    assert {p.sublayers for p in small} == {("attention",)}
    assert len(within_budget(anatomy, parts, [], anatomy.block_params - mlp)) == 6
    assert within_budget(anatomy, parts, [parts[0]], anatomy.block_params - attention) == []
    rest = within_budget(anatomy, parts, parts[::2], anatomy.block_params - 3 * attention - 1)
    assert rest == parts[1::2]  # no attention is left: the smallest is an MLP


def test_sub_layers_of_a_model_that_lacks_some_already():
    first = prune(pipeline.model("llama"), "sublayer-greedy", ratio=0.3, options={"sublayers": "attention"})
    first.model.set_attn_implementation("eager")
    lacking = {i for i, layer in enumerate(first.target.anatomy.shape.layers) if layer.skipped}
    assert lacking and first.target.anatomy.shape.num_hidden_layers == 3
    second = prune(first.model, "sublayer-greedy", ratio=0.2)
    rounds = second.measured["losses"]["rounds"]
    assert not {f"layers.{i}.attention" for i in lacking} & set(rounds[0]["losses"])
    gone = [(int(r["removed"].split(".")[1]), r["removed"].split(".")[2]) for r in rounds]
    same_model(second, without(first.model, gone))
    for method, request in (("shortgpt", {}), ("sleb", NONE), ("shortened-llama", NONE), ("shortened-llama", PERPLEXITY)):
        again = prune(first.model, method, ratio=0.34, **request)
        (gone,) = set(range(3)) - set(kept_layers(again))
        naive = copy.deepcopy(first.model)
        for sublayer in set(SUBLAYERS) - set(first.target.anatomy.shape.layers[gone].skipped):
            silence_(naive, gone, sublayer)
        same_model(again, naive)


# -- all of them --------------------------------------------------------------------------------------------------------

ALL = [
    ("shortgpt", 0.34, {}),
    ("shortened-llama", 0.34, NONE),
    ("shortened-llama", 0.34, PERPLEXITY),
    ("sleb", 0.34, {}),
    ("sublayer-greedy", 0.3, {}),
    ("sublayer-greedy", 0.25, {"options": {"sublayers": "attention"}}),
]


@pytest.mark.parametrize(("method", "ratio", "request_"), ALL)
@pytest.mark.parametrize("case", ["llama_tied", "llama_gqa4", "gemma2"])
def test_bfloat16_models_run(case, method, ratio, request_):
    model = pipeline.model(case, dtype=torch.bfloat16)
    outcome = prune(model, method, ratio=ratio, **request_)
    assert {p.dtype for p in outcome.model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(tiny.logits_of(outcome.model, WINDOWS.ids_NT)).all()
    assert outcome.target.anatomy.num_params == sum(p.numel() for p in outcome.model.parameters())
    tied = outcome.model.get_input_embeddings().weight is outcome.model.get_output_embeddings().weight
    assert tied == model.config.tie_word_embeddings


@pytest.mark.parametrize(("method", "ratio", "request_"), ALL)
@pytest.mark.parametrize("case", ["llama", "qwen3", "olmo2"])
def test_the_decision_does_not_depend_on_the_batch(case, method, ratio, request_):
    model = pipeline.model(case)
    one, many = (prune(model, method, ratio=ratio, batch_size=size, **request_) for size in (1, 5))
    assert one.keep == many.keep


@pytest.mark.parametrize(("method", "ratio", "request_"), ALL)
def test_progress_goes_up_to_the_end(method, ratio, request_):
    seen = []
    model = pipeline.model("llama")
    plan = plan_for(model, method=method, ratio=ratio, **request_)
    one_shot_(plan, model, WINDOWS, batch_size=2, progress=lambda *a: seen.append(a))
    done, total = zip(*[(d, t) for stage, d, t in seen if stage == "score"], strict=True)
    assert done[-1] == total[-1] and all(b >= a for a, b in pairwise(done))
    if method != "sublayer-greedy":  # where the number of tries is known
        assert done == tuple(range(1, len(done) + 1)) and set(total) == {len(done)}


@pytest.mark.parametrize(("method", "ratio", "request_"), ALL)
def test_what_was_measured_travels(method, ratio, request_, tmp_path, monkeypatch):
    pipeline.verify_here(monkeypatch)
    ask = {"method": method, "ratio": ratio, "calibration": str(pipeline.text_file()), "text": api.TextOptions(3, 16)}
    cut = api.prune(str(pipeline.folder()), **ask, **request_)
    cut.save(tmp_path / "out")
    name = "scores" if cut.outcome.losses is None else "losses"
    saved = json.loads((tmp_path / "out" / "prunus" / f"{name}.json").read_text())
    assert saved == cut.outcome.measured[name]
    if name == "scores":
        (values,) = saved.values()
        assert cut.outcome.scores.values["layers"].tolist() == pytest.approx(values) and len(values) == 3
    elif "rounds" in saved:
        assert [r["loss"] for r in saved["rounds"]] == cut.outcome.losses
    else:
        assert saved == {"loss_without_layer": {f"layers.{i}": loss for i, loss in enumerate(cut.outcome.losses)}}


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("minitron-depth", {"ratio": 0.3}),
        ("shortgpt", {"ratio": 0.3}),
        ("shortened-llama", {"ratio": 0.3, **PERPLEXITY}),
        ("shortened-llama", {"ratio": 0.3, "options": {"score": "perplexity"}}),
        ("sleb", {"ratio": 0.4}),
        ("sleb", {"ratio": 0.3, **NONE}),
        ("sublayer-greedy", {"ratio": 0.3}),
        ("sublayer-greedy", {"ratio": 0.2, "options": {"sublayers": "mlp"}}),
    ],
)
def test_the_plan_knows_what_scoring_takes(method, request_, monkeypatch):
    """Blocks that run and heads that are asked, counted; sub-layers are an estimate, since which of them go is not known."""
    from prunus import depth

    model = pipeline.model("llama", num_hidden_layers=10)
    plan = plan_for(model, method=method, **request_)
    ran, asked, forward, logits = [], [], Sweep.forward, depth.logits_from

    def counted(self, layer, hidden, position=None):
        parts = [self.blocks[layer].self_attn, self.blocks[layer].mlp]
        ran.append(len(hidden) * sum(1 for part in parts if next(part.parameters(), None) is not None) / 2)
        return forward(self, layer, hidden, position)

    monkeypatch.setattr(Sweep, "forward", counted)
    monkeypatch.setattr(depth, "logits_from", lambda *a: asked.append(1) or logits(*a))
    one_shot_(plan, model, WINDOWS, batch_size=2)
    anatomy = plan.anatomy
    head = 2 * 16 * anatomy.shape.vocab_size * anatomy.shape.hidden_size
    block = (anatomy.flops(16) - head) / 10
    real = sum(ran) * block + len(asked) * head
    assert plan.scoring_flops(WINDOWS.num_windows, 16) == pytest.approx(real, rel=0.25 if plan.budget else 1e-9)


def test_taylor_costs_a_pass_forwards_again_and_back():
    plan = plan_for(pipeline.config("llama", num_hidden_layers=8), method="shortened-llama", ratio=0.2)
    head = 2 * 16 * plan.anatomy.shape.vocab_size * plan.anatomy.shape.hidden_size
    assert plan.scoring_flops(3, 16) == 3 * (4 * (plan.anatomy.flops(16) - head) + 2 * head)


def test_losses_leave_the_model_as_it_was():
    model = pipeline.model("gemma2")
    modules, weights = dict(model.named_modules()), pipeline.state(model)
    job = job_for(model, "sublayer-greedy", ratio=0.3)
    losses_without(job, [Part(1, 1, ("attention",)), Part(1, 1, ("mlp",))], [Part(2, 1, ("mlp",))])
    assert all(dict(model.named_modules())[name] is module for name, module in modules.items())
    assert all(torch.equal(value, weights[name]) for name, value in pipeline.state(model).items())


# -- refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "request_", "message"),
    [
        (
            6,
            {"method": "shortened-llama", "ratio": 0.2},
            r"protect: shortened-llama keeps the first 4 and the last 2 of 6 layers, so at most 0 can go, not 1; give --option "
            r"protect=0,0$",
        ),
        (3, {"method": "shortened-llama", "ratio": 0.34}, r"so at most 0 can go, not 1; give --option protect=0,0$"),
        (8, {"method": "shortened-llama", "ratio": 0.5}, r"at most 2 can go, not 4; ask for fewer, or give --option protect=0,0$"),
        (2, {"method": "sleb", "ratio": 0.5}, r"protect: sleb keeps the first 1 and the last 1 of 2 layers, so at most 0 can go"),
        (3, {"method": "sleb", "target": {"num_hidden_layers": 1}}, r"at most 1 can go, not 2; ask for fewer, or give"),
        (3, {"method": "sleb", "ratio": 0.34, "options": {"protect": "2,2"}}, r"unknown value for protect of sleb '2,2'"),
        (3, {"method": "shortened-llama", "ratio": 0.4, "options": {"score": "ppl"}}, r"unknown value for score of shortened"),
        (3, {"method": "shortgpt", "ratio": 0.1}, r"ratio: 0.1 of 3 layers is less than one layer"),
        (3, {"method": "shortgpt"}, r"ratio: shortgpt needs to know how much to cut; give --ratio or --target"),
        (3, {"method": "shortgpt", "ratio": 0.4, "uniform": True}, r"uniform: shortgpt always leaves uniform layers"),
        (3, {"method": "sublayer-greedy", "ratio": 0.4, "uniform": True}, r"uniform: the sub-layers that go make layers differ"),
        (3, {"method": "sublayer-greedy"}, r"ratio: sublayer-greedy needs to know how much to cut; give --ratio$"),
        (3, {"method": "sublayer-greedy", "target": {"num_hidden_layers": 2}}, r"target: sublayer-greedy does not take it"),
        (3, {"method": "sublayer-greedy", "ratio": 0.3, "multiple_of": 8}, r"multiple_of: sublayer-greedy does not take it"),
        (3, {"method": "sublayer-greedy", "ratio": 0.05}, r"ratio: 0.05 is below one sub-layer .*ask for at least 0.09"),
        (3, {"method": "sublayer-greedy", "ratio": 0.95}, r"ratio: 0.95 is more than this model's sub-layers can give; ask for at"),
        (
            3,
            {"method": "sublayer-greedy", "ratio": 0.6, "options": {"sublayers": "attention"}},
            r"more than this model's attention sub-layers can give; ask for at most 0.4837",
        ),
        (1, {"method": "sublayer-greedy", "ratio": 0.4, "options": {"sublayers": "mlp"}}, r"sublayers: this model has 1 MLPs"),
    ],
)  # fmt: skip
def test_requests_that_are_refused(layers, request_, message):
    with pytest.raises(UserError, match=message) as caught:
        plan_for(pipeline.config("llama", num_hidden_layers=layers), **request_)
    assert "\n" not in str(caught.value)


def test_the_floor_and_ceiling_that_are_named_are_enough():
    for options in ({}, {"sublayers": "attention"}, {"sublayers": "mlp"}):
        for ratio in (0.01, 0.99):
            with pytest.raises(UserError) as caught:
                plan_for(pipeline.config("llama"), method="sublayer-greedy", ratio=ratio, options=options)
            named = float(str(caught.value).rsplit(" ", 1)[1]) + (1e-4 if ratio < 0.5 else -1e-4)
            model = pipeline.model("llama")
            outcome = prune(model, "sublayer-greedy", ratio=named, options=options)
            assert torch.isfinite(tiny.logits_of(outcome.model, WINDOWS.ids_NT)).all()


def test_statistics_cannot_be_used_again(tmp_path):
    ask = {
        "calibration": str(pipeline.text_file()),
        "statistics": tmp_path / "s.safetensors",
        "text": api.TextOptions(3, 16),
    }
    with pytest.raises(UserError, match="statistics: minitron-depth must sweep again for every target; drop --statistics"):
        api.prune(str(pipeline.folder()), method="minitron-depth", ratio=0.4, **ask)


def test_text_is_needed():
    with pytest.raises(UserError, match="calibration: sleb needs text"):
        api.prune(str(pipeline.folder()), method="sleb", ratio=0.34)
