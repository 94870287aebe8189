"""What the anatomy says from the config alone, held against modules that were really built."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from cuts import REFUSED, keep_of, pairs
from torch.utils.flop_counter import FlopCounterMode

from prunus import cut, hf
from prunus.anatomy import Anatomy
from prunus.errors import UserError

CUTS = (
    "layers_first",
    "sublayers",
    "kv_heads_per_layer",
    "q_heads",
    "heads_per_layer",
    "intermediate_per_layer",
    "hidden",
    "everything",
)


def built(dense, keep):
    anatomy = Anatomy.of(dense.config)
    target = hf.target_for(dense.config, anatomy, keep)
    target.config._attn_implementation = "eager"
    tensors = cut.slice_tensors(hf.weights(dense, anatomy), cut.slice_plan(anatomy, keep))
    return target.anatomy, hf.build(target.config, tensors)


def assert_counts_match(anatomy, model):
    parameters = dict(model.named_parameters())
    assert {n: tuple(p.shape) for n, p in parameters.items()} == {n: t.shape for n, t in anatomy.tensors.items()}
    assert anatomy.num_params == sum(p.numel() for p in parameters.values())
    inside = {n: p for n, p in parameters.items() if ".layers." in n}
    assert anatomy.block_params == sum(p.numel() for p in inside.values())
    assert anatomy.matrix_params == sum(p.numel() for n, p in inside.items() if p.dim() == 2)
    assert anatomy.weight_bytes(8) == sum(p.numel() * p.element_size() for p in parameters.values())


def counted_flops(model, length):
    """FLOPs of one sequence as torch counts them; eager, because on CPU the counter misses SDPA."""
    ids = tiny.tokens(1, length)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False)
    return counter.get_total_flops()


@pytest.mark.parametrize("case", tiny.CASES)
def test_counts_of_dense_models(case, dense_of):
    dense = dense_of(case)
    anatomy = Anatomy.of(dense.config)
    assert_counts_match(anatomy, dense)
    for length in (3, 10):
        assert anatomy.flops(length) == counted_flops(dense, length)


@pytest.mark.parametrize(("case", "cut_name"), pairs(CUTS))
def test_counts_of_cut_models(case, cut_name, dense_of):
    anatomy, model = built(dense_of(case), keep_of(case, cut_name))
    assert_counts_match(anatomy, model)
    assert anatomy.flops(7) == counted_flops(model, 7)


@pytest.mark.parametrize(
    ("case", "cut_name"), pairs(("kv_heads_per_layer", "q_heads", "heads_per_layer", "sublayers", "everything"))
)
def test_kv_bytes_are_those_of_the_cache(case, cut_name, dense_of):
    anatomy, model = built(dense_of(case), keep_of(case, cut_name))
    length = 3  # shorter than the sliding window, behind which a cache holds no more tokens
    with torch.no_grad():
        cache = model(input_ids=tiny.tokens(1, length), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    # a removed attention leaves a marker of one number each for key and value, so that the cache knows its length
    markers = sum(2 * 8 for layer in anatomy.shape.layers if not layer.num_attention_heads)
    assert held == length * (anatomy.kv_bytes_per_token(8) + markers)


AXES = ("layers", "attention", "mlp", "kv_heads", "q_heads", "heads", "intermediate", "hidden", "vocab")


@pytest.mark.parametrize("case", tiny.CASES)
def test_spans_lie_inside_and_claim_every_dimension_once(case):
    """Inner axes partition their dimension; q_heads partitions it a second way, and heads a third, which share KV heads.
    Head norms and what no axis cuts are unclaimed.
    """
    anatomy = Anatomy.of(tiny.tiny_config(case))
    refused = REFUSED.get(case, set())
    assert {name.rsplit(".", 1)[-1] for name in anatomy.axes} == set(AXES) - refused
    assert set(anatomy.refused) == refused
    unclaimed = {("hidden",), ("q",), ("kv",), ("qkv",)} if refused else set()
    claimed: dict[tuple[str, int], dict[str, list[int]]] = {}
    for name, axis in anatomy.axes.items():
        for span in axis.spans:
            size = anatomy.tensors[span.param].shape[span.dim]
            rows = [row for u in range(axis.size) for row in tiny.spans_rows(span, [u])]
            rows = rows if span.shared is None else sorted(set(rows))
            assert all(0 <= row < size for row in rows), (name, span)
            claimed.setdefault((span.param, span.dim), {}).setdefault(name, []).extend(rows)
    for param, tensor in anatomy.tensors.items():
        for dim, size in enumerate(tensor.shape):
            owners = claimed.get((param, dim), {})
            for name, rows in owners.items():
                assert len(rows) == len(set(rows)), (name, param, dim)  # no two units share a row
            inner = {
                n: r for n, r in owners.items() if not n.endswith(("layers", ".attention", ".mlp", ".q_heads", ".heads"))
            }
            over_a_head = param.endswith(("q_norm.weight", "k_norm.weight")) and size == tiny.HEAD_DIM
            if over_a_head or ".q_layernorm." in param or ".k_layernorm." in param or tensor.param.dims[dim] in unclaimed:
                assert not inner
            else:  # each row belongs to one unit of one inner axis
                rows = [row for r in inner.values() for row in r]
                assert sorted(rows) == list(range(size)), (param, dim)
            if tensor.layer is not None and dim == 0:
                whole = [n for n in owners if n in ("layers", f"layers.{tensor.layer}.{tensor.sublayer}")]
                shared = case in ("phi", "phi_tied", "phi_qk") and ".input_layernorm." in param
                assert len(whole) == (1 if shared else 2)
                assert all(sorted(owners[n]) == list(range(size)) for n in whole)


@pytest.mark.parametrize("case", tiny.CASES)
def test_params_of_a_unit_are_what_removing_it_frees(case):
    anatomy = Anatomy.of(tiny.tiny_config(case))
    for name, axis in anatomy.axes.items():
        if name == "vocab" or (axis.size == 1 and not name.endswith(("attention", "mlp"))):
            continue
        keep = type(keep_of(case, "layers_first"))({name: tuple(range(1, axis.size))})
        freed = anatomy.num_params - keep.anatomy_after(anatomy).num_params
        assert anatomy.unit_params(name) == freed, name


OUTPUTS = dict.fromkeys(tiny.CASES, ("model.layers.{}.self_attn.o_proj.weight", "model.layers.{}.mlp.down_proj.weight"))
OUTPUTS |= dict.fromkeys(
    ("phi", "phi_tied", "phi_qk"), ("model.layers.{}.self_attn.dense.weight", "model.layers.{}.mlp.fc2.weight")
)
OUTPUTS |= dict.fromkeys(
    ("gpt_neox", "gpt_neox_sequential"),
    ("gpt_neox.layers.{}.attention.dense.weight", "gpt_neox.layers.{}.mlp.dense_4h_to_h.weight"),
)


@pytest.mark.parametrize("case", tiny.CASES)
def test_readers_are_the_matrices_that_leave_a_sub_layer(case):
    anatomy = Anatomy.of(tiny.tiny_config(case))
    attention, mlp = OUTPUTS[case]
    for i in range(tiny.LAYERS):
        for axis in {"kv_heads", "q_heads", "heads"} - REFUSED.get(case, set()):
            assert anatomy.reader(f"layers.{i}.{axis}").param == attention.format(i)
        assert anatomy.reader(f"layers.{i}.intermediate").param == mlp.format(i)


def test_weights_are_the_models_own_tensors(dense_of):
    model = tiny.clone(dense_of("llama"))
    held = hf.weights(model, Anatomy.of(model.config))
    held["model.norm.weight"].zero_()
    assert not model.model.norm.weight.any()
    assert not held["model.norm.weight"].requires_grad


def test_a_model_that_is_not_what_its_family_declares_is_refused(dense_of):
    model = tiny.clone(dense_of("llama"))
    anatomy = Anatomy.of(model.config)
    model.model.layers[1].self_attn.q_proj.bias = torch.nn.Parameter(torch.zeros(64))
    with pytest.raises(UserError, match=r"holds 'model.layers.1.self_attn.q_proj.bias'.*'llama'.*add-a-family"):
        hf.weights(model, anatomy)
    model = tiny.clone(dense_of("llama"))
    del model.model.layers[0].mlp.up_proj
    with pytest.raises(UserError, match=r"lacks 'model.layers.0.mlp.up_proj.weight'"):
        hf.weights(model, anatomy)
    model = tiny.clone(dense_of("llama"))
    model.model.norm.weight = torch.nn.Parameter(torch.zeros(31))
    with pytest.raises(UserError, match=r"another shape for 'model.norm.weight'"):
        hf.weights(model, anatomy)


def test_heads_that_cannot_share_evenly_are_refused():
    config = tiny.tiny_config("mistral", num_attention_heads=6, num_key_value_heads=4)
    with pytest.raises(UserError, match="layer 0 has 6 query heads for 4 KV heads"):
        Anatomy.of(config)


def test_flops_by_hand():
    """One layer, every factor another prime: 2 T (q + k + v + o + 3 ffn + head) + QK^T + AV over the whole square."""
    fields = {"hidden_size": 5, "head_dim": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = tiny.tiny_config("mistral", **fields, intermediate_size=11, vocab_size=13, num_hidden_layers=1)
    t = 7
    matrices = 4 * 3 * 5 + 2 * 3 * 5 + 2 * 3 * 5 + 5 * 4 * 3 + 3 * 11 * 5
    wanted = 2 * t * (matrices + 13 * 5) + 2 * (4 * t * t * 3) * 2
    anatomy = Anatomy.of(config)
    assert anatomy.flops(t) == wanted
    assert anatomy.flops(t, density=0.5, convention="all") == wanted / 2
    assert anatomy.flops(t, density=0.5) == wanted - t * matrices
    assert math.prod(anatomy.tensors["model.layers.0.self_attn.k_proj.weight"].shape) == 30
