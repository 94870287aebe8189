"""Moments are the textbook's; a sweep is the model's own forward, one block at a time.

Shapes: N windows, T tokens, C channels.
"""

from __future__ import annotations

import math

import pipeline
import pytest
import tiny
import torch

from prunus import findings
from prunus.anatomy import Anatomy
from prunus.errors import UserError
from prunus.findings import Findings
from prunus.keep import Keep
from prunus.statistics import BlockCosine, Moments, Sweep, collect, layer_moments, logits_from, reading_points

ALL = frozenset({"mean", "var", "sumsq", "abs", "window_abs", "gram"})
DENSE = {"hidden": ALL, "q": ALL, "intermediate": ALL}


def data(n=7, t=11, c=5, offset=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([0.1, 1.0, 3.0, 10.0, 0.5])[:c]
    x = torch.randn(n, t, c, generator=generator) * scale + offset
    x[:, :, -1] = offset + 0.25  # a channel that never moves
    return x


def moments(x, batch, want=ALL):
    out = Moments(want)
    for part in x.split(batch):
        out.update(part)
    return out


def naive(x):
    """The definitions with loops over plain Python floats, which are float64."""
    rows = [[float(v) for v in token] for window in x for token in window]
    n, c = len(rows), len(rows[0])
    columns = list(zip(*rows, strict=True))
    mean = [math.fsum(col) / n for col in columns]
    windows = [[math.fsum(abs(float(v)) for v in window[:, j]) / len(window) for window in x] for j in range(c)]
    return {
        "mean": mean,
        "var": [math.fsum((v - m) ** 2 for v in col) / (n - 1) for col, m in zip(columns, mean, strict=True)],
        "sumsq": [math.fsum(v * v for v in col) for col in columns],
        "abs": [math.fsum(map(abs, col)) for col in columns],
        "window_abs": [math.fsum(a * a for a in per_window) for per_window in windows],
        "gram": [[math.fsum(a * b for a, b in zip(p, q, strict=True)) for q in columns] for p in columns],
    }


def seen(m):
    return {"mean": m.mean_C, "var": m.var_C} | {k: m.sums[k] for k in ("sumsq", "abs", "window_abs")} | {"gram": m.gram_CC}


def test_gram_matrices_made_panel_by_panel(monkeypatch):
    """Several panels, a last one that is narrow, more windows than are summed in float32, and more after `settle`."""
    monkeypatch.setattr("prunus.statistics._PANEL", 8)
    x = torch.randn(11, 13, 21, generator=torch.Generator().manual_seed(0))
    expected = torch.einsum("ntc,ntd->cd", x.double(), x.double())
    m = moments(x[:9], 2, frozenset({"gram"}))
    m.settle()
    m.update(x[9:])
    # 11 * 13 products of numbers of order 1, in float32
    torch.testing.assert_close(m.gram_CC, expected, rtol=0, atol=1e-4)
    assert m.gram_CC.dtype == torch.float64 and torch.equal(m.gram_CC, m.gram_CC.T)


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_moments_are_the_formulas(batch):
    x = data()
    found, expected = seen(moments(x, batch)), naive(x)
    for name, value in found.items():
        # sums over one window of 11 tokens are float32 (relative 1e-6), everything above that is float64; the channel
        # that never moves has a variance of 0, hence the absolute part
        torch.testing.assert_close(value, torch.tensor(expected[name], dtype=torch.float64), rtol=2e-6, atol=1e-6, msg=name)
    assert moments(x, batch).count == 77
    torch.testing.assert_close(
        moments(x, batch).norm_C(), torch.tensor(expected["sumsq"], dtype=torch.float64).sqrt(), rtol=1e-6, atol=0
    )


def test_a_large_offset_does_not_cancel():
    """At an offset of 1000 times the spread, E[x^2] - E[x]^2 in float32 has no digit left; ours keeps five."""
    x = data(offset=3000.0)
    expected = torch.tensor(naive(x)["var"], dtype=torch.float64)
    moving = expected > 0
    textbook = (x**2).mean((0, 1)) - x.mean((0, 1)) ** 2
    assert float(((textbook - expected)[moving] / expected[moving]).abs().max()) > 0.5  # the test can tell
    found = moments(x, 2)
    # x - shift is exact to the rounding of x itself (3000 * 6e-8 = 2e-4 against a deviation of 0.1 in the first channel),
    # and that rounding is in `expected` too; what is left is the float32 sum over a window
    torch.testing.assert_close(found.var_C[moving], expected[moving], rtol=1e-5, atol=0)
    assert float(found.var_C[~moving].max()) == 0.0
    torch.testing.assert_close(found.mean_C, torch.tensor(naive(x)["mean"], dtype=torch.float64), rtol=1e-7, atol=0)


def test_a_drifting_offset_does_not_cancel_much():
    """The shift is the first window's; windows elsewhere cost digits only in proportion to how far they are."""
    x = data() + torch.arange(7.0)[:, None, None] * 50
    expected = torch.tensor(naive(x)["var"], dtype=torch.float64)
    torch.testing.assert_close(moments(x, 2).var_C, expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("batch", [4, 16])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_the_batch_split_does_not_matter(batch, offset):
    """X23 at 1e-6; what is summed in float32 does not see the batch, so only float64 sums differ."""
    x = data(n=16, offset=offset)
    one, many = seen(moments(x, 1)), seen(moments(x, batch))
    for name, value in one.items():
        torch.testing.assert_close(many[name], value, rtol=1e-12, atol=1e-12 * float(value.abs().max()), msg=name)


def test_one_token_has_no_variance():
    m = moments(torch.ones(1, 1, 3), 1)
    assert m.var_C.tolist() == [0.0, 0.0, 0.0] and m.mean_C.tolist() == [1.0, 1.0, 1.0]


def test_sixteen_bit_activations_are_widened():
    x = data().bfloat16()
    torch.testing.assert_close(
        moments(x, 2).var_C, torch.tensor(naive(x.float())["var"], dtype=torch.float64), rtol=2e-6, atol=1e-6
    )


def test_only_what_is_wanted_is_kept():
    assert set(moments(data(), 2, frozenset({"sumsq"})).sums) == {"sumsq"}
    assert set(moments(data(), 2, frozenset({"mean"})).sums) == {"centred"}


def test_updating_leaves_its_argument_alone():
    x = data()
    copy = x.clone()
    moments(x, 3)
    assert torch.equal(x, copy)


def test_saved_and_loaded(tmp_path):
    path = tmp_path / "deep" / "statistics.safetensors"
    statistics = {"layers.0.mlp.intermediate": moments(data(), 2), "layers.1.attention.q": moments(data(seed=1), 2)}
    findings.save(Findings("this", statistics=statistics), path, "key")
    back = findings.load(path, "key", "this").statistics
    assert set(back) == set(statistics)
    for name, m in statistics.items():
        assert back[name].count == m.count == 77
        for part, value in seen(m).items():
            assert torch.equal(seen(back[name])[part], value)
    back["layers.1.attention.q"].update(data(seed=2))  # and they go on counting
    both = moments(torch.cat([data(seed=1), data(seed=2)]), 2)
    assert torch.equal(back["layers.1.attention.q"].var_C, both.var_C)
    with pytest.raises(UserError, match=r"statistics\.safetensors: holds statistics of another model, other windows or"):
        findings.load(path, "another key", "this")
    with pytest.raises(UserError, match=r"holds what was gathered for 'this', not 'that'; give another file"):
        findings.load(path, "key", "that")


# -- the sweep ----------------------------------------------------------------------------------------------------------

IDS = tiny.tokens(5, 12, vocab=pipeline.VOCAB)
SWEPT = ["llama", "gemma2", "qwen2", "smollm3", "olmo", "olmo2", "phi", "phi3", "gpt_neox", "per-layer"]
READERS = {  # what reads the stream, the heads, the stream again, the channels; Llama's otherwise
    "phi3": ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
    "phi": ("self_attn.q_proj", "self_attn.dense", "mlp.fc1", "mlp.fc2"),
    "gpt_neox": ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
}


def swept_model(case):
    if case != "per-layer":
        return pipeline.model(case)
    dense = pipeline.config("llama", attention_bias=False)
    keep = Keep({"layers.0.kv_heads": (0,), "layers.1.attention": (), "layers.2.mlp": (), "layers.0.intermediate": (1, 2)})
    from prunus.hf import target_for

    return tiny.grown(target_for(dense, Anatomy.of(dense), keep, out_bias=frozenset({"attention", "mlp"})).config)


@pytest.mark.parametrize("case", SWEPT)
def test_a_sweep_is_the_forward_pass(case):
    """Same kernels in the same order on the same batches: equal to float64 rounding."""
    model = swept_model(case)
    anatomy = Anatomy.of(model.config)
    with torch.no_grad():
        expected = model(input_ids=IDS, use_cache=False, output_hidden_states=True)
    sweep = Sweep(model, anatomy, IDS, batch_size=2)  # 2, 2 and 1 windows
    pairs = []
    for layer in range(tiny.LAYERS):
        torch.testing.assert_close(torch.cat(sweep.hidden), expected.hidden_states[layer], rtol=1e-10, atol=1e-10)
        sweep.run(layer, each=lambda before, after: pairs.append((before, after)))
    torch.testing.assert_close(torch.cat([b for b, _ in pairs[:3]]), expected.hidden_states[0], rtol=1e-10, atol=1e-10)
    assert len(pairs) == 3 * tiny.LAYERS
    assert torch.equal(torch.cat([a for _, a in pairs[-3:]]), torch.cat(sweep.hidden))
    with torch.no_grad():
        logits = [logits_from(model, anatomy, h, ids) for h, ids in zip(sweep.hidden, sweep.ids, strict=True)]
    torch.testing.assert_close(torch.cat(logits), expected.logits, rtol=1e-10, atol=1e-10)
    assert len(model.get_decoder().layers) == tiny.LAYERS


@pytest.mark.parametrize("case", SWEPT)
def test_statistics_of_a_sweep_are_those_of_a_plain_pass(case):
    model = swept_model(case)
    anatomy = Anatomy.of(model.config)
    statistics = collect(Sweep(model, anatomy, IDS, 2), DENSE)
    where = {}
    for layer in range(tiny.LAYERS):
        readers = READERS.get(case, ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"))
        points = ("attention.hidden", "attention.q", "mlp.hidden", "mlp.intermediate")
        for point, reader in zip(points, readers, strict=True):
            where[f"layers.{layer}.{point}"] = anatomy.block_name(layer) + reader
    if case == "per-layer":
        where = {k: v for k, v in where.items() if not k.startswith(("layers.1.attention", "layers.2.mlp"))}
    assert set(statistics) == set(where)
    inputs = pipeline.inputs_of(model, IDS, where.values())
    for name, module in where.items():
        x = inputs[module].reshape(-1, inputs[module].shape[-1])
        # sums within a window of 12 tokens are float32
        torch.testing.assert_close(statistics[name].mean_C, x.mean(0), rtol=1e-5, atol=1e-6, msg=name)
        torch.testing.assert_close(statistics[name].var_C, x.var(0), rtol=1e-5, atol=1e-7, msg=name)
        torch.testing.assert_close(statistics[name].gram_CC, x.T @ x, rtol=1e-5, atol=1e-4, msg=name)


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_statistics_do_not_depend_on_the_batch(batch):
    """X23 through a whole model in float64; batched matmuls may round otherwise, far below 1e-6."""
    model = swept_model("llama")
    anatomy = Anatomy.of(model.config)
    ids = tiny.tokens(16, 12, vocab=pipeline.VOCAB)
    one, many = (collect(Sweep(model, anatomy, ids, b), DENSE) for b in (16, batch))
    for name in one:
        for part, value in seen(one[name]).items():
            torch.testing.assert_close(seen(many[name])[part], value, rtol=1e-6, atol=1e-9, msg=f"{name} {part}")


@pytest.mark.parametrize("case", SWEPT)
def test_observing_sees_what_running_sees_and_moves_nothing(case):
    model = swept_model(case)
    anatomy = Anatomy.of(model.config)
    before = pipeline.state(model)
    modules_before = {name: id(m) for name, m in model.named_modules()}
    sweep = Sweep(model, anatomy, IDS, 2)
    for layer in range(tiny.LAYERS):
        windows = [h.clone() for h in sweep.hidden]
        named, modules = layer_moments(sweep, layer, DENSE)
        sweep.observe(layer, modules)
        assert all(torch.equal(a, b) for a, b in zip(windows, sweep.hidden, strict=True))
        full, modules = layer_moments(sweep, layer, DENSE)
        with sweep.collecting(modules):
            sweep.run(layer)
        assert set(named) == set(full) and named
        for name in full:
            assert named[name].count == full[name].count == 60
            for part, value in seen(full[name]).items():
                assert torch.equal(seen(named[name])[part], value), (name, part)
    assert {name: id(m) for name, m in model.named_modules()} == modules_before
    assert all(torch.equal(v, before[k]) for k, v in pipeline.state(model).items())
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("where", ["observe", "run", "collecting", "logits"])
def test_the_model_is_whole_after_an_exception(where):
    model = swept_model("llama")
    anatomy = Anatomy.of(model.config)
    modules_before = {name: id(m) for name, m in model.named_modules()}
    expected = tiny.logits_of(model, IDS)
    sweep = Sweep(model, anatomy, IDS, 2)

    class Bad:
        def update(self, x):
            raise KeyboardInterrupt

    def fail(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        if where == "observe":
            sweep.observe(0, {"model.layers.0.mlp.down_proj": Bad()})
        elif where == "run":
            sweep.run(0, each=fail)
        elif where == "collecting":
            with sweep.collecting({"model.layers.1.self_attn.q_proj": Bad()}):
                sweep.run(1)
        else:
            handle = model.lm_head.register_forward_pre_hook(fail)
            try:
                logits_from(model, anatomy, sweep.hidden[0], sweep.ids[0])
            finally:
                handle.remove()
    assert {name: id(m) for name, m in model.named_modules()} == modules_before
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert torch.equal(tiny.logits_of(model, IDS), expected)


def test_the_model_is_whole_after_an_exception_in_the_first_pass():
    model = swept_model("llama")
    blocks = model.model.layers
    with pytest.raises(IndexError):
        Sweep(model, Anatomy.of(model.config), torch.full((1, 4), pipeline.VOCAB), 1)  # no such token
    assert model.model.layers is blocks


def test_reading_points_name_every_matrix_once():
    anatomy = Anatomy.of(pipeline.config("llama"))
    prefix = "model.layers.1."
    assert reading_points(anatomy, 1) == {
        ("attention", "hidden"): [f"{prefix}self_attn.{p}_proj.weight" for p in "qkv"],
        ("attention", "q"): [f"{prefix}self_attn.o_proj.weight"],
        ("mlp", "hidden"): [f"{prefix}mlp.gate_proj.weight", f"{prefix}mlp.up_proj.weight"],
        ("mlp", "intermediate"): [f"{prefix}mlp.down_proj.weight"],
    }


# -- block cosine -------------------------------------------------------------------------------------------------------


def test_cosine_of_identity_and_of_sixty_degrees():
    """X7. The angle is between two coordinates; float32 cosines are good to 1e-6."""
    x = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    same, turned, mixed = BlockCosine(), BlockCosine(), BlockCosine()
    same(x, x * 3)
    angle = math.pi / 3
    rotation = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)
    turned(x, x @ rotation)
    assert same.mean == pytest.approx(1.0, abs=1e-6)
    assert turned.mean == pytest.approx(0.5, abs=1e-6)
    mixed(x, x)
    mixed(x[:1], -x[:1])  # 15 tokens of 1, 5 of -1: the mean is over tokens, not over batches
    assert mixed.mean == pytest.approx(0.5, abs=1e-6)


def test_cosine_is_taken_in_float32():
    """B2: in bf16 a cosine of 1 - 1e-4 rounds to 1."""
    x = torch.ones(1, 4, 64, dtype=torch.bfloat16)
    y = x.clone()
    y[..., 0] = 1.125
    cosine = BlockCosine()
    cosine(x, y)
    expected = float(torch.nn.functional.cosine_similarity(x.double(), y.double(), dim=-1).mean())
    assert 1 - expected > 5e-5
    assert cosine.mean == pytest.approx(expected, abs=1e-6)
