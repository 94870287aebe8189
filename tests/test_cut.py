"""Zeroing and slicing on tensors, against explicit indexing; what happens to AdamW's moments."""

from __future__ import annotations

import math

import pytest
import tiny
import torch

from prunus import cut
from prunus.anatomy import Anatomy
from prunus.keep import Keep, WeightMask


def random_tensors(anatomy, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(t.shape, generator=generator, dtype=torch.float64) for n, t in anatomy.tensors.items()}


def anatomy_of(case, **changes):
    return Anatomy.of(tiny.tiny_config(case, **changes))


P = "model.layers.1."


def heads(*indices):
    """Rows of query or KV heads of size 8."""
    return [h * 8 + j for h in indices for j in range(8)]


LLAMA = anatomy_of("llama_bias")  # 8 query heads, 4 KV heads of size 8: group g has query heads 2 g and 2 g + 1
# decision, {parameter: (dimension, rows that stay)}: all that the decision may touch
BY_HAND = {
    "kv_heads": (
        {"layers.1.kv_heads": (0, 3)},
        {
            f"{P}self_attn.q_proj.weight": (0, heads(0, 1, 6, 7)),
            f"{P}self_attn.q_proj.bias": (0, heads(0, 1, 6, 7)),
            f"{P}self_attn.k_proj.weight": (0, heads(0, 3)),
            f"{P}self_attn.k_proj.bias": (0, heads(0, 3)),
            f"{P}self_attn.v_proj.weight": (0, heads(0, 3)),
            f"{P}self_attn.v_proj.bias": (0, heads(0, 3)),
            f"{P}self_attn.o_proj.weight": (1, heads(0, 1, 6, 7)),
        },
    ),
    "q_heads": (
        {"layers.1.q_heads": (1,)},
        {
            f"{P}self_attn.q_proj.weight": (0, heads(1, 3, 5, 7)),
            f"{P}self_attn.q_proj.bias": (0, heads(1, 3, 5, 7)),
            f"{P}self_attn.o_proj.weight": (1, heads(1, 3, 5, 7)),
        },
    ),
    "intermediate": (
        {"layers.1.intermediate": (2, 3, 20)},
        {
            f"{P}mlp.gate_proj.weight": (0, [2, 3, 20]),
            f"{P}mlp.gate_proj.bias": (0, [2, 3, 20]),
            f"{P}mlp.up_proj.weight": (0, [2, 3, 20]),
            f"{P}mlp.up_proj.bias": (0, [2, 3, 20]),
            f"{P}mlp.down_proj.weight": (1, [2, 3, 20]),
        },
    ),
    "vocab": (
        {"vocab": (0, 1, 2, 30)},
        {"model.embed_tokens.weight": (0, [0, 1, 2, 30]), "lm_head.weight": (0, [0, 1, 2, 30])},
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_zeroing_and_slicing_touch_just_these_rows(name):
    units, touched = BY_HAND[name]
    keep, tensors = Keep(units), random_tensors(LLAMA)
    original = {n: t.clone() for n, t in tensors.items()}
    sliced = cut.slice_tensors(tensors, cut.slice_plan(LLAMA, keep))
    assert all(torch.equal(tensors[n], original[n]) for n in tensors)  # slicing is pure
    zeroed = {n: t.clone() for n, t in tensors.items()}
    cut.zero_(zeroed, LLAMA, keep)
    assert sliced.keys() == tensors.keys()
    for n, t in original.items():
        if n in touched:
            dim, stay = touched[n]
            go = [r for r in range(t.shape[dim]) if r not in stay]
            assert torch.equal(sliced[n], t[stay] if dim == 0 else t[:, stay]), n
            t[go if dim == 0 else (slice(None), go)] = 0
        else:
            assert torch.equal(sliced[n], t), n
            assert sliced[n].data_ptr() != tensors[n].data_ptr()
        assert torch.equal(zeroed[n], t), n


def test_fused_projections_are_cut_in_each_part():
    anatomy = anatomy_of("phi3")  # qkv: rows 0-63 q, 64-95 k, 96-127 v for heads of size 4
    assert anatomy.shape.head_dim == 4
    tensors = random_tensors(anatomy)
    keep = Keep({"layers.1.kv_heads": (3,), "layers.1.intermediate": (0, 5)})
    sliced = cut.slice_tensors(tensors, cut.slice_plan(anatomy, keep))
    qkv = tensors[f"{P}self_attn.qkv_proj.weight"]
    parts = torch.cat([qkv[24:32], qkv[32 + 12 : 32 + 16], qkv[48 + 12 : 48 + 16]])
    assert torch.equal(sliced[f"{P}self_attn.qkv_proj.weight"], parts)
    gate_up = tensors[f"{P}mlp.gate_up_proj.weight"]
    assert torch.equal(sliced[f"{P}mlp.gate_up_proj.weight"], gate_up[[0, 5, 24, 29]])


def test_layers_are_renumbered_and_sub_layers_go():
    tensors = random_tensors(LLAMA)
    keep = Keep({"layers": (0, 2), "layers.2.attention": ()})
    sliced = cut.slice_tensors(tensors, cut.slice_plan(LLAMA, keep))
    assert not [n for n in sliced if n.startswith("model.layers.2.")]
    moved = {n for n in sliced if n.startswith("model.layers.1.")}
    assert moved == {f"{P}{n}" for n in (
        "post_attention_layernorm.weight",
        *(f"mlp.{m}_proj.{leaf}" for m in ("gate", "up", "down") for leaf in ("weight", "bias")),
    )}  # fmt: skip
    for n in moved:
        assert torch.equal(sliced[n], tensors[n.replace("layers.1.", "layers.2.")])
    zeroed = {n: t.clone() for n, t in tensors.items()}
    cut.zero_(zeroed, LLAMA, keep)
    dead = {n for n, t in zeroed.items() if not t.any()}
    attention = {n for n in tensors if n.startswith("model.layers.2.self_attn")}
    assert dead == {n for n in tensors if n.startswith(P)} | attention | {"model.layers.2.input_layernorm.weight"}


def test_slicing_in_place_empties_its_input():
    tensors = random_tensors(LLAMA)
    keep = Keep({"hidden": tuple(range(3, 30)), "layers": (1,)})
    plan = cut.slice_plan(LLAMA, keep)
    wanted = cut.slice_tensors(tensors, plan)
    got = cut.slice_tensors_(tensors, plan)
    assert not tensors
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[n], wanted[n]) for n in wanted)


C = math.sqrt(32 / 20)
STEM = tuple(range(5, 25))


@pytest.mark.parametrize("case", ["llama", "gemma", "gemma_untied", "gemma2", "olmo2"])
def test_gains_are_folded_by_hand(case):
    """w c for RMSNorm; (1 + w) c - 1 for Gemma's; sqrt(hidden_size) in the embedding, and no final gain if it is tied."""
    anatomy, gemma = anatomy_of(case), case.startswith("gemma")
    tied = anatomy.shape.tie_word_embeddings
    tensors = random_tensors(anatomy)
    sliced = cut.slice_tensors(tensors, cut.slice_plan(anatomy, Keep({"hidden": STEM})))
    plain = cut.slice_tensors(tensors, cut.slice_plan(anatomy, Keep({"hidden": STEM}), fold=False))
    for n, t in sliced.items():
        over_stem = "norm" in n and tuple(t.shape) == (20,)
        kept = tensors[n][5:25] if over_stem else None
        if over_stem and not (gemma and tied and n == "model.norm.weight"):
            wanted = (1 + kept) * C - 1 if gemma else kept * C
        elif over_stem:
            wanted = kept
        elif gemma and n == "model.embed_tokens.weight":
            wanted = tensors[n][:, 5:25] * C
        else:
            wanted = plain[n]
        torch.testing.assert_close(t, wanted, rtol=1e-14, atol=1e-14)
        if over_stem:
            assert n == "model.norm.weight" or not torch.equal(t, kept)


def test_without_the_fold_stem_tensors_are_plain_rows():
    tensors = random_tensors(LLAMA)
    sliced = cut.slice_tensors(tensors, cut.slice_plan(LLAMA, Keep({"hidden": STEM}), fold=False))
    assert torch.equal(sliced["model.norm.weight"], tensors["model.norm.weight"][5:25])
    assert torch.equal(sliced[f"{P}self_attn.o_proj.bias"], tensors[f"{P}self_attn.o_proj.bias"][5:25])
    assert torch.equal(sliced[f"{P}mlp.down_proj.weight"], tensors[f"{P}mlp.down_proj.weight"][5:25])
    assert torch.equal(sliced["lm_head.weight"], tensors["lm_head.weight"][:, 5:25])


def random_slots(anatomy):
    first, second = random_tensors(anatomy, 1), random_tensors(anatomy, 2)
    return {n: {"step": torch.tensor(7.0), "exp_avg": first[n], "exp_avg_sq": second[n] ** 2} for n in first}


@pytest.mark.parametrize("name", BY_HAND)
def test_moments_of_surviving_weights_survive_bit_for_bit(name):
    units, touched = BY_HAND[name]
    slots = random_slots(LLAMA)
    carried = cut.slice_slots(slots, cut.slice_plan(LLAMA, Keep(units)))
    assert carried.keys() == slots.keys()
    for n, state in carried.items():
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
        dim, stay = touched.get(n, (0, list(range(slots[n]["exp_avg"].shape[0]))))
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[key], slots[n][key].index_select(dim, torch.tensor(stay)))


def test_slots_are_never_shared():
    slots = random_slots(LLAMA)
    carried = cut.slice_slots(slots, cut.slice_plan(LLAMA, Keep({"layers.1.intermediate": (0,)})))
    for n, state in carried.items():
        for key, value in state.items():
            value.add_(1)
            assert not torch.equal(value, slots[n][key])
    assert all(s["step"] == 7 for s in slots.values())


@pytest.mark.parametrize("case", ["llama", "gemma", "gemma_untied"])
def test_moments_of_folded_gains_are_those_of_their_gradient(case):
    """A weight that is c times as large has a gradient 1 / c as large: moments go by c^-1 and c^-2, never by the offset."""
    anatomy = anatomy_of(case)
    tied = anatomy.shape.tie_word_embeddings
    slots = random_slots(anatomy)
    carried = cut.slice_slots(slots, cut.slice_plan(anatomy, Keep({"hidden": STEM})))
    gemma = case.startswith("gemma")
    for n, state in carried.items():
        dims = [d for d, segments in enumerate(anatomy.tensors[n].param.dims) if segments == ("hidden",)]
        folded = "norm" in n and not (gemma and tied and n == "model.norm.weight")
        folded = folded or (gemma and n == "model.embed_tokens.weight")
        for key, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
            kept = slots[n][key]
            for dim in dims:
                kept = kept.narrow(dim, 5, 20)
            if folded:
                torch.testing.assert_close(state[key], kept / C**power, rtol=1e-14, atol=0)
            else:
                assert torch.equal(state[key], kept), (n, key)


def test_moments_follow_their_layer_to_its_new_place():
    slots = random_slots(LLAMA)
    carried = cut.slice_slots(slots, cut.slice_plan(LLAMA, Keep({"layers": (0, 2)})))
    assert len(carried) == len(slots) - sum(n.startswith(P) for n in slots)
    name = "self_attn.o_proj.bias"
    assert torch.equal(carried[P + name]["exp_avg"], slots[f"model.layers.2.{name}"]["exp_avg"])


def test_zeroing_slots_that_lack_a_parameter():
    """A frozen parameter has no optimizer state; its axis is zeroed in the others."""
    tensors = random_tensors(LLAMA)
    del tensors[f"{P}mlp.up_proj.weight"]
    cut.zero_(tensors, LLAMA, Keep({"layers.1.intermediate": (0,)}))
    assert not tensors[f"{P}mlp.gate_proj.weight"][1:].any()
    assert tensors[f"{P}mlp.gate_proj.weight"][0].all()


def test_masked_weights_become_exactly_zero():
    tensors = random_tensors(LLAMA)
    name = f"{P}mlp.up_proj.weight"
    kept = torch.zeros(24, 32, dtype=torch.bool)
    kept[3, 4] = kept[0, 0] = True
    before = {n: t.clone() for n, t in tensors.items()}
    cut.zero_weights_(tensors, WeightMask({name: kept}))
    assert tensors[name].nonzero().tolist() == [[0, 0], [3, 4]]
    assert tensors[name][3, 4] == before[name][3, 4]
    assert all(torch.equal(tensors[n], before[n]) for n in tensors if n != name)


def test_kinds_of_axes_that_a_decision_cuts():
    keep = Keep({"hidden": (0,), "layers.0.kv_heads": (0,), "layers.1.kv_heads": (1,), "layers": (0,)})
    assert cut.config_axes(keep) == {"hidden", "kv_heads", "layers"}
