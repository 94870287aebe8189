"""What units and weights are worth, against loops over float64 and against numbers worked out by hand."""

from __future__ import annotations

import math
import statistics as st

import pipeline
import pytest
import tiny
import torch

from prunus import hf
from prunus.allocate import kept_in_rows
from prunus.anatomy import Anatomy
from prunus.criteria import UNIT_CRITERIA, activation_norm, fluctuation, magnitude, wanda
from prunus.cut import slice_plan, slice_tensors
from prunus.keep import Keep
from prunus.statistics import Moments, Sweep, collect

IDS = tiny.tokens(6, 13, vocab=pipeline.VOCAB)
GROUPED = ["llama_mha", "llama", "llama_gqa4", "llama_mqa", "phi3", "qwen3", "gemma2"]  # 1, 2, 4, 8 query heads a group


def moments(x, *want):
    out = Moments(frozenset(want))
    out.update(torch.as_tensor(x, dtype=torch.float64).reshape(-1, *torch.as_tensor(x).shape[-2:]))
    return out


def scored(model, name="fluctuation", batch=2):
    """(scores, anatomy) of a unit criterion on the shared windows."""
    anatomy = Anatomy.of(model.config)
    statistics = collect(Sweep(model, anatomy, IDS, batch), UNIT_CRITERIA[name].wants)
    return UNIT_CRITERIA[name].score(anatomy, hf.weights(model, anatomy), statistics), anatomy


# -- single weights -----------------------------------------------------------------------------------------------------


def test_magnitude():
    weight = torch.tensor([[1, -3], [2, 0.5]], dtype=torch.bfloat16)
    assert magnitude(weight, None).tolist() == [[1, 3], [2, 0.5]]
    assert magnitude(weight, None).dtype == torch.float32


def test_wanda_by_hand():
    """X3: the two largest magnitudes go."""
    weight = torch.tensor([[1, -2, 0.5, 3]])
    inputs = moments([[[4, 0, 0, 0], [0, 1, 0, 0]], [[0, 0, 6, 0], [0, 0, 0, 0.5]]], "sumsq")
    score = wanda(weight, inputs)
    assert score.tolist() == [[4, 2, 3, 1.5]]
    assert kept_in_rows(score, 0.5).tolist() == [[True, False, True, False]]


def test_wanda_is_its_formula():
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(7, 5, generator=generator), torch.randn(3, 11, 5, generator=generator)
    expected = [
        [abs(float(w)) * math.sqrt(math.fsum(float(v) ** 2 for v in x[:, :, j].flatten())) for j, w in enumerate(row)]
        for row in weight
    ]
    # the score is returned in float32
    torch.testing.assert_close(wanda(weight, moments(x, "sumsq")), torch.tensor(expected), rtol=1e-6, atol=0)


def test_wanda_without_a_difference_between_inputs_is_magnitude():
    weight = torch.randn(9, 8, generator=torch.Generator().manual_seed(1))
    same = moments(torch.ones(2, 3, 8), "sumsq")
    assert torch.equal(kept_in_rows(wanda(weight, same), 0.5), kept_in_rows(magnitude(weight, None), 0.5))


def test_wanda_does_not_see_where_a_scale_sits():
    """Input channel j times c, column j times 1/c: the function is the same and so is the mask."""
    generator = torch.Generator().manual_seed(2)
    weight, x = torch.randn(16, 12, generator=generator).double(), torch.randn(4, 9, 12, generator=generator).double()
    c = torch.tensor([10.0 ** (j % 5 - 2) for j in range(12)], dtype=torch.float64)
    plain = kept_in_rows(wanda(weight, moments(x, "sumsq")), 0.5)
    assert torch.equal(plain, kept_in_rows(wanda(weight / c, moments(x * c, "sumsq")), 0.5))
    assert not torch.equal(plain, kept_in_rows(magnitude(weight / c, None), 0.5))  # magnitude does


# -- fluctuation (FLAP) -------------------------------------------------------------------------------------------------


def by_hand(hidden=8):
    """X5 in a model with two FFN channels: x0 is always 3, x1 is +-1, W's first row is [2, 1], the others nothing."""
    config = tiny.tiny_config("llama", intermediate_size=2, num_hidden_layers=1)
    anatomy = Anatomy.of(config)
    x = torch.tensor([[[3.0, 1], [3, -1]], [[3, 1], [3, -1]]])
    weight = torch.zeros(tiny.HIDDEN, 2)
    weight[0] = torch.tensor([2.0, 1])
    tensors = {name: torch.ones(t.shape) for name, t in anatomy.tensors.items()}
    tensors["model.layers.0.mlp.down_proj.weight"] = weight
    seen = {
        "layers.0.mlp.intermediate": moments(x, "mean", "var"),
        "layers.0.attention.q": moments(torch.zeros(1, 2, 64), "mean", "var"),
    }
    return anatomy, tensors, seen, x, weight


def test_fluctuation_by_hand():
    """X5: the variances are 0 and 4/3, and so are the scores, because the second column of W has norm 1."""
    anatomy, tensors, seen, _, _ = by_hand()
    assert seen["layers.0.mlp.intermediate"].var_C.tolist() == pytest.approx([0, 4 / 3], abs=1e-12)
    scores = fluctuation(anatomy, tensors, seen, 0)
    assert scores.values["layers.0.intermediate"].tolist() == pytest.approx([0, 4 / 3], rel=1e-7)
    assert scores.spread["layers.0.intermediate"] == pytest.approx((2 / 3, st.stdev([0, 4 / 3])), rel=1e-7)
    assert scores.values["layers.0.kv_heads"].tolist() == [0.0] * 4


@pytest.mark.parametrize("case", GROUPED)
def test_fluctuation_is_its_formula(case):
    """var(x_c) * ||W_:c||^2, unbiased; a KV group is the mean over the contiguous channels of its query heads."""
    model = pipeline.model(case)
    scores, anatomy = scored(model)
    layer_shape = anatomy.shape.layers[0]
    head_dim, groups = anatomy.shape.head_dim, layer_shape.num_key_value_heads
    per_group = layer_shape.num_attention_heads // groups * head_dim
    assert len(scores.values) == len(scores.spread) == 2 * tiny.LAYERS
    for layer in range(tiny.LAYERS):
        for axis, module in (("kv_heads", "self_attn.o_proj"), ("intermediate", "mlp.down_proj")):
            name = f"model.layers.{layer}.{module}"
            x = pipeline.inputs_of(model, IDS, [name])[name].flatten(0, 1)
            weight = model.get_submodule(name).weight.detach().double()
            channels = [
                st.variance(x[:, c].tolist()) * math.fsum(float(w) ** 2 for w in weight[:, c]) for c in range(x.shape[1])
            ]
            units = channels
            if axis == "kv_heads":
                units = [st.fmean(channels[g * per_group : (g + 1) * per_group]) for g in range(groups)]
            found = scores.values[f"layers.{layer}.{axis}"]
            assert found.dtype == torch.float32
            # activations go into the moments as float32: relative 1e-5 in a variance of this size
            assert found.tolist() == pytest.approx(units, rel=2e-5)
            expected = (st.fmean(channels), st.stdev(channels))
            assert scores.spread[f"layers.{layer}.{axis}"] == pytest.approx(expected, rel=2e-5)


def test_fluctuation_of_layers_that_differ():
    """A layer without attention or MLP has no such scores; the others are scored at their own sizes."""
    config = tiny.tiny_config("llama", vocab_size=pipeline.VOCAB)
    cut = Keep({"layers.0.kv_heads": (0, 1), "layers.1.attention": (), "layers.2.mlp": (), "layers.1.intermediate": (0, 1)})
    model = tiny.grown(hf.target_for(config, Anatomy.of(config), cut).config)
    scores, _ = scored(model)
    assert {name: len(v) for name, v in scores.values.items()} == {
        "layers.0.kv_heads": 2,
        "layers.0.intermediate": tiny.INTERMEDIATE,
        "layers.1.intermediate": 2,
        "layers.2.kv_heads": tiny.KV_HEADS,
    }


@pytest.mark.parametrize("case", ["llama", "llama_mha", "llama_gqa4"])
def test_groups_own_the_query_heads_that_read_them(case):
    """B12: only the contiguous query heads of one group reach the stream. That group must win, and alone it is the model."""
    model = pipeline.model(case)
    anatomy = Anatomy.of(model.config)
    groups = anatomy.shape.layers[0].num_key_value_heads
    per_group = anatomy.shape.layers[0].num_attention_heads // groups
    planted = 1
    with torch.no_grad():
        for block in model.model.layers:
            heads = block.self_attn.o_proj.weight.view(tiny.HIDDEN, -1, tiny.HEAD_DIM)
            for q in range(heads.shape[1]):
                if q // per_group != planted:
                    heads[:, q] = 0
    expected = tiny.logits_of(model, IDS)
    scores, _ = scored(model)
    for layer in range(tiny.LAYERS):
        values = scores.values[f"layers.{layer}.kv_heads"]
        assert int(values.argmax()) == planted
        assert float(values[planted]) > 0 and float(values.sum()) == float(values[planted])
    keep = Keep({f"layers.{i}.kv_heads": (planted,) for i in range(tiny.LAYERS)})
    target = hf.target_for(model.config, anatomy, keep)
    cut = hf.build(target.config, slice_tensors(pipeline.state(model), slice_plan(anatomy, keep)))
    cut.set_attn_implementation("eager")  # as the dense model: its softmax is float32, which is 1e-6 from sdpa's
    torch.testing.assert_close(tiny.logits_of(cut, IDS), expected, rtol=1e-10, atol=1e-10)


def test_dead_units_come_last():
    """0.7 no. 5: what reaches nothing is worth nothing."""
    model = pipeline.model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[:, 7] = 0
        model.model.layers[2].self_attn.o_proj.weight[:, 2 * 16 : 3 * 16] = 0  # group 2: two heads of eight
    scores, _ = scored(model)
    channels, groups = scores.values["layers.1.intermediate"], scores.values["layers.2.kv_heads"]
    assert float(channels[7]) == 0.0 and float(channels.min()) == 0.0 and int((channels == 0).sum()) == 1
    assert float(groups[2]) == 0.0 and int(groups.argmin()) == 2 and int((groups == 0).sum()) == 1


@pytest.mark.parametrize("criterion", ["fluctuation", "activation-norm:mean-l2", "activation-norm:l2"])
def test_duplicates_are_worth_the_same(criterion):
    """0.7 no. 4: a channel copied over another, both with half its outgoing weights. Only the copies' scores may meet."""
    model = pipeline.model("llama")
    mlp = model.model.layers[1].mlp
    with torch.no_grad():
        for matrix in (mlp.gate_proj.weight, mlp.up_proj.weight):
            matrix[9] = matrix[4]
        mlp.down_proj.weight[:, 4] /= 2
        mlp.down_proj.weight[:, 9] = mlp.down_proj.weight[:, 4]
    values = scored(model, criterion)[0].values["layers.1.intermediate"].tolist()
    assert values[4] == pytest.approx(values[9], rel=1e-12)
    assert len(set(values) - {values[4], values[9]}) == tiny.INTERMEDIATE - 2


def test_fluctuation_does_not_see_where_a_scale_sits():
    """up_proj row j times c, down_proj column j times 1/c: the same function and the same scores."""
    model, scaled = pipeline.model("llama"), pipeline.model("llama")
    c = torch.tensor([2.0 ** (j % 5 - 2) for j in range(tiny.INTERMEDIATE)], dtype=torch.float64)
    with torch.no_grad():
        for block in scaled.model.layers:
            block.mlp.up_proj.weight.mul_(c[:, None])
            block.mlp.down_proj.weight.div_(c)
    plain, moved = scored(model)[0].values, scored(scaled)[0].values
    for name in plain:  # powers of two, but the stream is added up in another order downstream
        assert moved[name].tolist() == pytest.approx(plain[name].tolist(), rel=1e-5)


# -- activation norm (Minitron) -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reduction", "want", "expected"),
    [("mean-l2", "window_abs", [4 / 3, 1.0]), ("l2", "sumsq", [math.sqrt(8), 3.0])],
)
def test_activation_norm_by_hand(reduction, want, expected):
    """2.7 'Check': on these three tokens the two published definitions disagree about the better channel."""
    seen = moments([[[2, 0], [0, 3], [2, 0]]], want)
    config = tiny.tiny_config("llama", num_hidden_layers=1, intermediate_size=2, hidden_size=2, num_attention_heads=2,
                              num_key_value_heads=1)  # fmt: skip
    anatomy = Anatomy.of(config)
    statistics = {"layers.0.attention.hidden": seen, "layers.0.mlp.hidden": seen, "layers.0.mlp.intermediate": seen}
    scores = activation_norm(reduction)(anatomy, {}, statistics)
    assert scores.values["layers.0.intermediate"].tolist() == pytest.approx(expected, rel=1e-6)
    assert scores.values["hidden"].tolist() == pytest.approx([2 * e for e in expected], rel=1e-6)  # two norms


def test_mean_l2_takes_the_mean_over_tokens_and_the_norm_over_windows():
    """B1: the axes. Two windows of two tokens: means 2 and 0, then 3 and 4."""
    seen = moments([[[1.0, 3], [-3, -3]], [[0, 4], [0, -4]]], "window_abs")
    assert seen.sums["window_abs"].sqrt().tolist() == pytest.approx([2.0, 5.0])


@pytest.mark.parametrize("case", ["llama_gqa4", "gemma2", "olmo2", "phi3"])
@pytest.mark.parametrize("reduction", ["mean-l2", "l2"])
def test_activation_norm_is_its_formula(case, reduction):
    model = pipeline.model(case)
    scores, _ = scored(model, f"activation-norm:{reduction}")
    qkv, gate = ("qkv_proj", "gate_up_proj") if case == "phi3" else ("q_proj", "gate_proj")

    def channel(module):
        x_NTC = pipeline.inputs_of(model, IDS, [module])[module]
        columns = x_NTC.shape[-1]
        if reduction == "l2":
            return [math.sqrt(math.fsum(v * v for v in x_NTC[:, :, c].flatten().tolist())) for c in range(columns)]
        means = [[st.fmean(abs(v) for v in window[:, c].tolist()) for window in x_NTC] for c in range(columns)]
        return [math.sqrt(math.fsum(m * m for m in per_window)) for per_window in means]

    stem = [0.0] * tiny.HIDDEN
    for layer in range(tiny.LAYERS):
        for module in (f"self_attn.{qkv}", f"mlp.{gate}"):
            stem = [a + b for a, b in zip(stem, channel(f"model.layers.{layer}.{module}"), strict=True)]
        expected = channel(f"model.layers.{layer}.mlp.down_proj")
        assert scores.values[f"layers.{layer}.intermediate"].tolist() == pytest.approx(expected, rel=1e-5)
    assert scores.values["hidden"].tolist() == pytest.approx(stem, rel=1e-5)
    assert set(scores.values) == {"hidden"} | {f"layers.{i}.intermediate" for i in range(tiny.LAYERS)}


@pytest.mark.parametrize("criterion", ["fluctuation", "activation-norm:mean-l2", "activation-norm:l2"])
def test_scores_do_not_depend_on_the_batch(criterion):
    """B1, X23: 1, 2 and 6 windows at a time; what is left is the rounding of batched matmuls in float64."""
    model = pipeline.model("llama")
    one = scored(model, criterion, batch=1)[0].values
    for batch in (2, 6):
        other = scored(model, criterion, batch=batch)[0].values
        for name in one:
            torch.testing.assert_close(other[name], one[name], rtol=1e-6, atol=0)


def test_activation_norm_does_see_where_a_scale_sits():
    """The documented weakness: a gain times c and the matrices behind it times 1/c is the same model, scored differently."""
    model, scaled = pipeline.model("llama"), pipeline.model("llama")
    with torch.no_grad():
        for block in scaled.model.layers:
            block.input_layernorm.weight[3] *= 8
            for matrix in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
                matrix.weight[:, 3] /= 8
    torch.testing.assert_close(tiny.logits_of(model, IDS), tiny.logits_of(scaled, IDS), rtol=1e-10, atol=1e-10)
    plain = scored(model, "activation-norm:mean-l2")[0].values["hidden"]
    moved = scored(scaled, "activation-norm:mean-l2")[0].values["hidden"]
    assert float(moved[3]) > 3 * float(plain[3])
    torch.testing.assert_close(moved[4:], plain[4:], rtol=1e-6, atol=0)
