"""adapt-pruner through the whole pipeline: shares by how far a layer turns the stream, units by their Taylor score."""

from __future__ import annotations

import copy
import json

import pipeline
import pytest
import tiny
import torch
from pipeline import plan_for
from test_depth import blocks, streams
from test_taylor import CHANNELS_ALONE, naive, same_scores, window_gradients

from prunus.anatomy import Anatomy
from prunus.cut import zero_
from prunus.errors import UserError
from prunus.oneshot import one_shot_

WINDOWS = pipeline.windows(5)


def prune(model, ratio=0.3, **request):
    consumed = copy.deepcopy(model)
    plan = plan_for(consumed, method="adapt-pruner", ratio=ratio, **request)
    return one_shot_(plan, consumed, WINDOWS, batch_size=2)


def of_layer(anatomy, layer):
    return sum(t.numel for t in anatomy.tensors.values() if t.layer == layer)


@pytest.mark.parametrize("case", sorted(tiny.CASES))
@pytest.mark.parametrize("multiple_of", [1, 4])
def test_every_family_meets_the_target_and_its_layers_their_shares(case, multiple_of):
    """Shares by a closed form, where none is clipped: the layers of a tiny model are of one size."""
    model = pipeline.model(case)
    ratio = 0.1 if case in CHANNELS_ALONE else 0.3
    outcome = prune(model, ratio, multiple_of=multiple_of, options={"amplitude": "0.5"})
    anatomy, after = Anatomy.of(model.config), outcome.target.anatomy
    chunk = anatomy.unit_params("layers.0.intermediate") * multiple_of
    budget = (1 - ratio) * anatomy.block_params
    assert outcome.plan.step == chunk and budget - chunk < after.block_params <= budget
    turned = []
    for before, out in streams(model, WINDOWS.ids_NT):
        cosine = (before * out).sum(-1) / before.norm(dim=-1) / out.norm(dim=-1)
        turned.append(1 - cosine.mean())
    centred = torch.stack(turned) - torch.stack(turned).mean()
    wanted = ratio - 0.5 * ratio * centred / centred.abs().max()
    measured = outcome.measured["scores"]
    assert measured["block-influence"] == pytest.approx([float(t) for t in turned], rel=1e-5, abs=1e-6)  # cosines: float32
    # a cosine is off by 1e-7, and what layers differ by is not much more in some models
    assert measured["share"] == pytest.approx(wanted.tolist(), abs=1e-4)
    group = anatomy.unit_params("layers.0.kv_heads") if "layers.0.kv_heads" in anatomy.axes else 0
    gap = max(0, group + chunk - tiny.INTERMEDIATE * chunk // multiple_of)  # where one group is more than all the channels
    for layer, share in enumerate(measured["share"]):
        assert abs(of_layer(after, layer) - (1 - share) * of_layer(anatomy, layer)) < 2 * chunk + gap
    zero_(dict(model.named_parameters()), anatomy, outcome.keep)
    outcome.model.set_attn_implementation("eager")
    if case != "olmo2":  # its norms run over all heads, whose epsilon no per-layer gain can mend: test_zero_slice_save
        dense = tiny.logits_of(model, WINDOWS.ids_NT)
        torch.testing.assert_close(tiny.logits_of(outcome.model, WINDOWS.ids_NT), dense, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", ["llama_tied", "llama_gqa4", "gemma2", "phi3"])
def test_units_go_by_the_first_order_score_of_their_layer(case):
    model = pipeline.model(case)
    outcome = prune(model)
    expected = naive(model, window_gradients(model, WINDOWS.ids_NT), "first", "sum")
    same_scores({name: v for name, v in outcome.scores.values.items() if name != "layers"}, expected)
    for name, kept in outcome.keep.units.items():
        gone = pipeline.lowest([(v, -i) for i, v in enumerate(expected[name].tolist())], len(expected[name]) - len(kept))
        assert sorted({*range(len(expected[name]))} - set(gone)) == list(kept)


def test_a_layer_that_does_nothing_loses_most_and_amplitude_zero_takes_alike():
    model = pipeline.model("llama", num_hidden_layers=6)
    with torch.no_grad():
        for part in (blocks(model)[3].self_attn.o_proj, blocks(model)[3].mlp.down_proj):
            part.weight.mul_(1e-3)
    outcome = prune(model, 0.3)
    sizes = [of_layer(outcome.target.anatomy, i) for i in range(6)]
    assert sizes[3] == min(sizes) and max(sizes) > 1.3 * sizes[3]
    assert outcome.measured["scores"]["share"][3] == pytest.approx(
        0.6, abs=0.1
    )  # about twice the ratio, as amplitude 1 says
    alike = prune(model, 0.3, options={"amplitude": "0"})
    assert alike.measured["scores"]["share"] == pytest.approx([0.3] * 6, abs=1e-4)
    sizes = [of_layer(alike.target.anatomy, i) for i in range(6)]
    assert max(sizes) - min(sizes) <= alike.plan.step


@pytest.mark.parametrize("ratio", [0.5, 0.7, 0.78])
def test_layers_that_cannot_give_their_share_leave_it_to_others(ratio):
    """B16: a clipped share breaks the published sum; here the budget holds, and no axis is left empty."""
    case = "llama_mha"
    model = pipeline.model(case, num_hidden_layers=6)
    outcome = prune(model, ratio, options={"amplitude": "1.5"})
    anatomy, after = Anatomy.of(model.config), outcome.target.anatomy
    assert (1 - ratio) * anatomy.block_params - outcome.plan.step < after.block_params <= (1 - ratio) * anatomy.block_params
    assert all(layer.num_key_value_heads >= 1 and layer.intermediate_size >= 1 for layer in after.shape.layers)
    assert outcome.measured["scores"]["share"][0] >= 0
    assert torch.isfinite(tiny.logits_of(outcome.model, WINDOWS.ids_NT)).all()


def test_least_squares_is_available():
    model = pipeline.model("llama")
    plain, fitted = prune(model, 0.4), prune(model, 0.4, compensate="least-squares")
    assert plain.keep == fitted.keep
    name = "model.layers.2.mlp.down_proj.weight"
    a, b = (dict(outcome.model.named_parameters())[name] for outcome in (plain, fitted))
    assert a.shape == b.shape and not torch.allclose(a, b)


def test_a_pruned_model_can_be_pruned_again():
    model = prune(pipeline.model("llama"), 0.2).model
    again = prune(model, 0.2)
    anatomy = Anatomy.of(model.config)
    assert len(set(anatomy.shape.layers)) > 1
    assert 0.8 * anatomy.block_params - again.plan.step < again.target.anatomy.block_params <= 0.8 * anatomy.block_params


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, r"ratio: adapt-pruner needs to know how much to cut; give --ratio$"),
        ({"ratio": 0.2, "uniform": True}, r"uniform: every layer loses a share of its own; drop the option"),
        ({"ratio": 0.2, "options": {"amplitude": "2"}}, r"unknown value for amplitude of adapt-pruner '2'"),
        (
            {"ratio": 0.2, "options": {"amplitud": "1"}},
            r"option 'amplitud' does not exist .* \(did you mean 'amplitude'\?\)",
        ),
        ({"ratio": 0.001}, r"ratio: 0.001 is below one unit of this model; ask for more than 0.0038"),
        (
            {"ratio": 0.95},
            r"ratio: the least that can stay \(one unit of every axis\) takes .*; ask for a smaller ratio \(less",
        ),
        ({"ratio": 0.2, "target": {"hidden_size": 8}}, r"target: adapt-pruner does not take it; drop the option"),
    ],
)
def test_requests_that_are_refused(request_, message):
    with pytest.raises(UserError, match=message) as caught:
        plan_for(pipeline.config("llama"), method="adapt-pruner", **request_)
    assert "\n" not in str(caught.value)


def test_the_plan_says_what_it_knows():
    plan = plan_for(pipeline.config("llama"), method="adapt-pruner", ratio=0.3)
    assert any("pruned_llama" in note and "--uniform" not in note for note in plan.notes)
    head = 2 * 16 * plan.anatomy.shape.vocab_size * plan.anatomy.shape.hidden_size
    assert plan.scoring_flops(3, 16) == 3 * (4 * (plan.anatomy.flops(16) - head) + 2 * head)
    matrices = sum(t.numel for t in plan.anatomy.tensors.values() if t.is_matrix)
    assert plan.gradient_bytes(4, 16) > 4 * matrices


def test_saved_and_loaded_in_a_clean_process(tmp_path):
    """A type of ours, with what decided the shares beside it."""
    code, said, err = pipeline.cli(
        "prune", pipeline.folder(), "-m", "adapt-pruner", "-r", 0.3, "-c", pipeline.text_file(), "--windows", 4,
        "--seq-len", 16, "-o", tmp_path / "out", "--json",
    )  # fmt: skip
    assert (code, err) == (0, "") and json.loads(said)["after"]["model_type"] == "pruned_llama"
    saved = json.loads((tmp_path / "out" / "prunus" / "scores.json").read_text())
    assert set(saved) == {"block-influence", "share"} and len(saved["share"]) == 3
    assert pipeline.cli("verify", tmp_path / "out")[0] == 0
