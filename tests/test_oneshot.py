"""Whole cuts of tiny models: sizes reached, weights where they belong, and naive reimplementations to compare with."""

from __future__ import annotations

import copy
import math

import pipeline
import pytest
import tiny
import torch
from pipeline import plan_for

from prunus import api
from prunus.anatomy import Anatomy
from prunus.axes import kind_of
from prunus.cut import slice_plan, slice_tensors, zero_
from prunus.errors import UserError
from prunus.hf import target_for
from prunus.keep import Keep
from prunus.oneshot import one_shot_
from prunus.statistics import Sweep

WINDOWS = pipeline.windows(5)
FAMILIES = ["llama", "llama_tied", "mistral", "qwen3", "gemma2", "olmo2", "phi3", "llama_bias"]
LIKE_LLAMA = ["llama", "llama_tied", "mistral", "qwen3", "gemma2"]


def cut(case, dtype=torch.float64, batch_size=2, **request):
    """(outcome, dense model) of a request; the dense model is another copy."""
    dense, consumed = pipeline.model(case, dtype=dtype), pipeline.model(case, dtype=dtype)
    outcome = one_shot_(plan_for(dense, **request), consumed, WINDOWS, batch_size=batch_size)
    return outcome, dense


def block_params(model):
    return sum(p.numel() for name, p in model.named_parameters() if ".layers." in name)


def check_sizes(outcome, dense):
    """What the outcome says of its sizes is what its model has; the model runs."""
    plan, model = outcome.plan, outcome.model
    before, after = block_params(dense), block_params(model)
    everything = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in dense.parameters())
    assert outcome.target.anatomy.block_params == after
    assert outcome.target.anatomy.num_params == everything[0]
    assert outcome.ratios["removed_of_block"] == pytest.approx(1 - after / before, rel=1e-12)
    assert outcome.ratios["removed_of_all"] == pytest.approx(1 - everything[0] / everything[1], rel=1e-12)
    assert torch.isfinite(tiny.logits_of(model, WINDOWS.ids_NT)).all()
    return plan.target_block_params, after


def unchanged_rows(outcome, dense):
    """Every weight of the cut model is the dense one at the kept units; biases aside, and gains that a cut of heads folds."""
    anatomy = Anatomy.of(dense.config)
    expected = slice_tensors(pipeline.state(dense), slice_plan(anatomy, outcome.keep, fold=False))
    found = pipeline.state(outcome.model)
    for name, tensor in expected.items():
        if not name.endswith(".bias") and not (
            dense.config.model_type == "olmo2" and name.endswith(("q_norm.weight", "k_norm.weight"))
        ):
            assert torch.equal(found[name], tensor), name


# -- flap ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FAMILIES)
@pytest.mark.parametrize("request_", [{}, {"compensate": "none"}, {"uniform": True, "compensate": "none"}])
def test_flap_meets_its_budget(case, request_):
    outcome, dense = cut(case, method="flap", ratio=0.35, **request_)
    budget, after = check_sizes(outcome, dense)
    assert budget - outcome.plan.step < after <= budget
    unchanged_rows(outcome, dense)
    shape = outcome.target.anatomy.shape
    assert all(layer.num_key_value_heads >= 1 and layer.intermediate_size >= 1 for layer in shape.layers)
    assert shape.is_uniform or "uniform" not in request_
    # a gemma2 config refuses a stem that its query heads do not divide, and no other stock type runs its weights
    lawful = case != "gemma2" or tiny.HIDDEN % shape.layers[0].num_attention_heads == 0
    assert outcome.target.is_stock == ("uniform" in request_ and lawful)
    assert {kind_of(name) for name in outcome.keep.units} <= {"kv_heads", "intermediate"}


@pytest.mark.parametrize("case", ["llama", "llama_tied", "llama_bias"])
@pytest.mark.parametrize("ratio", [0.35, 0.5, 0.7])
def test_uniform_flap_with_biases_is_a_stock_model(case, ratio):
    """A llama where its heads divide the stem; else a Seed-OSS, which is a llama without that refusal."""
    outcome, dense = cut(case, method="flap", ratio=ratio, uniform=True)
    budget, after = check_sizes(outcome, dense)  # also where the Seed-OSS has fewer biases than a llama would
    shape, config = outcome.target.anatomy.shape, outcome.model.config
    lawful = tiny.HIDDEN % shape.layers[0].num_attention_heads == 0
    assert outcome.target.is_stock and config.model_type == ("llama" if lawful else "seed_oss")
    block = outcome.model.model.layers[0]
    assert block.self_attn.o_proj.bias is not None and block.mlp.down_proj.bias is not None
    assert len(set(shape.layers)) == 1
    biases = sum(p.numel() for n, p in block.named_parameters() if n.endswith(".bias")) / shape.layers[0].intermediate_size
    layer, head_dim = shape.layers[0], shape.head_dim
    spared = 0 if lawful else 3 * (layer.num_attention_heads + 2 * layer.num_key_value_heads) * head_dim  # no q, k, v biases
    assert budget - outcome.plan.step - 3 * biases - spared < after <= budget  # one channel owns biases too


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("multiple_of", [1, 4, 8])
def test_flap_s_widths_are_multiples(ratio, multiple_of):
    outcome, dense = cut("qwen3", method="flap", ratio=ratio, multiple_of=multiple_of)
    budget, after = check_sizes(outcome, dense)
    assert budget - outcome.plan.step < after <= budget
    assert all(layer.intermediate_size % multiple_of == 0 for layer in outcome.target.anatomy.shape.layers)


@pytest.mark.parametrize("ratio", [0.5, 0.7])
def test_layers_that_come_out_alike_by_chance_keep_to_the_budget(ratio):
    """A stock llama's bias flags add biases to q, k, v, gate and up too: parameters that were not asked for."""
    outcome, dense = cut("llama", method="flap", ratio=ratio)
    assert len(set(outcome.target.anatomy.shape.layers)) == 1
    budget, after = check_sizes(outcome, dense)
    assert after <= budget


@pytest.mark.parametrize("case", ["llama", "gemma2", "phi3"])
def test_flap_keeps_the_best_of_every_layer(case):
    """Within each axis the kept units are the best by the outcome's own scores (test_criteria holds these to the formula)."""
    outcome, _ = cut(case, method="flap", ratio=0.4)
    for name, kept in outcome.keep.units.items():
        values = outcome.scores.values[name].tolist()
        order = sorted(range(len(values)), key=lambda u, v=values: -v[u])
        assert kept == tuple(sorted(order[: len(kept)]))
    sizes = [len(k) for k in outcome.keep.units.values()]
    assert len(set(sizes)) > 1  # per layer, as the scores say


@pytest.mark.parametrize("case", ["llama", "llama_bias", "phi3"])
def test_flap_s_biases(case):
    """Those of the dense model plus what the removed channels gave on average, from one plain pass of the dense model."""
    outcome, dense = cut(case, method="flap", ratio=0.4)
    for layer in range(tiny.LAYERS):
        for module, axis, block in (
            ("self_attn.o_proj", "kv_heads", dense.config.head_dim if case != "phi3" else 4),
            ("mlp.down_proj", "intermediate", 1),
        ):
            name = f"model.layers.{layer}.{module}"
            linear = dense.get_submodule(name)
            if axis == "kv_heads":
                block = linear.in_features // tiny.KV_HEADS
            kept = outcome.keep.units.get(f"layers.{layer}.{axis}", range(linear.in_features // block))
            columns = {u * block + j for u in kept for j in range(block)}
            x = pipeline.inputs_of(dense, WINDOWS.ids_NT, [name])[name].flatten(0, 1)
            expected = torch.zeros(tiny.HIDDEN).double() if linear.bias is None else linear.bias.detach().clone()
            for c in range(linear.in_features):
                if c not in columns:
                    expected += linear.weight[:, c].detach() * x[:, c].mean()
            found = outcome.model.get_submodule(name).bias.detach()
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # through float32


def test_flap_without_compensation_is_the_zeroed_model():
    """0.7 no. 1: the sliced model is the dense one with the same units zeroed."""
    outcome, dense = cut("llama", method="flap", ratio=0.4, compensate="none")
    zero_(dict(dense.named_parameters()), Anatomy.of(dense.config), outcome.keep)
    outcome.model.set_attn_implementation("eager")
    logits = tiny.logits_of(outcome.model, WINDOWS.ids_NT)
    torch.testing.assert_close(logits, tiny.logits_of(dense, WINDOWS.ids_NT), rtol=1e-9, atol=1e-9)


def test_flap_s_bias_helps():
    """Not a law, but on this model and its own calibration windows the compensated cut is nearer to the dense logits."""
    (biased, dense), (bare, _) = (cut("llama", method="flap", ratio=0.3, compensate=c) for c in ("bias", "none"))
    expected = tiny.logits_of(dense, WINDOWS.ids_NT)
    with_bias, without = (float((tiny.logits_of(o.model, WINDOWS.ids_NT) - expected).pow(2).mean()) for o in (biased, bare))
    assert with_bias < without


def test_flap_that_leaves_nothing_is_refused():
    with pytest.raises(UserError, match=r"ratio: the least that can stay .* ask for a smaller ratio"):
        cut("llama", method="flap", ratio=0.95)
    with pytest.raises(UserError, match=r"ratio: .* ask for a smaller ratio"):
        cut("llama", method="flap", ratio=0.95, uniform=True)


# -- minitron-width -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FAMILIES)
@pytest.mark.parametrize("request_", [{}, {"compensate": "gain"}, {"options": {"reduction": "l2"}}])
def test_width_meets_its_target(case, request_):
    outcome, dense = cut(case, method="minitron-width", ratio=0.35, **request_)
    budget, after = check_sizes(outcome, dense)
    assert after == budget <= 0.65 * block_params(dense)
    assert 0.65 * block_params(dense) - outcome.plan.step < after
    assert outcome.target.is_stock
    if not case.startswith("gemma") and "compensate" not in request_:
        unchanged_rows(outcome, dense)
    assert set(outcome.keep.units) == {"hidden"} | {f"layers.{i}.intermediate" for i in range(tiny.LAYERS)}


@pytest.mark.parametrize("case", ["llama", "llama_tied", "gemma2"])
def test_width_to_a_target(case):
    target = {"hidden_size": 16, "intermediate_size": 10}
    outcome, dense = cut(case, method="minitron-width", target=target)
    config = outcome.model.config
    assert (config.hidden_size, config.intermediate_size) == (16, 10)
    assert (config.num_attention_heads, config.head_dim) == (dense.config.num_attention_heads, dense.config.head_dim)
    check_sizes(outcome, dense)


def test_width_of_a_stem_that_llama_refuses_is_written_as_another_type():
    outcome, dense = cut("llama", method="minitron-width", target={"hidden_size": 27})
    assert outcome.model.config.model_type == "mistral" and outcome.model.config.hidden_size == 27
    check_sizes(outcome, dense)
    unchanged_rows(outcome, dense)


def test_width_of_the_ffn_alone_leaves_the_stem():
    outcome, dense = cut("llama", method="minitron-width", target={"intermediate_size": 10})
    assert "hidden" not in outcome.keep.units and outcome.model.config.hidden_size == tiny.HIDDEN
    unchanged_rows(outcome, dense)
    with pytest.raises(
        UserError, match="compensate: gain repairs the norms of a cut stem, but this plan leaves the stem whole"
    ):
        cut("llama", method="minitron-width", target={"intermediate_size": 10}, compensate="gain")


@pytest.mark.parametrize("case", ["llama", "gemma2", "olmo2"])
def test_width_s_measured_gains(case):
    """Every norm over the stem, in the cut model, multiplies by the dense gain times E[rms_kept / rms_all]."""
    outcome, dense = cut(case, method="minitron-width", target={"hidden_size": 16}, compensate="gain")
    kept = list(outcome.keep.units["hidden"])
    offset = 1.0 if case == "gemma2" else 0.0
    eps = dense.config.rms_norm_eps
    norms = [n for n, m in dense.named_modules() if n.endswith("norm") and "self_attn" not in n and hasattr(m, "weight")]
    inputs = pipeline.inputs_of(dense, WINDOWS.ids_NT, norms)
    for name in norms:
        x = inputs[name]
        ratio = ((x[..., kept].pow(2).mean(-1) + eps) / (x.pow(2).mean(-1) + eps)).sqrt().mean()
        expected = (dense.get_submodule(name).weight.detach()[kept] + offset) * ratio
        if case == "gemma2" and name == "model.norm":
            # the config scales embeddings by sqrt(16) now, the shared matrix pays it back, and the head must not notice
            expected = expected * math.sqrt(16 / 32)
        found = outcome.model.get_submodule(name).weight.detach() + offset
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


# -- minitron-depth -----------------------------------------------------------------------------------------------------


def without_layers(dense, gone):
    """Another model with these layers deleted by hand."""
    short = copy.deepcopy(dense)
    kept = [i for i in range(len(dense.model.layers)) if i not in gone]
    short.model.layers = torch.nn.ModuleList([short.model.layers[i] for i in kept])
    short.config.num_hidden_layers = len(kept)
    for name in ("layer_types", "no_rope_layers"):
        if getattr(short.config, name, None) is not None:
            setattr(short.config, name, [getattr(dense.config, name)[i] for i in kept])
    return short


def mean_loss(model, ids):
    """Nats a token, position by position."""
    log_p = tiny.logits_of(model, ids).double().log_softmax(-1)
    return -log_p[:, :-1].gather(-1, ids[:, 1:, None]).mean().item()


@pytest.mark.parametrize("case", ["llama", "llama_tied", "qwen2", "qwen3", "gemma2", "olmo2", "phi3", "smollm3"])
@pytest.mark.parametrize("run", [1, 2])
def test_depth_s_losses_are_those_of_shorter_models(case, run):
    model = pipeline.model(case)
    plan = plan_for(model, method="minitron-depth", target={"num_hidden_layers": tiny.LAYERS - run})
    expected = [mean_loss(without_layers(model, range(i, i + run)), WINDOWS.ids_NT) for i in range(tiny.LAYERS - run + 1)]
    start = expected.index(min(expected))
    for batch_size in (5, 2):
        outcome = one_shot_(plan, copy.deepcopy(model), WINDOWS, batch_size=batch_size)
        assert outcome.losses == pytest.approx(expected, rel=1e-5)  # softmax in float32 of logits of order 1
        assert outcome.keep.units["layers"] == tuple(i for i in range(tiny.LAYERS) if not start <= i < start + run)
    short = without_layers(model, range(start, start + run))
    outcome.model.set_attn_implementation("eager")
    logits = tiny.logits_of(outcome.model, WINDOWS.ids_NT)
    torch.testing.assert_close(logits, tiny.logits_of(short, WINDOWS.ids_NT), rtol=1e-9, atol=1e-9)
    cached = tiny.greedy_cached(outcome.model, WINDOWS.ids_NT[:1, :5], 6)  # B2 (e): layers renumbered for the cache
    assert torch.equal(cached, tiny.greedy_by_hand(short, WINDOWS.ids_NT[:1, :5], 6))


@pytest.mark.parametrize("planted", [0, 1, 2])
def test_depth_finds_the_layer_that_does_nothing(planted):
    """2.6 'Check': o_proj = down_proj = 0 makes an identity block; removing it costs exactly nothing."""
    model = pipeline.model("llama")
    with torch.no_grad():
        model.model.layers[planted].self_attn.o_proj.weight.zero_()
        model.model.layers[planted].mlp.down_proj.weight.zero_()
        model.lm_head.weight.mul_(20)  # sharp predictions: the model is sure of its own text, and of nothing less
    windows = learnt(model)
    dense = mean_loss(model, windows.ids_NT)
    outcome = one_shot_(plan_for(model, method="minitron-depth", ratio=0.34), model, windows, batch_size=2)
    assert outcome.keep.units["layers"] == tuple(i for i in range(3) if i != planted)
    assert outcome.losses[planted] == pytest.approx(dense, rel=1e-6)
    assert min(loss for i, loss in enumerate(outcome.losses) if i != planted) > dense + 1e-3


def learnt(model):
    """Windows whose every token is the model's own best guess, so that any change of the model costs loss."""
    ids = tiny.greedy_by_hand(model, tiny.tokens(4, 2, vocab=pipeline.VOCAB), 14)
    base = pipeline.windows(4)
    return type(base)(ids, "greedy", None, None, "1" * 64, None, ids.numel())


def test_depth_takes_a_removal_that_helps():
    """B2 (a): with |difference| the harmless removal would win; the one that improves on the dense model must."""
    model = pipeline.model("llama")
    with torch.no_grad():
        for layer in (0, 1):
            for matrix in (model.model.layers[layer].self_attn.o_proj, model.model.layers[layer].mlp.down_proj):
                matrix.weight.zero_()
    good = copy.deepcopy(model)
    with torch.no_grad():  # layer 2 does nothing in `good`; in `model` it does harm
        for matrix in (good.model.layers[2].self_attn.o_proj, good.model.layers[2].mlp.down_proj):
            matrix.weight.zero_()
    windows = learnt(good)
    dense = mean_loss(model, windows.ids_NT)
    outcome = one_shot_(plan_for(model, method="minitron-depth", ratio=0.34), model, windows, batch_size=2)
    assert outcome.losses[2] < dense - 1e-3
    assert abs(outcome.losses[0] - dense) < 1e-5  # the harmless one, which |difference| would take
    assert outcome.keep.units["layers"] == (0, 1)


# -- sparse -------------------------------------------------------------------------------------------------------------


def sparse_matrices(model):
    return {n: p.detach() for n, p in model.named_parameters() if ".layers." in n and p.dim() == 2}


@pytest.mark.parametrize("case", FAMILIES)
@pytest.mark.parametrize("method", ["magnitude", "wanda"])
@pytest.mark.parametrize("request_", [{"ratio": 0.5}, {"ratio": 0.3}, {"pattern": "2:4"}, {"pattern": "1:4"}])
def test_sparsity_is_exact(case, method, request_):
    outcome, dense = cut(case, method=method, **request_)
    found, before = pipeline.state(outcome.model), pipeline.state(dense)
    matrices = sparse_matrices(dense)
    assert set(outcome.mask.kept) == set(matrices)
    zeros = total = 0
    for name, weight in found.items():
        if name not in matrices:
            assert torch.equal(weight, before[name]), name
            continue
        kept = outcome.mask.kept[name]
        assert (weight[~kept] == 0).all() and torch.equal(weight[kept], before[name][kept])
        assert (weight[kept] != 0).all()  # so that zeros can be counted
        gone = weight == 0
        zeros, total = zeros + int(gone.sum()), total + gone.numel()
        if "pattern" in request_:
            n, m = map(int, request_["pattern"].split(":"))
            assert ((~gone).reshape(gone.shape[0], -1, m).sum(-1) == n).all()
        elif method == "wanda":
            assert (gone.sum(1) == int(request_["ratio"] * gone.shape[1])).all()
        else:
            assert int(gone.sum()) == round(request_["ratio"] * gone.numel())
    assert outcome.ratios == {
        "removed_of_all": 0,
        "removed_of_block": 0,
        "sparsity": pytest.approx(zeros / total, abs=1e-12),
    }
    assert outcome.model.config.to_dict() == dense.config.to_dict()


@pytest.mark.parametrize("case", ["llama", "phi3"])
def test_magnitude_is_its_formula(case):
    outcome, dense = cut(case, method="magnitude", ratio=0.4)
    for name, weight in sparse_matrices(dense).items():
        flat = weight.abs().flatten().tolist()
        gone = pipeline.lowest(flat, round(0.4 * len(flat)))
        assert (~outcome.mask.kept[name]).flatten().nonzero().flatten().tolist() == sorted(gone)


@pytest.mark.parametrize("case", ["llama", "llama_tied", "qwen3", "gemma2", "olmo2", "phi3", "mistral"])
@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_wanda_prunes_block_by_block_with_pruned_inputs(case, pattern):
    """Against hooks on the whole model: every block's inputs come from a forward with all earlier blocks pruned."""
    outcome, model = cut(case, method="wanda", **({"pattern": pattern} if pattern else {"ratio": 0.5}))
    dense_masks = {}
    for layer in range(tiny.LAYERS):
        prefix = f"model.layers.{layer}."
        names = [n.removesuffix(".weight") for n in sparse_matrices(model) if n.startswith(prefix)]
        inputs = pipeline.inputs_of(model, WINDOWS.ids_NT, names)
        for name in names:
            weight = model.get_submodule(name).weight.detach()
            norms = inputs[name].flatten(0, 1).pow(2).sum(0).sqrt()
            scores = weight.abs() * norms
            kept = torch.ones_like(weight, dtype=torch.bool)
            width = 4 if pattern else weight.shape[1]
            for r in range(weight.shape[0]):
                for start in range(0, weight.shape[1], width):
                    for j in pipeline.lowest(scores[r, start : start + width].tolist(), width // 2):
                        kept[r, start + j] = False
            dense_masks[f"{name}.weight"] = kept
        for name in names:  # only once the whole block is scored
            weight = model.get_submodule(name).weight
            weight.data[~dense_masks[f"{name}.weight"]] = 0
    for name, kept in dense_masks.items():
        assert torch.equal(outcome.mask.kept[name], kept), name
    outcome.model.set_attn_implementation("eager")
    assert torch.equal(tiny.logits_of(outcome.model, WINDOWS.ids_NT), tiny.logits_of(model, WINDOWS.ids_NT))


def test_wanda_does_not_use_dense_inputs():
    """The test above can tell: with dense inputs the last block's mask would be another."""
    outcome, dense = cut("llama", method="wanda", ratio=0.5)
    name = "model.layers.2.mlp.down_proj"
    x = pipeline.inputs_of(dense, WINDOWS.ids_NT, [name])[name].flatten(0, 1)
    scores = dense.get_submodule(name).weight.detach().abs() * x.pow(2).sum(0).sqrt()
    order = scores.argsort(dim=1, stable=True)[:, : scores.shape[1] // 2]
    kept = torch.ones_like(scores, dtype=torch.bool).scatter_(1, order, False)
    assert not torch.equal(kept, outcome.mask.kept[f"{name}.weight"])


# -- all methods --------------------------------------------------------------------------------------------------------

ALL = [("flap", 0.3), ("minitron-width", 0.3), ("minitron-depth", 0.34), ("wanda", 0.5), ("magnitude", 0.5)]


@pytest.mark.parametrize(("method", "ratio"), ALL)
def test_bfloat16_models_stay_bfloat16(method, ratio):
    outcome, dense = cut("llama", dtype=torch.bfloat16, method=method, ratio=ratio)
    assert {p.dtype for p in outcome.model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(tiny.logits_of(outcome.model, WINDOWS.ids_NT)).all()
    if outcome.findings is not None:
        assert all(v.dtype == torch.float64 for m in outcome.findings.statistics.values() for v in m.sums.values())
    assert block_params(outcome.model) <= block_params(dense)


@pytest.mark.parametrize(("method", "ratio"), ALL)
@pytest.mark.parametrize("case", LIKE_LLAMA)
def test_the_decision_does_not_depend_on_the_batch(case, method, ratio):
    one, _ = cut(case, batch_size=1, method=method, ratio=ratio)
    many, _ = cut(case, batch_size=5, method=method, ratio=ratio)
    assert one.keep == many.keep
    if one.mask is not None:
        assert all(torch.equal(kept, many.mask.kept[name]) for name, kept in one.mask.kept.items())


@pytest.mark.parametrize(("method", "ratio"), ALL[:3])
def test_the_dense_model_is_consumed(method, ratio):
    """Its weights are let go of before the cut model stands, so that memory never holds two."""
    model = pipeline.model("llama")
    one_shot_(plan_for(model, method=method, ratio=ratio), model, WINDOWS)
    assert all(p.device.type == "meta" for p in model.parameters())


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_sparse_methods_work_in_place(method):
    model = pipeline.model("llama")
    where = {name: p.data_ptr() for name, p in model.named_parameters()}
    outcome = one_shot_(plan_for(model, method=method, ratio=0.5), model, WINDOWS)
    assert outcome.model is model
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == where


@pytest.mark.parametrize(("method", "ratio"), ALL)
def test_generation_settings_survive(method, ratio):
    model = pipeline.model("llama")
    model.generation_config.max_length = 123
    outcome = one_shot_(plan_for(model, method=method, ratio=ratio), model, WINDOWS)
    assert outcome.model.generation_config.max_length == 123


@pytest.mark.parametrize(("method", "ratio"), ALL)
def test_progress_goes_up_to_the_end(method, ratio):
    seen = []
    model = pipeline.model("llama")
    plan = plan_for(model, method=method, ratio=ratio)
    one_shot_(plan, model, WINDOWS, batch_size=2, progress=lambda *a: seen.append(a))
    steps = [(done, total) for stage, done, total in seen if stage == "score"]
    assert steps == [(i + 1, len(steps)) for i in range(len(steps))] and steps


@pytest.mark.parametrize(
    "request_",
    [
        {"method": "flap", "ratio": 0.3},
        {"method": "flap", "ratio": 0.4, "uniform": True},
        {"method": "minitron-depth", "ratio": 0.34},
        {"method": "wanda", "ratio": 0.5},
        {"method": "minitron-width", "target": {"hidden_size": 24}},
    ],
    ids=lambda r: r["method"] + ("-uniform" if "uniform" in r else ""),
)
def test_a_cut_model_can_be_cut_again(request_):
    """Also one whose layers differ, with FLAP's biases in it."""
    first, _ = cut("llama", method="flap", ratio=0.2)
    again = copy.deepcopy(first.model)
    outcome = one_shot_(plan_for(again, **request_), again, WINDOWS)
    after = block_params(outcome.model)
    assert outcome.target.anatomy.block_params == after <= block_params(first.model)
    assert torch.isfinite(tiny.logits_of(outcome.model, WINDOWS.ids_NT)).all()
    assert outcome.target.is_stock == ("uniform" in request_)


def test_flap_s_second_biases_come_on_top():
    first, _ = cut("llama", method="flap", ratio=0.2)
    dense = copy.deepcopy(first.model)
    second = one_shot_(plan_for(first.model, method="flap", ratio=0.2), first.model, WINDOWS)
    for layer in range(tiny.LAYERS):
        name = f"model.layers.{layer}.mlp.down_proj"
        linear = dense.get_submodule(name)
        kept = second.keep.units.get(f"layers.{layer}.intermediate", range(linear.in_features))
        x = pipeline.inputs_of(dense, WINDOWS.ids_NT, [name])[name].flatten(0, 1).mean(0)
        gone = [c for c in range(linear.in_features) if c not in kept]
        expected = linear.bias.detach() + linear.weight.detach()[:, gone] @ x[gone]
        torch.testing.assert_close(second.model.get_submodule(name).bias.detach(), expected, rtol=1e-5, atol=1e-5)


def test_a_biased_model_whose_layers_become_alike_again():
    """FLAP's biases without stock flags, and a cut that makes the FFN widths equal: the config must still say the biases."""
    config = pipeline.config("llama")
    keep = Keep({f"layers.{i}.intermediate": tuple(range(20 + i)) for i in range(3)})
    biased = target_for(config, Anatomy.of(config), keep, out_bias=frozenset({"attention", "mlp"})).config
    model = tiny.grown(biased)
    outcome = one_shot_(plan_for(model, method="minitron-width", target={"intermediate_size": 12}), model, WINDOWS)
    assert outcome.model.model.layers[0].mlp.down_proj.bias is not None
    assert torch.isfinite(tiny.logits_of(outcome.model, WINDOWS.ids_NT)).all()


# -- statistics, used again ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["flap", "minitron-width"])
def test_statistics_spare_the_pass(method, monkeypatch):
    first, _ = cut("llama", method=method, ratio=0.2)
    direct, _ = cut("llama", method=method, ratio=0.4)

    def refuse(*_, **__):
        raise AssertionError("no second pass")

    monkeypatch.setattr(Sweep, "__init__", refuse)
    model = pipeline.model("llama")
    plan = plan_for(model, method=method, ratio=0.4)
    again = one_shot_(plan, model, WINDOWS, findings=first.findings)
    assert again.keep == direct.keep != first.keep
    for name, value in pipeline.state(direct.model).items():
        assert torch.equal(value, pipeline.state(again.model)[name]), name


def test_statistics_in_a_file_spare_the_pass(tmp_path, monkeypatch):
    """Through the front door: written by the first run, read by the second, refused for other windows."""
    file = tmp_path / "statistics.safetensors"
    ask = {
        "method": "flap",
        "calibration": str(pipeline.text_file()),
        "text": api.TextOptions(4, 16),
        "statistics": file,
    }
    source = str(pipeline.folder())
    direct = api.prune(source, ratio=0.4, **(ask | {"statistics": None}))
    api.prune(source, ratio=0.2, **ask)
    passes = []
    run = Sweep.run
    monkeypatch.setattr(Sweep, "run", lambda *a, **k: passes.append(1) or run(*a, **k))
    again = api.prune(source, ratio=0.4, **ask)
    assert not passes and again.outcome.keep == direct.outcome.keep
    for other in ({"text": api.TextOptions(5, 16)}, {"dtype": "bfloat16"}):
        with pytest.raises(UserError, match="holds statistics of another model, other windows or another dtype"):
            api.prune(source, ratio=0.4, **(ask | other))
    with pytest.raises(UserError, match="statistics: wanda must sweep again for every target; drop --statistics"):
        api.prune(source, **(ask | {"method": "wanda", "ratio": 0.5}))
