"""prunus: where the cut falls, what the refit makes of it, and the command."""

from __future__ import annotations

import copy
import json
import math

import pipeline
import pytest
import tiny
import torch
from pipeline import plan_for
from surgery import CASES, CLOSE, WINDOWS, job_for, naive_curve, naive_fisher, prune, ratio_for, readers, seen
from torch import nn

from prunus import api
from prunus.anatomy import Anatomy
from prunus.axes import kind_of
from prunus.cut import zero_
from prunus.errors import UserError
from prunus.keep import Keep
from prunus.planning import biased_anatomy
from prunus.surgeon import _FROM_AFAR, words

# -- the cut --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def step_through(outcome, dense, check):
    """The dense model, cut reader by reader as the outcome says. `check` sees each: x, dense W and b, kept rows, W', b'."""
    model, anatomy = copy.deepcopy(dense), Anatomy.of(dense.config)
    for axis, name in readers(anatomy):
        x = pipeline.inputs_of(model, seen(model.config), [name])[name].flatten(0, 1)
        live, cut = model.get_submodule(name), outcome.model.get_submodule(name)
        units = outcome.keep.units.get(axis.name, tuple(range(axis.size)))
        kept = torch.tensor(tiny.spans_rows(anatomy.reader(axis.name), units))
        nothing = torch.zeros(live.weight.shape[0], dtype=torch.float64)
        biases = [nothing if module.bias is None else module.bias.double() for module in (live, cut)]
        check(x, live.weight.double().clone(), biases[0], kept, cut.weight.double(), biases[1])
        zero_(dict(model.named_parameters()), anatomy, Keep({axis.name: units}))
        live.weight.data[:, kept] = cut.weight.to(live.weight.dtype)
        live.bias = nn.Parameter(biases[1].clone())
    return model


@pytest.mark.parametrize("compensate", ["affine", "least-squares"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_readers_are_refitted_behind_the_cut(case, compensate):
    """Each is as good as lstsq on what the model, cut so far, gives it, and never worse than no refit; a bias keeps its mean."""
    outcome, dense = prune(case, compensate=compensate)
    gains = []

    def check(x, weight, bias, kept, refitted, shifted):
        wanted = x @ weight.T + bias
        error = float((x[:, kept] @ refitted.T + shifted - wanted).square().sum())
        gone = torch.ones(x.shape[1], dtype=torch.bool)
        gone[kept] = False
        plain = x[:, kept] @ weight[:, kept].T + bias
        seen = x[:, kept]
        if compensate == "affine":
            plain = plain + (wanted - plain).mean(0)  # flap's bias
            seen = torch.cat([seen, torch.ones(len(x), 1, dtype=x.dtype)], 1)
            mean = x[:, kept].mean(0) @ refitted.T + shifted
            torch.testing.assert_close(mean, wanted.mean(0), rtol=CLOSE, atol=CLOSE * float(wanted.abs().max()))
        else:
            assert torch.equal(shifted, bias)
        unfitted = float((plain - wanted).square().sum())
        scale = float(wanted.square().sum())
        fitted = seen @ torch.linalg.lstsq(seen, wanted - bias * (compensate != "affine")).solution
        best = float((fitted + bias * (compensate != "affine") - wanted).square().sum())
        # the refit damps by 1e-4 of the mean diagonal; where nothing went, float32 sums are all there is
        assert best * (1 - 1e-9) - 1e-9 * scale <= error <= 1.01 * best + 1e-8 * scale
        assert error <= unfitted + 1e-8 * scale
        if gone.any():
            assert error < unfitted
            gains.append(error / unfitted)

    stepped = step_through(outcome, dense, check)
    assert min(gains) < 0.95, gains  # the refit is worth something
    outcome.model.set_attn_implementation("eager")
    if case != "olmo2":  # its norms run over all heads, whose epsilon no per-layer gain can mend: test_zero_slice_save
        expected = tiny.logits_of(stepped, WINDOWS.ids_NT)
        # biases are kept in float32
        torch.testing.assert_close(tiny.logits_of(outcome.model, WINDOWS.ids_NT), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["llama", "qwen2", "phi3"])
def test_units_go_by_the_curve_s_rule_behind_the_cut(case):
    """In the first attention nothing is cut yet: what stays there is what the naive curve leaves at that size."""
    outcome, dense = prune(case, 0.45)
    anatomy = Anatomy.of(dense.config)
    axis, module = readers(anatomy)[0]
    rows = [torch.tensor(tiny.spans_rows(anatomy.reader(axis.name), [u])) for u in range(axis.size)]
    weight = dense.get_submodule(module).weight.detach().double()
    x = pipeline.inputs_of(dense, seen(dense.config), [module])[module].reshape(-1, weight.shape[1])
    fisher = naive_fisher(dense, WINDOWS.ids_NT, [module])[module]
    alive = list(range(axis.size))
    while len(alive) > len(outcome.keep.units.get(axis.name, alive)):
        costs = {}
        for u in alive:
            stay = [rows[v] for v in alive if v != u]
            costs[u] = naive_curve(x, weight, fisher, [torch.cat(stay), rows[u]], True)[1] if stay else math.inf
        alive.remove(min(costs, key=lambda u: costs[u]))
    assert tuple(alive) == outcome.keep.units.get(axis.name, tuple(range(axis.size)))


def test_a_constant_channel_goes_into_the_bias():
    """Whatever its weight: what does not vary is a mean, and a bias carries it in full."""
    model = pipeline.model("phi")
    with torch.no_grad():
        part = model.model.layers[1].mlp
        part.fc1.weight[7] = 0
        part.fc1.bias[7] = 2.0
        part.fc2.weight[:, 7] = 30.0
    outcome, _ = prune(model, 0.2)
    kept = outcome.keep.units["layers.1.intermediate"]
    assert 7 not in kept and len(kept) > 1
    curve = outcome.measured["curves"]["layers.1.intermediate"]
    assert curve["nats"][-2] < 1e-3 * curve["nats"][-4]


# -- where the cut falls --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multiple_of", [1, 5])
@pytest.mark.parametrize("case", CASES)
def test_the_budget_is_met_and_never_exceeded(case, multiple_of):
    outcome, dense = prune(case, multiple_of=multiple_of)
    anatomy, after = Anatomy.of(dense.config), outcome.target.anatomy
    budget = (1 - ratio_for(case)) * anatomy.block_params
    counted = sum(p.numel() for n, p in outcome.model.named_parameters() if ".layers." in n)
    assert counted == after.block_params <= budget
    left = [name for name, axis in anatomy.axes.items() if kind_of(name) == "intermediate"]
    assert any(len(outcome.keep.units.get(name, ())) for name in left)  # some channels went, so one of them could come back
    assert budget - outcome.plan.step < counted
    for name in left:
        size = len(outcome.keep.units.get(name, range(24)))
        assert size == 24 or size % multiple_of == 0
    assert outcome.target.anatomy.shape.layers[0].num_key_value_heads >= 1


@pytest.mark.parametrize("ratio", [0.15, 0.3, 0.5])
@pytest.mark.parametrize("case", ["llama", "llama_gqa4", "qwen2"])
def test_uniform_sizes_are_the_best_that_fill_the_budget(case, ratio):
    compensate = "affine" if case.startswith("llama") else "least-squares"  # qwen2's config has no place for the biases
    outcome, dense = prune(case, ratio, uniform=True, compensate=compensate)
    anatomy, after = Anatomy.of(dense.config), outcome.target.anatomy
    assert outcome.target.is_stock and len(set(after.shape.layers)) == 1
    budget, step, widest = (1 - ratio) * anatomy.block_params, outcome.plan.step, tiny.INTERMEDIATE
    curves = {
        name: dict(zip(curve["sizes"], curve["nats"], strict=True)) for name, curve in outcome.measured["curves"].items()
    }
    wide = biased_anatomy(outcome.plan)

    def params(groups, channels):
        units = {f"layers.{i}.kv_heads": tuple(range(groups)) for i in range(tiny.LAYERS)}
        units |= {f"layers.{i}.intermediate": tuple(range(channels)) for i in range(tiny.LAYERS)}
        return Keep(units).anatomy_after(wide).block_params

    def error(groups, channels):
        sizes = {"kv_heads": groups, "intermediate": channels}
        weight = {"kv_heads": _FROM_AFAR, "intermediate": 1.0}
        return sum(weight[kind_of(name)] * curve[sizes[kind_of(name)]] for name, curve in curves.items())

    groups = range(1, anatomy.shape.layers[0].num_key_value_heads + 1)
    lawful = [(g, c) for g in groups for c in range(1, widest + 1) if params(g, c) <= budget]
    full = [pair for pair in lawful if params(*pair) > budget - step]
    got = after.shape.layers[0].num_key_value_heads, after.shape.layers[0].intermediate_size
    assert got == (min(full, key=lambda pair: error(*pair)) if full else max(lawful, key=lambda pair: params(*pair)))
    assert after.block_params <= params(*got)  # less where the type that can say it has fewer biases than was counted


def test_a_layer_that_the_loss_does_not_feel_loses_most():
    model = pipeline.model("llama")
    with torch.no_grad():
        for part in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
            part.weight.mul_(1e-3)
    outcome, _ = prune(model, 0.3)
    sizes = [(x.num_key_value_heads, x.intermediate_size) for x in outcome.target.anatomy.shape.layers]
    assert sizes[1][0] == 1 and 2 * sizes[1][1] < min(sizes[0][1], sizes[2][1])


def test_a_pruned_model_can_be_pruned_again():
    first, _ = prune("llama", 0.2)
    again, _ = prune(first.model, 0.3)
    anatomy = Anatomy.of(first.model.config)
    assert 0.7 * anatomy.block_params - again.plan.step < again.target.anatomy.block_params <= 0.7 * anatomy.block_params


# -- from the command line ------------------------------------------------------------------------------------------------

SMALL = ("-c", pipeline.text_file(), "--windows", 6, "--seq-len", 16, "--multiple-of", 1)


@pytest.mark.parametrize(
    ("case", "options", "model_type", "biases"),  # each costs a reload in a clean process
    [
        ("llama", ("-r", 0.3), "pruned_llama", True),
        ("mistral", ("-r", 0.3, "--uniform", "--compensate", "least-squares"), "mistral", False),
    ],
)
def test_saved_and_loaded_in_a_clean_process(case, options, model_type, biases, tmp_path):
    folder = pipeline.folder(case)
    code, said, err = pipeline.cli("prune", folder, "-m", "prunus", *options, *SMALL, "-o", tmp_path / "out", "--json")
    assert (code, err) == (0, ""), err
    assert json.loads(said)["after"]["model_type"] == model_type
    saved = json.loads((tmp_path / "out" / "prunus" / "curves.json").read_text())
    assert set(saved) == {f"layers.{i}.{kind}" for i in range(tiny.LAYERS) for kind in ("kv_heads", "intermediate")}
    from safetensors import safe_open

    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert any(name.endswith("proj.bias") for name in file.keys()) == biases  # noqa: SIM118 (no mapping)
    assert pipeline.cli("verify", tmp_path / "out")[0] == 0


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, r"ratio: prunus needs to know how much to cut; give --ratio$"),
        ({"ratio": 0.001}, r"ratio: 0.001 is below one unit of this model; ask for more than 0.0\d+$"),
        (
            {"ratio": 0.95},
            r"ratio: the least that can stay \(one unit of every axis\) takes .*; ask for a smaller ratio \(less",
        ),
        ({"ratio": 0.2, "pattern": "2:4"}, r"pattern: prunus does not take it; drop the option"),
        ({"ratio": 0.2, "target": {"hidden_size": 8}}, r"target: prunus does not take it; drop the option"),
        ({"ratio": 0.2, "compensate": "none"}, r"unknown value for compensate of prunus 'none'"),
        ({"ratio": 0.2, "options": {"score": "first"}}, r"option 'score' does not exist for prunus; it has words, unseen"),
        ({"ratio": 0.2, "multiple_of": 0}, r"multiple_of: 0 is no multiple; it must be 1 or more"),
    ],
)
def test_requests_that_are_refused(request_, message):
    with pytest.raises(UserError, match=message) as caught:
        plan_for(pipeline.config("llama"), method="prunus", **({"multiple_of": 1} | request_))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", ["mistral", "phi3"])
def test_uniform_biases_need_a_config_that_has_them(case):
    message = rf"uniform: a stock {case} config has no place for prunus's biases; add --compensate least-squares, or drop"
    with pytest.raises(UserError, match=message):
        plan_for(pipeline.config(case), method="prunus", ratio=0.3, multiple_of=1, uniform=True)
    assert plan_for(
        pipeline.config(case), method="prunus", ratio=0.3, multiple_of=1, uniform=True, compensate="least-squares"
    )


def test_inputs_that_are_refused():
    with pytest.raises(UserError, match="calibration: prunus needs text"):
        api.prune(str(pipeline.folder()), method="prunus", ratio=0.2, multiple_of=1)


def test_every_word_is_seen_before_any_comes_again():
    model = pipeline.model("llama")
    assert words(job_for(model, options={"words": "0"})) is None
    found = words(job_for(model, options={"words": "1.5"})).flatten()
    vocab, count = model.config.vocab_size, round(1.5 * len(WINDOWS.ids_NT)) * WINDOWS.ids_NT.shape[1]
    assert len(found) == count and int(found.max()) < vocab
    often = torch.bincount(found, minlength=vocab)
    assert int(often.max() - often.min()) <= 1 and torch.equal(
        found, words(job_for(model, options={"words": "1.5"})).flatten()
    )


def test_the_plan_says_what_it_knows():
    plan = plan_for(pipeline.config("llama"), method="prunus", ratio=0.3, multiple_of=1)
    assert any("pruned_llama" in note and "--uniform makes all layers alike" in note for note in plan.notes)
    head = 2 * 16 * plan.anatomy.shape.vocab_size * plan.anatomy.shape.hidden_size
    # forwards, back (a block again and its stream's gradient); the curves' sweep; three passes behind the cut, vocabulary and all
    assert plan.scoring_flops(3, 16) == 3 * ((4 + 3 * 1.375) * (plan.anatomy.flops(16) - head) + 2 * head)
    assert plan.gradient_bytes(4, 16) > 0
