"""The family table's errors, and what it declares that no other family has."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from pipeline import plan_for

from prunus import hf
from prunus.anatomy import Anatomy
from prunus.errors import UserError, unknown
from prunus.families import BY_MODEL_TYPE, family_of
from prunus.keep import Keep


def test_unknown_families_are_told_the_nearest_the_list_and_the_page():
    with pytest.raises(UserError) as caught:
        family_of("lama")
    message = str(caught.value)
    assert message.startswith("unknown model family 'lama' (did you mean 'llama'?): prunus knows ")
    assert all(name in message for name in BY_MODEL_TYPE)
    assert "docs/add-a-family.md" in message
    with pytest.raises(UserError, match="unknown model family 'xxxxxxxx': prunus knows"):
        family_of("xxxxxxxx")


def test_types_of_ours_belong_to_the_family_they_were_cut_from():
    assert all(family_of(f"pruned_{t}") is family for t, family in BY_MODEL_TYPE.items())


def test_unknown_names_in_general():
    error = unknown("method", "wnda", ["wanda", "flap"], "see --list")
    assert str(error) == "unknown method 'wnda' (did you mean 'wanda'?): known are flap, wanda; see --list"
    assert str(unknown("method", "zzz", ["wanda"])) == "unknown method 'zzz': known are wanda"


# -- LayerNorm ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["olmo", "phi"])
def test_no_gain_mends_a_layer_norm(case):
    config = tiny.tiny_config(case)
    anatomy = Anatomy.of(config)
    assert anatomy.exactness("hidden") == "inexact"
    assert not anatomy.eps_scalable
    assert plan_for(config, method="minitron-width", ratio=0.3).target.anatomy.shape.hidden_size < tiny.HIDDEN
    with pytest.raises(UserError, match=f"compensate: gain mends RMSNorms, but the norms of {case} subtract the mean"):
        plan_for(config, method="minitron-width", ratio=0.3, compensate="gain")


def test_a_norm_that_both_sub_layers_read_stays_when_one_goes():
    anatomy = Anatomy.of(tiny.tiny_config("phi"))
    shared = {f"model.layers.1.input_layernorm.{leaf}" for leaf in ("weight", "bias")}
    assert all(anatomy.tensors[name].sublayer is None for name in shared)
    for gone in ({"layers.1.attention": ()}, {"layers.1.mlp": ()}, {"layers.1.attention": (), "layers.1.mlp": ()}):
        assert shared <= set(Keep(gone).anatomy_after(anatomy).tensors)
    assert not shared & {f"model.layers.0.{n}" for n in Keep({"layers": (0,)}).anatomy_after(anatomy).tensors}
    assert {s.param for s in anatomy.axes["layers"].spans} >= shared


# -- axes that no config can say ----------------------------------------------------------------------------------------

REFUSING = {
    "gpt_neox": "a gpt_neox config makes the size of a head",
    "phi_qk": "with qk_layernorm the config makes the size",
}


@pytest.mark.parametrize("case", REFUSING)
def test_axes_that_no_config_can_say_are_refused_in_one_sentence(case):
    config = tiny.tiny_config(case)
    anatomy = Anatomy.of(config)
    for name in ("hidden", "layers.0.kv_heads", "layers.2.q_heads"):
        assert name not in anatomy.axes
        with pytest.raises(UserError, match=f"keep: '{name}' cannot be cut: {REFUSING[case]}"):
            Keep({name: (0,)}).validated(anatomy)
    for target in ({}, {"intermediate_size": 8}):
        with pytest.raises(UserError, match=f"minitron-width: it cuts hidden, but {REFUSING[case]}.* use flap or") as caught:
            plan_for(config, method="minitron-width", ratio=None if target else 0.2, target=target)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=f"uniform: it gives up KV groups, but {REFUSING[case]}.*; drop --uniform"):
        plan_for(config, method="flap", ratio=0.2, uniform=True)
    assert Anatomy.of(tiny.tiny_config("phi")).refused == {}


@pytest.mark.parametrize("case", REFUSING)
def test_flap_cuts_what_there_is_and_says_so(case):
    plan = plan_for(tiny.tiny_config(case), method="flap", ratio=0.1)
    assert plan.notes[0].startswith(f"flap leaves kv_heads alone: {REFUSING[case]}")
    assert plan.describe(16, 2)["cuts"] == ["intermediate"]
    with pytest.raises(UserError, match=r"more than this model's FFN channels can give; ask for less than 0\.") as caught:
        plan_for(tiny.tiny_config(case), method="flap", ratio=0.9)
    most = float(str(caught.value).rsplit(" ", 1)[1])
    assert plan_for(tiny.tiny_config(case), method="flap", ratio=most - 1e-3).budget > 0


def test_a_head_of_a_fused_projection_is_its_query_key_and_value(dense_of):
    """The table would know how to cut GPT-NeoX's heads: what it calls one head's rows moves that head's scores alone."""
    dense = dense_of("gpt_neox")
    anatomy = Anatomy.of(dense.config)
    able = replace(anatomy, family=replace(anatomy.family, refused={}))
    attention = dense.gpt_neox.layers[0].attention
    axis = able.axes["layers.0.kv_heads"]
    assert axis.size == tiny.HEADS
    rows = {s.param: s.rows([3]).flatten() for s in axis.spans}
    seen = []
    x = torch.randn(1, 5, tiny.HIDDEN, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    positions = dense.gpt_neox.rotary_emb(x, torch.arange(5)[None])
    for change in (False, True):
        module = tiny.clone(attention)
        module.dense.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
        if change:
            with torch.no_grad():
                module.query_key_value.weight[rows["gpt_neox.layers.0.attention.query_key_value.weight"]] *= 2
        module(x, None, position_embeddings=positions)
    moved = (seen[0] - seen[1]).abs().amax((0, 1)).nonzero().flatten()
    assert moved.tolist() == rows["gpt_neox.layers.0.attention.dense.weight"].tolist()


# -- configs and files in the family's own words ------------------------------------------------------------------------


def test_gpt_neox_configs_say_only_what_their_class_knows():
    config = tiny.tiny_config("gpt_neox")
    anatomy = Anatomy.of(config)
    for units in ({"layers": (0, 2)}, {"layers.1.intermediate": (0, 5)}, {f"layers.{i}.attention": () for i in range(3)}):
        target = hf.target_for(config, anatomy, Keep(units))
        said = target.config.to_dict()
        assert not {"num_key_value_heads", "head_dim"} & set(said)
        assert not any("num_key_value_heads" in entry for entry in said.get("per_layer_config", {}).values())
        assert said["num_attention_heads"] == tiny.HEADS
        assert Anatomy.of(target.config).shape == target.anatomy.shape
        assert target.config.rope_parameters["partial_rotary_factor"] == 0.5


def test_stock_gpt_neox_files_keep_the_names_that_other_engines_know(dense_of, tmp_path):
    from prunus.headers import safetensors_shapes

    dense = dense_of("gpt_neox")
    anatomy = Anatomy.of(dense.config)
    for config in (dense.config, hf.target_for(dense.config, anatomy, Keep({}), stock=False).config):
        hf.build(config, dict(hf.weights(dense, anatomy))).save_pretrained(tmp_path / config.model_type)
        heads = [n for n in safetensors_shapes(tmp_path / config.model_type / "model.safetensors") if ".layers." not in n]
        assert ("embed_out.weight" in heads) == (config.model_type == "gpt_neox")
        assert ("lm_head.weight" in heads) == (config.model_type == "pruned_gpt_neox")
