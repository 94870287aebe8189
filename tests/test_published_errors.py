"""Where published code is wrong, ours is right: one test a fact. B1 to B26 are the numbers of our list of such facts.

Facts that a method's own file proves, by its formula or by hand: B1 (test_criteria), B2 a, e, f (test_oneshot, test_depth),
B10 c to f and B11's ties (test_oneshot, test_allocate, test_solve), B15 (test_taylor), B16's clipped shares (test_adaptive),
B17 (test_depth, test_windows), B18's layer that does nothing and B19's first layer and mean over tokens (test_depth).
"""

from __future__ import annotations

import copy
import statistics as st
from dataclasses import replace

import pipeline
import pytest
import tiny
import torch
from test_every_method import request_for, run

from prunus.eliminate import stay_after_swaps
from prunus.methods import ONE_SHOT
from prunus.oneshot import one_shot_
from prunus.rotation import Gram
from prunus.solve import factor, inverse_upper, sparsegpt
from prunus.statistics import Moments

WINDOWS = pipeline.windows(4, 8)


def moments(x_NTC, *want):
    out = Moments(frozenset(want))
    for window in x_NTC:
        out.update(window[None])
    return out


# -- Minitron (B1, B2) ----------------------------------------------------------------------------------------------------


def test_a_tied_embedding_is_cut_once():
    """B2 b, a study's Minitron scripts: the embedding is sliced, then lm_head slices the same storage again: IndexError."""
    outcome = run("minitron-width", pipeline.model("llama_tied"), WINDOWS)
    embedding, head = outcome.model.get_input_embeddings().weight, outcome.model.get_output_embeddings().weight
    assert head is embedding and embedding.shape == (pipeline.VOCAB, len(outcome.keep.units["hidden"]))
    dense = pipeline.shared("llama_tied").get_input_embeddings().weight
    assert torch.equal(embedding, dense[:, list(outcome.keep.units["hidden"])])


# -- FLAP, Wanda (B10, B11) -----------------------------------------------------------------------------------------------


def test_the_variance_counts_every_window_from_the_first():
    """B10 a, FLAP: old and new mean are one tensor, and the first sample adds nothing: the variance is about 0.92 of itself."""
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[0] *= 10  # so that without the first window it would be far off
    found = moments(x, "mean", "var")
    for c in range(5):
        assert float(found.var_C[c]) == pytest.approx(st.variance(x[..., c].flatten().tolist()), rel=1e-6)  # float32 sums


def test_windows_beyond_the_first_128_count():
    """B11, Wanda and SparseGPT: the buffer of calibration inputs has 128 slots, whatever --nsamples says."""
    model = pipeline.model("llama", num_hidden_layers=1, dtype=torch.float32)
    windows, more = pipeline.windows(128, 2), pipeline.windows(160, 2)
    assert torch.equal(windows.ids_NT, more.ids_NT[:128])
    masks = [run("wanda", copy.deepcopy(model), w, batch_size=32).mask.kept for w in (windows, more)]
    assert any(not torch.equal(kept, masks[1][name]) for name, kept in masks[0].items())


@pytest.mark.parametrize("name", [n for n, row in ONE_SHOT.items() if {"kv_heads", "intermediate"} <= set(row.axes)])
def test_the_order_of_the_windows_does_not_matter(name):
    """B10 a (the first sample is lost), B12 (gradients of the step before are not cleared), B15 (only the last counts)."""
    model, turned = pipeline.model("llama_gqa4"), replace(WINDOWS, ids_NT=WINDOWS.ids_NT.flip(0))
    for options in ({"score": "second"}, {"score": "mix"}) if "score" in ONE_SHOT[name].options else ({},):
        asked = {"options": {**request_for(name, model.config)["options"], **options}}
        one, other = (run(name, copy.deepcopy(model), windows, **asked) for windows in (WINDOWS, turned))
        assert one.keep == other.keep


# -- KV groups (B12) ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n, row in ONE_SHOT.items() if "kv_heads" in row.axes])
@pytest.mark.parametrize("case", ["llama", "llama_gqa4"])
def test_a_kv_group_is_scored_with_its_own_query_heads(name, case):
    """B12, LLM-Pruner and Adapt-Pruner: group g is given the heads g, g + k, ...; attention gives it g * r to g * r + r - 1.

    Only group 1's own heads reach the stream here, so it must stay in every layer and others go.
    """
    model = pipeline.model(case)
    per_group = model.config.num_attention_heads // model.config.num_key_value_heads
    with torch.no_grad():
        for block in model.model.layers:
            heads = block.self_attn.o_proj.weight.view(tiny.HIDDEN, -1, tiny.HEAD_DIM)
            for q in range(heads.shape[1]):
                if q // per_group != 1:
                    heads[:, q] = 0
    outcome = run(name, model, WINDOWS)
    kept = [outcome.keep.units.get(f"layers.{i}.kv_heads") for i in range(tiny.LAYERS)]
    assert any(kept) and all(1 in units for units in kept if units is not None)
    if outcome.scores is not None and ONE_SHOT[name].needs_text:  # magnitudes do not see where a head leads
        for i in range(tiny.LAYERS):
            assert outcome.scores.values[f"layers.{i}.kv_heads"].nonzero().flatten().tolist() == [1]


# -- SliceGPT (B14) -------------------------------------------------------------------------------------------------------


def offset_model():
    """Its stream has a mean (the embedding's entries are around 3), lies in 16 of 32 directions, and eps is not nothing."""
    model = pipeline.model("llama", rms_norm_eps=0.1)
    basis = torch.linalg.qr(torch.randn(32, 16, generator=torch.Generator().manual_seed(7), dtype=torch.float64)).Q
    basis = torch.linalg.qr(torch.cat([torch.ones(32, 1, dtype=torch.float64), basis[:, 1:]], 1)).Q  # the mean is in them
    inside = basis @ basis.T
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(3.0)
        for name, p in model.named_parameters():
            if "embed_" in name:
                p.copy_(p @ inside)
            elif "o_proj" in name or "down_proj" in name:
                p.copy_(inside @ p)
    return model


@pytest.mark.parametrize("rotation", ["per-block", "shared"])
def test_the_embedding_keeps_its_mean_and_norms_their_epsilon(rotation):
    """B14, TransformerCompression: the embedding's mean is subtracted though RMSNorm subtracts none, and eps is always 1e-5.

    A pure rotation then moved logits by a third. Here half of the directions go, which carry nothing, and nothing moves.
    """
    model = offset_model()
    expected = tiny.logits_of(model, WINDOWS.ids_NT)
    plan = pipeline.plan_for(model, method="slicegpt", target={"hidden_size": 16}, options={"rotation": rotation})
    cut = one_shot_(plan, model, WINDOWS).model
    cut.set_attn_implementation("eager")
    assert tiny.relative(tiny.logits_of(cut, WINDOWS.ids_NT), expected) < 1e-5  # norms compute in float32


def test_half_precision_signals_are_widened_before_their_products():
    """B14: the Gram matrix of bf16 inputs was taken in bf16."""
    x = torch.randn(2, 300, 4, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    gram = Gram(None)
    gram.update(x)
    rows = x.double().reshape(-1, 4)
    assert gram.total_DD.dtype == torch.float64
    torch.testing.assert_close(gram.total_DD, rows.T @ rows, rtol=1e-12, atol=1e-12)


# -- Adapt-Pruner (B16) ---------------------------------------------------------------------------------------------------


def test_attention_is_cut_with_the_channels():
    """B16, Adapt-Pruner: a stage smaller than a KV group's share never cuts attention. One cut to the target does."""
    model = pipeline.model("llama")
    outcome = run("adapt-pruner", model, WINDOWS, ratio=0.4, options={"amplitude": "0"})
    shape = outcome.target.anatomy.shape
    assert all(layer.num_key_value_heads < tiny.KV_HEADS for layer in shape.layers)
    assert all(layer.intermediate_size < tiny.INTERMEDIATE for layer in shape.layers)


# -- SparseGPT (B18) ------------------------------------------------------------------------------------------------------


def problem():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 32, generator=generator) @ torch.randn(32, 32, generator=generator)
    return torch.randn(16, 32, generator=generator), x.T @ x


def test_the_scale_of_the_hessian_does_not_matter():
    """B18, Model-Optimizer: on CUDA the Hessian comes out doubled. A power of two is exact, and damping is relative."""
    weight, gram = problem()
    [(one, kept)], [(two, other)] = (sparsegpt([weight], inverse_upper(c * gram), sparsity=0.5) for c in (1.0, 2.0))
    assert torch.equal(kept, other)
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_compensated_weights_are_in_the_result():
    """B18: only the mask was kept, and the weights that had taken over were thrown away."""
    outcome, dense = run("sparsegpt", pipeline.model("llama"), WINDOWS), pipeline.state(pipeline.shared("llama"))
    after = pipeline.state(outcome.model)
    assert all(not torch.equal(after[name][kept], dense[name][kept]) for name, kept in outcome.mask.kept.items())


def test_a_factor_is_a_factor_also_where_damping_had_to_grow():
    """B18: where Cholesky failed, the inverse itself served as if it were the factor."""
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = factor(x.T @ x, damp=0.0)
    damped = (x.T @ x) + found.damp * (x.T @ x).diagonal().mean() * torch.eye(6)
    assert found.escalated
    torch.testing.assert_close(found.lower.double() @ found.lower.double().T, damped, rtol=1e-6, atol=1e-6)


# -- OSSCAR (B19) ---------------------------------------------------------------------------------------------------------


def test_columns_that_add_up_to_zero_are_not_taken_for_cut():
    """B19, OSSCAR: what is cut is told by |sum of the column| = 0, which is true of columns that cancel."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(200, 6, generator=generator), torch.randn(4, 6, generator=generator)
    weight[:, 2] = torch.tensor([9.0, -9.0, 5.0, -5.0])
    assert 2 in stay_after_swaps(weight, x.T @ x, torch.arange(6)[:, None], 3)
    model = pipeline.model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[:, 7] = torch.tensor([9.0, -9.0] * 16)
    outcome = run("osscar", model, WINDOWS)
    at = outcome.keep.units["layers.1.intermediate"].index(7)
    assert float(outcome.model.model.layers[1].mlp.down_proj.weight[:, at].detach().abs().max()) > 1
