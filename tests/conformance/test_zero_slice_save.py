"""Every family, every axis, uniform and per layer: zeroed = sliced = saved and loaded again."""

from __future__ import annotations

import pytest
import tiny
import torch
from cuts import UNIFORM, folds, inexact, keep_of, pairs
from transformers import AutoModelForCausalLM

from prunus import cut, hf
from prunus.anatomy import Anatomy

IDS = tiny.tokens(2, 11)  # longer than the sliding window of 4
NEW = 5
# Weights are float64. Exact axes: the sliced model does the same sums less some zeros, in another order (1e-16); the
# norms and the softmax of transformers round to float32, which hides that (0.0 or about 1e-16 measured).
EXACT = 1e-9
# Folded axes: the gain is sqrt(d / d') times as large and the mean of squares d / d' times, each rounded to float32
# (6e-8) in up to 13 norms; 1e-6 measured. A missing fold is off by 1e-1.
FOLDED = 1e-5
# A cut that moved the logits less than this would show nothing.
AT_STAKE = 0.1
# Inexact axes: LayerNorm over d' channels is not LayerNorm over d of which some are zero; 0.07 to 0.4 measured.
OFF = 1e-2


def zeroed_model(dense, keep):
    model = tiny.clone(dense)
    anatomy = Anatomy.of(dense.config)
    cut.zero_(hf.weights(model, anatomy), anatomy, keep)
    return model


def sliced_model(dense, keep, *, fold=True):
    anatomy = Anatomy.of(dense.config)
    target = hf.target_for(dense.config, anatomy, keep, fold=fold)
    # the dense models attend eagerly, whose softmax is in float32; so must those they are held against
    target.config._attn_implementation = "eager"
    plan = cut.slice_plan(anatomy, keep, fold=fold)
    return target, hf.build(target.config, cut.slice_tensors(hf.weights(dense, anatomy), plan))


@pytest.mark.parametrize(("case", "cut_name"), pairs())
def test_zeroed_sliced_and_saved_models_agree(case, cut_name, dense_of, tmp_path):
    dense, keep = dense_of(case), keep_of(case, cut_name)
    zeroed = zeroed_model(dense, keep)
    target, sliced = sliced_model(dense, keep)
    wanted = tiny.logits_of(zeroed, IDS)
    assert tiny.relative(wanted, tiny.logits_of(dense, IDS)) > AT_STAKE

    got = tiny.logits_of(sliced, IDS)
    if inexact(case, cut_name):
        assert tiny.relative(got, wanted) > OFF
    else:
        assert tiny.relative(got, wanted) < (FOLDED if folds(case, cut_name) else EXACT)
    text = tiny.greedy_by_hand(sliced if inexact(case, cut_name) else zeroed, IDS, NEW)
    assert tiny.greedy_cached(sliced, IDS, NEW).tolist() == text.tolist()
    assert tiny.greedy_stepwise(sliced, IDS, NEW).tolist() == text.tolist()

    sliced.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, attn_implementation="eager")
    assert type(again) is type(sliced)
    assert torch.equal(tiny.logits_of(again, IDS), got)
    assert tiny.greedy_cached(again, IDS, NEW).tolist() == text.tolist()

    # the config that came back from disk says the same sizes as the plan did
    assert Anatomy.of(again.config).shape == target.anatomy.shape == keep.anatomy_after(Anatomy.of(dense.config)).shape
    assert {n: tuple(p.shape) for n, p in again.named_parameters()} == {
        n: t.shape for n, t in target.anatomy.tensors.items()
    }


@pytest.mark.parametrize(("case", "cut_name"), pairs())
def test_uniform_cuts_stay_stock_types(case, cut_name, dense_of):
    dense = dense_of(case)
    target = hf.target_for(dense.config, Anatomy.of(dense.config), keep_of(case, cut_name))
    # Gemma 2 and 3 configs refuse hidden_size 27 with 8 heads, and no other stock type runs their weights
    refused = cut_name == "hidden_odd" and case in ("gemma2", "gemma3")
    assert target.is_stock == (cut_name in UNIFORM and not refused)
    assert bool(target.notes) == (not target.is_stock or target.config.model_type != dense.config.model_type)


@pytest.mark.parametrize(("case", "cut_name"), [c for c in pairs() if c[1] != "everything"])
def test_exactness_says_whether_the_fold_is_needed(case, cut_name, dense_of):
    """Exact axes: with and without the fold it is one model, the one above. Folded axes: without it another. Inexact
    axes: there is no fold either, and the test above says that it is another model.
    """
    dense, keep = dense_of(case), keep_of(case, cut_name)
    anatomy = Anatomy.of(dense.config)
    declared = {anatomy.exactness(axis) for axis in keep.units}
    assert declared == {"inexact" if inexact(case, cut_name) else "fold" if folds(case, cut_name) else "exact"}
    if declared != {"fold"}:
        tensors = hf.weights(dense, anatomy)
        folded, plain = (cut.slice_tensors(tensors, cut.slice_plan(anatomy, keep, fold=f)) for f in (True, False))
        assert folded.keys() == plain.keys()
        assert all(torch.equal(folded[n], plain[n]) for n in folded)
        configs = [hf.target_for(dense.config, anatomy, keep, fold=f).config for f in (True, False)]
        assert configs[0].to_dict() == configs[1].to_dict()
    else:
        _, unfolded = sliced_model(dense, keep, fold=False)
        off = tiny.relative(tiny.logits_of(unfolded, IDS), tiny.logits_of(zeroed_model(dense, keep), IDS))
        assert off > 1e-2  # d' = 24 or 27 of 32 channels: each gain is 8 to 15 % too small


SCALABLE = [
    "llama",
    "llama_bias",
    "llama_tied",
    "mistral",
    "qwen2",
    "smollm3",
    "gemma",
    "gemma_untied",
    "gemma2",
    "phi3",
    "seed_oss",
]


@pytest.mark.parametrize("case", SCALABLE)
def test_an_epsilon_that_matters_is_scaled_with_the_stem(case):
    """With epsilon 0.1 against mean squares of about 1 a fold that forgets it is off by percents."""
    dense = tiny.grown(tiny.tiny_config(case, rms_norm_eps=0.1))
    assert Anatomy.of(dense.config).eps_scalable
    keep = keep_of(case, "hidden")
    target, sliced = sliced_model(dense, keep)
    wanted = tiny.logits_of(zeroed_model(dense, keep), IDS)
    assert tiny.relative(tiny.logits_of(sliced, IDS), wanted) < FOLDED
    assert target.config.rms_norm_eps == pytest.approx(0.1 * 32 / 24, rel=1e-12)
    for module in sliced.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.1
        elif hasattr(module, "eps"):
            module.eps = 0.1
    assert tiny.relative(tiny.logits_of(sliced, IDS), wanted) > 1e-3


@pytest.mark.parametrize("case", ["qwen3", "gemma3", "olmo2"])
def test_norms_over_heads_share_the_epsilon_so_it_stays(case, dense_of):
    dense = dense_of(case)
    anatomy = Anatomy.of(dense.config)
    assert not anatomy.eps_scalable
    target = hf.target_for(dense.config, anatomy, keep_of(case, "hidden"))
    assert target.config.rms_norm_eps == dense.config.rms_norm_eps


@pytest.mark.parametrize("case", tiny.CASES)
def test_keeping_all_is_the_identity(case, dense_of):
    dense = dense_of(case)
    anatomy = Anatomy.of(dense.config)
    keep = type(keep_of(case, "hidden"))({name: tuple(range(axis.size)) for name, axis in anatomy.axes.items()})
    target, sliced = sliced_model(dense, keep)
    assert target.is_stock
    assert not target.notes
    assert type(sliced) is type(dense)
    zeroed = zeroed_model(dense, keep)
    for name, p in dense.named_parameters():
        assert torch.equal(p, sliced.get_parameter(name)), name
        assert torch.equal(p, zeroed.get_parameter(name)), name
        assert p.data_ptr() != sliced.get_parameter(name).data_ptr()
