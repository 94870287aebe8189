"""What repairs the rest: FLAP's bias keeps the mean output, measured gains keep the norms' scale."""

from __future__ import annotations

import pipeline
import pytest
import tiny
import torch
from test_criteria import by_hand

from prunus import hf
from prunus.anatomy import Anatomy
from prunus.compensate import measured_gains, output_bias
from prunus.cut import slice_plan, slice_tensors
from prunus.keep import Keep
from prunus.statistics import Sweep, collect

IDS = tiny.tokens(6, 13, vocab=pipeline.VOCAB)
MEAN = {"q": frozenset({"mean"}), "intermediate": frozenset({"mean"})}
KEEP = Keep(
    {
        "layers.0.kv_heads": (1, 3),
        "layers.1.kv_heads": (0,),
        "layers.0.intermediate": tuple(range(0, 24, 3)),
        "layers.2.intermediate": tuple(range(5)),
    }
)


def biased(case):
    model = pipeline.model(case)
    anatomy = Anatomy.of(model.config)
    tensors = hf.weights(model, anatomy)
    return model, anatomy, output_bias(anatomy, tensors, collect(Sweep(model, anatomy, IDS, 2), MEAN), KEEP)


def dropped_columns(layer, module, head_dim=tiny.HEAD_DIM):
    """Input channels of o_proj or down_proj that KEEP removes, from its own definition: contiguous heads of a group."""
    axis = "kv_heads" if module == "self_attn.o_proj" else "intermediate"
    size = tiny.KV_HEADS if axis == "kv_heads" else tiny.INTERMEDIATE
    block = tiny.HEADS // tiny.KV_HEADS * head_dim if axis == "kv_heads" else 1
    kept = KEEP.units.get(f"layers.{layer}.{axis}", range(size))
    return [u * block + j for u in range(size) if u not in kept for j in range(block)]


def test_bias_by_hand():
    """X5: removing the channel that is always 3 under a weight of 2 gives b = 6 and the same outputs."""
    anatomy, tensors, seen, x, weight = by_hand()
    name = "model.layers.0.mlp.down_proj.bias"
    bias = output_bias(anatomy, tensors, seen, Keep({"layers.0.intermediate": (1,)}))[name]
    assert bias.tolist() == [6.0] + [0.0] * (tiny.HIDDEN - 1)
    assert torch.equal(x[..., 1:] @ weight[:, 1:].T + bias, x @ weight.T)


@pytest.mark.parametrize("case", ["llama", "qwen3", "gemma2", "olmo2", "phi3", "llama_bias"])
def test_bias_is_its_formula_and_keeps_the_mean_output(case):
    """b = sum over removed c of W[:, c] mean(x_c), on top of what was there; the mean over tokens of W x + b stays."""
    model, anatomy, biases = biased(case)
    head_dim = anatomy.shape.head_dim
    assert len(biases) == 2 * tiny.LAYERS  # every layer has both, so that all are alike
    for layer in range(tiny.LAYERS):
        for module in ("self_attn.o_proj", "mlp.down_proj"):
            name = f"model.layers.{layer}.{module}"
            linear = model.get_submodule(name).requires_grad_(False)
            x = pipeline.inputs_of(model, IDS, [name])[name].flatten(0, 1)
            gone = dropped_columns(layer, module, head_dim)
            bias = biases[f"{name}.bias"]
            before = torch.zeros(tiny.HIDDEN).double() if linear.bias is None else linear.bias.double()
            expected = before.clone()
            for c in gone:
                expected += linear.weight[:, c].double() * float(x[:, c].mean())
            assert bias.dtype == torch.float32
            # sums of a hundred products of order 1, from float32 activations, returned in float32
            torch.testing.assert_close(bias.double(), expected, rtol=1e-5, atol=1e-5)
            stays = [c for c in range(x.shape[1]) if c not in gone]
            cut = x[:, stays] @ linear.weight[:, stays].double().T + bias.double()
            dense = x @ linear.weight.double().T + before
            torch.testing.assert_close(cut.mean(0), dense.mean(0), rtol=1e-5, atol=1e-5)
            if gone:
                uncompensated = x[:, stays] @ linear.weight[:, stays].double().T + before
                assert float((uncompensated.mean(0) - dense.mean(0)).abs().max()) > 1e-2  # the test can tell


def test_bias_in_the_cut_model():
    """In the first block the inputs are the dense ones, so there the cut model's own mean outputs are the dense model's."""
    model, anatomy, biases = biased("llama")
    keep = Keep({k: v for k, v in KEEP.units.items() if k == "layers.0.kv_heads"})
    target = hf.target_for(model.config, anatomy, keep, out_bias=frozenset({"attention", "mlp"}))
    sliced = slice_tensors(pipeline.state(model), slice_plan(anatomy, keep))
    sliced |= {"model.layers.0.self_attn.o_proj.bias": biases["model.layers.0.self_attn.o_proj.bias"].double()}
    sliced |= hf.empty_weights(target, sliced, torch.float64)
    cut = hf.build(target.config, sliced)
    cut.set_attn_implementation("eager")

    def mean_output(m):
        seen = []
        handle = m.model.layers[0].self_attn.o_proj.register_forward_hook(lambda *a: seen.append(a[2]))
        tiny.logits_of(m, IDS)
        handle.remove()
        return seen[0].flatten(0, 1).mean(0)

    torch.testing.assert_close(mean_output(cut), mean_output(model), rtol=1e-5, atol=1e-5)


# -- measured gains (R2) ------------------------------------------------------------------------------------------------


def stem_norms(model):
    """Name -> module of every norm over the stem."""
    return {
        name: module
        for name, module in model.named_modules()
        if name.endswith("norm") and hasattr(module, "weight") and "self_attn" not in name
    }


def rms(x, eps):
    return (x.pow(2).mean(-1) + eps).sqrt()


@pytest.mark.parametrize("case", ["llama", "gemma2", "olmo2"])
def test_measured_gains(case):
    """c = E[rms_kept / rms_all] at every norm over the stem, the last included; with it the normed stream is nearer."""
    model = pipeline.model(case)
    anatomy, eps = Anatomy.of(model.config), model.config.rms_norm_eps
    norms = stem_norms(model)
    inputs = pipeline.inputs_of(model, IDS, norms)
    energy = inputs["model.norm"].pow(2).mean((0, 1))
    kept = sorted(energy.argsort(descending=True)[:24].tolist())  # the 25 % with the least energy go
    found = measured_gains(Sweep(model, anatomy, IDS, 2), Keep({"hidden": tuple(kept)}), eps)
    assert set(found) == {f"{name}.weight" for name in norms}
    offset = 1.0 if case == "gemma2" else 0.0
    r0 = r2 = 0.0
    for name, module in norms.items():
        x = inputs[name].flatten(0, 1)
        ratio = rms(x[:, kept], eps) / rms(x, eps)
        assert found[f"{name}.weight"] == pytest.approx(float(ratio.mean()), rel=1e-6)  # x is squared in float32
        gain = module.weight.detach().double() + offset
        dense = (x / rms(x, eps)[:, None] * gain)[:, kept]
        cut = x[:, kept] / rms(x[:, kept], eps)[:, None] * gain[kept]
        r0 += float((cut - dense).pow(2).mean())
        r2 += float((cut * found[f"{name}.weight"] - dense).pow(2).mean())
    assert r2 < 0.9 * r0  # what is left is how much the ratio varies from token to token


@pytest.mark.parametrize("case", ["llama", "gemma2", "gemma_untied"])
def test_measured_gains_in_the_cut_model(case):
    """The factor multiplies what the norm multiplies by (Gemma: 1 + w), and nothing else of the model."""
    model = pipeline.model(case)
    anatomy = Anatomy.of(model.config)
    keep = Keep({"hidden": tuple(range(0, 32, 2))})
    names = [f"{n}.weight" for n in stem_norms(model)]
    gains = {name: 0.5 + 0.1 * i for i, name in enumerate(names)}
    tensors = pipeline.state(model)
    plain = slice_tensors(tensors, slice_plan(anatomy, keep, fold=False))
    repaired = slice_tensors(tensors, slice_plan(anatomy, keep, fold=False, gains=gains))
    offset = 1.0 if case.startswith("gemma") else 0.0
    for name, before in plain.items():
        expected = (before + offset) * gains[name] - offset if name in gains else before
        torch.testing.assert_close(repaired[name], expected, rtol=1e-12, atol=1e-12)
