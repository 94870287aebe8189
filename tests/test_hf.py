"""Which config a cut model gets, and building models from tensors."""

from __future__ import annotations

import pipeline
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as hf_logging

from prunus import cut, hf
from prunus.anatomy import Anatomy
from prunus.errors import UserError
from prunus.keep import Keep
from prunus.oneshot import one_shot_

IDS = tiny.tokens(2, 9)
ODD = Keep({"hidden": tuple(range(3, 30))})  # 27 channels, which 8 heads do not divide
NARROW = Keep({f"layers.{i}.intermediate": tuple(range(i, i + 12)) for i in range(tiny.LAYERS)})


def target_of(config, keep, **options):
    return hf.target_for(config, Anatomy.of(config), keep, **options)


# -- which type -------------------------------------------------------------------------------------------------------


def test_llama_without_biases_becomes_mistral_where_its_config_refuses():
    target = target_of(tiny.tiny_config("llama"), ODD)
    assert target.is_stock
    assert target.config.model_type == "mistral"
    assert target.config.sliding_window is None  # Mistral's default of 4096 would be another model
    assert (target.config.hidden_size, target.config.head_dim) == (27, 8)
    assert target.notes == (
        "a stock llama config cannot say hidden size 27, so it is written as mistral, which runs the same weights",
    )
    assert target.anatomy.family.name == "mistral"


@pytest.mark.parametrize("flag", ["attention_bias", "mlp_bias"])
def test_llama_with_biases_becomes_seed_oss(flag):
    target = target_of(tiny.tiny_config("llama", **{flag: True}), ODD)
    assert target.is_stock
    assert target.config.model_type == "seed_oss"
    config = target.config
    wanted = flag == "attention_bias"
    assert (config.attention_bias, config.attention_out_bias, config.mlp_bias) == (wanted, wanted, not wanted)
    assert (config.attention_dropout, config.residual_dropout) == (0.0, 0.0)  # Seed-OSS's defaults are 0.1
    biases = {n.split(".", 3)[-1] for n in target.anatomy.tensors if n.endswith("bias")}
    attention = {f"self_attn.{m}_proj.bias" for m in "qkvo"}
    assert biases == (attention if wanted else {f"mlp.{m}_proj.bias" for m in ("gate", "up", "down")})


@pytest.mark.parametrize(
    "case", ["mistral", "qwen2", "qwen3", "smollm3", "gemma", "olmo", "olmo2", "phi", "phi3", "seed_oss"]
)
def test_most_configs_take_any_hidden_size(case):
    config = tiny.tiny_config(case)
    target = target_of(config, ODD)
    assert target.config.model_type == config.model_type
    assert target.notes == ()


@pytest.mark.parametrize("case", ["gemma2", "gemma3"])
def test_gemma_becomes_a_type_of_ours_where_its_config_refuses(case):
    config = tiny.tiny_config(case)
    target = target_of(config, ODD)
    assert target.config.model_type == f"pruned_{config.model_type}"
    assert target.notes == (
        f"a stock {config.model_type} config cannot say hidden size 27, so the checkpoint is of type "
        f"pruned_{config.model_type}",
    )
    assert target_of(config, Keep({"hidden": tuple(range(24))})).config.model_type == config.model_type


def test_layers_that_differ_make_a_type_of_ours():
    target = target_of(tiny.tiny_config("llama"), Keep({"layers.1.intermediate": (0, 1), "layers.2.attention": ()}))
    config = target.config
    assert config.model_type == "pruned_llama"
    assert config.per_layer_config[1].intermediate_size == 2
    assert "attention" in config.per_layer_config[2].skip
    (note,) = target.notes
    assert "layers differ in size" in note
    assert "trust_remote_code=True" in note
    assert "prunus export --check says who can serve it" in note


def test_layers_that_differ_keep_their_long_rope(tmp_path):
    """Its check reads a head count, which layers that differ have none of."""
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.0], "long_factor": [2.0, 2.0],
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    config = pipeline.config("phi3", rope_parameters=rope, original_max_position_embeddings=32)
    dense = tiny.grown(config, dtype=torch.float32)
    plan = pipeline.plan_for(dense, method="flap", ratio=0.4)
    model = one_shot_(plan, dense, pipeline.windows()).model
    assert model.config.model_type == "pruned_phi3"
    assert len({layer.num_attention_heads for layer in Anatomy.of(model.config).shape.layers}) > 1
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.rope_parameters["rope_type"] == "longrope"
    ids = tiny.tokens(2, 40, vocab=pipeline.VOCAB)  # the long factors are in use
    assert torch.equal(tiny.logits_of(again, ids), tiny.logits_of(model, ids))


def test_lists_with_one_entry_a_layer_follow_the_kept_layers():
    config = tiny.tiny_config("gemma3", layer_types=["full_attention", "sliding_attention", "full_attention"])
    assert target_of(config, Keep({"layers": (1, 2)})).config.layer_types == ["sliding_attention", "full_attention"]
    config = tiny.tiny_config("smollm3", no_rope_layers=[1, 0, 0])
    target = target_of(config, Keep({"layers": (0, 2)}))
    assert target.config.no_rope_layers == [1, 0]
    assert target.config.num_hidden_layers == len(target.config.layer_types) == 2
    pruned = target_of(config, Keep({"layers": (1, 2), "layers.1.mlp": ()}))
    assert pruned.config.no_rope_layers == [0, 0]


def test_cutting_does_not_change_the_config_it_was_given():
    config = tiny.tiny_config("gemma3")
    before = config.to_dict()
    target_of(config, Keep({"layers": (1,), "layers.1.kv_heads": (0,), "hidden": tuple(range(20))}))
    assert config.to_dict() == before


def test_what_is_not_a_size_is_kept():
    config = tiny.tiny_config("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5}, hidden_act="gelu")
    for keep in (NARROW, ODD, Keep({"layers.0.mlp": ()})):
        got = target_of(config, keep).config
        assert got.rope_parameters["rope_theta"] == 5e5
        assert got.hidden_act == "gelu"
        assert (got.bos_token_id, got.eos_token_id, got.pad_token_id) == (1, 2, 0)
        assert got.max_position_embeddings == 64


# -- output biases ----------------------------------------------------------------------------------------------------

STOCK_BIAS = {  # family: flags that its stock config turns on for {attention, mlp}
    "llama": ({"attention_bias"}, {"mlp_bias"}),
    "smollm3": ({"attention_bias"}, {"mlp_bias"}),
    "seed_oss": ({"attention_out_bias"}, {"mlp_bias"}),
    "qwen3": ({"attention_bias"}, None),
    "gemma": ({"attention_bias"}, None),
    "gemma2": ({"attention_bias"}, None),
    "gemma3": ({"attention_bias"}, None),
    "olmo": ({"attention_bias"}, None),
    "olmo2": ({"attention_bias"}, None),
    "mistral": (None, None),
    "qwen2": (None, None),
    "phi3": (None, None),
    "phi": (set(), set()),  # the biases are always there
    "gpt_neox_sequential": ({"attention_bias"}, set()),
}


@pytest.mark.parametrize("sublayer", ["attention", "mlp"])
@pytest.mark.parametrize("case", STOCK_BIAS)
def test_output_biases_of_uniform_models(case, sublayer, tmp_path):
    """Stock flags where a family has them (the biases that come with them are zero), else a type of ours."""
    config = tiny.tiny_config(case)
    if case == "seed_oss":
        config = tiny.tiny_config(case, attention_bias=False, attention_out_bias=False, mlp_bias=False)
    dense = tiny.grown(config)
    anatomy = Anatomy.of(config)
    plan = cut.slice_plan(anatomy, NARROW)
    tensors = cut.slice_tensors(hf.weights(dense, anatomy), plan)
    plain = hf.build(target_of(config, NARROW).config, dict(tensors))
    target = target_of(config, NARROW, out_bias=frozenset({sublayer}))
    flags = STOCK_BIAS[case][sublayer == "mlp"]
    if flags is None:
        assert target.config.model_type == f"pruned_{config.model_type}"
        assert "a bias that it has no place for" in target.notes[0]
    else:
        assert target.config.model_type == config.model_type
        assert all(getattr(target.config, flag) for flag in flags)
        assert target.notes == ()

    added = hf.empty_weights(target, tensors, torch.float64)
    assert all(not t.any() and t.dtype == torch.float64 for t in added.values())
    if flags == set():
        assert not added
        return
    projection = "self_attn.o_proj" if sublayer == "attention" else "mlp.down_proj"
    projection = "attention.dense" if "neox" in case else projection
    written = {f"{anatomy.block_name(i)}{projection}.bias" for i in range(tiny.LAYERS)}
    assert written <= set(added)
    for i, name in enumerate(sorted(written)):
        added[name] = torch.linspace(-1, 1 + i, tiny.HIDDEN, dtype=torch.float64)
        # by hand: the same model without biases, and a hook that adds them
        module = plain.get_submodule(name.removesuffix(".bias"))
        module.register_forward_hook(lambda _module, _inputs, out, bias=added[name]: out + bias)
    model = hf.build(target.config, tensors | added)
    wanted = tiny.logits_of(plain, IDS)
    assert tiny.relative(tiny.logits_of(model, IDS), wanted) < 1e-9  # the same sums in float64
    assert tiny.relative(tiny.logits_of(dense, IDS), wanted) > 1e-2
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(tiny.logits_of(again, IDS), tiny.logits_of(model, IDS))


def test_a_bias_and_an_odd_stem_need_seed_oss():
    target = target_of(tiny.tiny_config("llama"), ODD, out_bias=frozenset({"mlp"}))
    assert target.config.model_type == "seed_oss"
    assert target.config.mlp_bias
    assert not target.config.attention_bias
    assert not target.config.attention_out_bias


# -- building ---------------------------------------------------------------------------------------------------------


def test_build_refuses_missing_and_left_over_tensors(dense_of):
    dense = dense_of("llama")
    tensors = hf.weights(dense, Anatomy.of(dense.config))
    lacking = {n: t for n, t in tensors.items() if n != "model.norm.weight"}
    with pytest.raises(AssertionError, match=r"model\.norm\.weight"):
        hf.build(dense.config, lacking)
    with pytest.raises(AssertionError, match=r"model\.nope"):
        hf.build(dense.config, tensors | {"model.nope": torch.zeros(1, dtype=torch.float64)})


def test_build_takes_generation_settings_and_dtype(dense_of):
    from transformers import GenerationConfig

    dense = dense_of("llama_tied")
    tensors = {n: t.to(torch.bfloat16) for n, t in hf.weights(dense, Anatomy.of(dense.config)).items()}
    settings = GenerationConfig(max_new_tokens=3, eos_token_id=5)
    model = hf.build(dense.config, tensors, settings)
    assert model.generation_config is settings
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_transformers_is_as_loud_after_a_quiet_call_as_before():
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    try:
        hf_logging.set_verbosity_info()
        with hf.quiet():
            assert hf_logging.get_verbosity() == hf_logging.ERROR
        assert hf_logging.get_verbosity() == hf_logging.INFO
        with pytest.raises(UserError, match="boom"), hf.quiet():
            raise UserError("boom")
        assert hf_logging.get_verbosity() == hf_logging.INFO
        assert hf_logging.is_progress_bar_enabled() == bars
    finally:
        hf_logging.set_verbosity(level)
