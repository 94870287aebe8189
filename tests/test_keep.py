"""Decisions as data: names, JSON, composition, masks."""

from __future__ import annotations

import json
import re

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus.anatomy import Anatomy
from prunus.cut import slice_plan, slice_tensors, zero_
from prunus.errors import UserError
from prunus.families import family_of
from prunus.keep import Keep, WeightMask
from prunus.shape import LayerShape, Shape

LLAMA = Anatomy.of(tiny.tiny_config("llama"))


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ({"layers.0.kvheads": (0,)}, r"unknown axis 'layers.0.kvheads' \(did you mean 'layers.0.kv_heads'\?\).*hidden"),
        ({"layers.9.mlp": ()}, r"unknown axis 'layers.9.mlp'"),
        ({"hidden": (3, 1)}, r"'hidden' must be sorted and unique, got \[3, 1\]"),
        ({"hidden": (1, 1)}, r"'hidden' must be sorted and unique"),
        ({"layers.1.kv_heads": (2, 4)}, r"'layers.1.kv_heads' has units 0 to 3, got 4"),
        ({"layers.1.kv_heads": (0, 4)}, r"'layers.1.kv_heads' has units 0 to 3, got 4"),
        ({"layers.1.kv_heads": (-1, 2)}, r"'layers.1.kv_heads' has units 0 to 3, got -1"),
        ({"layers.1.kv_heads": ()}, r"'layers.1.kv_heads' would keep no unit; remove the sub-layer"),
        ({"layers": ()}, r"'layers' would keep no unit"),
        ({"hidden": ()}, r"'hidden' would keep no unit"),
        (
            {"layers.1.heads": (0,), "layers.1.kv_heads": (0,)},
            r"'layers.1.heads' and 'layers.1.kv_heads' both cut the layer's",
        ),
        (
            {"layers.1.q_heads": (0,), "layers.1.heads": (0,)},
            r"'layers.1.heads' and 'layers.1.q_heads' both cut the layer's",
        ),
    ],
)
def test_decisions_that_do_not_fit_are_refused(units, message):
    with pytest.raises(UserError, match=message):
        Keep(units).validated(LLAMA)


def test_what_a_family_refuses_is_refused_with_its_reason():
    anatomy = Anatomy.of(tiny.tiny_config("gpt_neox"))
    for name in ("hidden", "layers.0.kv_heads"):
        with pytest.raises(UserError, match=f"keep: '{name}' cannot be cut: ") as caught:
            Keep({name: (0,)}).validated(anatomy)
        assert str(caught.value).endswith(anatomy.refused[name.split(".")[-1]])


def test_the_last_unit_is_one():
    keep = Keep({"layers.1.kv_heads": (0, 3), "layers.0.attention": ()})
    assert keep.validated(LLAMA) is keep
    assert keep.dropped("layers.1.kv_heads", 4) == [1, 2] and keep.dropped("layers.0.attention", 1) == [0]
    assert keep.dropped("hidden", 3) == []


def test_what_a_shape_holds_besides_stays():
    """A sliced stream's size, a map of query heads, and layers that had lost a part before."""
    layers = (LayerShape(3, 2, 9, (0, 1, 1)), LayerShape(0, 0, 9), LayerShape(4, 2, 9))
    anatomy = LLAMA.with_shape(Shape(32, 8, 61, True, layers, 20))
    cut = {f"layers.{i}.intermediate": (0, 4) for i in range(3)}
    after = Keep(cut | {"layers.2.q_heads": (1,)}).anatomy_after(anatomy).shape
    assert after == Shape(32, 8, 61, True, (LayerShape(3, 2, 2, (0, 1, 1)), LayerShape(0, 0, 2), LayerShape(2, 2, 2)), 20)
    gone = Keep(cut | {"layers.2.attention": (), "layers.0.mlp": ()}).anatomy_after(anatomy).shape.layers
    assert gone == (LayerShape(3, 2, 0, (0, 1, 1)), LayerShape(0, 0, 2), LayerShape(0, 0, 2))
    heads = Keep({"layers.0.heads": (1, 2), "layers.2.heads": (0, 1, 2)}).anatomy_after(anatomy).shape.layers
    assert (heads[0], heads[2]) == (LayerShape(2, 1, 9), LayerShape(3, 2, 9, (0, 0, 1)))


def test_whole_sub_layers_may_go():
    keep = Keep({"layers.0.attention": (), "layers.2.mlp": (), "layers.1.mlp": (0,)})
    assert keep.validated(LLAMA) is keep
    shape = keep.anatomy_after(LLAMA).shape
    assert [layer.skipped for layer in shape.layers] == [("attention",), (), ("mlp",)]


def test_sizes_after_a_cut():
    keep = Keep(
        {
            "layers": (0, 2),
            "hidden": tuple(range(20)),
            "vocab": tuple(range(50)),
            "layers.0.kv_heads": (1, 2, 3),
            "layers.0.q_heads": (1,),
            "layers.1.kv_heads": (0,),
            "layers.2.intermediate": (5, 6),
        }
    )
    after = keep.anatomy_after(LLAMA).shape
    assert after == Shape(20, 8, 50, False, (LayerShape(3, 3, 24), LayerShape(8, 4, 2)))


def test_a_kv_head_goes_with_its_last_query_head():
    """Query heads 0 to 7 read KV heads 0 0 1 1 2 2 3 3."""
    keep = Keep({"layers.0.heads": (1, 4, 5, 6, 7), "layers.1.heads": (1, 3, 4, 6), "layers.2.heads": (0, 1, 6, 7)})
    layers = keep.validated(LLAMA).anatomy_after(LLAMA).shape.layers
    assert layers == (LayerShape(5, 3, 24, (0, 1, 1, 2, 2)), LayerShape(4, 4, 24), LayerShape(4, 2, 24))
    plan, head = slice_plan(LLAMA, keep), 8
    kept = {name: plan.rows[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qkvo"}
    assert {name: list(dims) for name, dims in kept.items()} == {"q": [0], "k": [0], "v": [0], "o": [1]}
    for name, dim, heads in (("q", 0, (1, 4, 5, 6, 7)), ("k", 0, (0, 2, 3)), ("v", 0, (0, 2, 3)), ("o", 1, (1, 4, 5, 6, 7))):
        assert kept[name][dim].tolist() == [head * h + j for h in heads for j in range(head)]


def test_json_says_ranges_and_comes_back():
    keep = Keep({"hidden": (0, 1, 2, 5, 7, 8), "layers.3.mlp": (), "layers": (4,)})
    data = json.loads(json.dumps(keep.to_json()))
    assert data == {"format": 1, "keep": {"hidden": "0-2,5,7-8", "layers.3.mlp": "", "layers": "4"}}
    assert Keep.from_json(data) == keep


UNITS = st.sets(st.integers(0, 30), max_size=12).map(lambda s: tuple(sorted(s)))


@given(st.dictionaries(st.sampled_from(["hidden", "layers", "layers.0.mlp", "layers.17.kv_heads"]), UNITS))
def test_json_round_trip(units):
    assert Keep.from_json(json.loads(json.dumps(Keep(units).to_json()))).units == units


@pytest.mark.parametrize(
    "text", ["a", "1-a", "-1", "1-2-3", " 1", "1;2", "0-99999999999", "5-3", "1-", "²", "1-²", "٣", "0-10000001"]
)
def test_ranges_that_do_not_parse_are_refused(text):
    with pytest.raises(UserError, match=r"plan.json: keep of 'hidden' must be ranges such as '0-5,7', got '"):
        Keep.from_json({"format": 1, "keep": {"hidden": f"0-1,{text}"}}, "plan.json")


def test_a_short_range_may_stand_anywhere():
    assert Keep.from_json({"format": 1, "keep": {"vocab": "6000000-6000001"}}).units == {"vocab": (6_000_000, 6_000_001)}


@pytest.mark.parametrize("value", [3, None, [1, 2], {"a": 1}])
def test_units_that_are_no_text_are_refused(value):
    with pytest.raises(UserError, match=r"keep.json: keep of 'hidden' must be text such as"):
        Keep.from_json({"format": 1, "keep": {"hidden": value}})


@pytest.mark.parametrize("data", [{}, {"format": 2, "keep": {}}, {"format": 1}, {"format": 1, "keep": []}])
def test_other_formats_are_refused(data):
    with pytest.raises(UserError, match=r"keep.json: expected format 1 with a 'keep' table"):
        Keep.from_json(data)


# -- two cuts in a row ------------------------------------------------------------------------------------------------


def test_then_renumbers_layers_and_units():
    first = Keep({"layers": (1, 2), "layers.2.intermediate": (4, 6, 9), "hidden": (2, 3, 5, 8)})
    later = Keep({"layers": (1,), "layers.1.intermediate": (0, 2), "hidden": (1, 3), "layers.1.kv_heads": (3,)})
    assert first.then(later, LLAMA).units == {
        "layers": (2,),
        "layers.2.intermediate": (4, 9),
        "hidden": (3, 8),
        "layers.2.kv_heads": (3,),
    }


def _some(draw, size):
    return tuple(sorted(draw(st.sets(st.integers(0, size - 1), min_size=1))))


@st.composite
def keeps(draw, anatomy, one_by_one):
    """A random decision about some of the axes; query heads go one by one, or by groups."""
    units = {}
    for name, axis in anatomy.axes.items():
        if name.endswith("kv_heads" if one_by_one else ".heads") or (one_by_one and name.endswith("q_heads")):
            continue
        if draw(st.booleans()):
            whole = name.endswith((".attention", ".mlp"))
            units[name] = draw(st.sampled_from([(), (0,), (0,)])) if whole else _some(draw, axis.size)
    return Keep(units)


@st.composite
def two_cuts(draw):
    family = family_of(draw(st.sampled_from(["llama", "gemma2", "qwen2", "olmo2", "phi3", "olmo", "phi", "gpt_neox"])))
    layers = []
    for _ in range(draw(st.integers(1, 4))):
        groups = draw(st.integers(1, 3))
        layers.append(LayerShape(groups * draw(st.integers(1, 3)), groups, draw(st.integers(1, 4))))
    shape = Shape(draw(st.integers(1, 5)), 2, 5, draw(st.booleans()), tuple(layers))
    anatomy = Anatomy(family, shape, frozenset(family.flags & {"attention_bias"}))
    one_by_one = draw(st.booleans())
    first = draw(keeps(anatomy, one_by_one))
    return anatomy, first, draw(keeps(first.anatomy_after(anatomy), one_by_one))


def _numbered(anatomy):
    """Tensors in which every entry is another whole number."""
    out, start = {}, 0
    for name, tensor in anatomy.tensors.items():
        out[name] = torch.arange(start, start + tensor.numel, dtype=torch.float64).reshape(tensor.shape)
        start += tensor.numel
    return out


@given(two_cuts())
@settings(deadline=None, max_examples=150)
def test_cutting_twice_is_cutting_once(cuts):
    anatomy, first, later = cuts
    first.validated(anatomy)
    between = first.anatomy_after(anatomy)
    later.validated(between)
    both = first.then(later, anatomy).validated(anatomy)
    once, twice = both.anatomy_after(anatomy), later.anatomy_after(between)
    assert once == twice
    for fold in (False, True):
        tensors = _numbered(anatomy)
        half = slice_tensors(tensors, slice_plan(anatomy, first, fold=fold))
        assert {n: tuple(t.shape) for n, t in half.items()} == {n: t.shape for n, t in between.tensors.items()}
        a = slice_tensors(half, slice_plan(between, later, fold=fold))
        b = slice_tensors(tensors, slice_plan(anatomy, both, fold=fold))
        assert a.keys() == b.keys() == once.tensors.keys()
        for name in a:
            if fold or anatomy.family.embedding_scaled:  # sqrt(d / d') sqrt(d' / d'') against sqrt(d / d''): roundings
                torch.testing.assert_close(a[name], b[name], rtol=1e-12, atol=1e-12)
            else:
                assert torch.equal(a[name], b[name]), name


@given(two_cuts())
@settings(deadline=None, max_examples=50)
def test_the_order_of_axes_does_not_matter(cuts):
    anatomy, keep, _ = cuts
    turned = Keep(dict(reversed(keep.units.items())))
    assert turned.anatomy_after(anatomy) == keep.anatomy_after(anatomy)
    a, b = (slice_tensors(_numbered(anatomy), slice_plan(anatomy, k)) for k in (keep, turned))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n], b[n]) for n in a)
    za, zb = _numbered(anatomy), _numbered(anatomy)
    zero_(za, anatomy, keep)
    zero_(zb, anatomy, turned)
    assert all(torch.equal(za[n], zb[n]) for n in za)


# -- masks ------------------------------------------------------------------------------------------------------------


def random_mask(names, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return WeightMask({n: torch.rand(LLAMA.tensors[n].shape, generator=generator) < 0.4 for n in names})


def test_masks_pack_eight_weights_a_byte():
    # (61, 32) has 1952 = 8 * 244 entries; a gain of 32; both and a bias of a length that is no multiple of eight
    names = ["model.layers.0.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight"]
    mask = random_mask(names)
    packed = mask.to_packed()
    assert {n: t.numel() for n, t in packed.items()} == {names[0]: 96, names[1]: 244, names[2]: 4}
    assert all(t.dtype == torch.uint8 for t in packed.values())
    back = WeightMask.from_packed(packed, LLAMA)
    assert back.kept.keys() == mask.kept.keys()
    for n in names:
        assert torch.equal(back.kept[n], mask.kept[n])
        assert back.kept[n].dtype == torch.bool


def test_the_first_weight_is_the_highest_bit():
    bits = torch.zeros(32, dtype=torch.bool)
    bits[0] = bits[10] = True
    assert WeightMask({"model.norm.weight": bits}).to_packed()["model.norm.weight"].tolist() == [128, 32, 0, 0]


@given(st.integers(1, 40), st.integers(0, 2**31))
def test_masks_of_any_length_come_back(hidden, seed):
    anatomy = Anatomy.of(tiny.tiny_config("mistral", hidden_size=hidden))
    mask = torch.rand(hidden, generator=torch.Generator().manual_seed(seed)) < 0.5
    back = WeightMask.from_packed(WeightMask({"model.norm.weight": mask}).to_packed(), anatomy)
    assert torch.equal(back.kept["model.norm.weight"], mask)


def test_masks_of_another_model_are_refused():
    packed = random_mask(["model.norm.weight"]).to_packed()
    with pytest.raises(UserError, match="'nope' does not fit"):
        WeightMask.from_packed({"nope": packed["model.norm.weight"]}, LLAMA)
    with pytest.raises(UserError, match=r"'model.norm.weight' does not fit"):
        WeightMask.from_packed({"model.norm.weight": packed["model.norm.weight"][:-1]}, LLAMA)


def test_sparsity_counts_weights():
    mask = WeightMask({"a": torch.tensor([True, False, False, False]), "b": torch.ones(4, 3, dtype=torch.bool)})
    assert mask.sparsity == pytest.approx(3 / 16, abs=1e-15)
    assert json.loads(mask.describe()) == {"matrices": 2, "sparsity": 0.1875}
    third = WeightMask({"a": torch.tensor([True, False, True])})
    assert json.loads(third.describe()) == {"matrices": 1, "sparsity": 0.333333}


@pytest.mark.parametrize("name", ["layers..intermediate", "layers.x.heads", "layers.0.", "", "layers.0.heads.1", "<b>"])
def test_names_that_no_axis_has_are_refused(name):
    with pytest.raises(UserError, match=rf"keep of '{re.escape(name)}', which is called like no axis"):
        Keep.from_json({"format": 1, "keep": {name: "0-3"}})
