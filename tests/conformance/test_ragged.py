"""Query heads cut one by one: layers whose query heads share KV heads unevenly, in models and in configs."""

from __future__ import annotations

import pytest
import tiny
import torch
from cuts import REFUSED
from test_pruned_types import FULL_CASES, per_layer_model, saved
from transformers import AutoModelForCausalLM

import prunus
from prunus import cut, hf
from prunus.anatomy import Anatomy
from prunus.errors import UserError
from prunus.keep import Keep
from prunus.latency import layer_part
from prunus.shape import LayerShape

IDS = tiny.tokens(2, 11)
CASES = [case for case in FULL_CASES if "heads" not in REFUSED.get(case, ())]
# five query heads in every layer: 0 0 1 1 2 2 3 3 becomes the maps below
ALIKE = {"layers.0.heads": (0, 2, 4, 6, 7), "layers.1.heads": (0, 1, 2, 3, 4), "layers.2.heads": (1, 2, 3, 6, 7)}
MAPS = [[0, 1, 2, 3, 3], [0, 0, 1, 1, 2], [0, 1, 1, 2, 2]]


def cut_to(model, keep):
    anatomy = Anatomy.of(model.config)
    target = hf.target_for(model.config, anatomy, keep.validated(anatomy))
    return target, hf.build(target.config, cut.slice_tensors(hf.weights(model, anatomy), cut.slice_plan(anatomy, keep)))


@pytest.mark.parametrize("case", CASES)
def test_backends_agree_and_no_token_sees_the_future(case, dense_of):
    model = per_layer_model(dense_of(case), case, "heads_per_layer")
    changed = IDS.clone()
    changed[:, 7] = (changed[:, 7] + 1) % tiny.VOCAB
    logits = {}
    for backend in ("eager",) if case == "gemma2" else ("eager", "sdpa"):  # Gemma 2 has no SDPA
        model.set_attn_implementation(backend)
        logits[backend] = tiny.logits_of(model, IDS)
        moved = (tiny.logits_of(model, changed) - logits[backend]).abs().amax(-1)
        assert not moved[:, :7].any()
        assert (moved[:, 7:].amax(-1) > 1e-3).all()
    # eager attention rounds its softmax to float32 (6e-8), SDPA does not
    assert tiny.relative(logits[backend], logits["eager"]) < 1e-5


def test_a_layer_attends_as_its_map_says(dense_of):
    """By hand: the dense attention of the same layer with every query head's own copy of its KV head."""
    dense = dense_of("mistral")
    target, model = cut_to(dense, Keep(ALIKE))
    assert [target.config.per_layer_config[i].kv_index for i in range(3)] == MAPS
    assert [layer.num_key_value_heads for layer in target.anatomy.shape.layers] == [4, 3, 3]
    config = tiny.tiny_config("mistral", num_attention_heads=5, num_key_value_heads=5)
    config._attn_implementation = "eager"
    tensors = {}
    for name, tensor in hf.weights(model, target.anatomy).items():
        layer = target.anatomy.tensors[name].layer
        if ".k_proj" in name or ".v_proj" in name:
            tensor = tensor.unflatten(0, (-1, tiny.HEAD_DIM))[MAPS[layer]].flatten(0, 1)
        tensors[name] = tensor
    model.set_attn_implementation("eager")
    assert torch.equal(tiny.logits_of(hf.build(config, tensors), IDS), tiny.logits_of(model, IDS))


def test_it_says_why_it_is_no_stock_type_and_how_many_heads_there_are(dense_of):
    target, _ = cut_to(dense_of("llama"), Keep(ALIKE))
    assert not target.is_stock and not target.anatomy.shape.is_uniform
    assert target.notes[0].startswith("query heads share KV heads unevenly: the checkpoint is of type pruned_llama")
    assert target.anatomy.shape.describe()["num_attention_heads"] == 5
    assert target.anatomy.kv_bytes_per_token() == 2 * tiny.HEAD_DIM * 2 * (4 + 3 + 3)
    parts = {layer_part(target.anatomy, i) for i in range(3)}
    assert len(parts) == 2 and all(part.endswith(" ragged") for part in parts)


@pytest.mark.parametrize("case", ["mistral", "olmo2"])
def test_a_ragged_model_is_a_source_and_goes_back_to_stock_where_it_is_even(case, dense_of, tmp_path):
    dense, first = dense_of(case), Keep(ALIKE)
    _, model = cut_to(dense, first)
    loaded = AutoModelForCausalLM.from_pretrained(saved(model, tmp_path), dtype=torch.float64, attn_implementation="eager")
    between = Anatomy.of(loaded.config)
    assert "kv_heads" not in {name.rsplit(".", 1)[-1] for name in between.axes}
    with pytest.raises(UserError, match=r"'layers.0.kv_heads' cannot be cut: its query heads share KV heads unevenly"):
        Keep({"layers.0.kv_heads": (0,)}).validated(between)
    second = Keep({"layers.0.heads": (0, 1, 2), "layers.1.heads": (0, 2, 4), "layers.2.heads": (0, 1, 3)})
    target, twice = cut_to(loaded, second)
    assert target.anatomy.shape.layers == (LayerShape(3, 3, 24),) * 3
    assert target.config.model_type == case
    _, once = cut_to(dense, first.then(second, Anatomy.of(dense.config)))
    assert tiny.relative(tiny.logits_of(twice, IDS), tiny.logits_of(once, IDS)) < 1e-6  # olmo2's gains were folded twice


@pytest.mark.parametrize("index", [[0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 0, 0, 0, 0], "01233", [0, 1, 2, 3, None]])
def test_maps_that_fit_no_layer_are_refused(index, dense_of):
    config = cut_to(dense_of("llama"), Keep(ALIKE))[0].config
    fields = config.to_dict()
    fields["per_layer_config"]["0"]["kv_index"] = index
    with pytest.raises(
        UserError, match=r"config.json: kv_index is .*, but it must name for each of 5 query heads one of 4 KV"
    ):
        Anatomy.of(type(config)(**fields))


@pytest.mark.parametrize("case", ["mistral", "llama_bias", "phi3", "gemma3", "phi"])
def test_copies_of_kv_heads_are_a_stock_model_of_the_same_logits(case, dense_of):
    _, ragged = cut_to(dense_of(case), Keep(ALIKE))
    ragged.set_attn_implementation("eager")
    stock = prunus.unshared(ragged)
    stock.set_attn_implementation("eager")
    anatomy = Anatomy.of(stock.config)
    # where a config refuses 32 channels with 5 heads, the checkpoint stays of our type, or is of another stock one
    assert stock.config.model_type == {"llama_bias": "seed_oss", "gemma3": "pruned_gemma3_text"}.get(case, case)
    assert [layer.num_key_value_heads for layer in anatomy.shape.layers] == [5, 5, 5] and not anatomy.shape.is_ragged
    # the same sums; a product with more rows may take another kernel, so rounding of float64
    assert tiny.relative(tiny.logits_of(stock, IDS), tiny.logits_of(ragged, IDS)) < 1e-12
    assert tiny.greedy_cached(stock, IDS, 3).tolist() == tiny.greedy_by_hand(ragged, IDS, 3).tolist()


def test_copies_that_would_change_the_logits_are_refused(dense_of):
    with pytest.raises(
        UserError, match=r"unshared: model\.layers\.0\.self_attn\.k_norm\.weight runs over all KV heads at once"
    ):
        prunus.unshared(cut_to(dense_of("olmo2"), Keep(ALIKE))[1])
    with pytest.raises(UserError, match="unshared: KV heads cannot be copied: a gpt_neox config"):
        prunus.unshared(dense_of("gpt_neox"))
