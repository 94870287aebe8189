"""Our per-layer model types: attention backends, causality, remote code, output biases."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from cuts import keep_of
from transformers import AutoModelForCausalLM

import prunus.modeling_pruned as pruned
from prunus import cut, hf
from prunus.anatomy import Anatomy
from prunus.families import FAMILIES
from prunus.keep import Keep

VARIANTS = ("llama_mha", "llama_gqa4", "llama_mqa", "gemma_untied", "seed_oss_bias", "phi_tied")
FULL_CASES = [c for c in tiny.CASES if c not in VARIANTS]
IDS = tiny.tokens(2, 11)


def per_layer_model(dense, case, cut_name):
    anatomy, keep = Anatomy.of(dense.config), keep_of(case, cut_name)
    target = hf.target_for(dense.config, anatomy, keep)
    assert not target.is_stock
    return hf.build(target.config, cut.slice_tensors(hf.weights(dense, anatomy), cut.slice_plan(anatomy, keep)))


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("cut_name", ["everything", "sublayers"])
@pytest.mark.parametrize("case", FULL_CASES)
def test_backends_agree_and_no_token_sees_the_future(case, cut_name, dense_of, tmp_path):
    folder = saved(per_layer_model(dense_of(case), case, cut_name), tmp_path)
    changed = IDS.clone()
    changed[:, 7] = (changed[:, 7] + 1) % tiny.VOCAB
    logits = {}
    for backend in ("eager", None) if case == "gemma2" else ("eager", "sdpa", None):  # Gemma 2 has no SDPA
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation=backend)
        assert model.config._attn_implementation == (backend or ("eager" if case == "gemma2" else "sdpa"))
        logits[backend] = tiny.logits_of(model, IDS)
        moved = (tiny.logits_of(model, changed) - logits[backend]).abs().amax(-1)
        assert not moved[:, :7].any()
        assert (moved[:, 7:].amax(-1) > 1e-3).all()
    # eager attention rounds its softmax to float32 (6e-8), SDPA does not
    assert tiny.relative(logits[backend], logits["eager"]) < 1e-5


@pytest.mark.parametrize("case", FULL_CASES)
def test_a_model_made_from_a_config_alone_sees_no_future_either(case, dense_of):
    anatomy, keep = Anatomy.of(dense_of(case).config), keep_of(case, "sublayers")
    config = hf.target_for(dense_of(case).config, anatomy, keep).config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()  # no backend asked for
    changed = IDS.clone()
    changed[:, 7] = (changed[:, 7] + 1) % tiny.VOCAB
    assert torch.equal(tiny.logits_of(model, changed)[:, :7], tiny.logits_of(model, IDS)[:, :7])
    assert not torch.equal(tiny.logits_of(model, changed)[:, 7:], tiny.logits_of(model, IDS)[:, 7:])


def test_the_attention_backend_can_be_switched_later(dense_of, tmp_path):
    """In a process of its own: transformers caches its answer on the stock class, where ours would inherit it."""
    folders = [
        saved(per_layer_model(dense_of(case), case, "sublayers"), tmp_path / case) for case in ("llama", "phi3", "gpt_neox")
    ]
    script = """
import sys, torch, prunus.modeling_pruned
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="sdpa")
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager", folder
    attentions = [m for name, m in model.named_modules() if name.endswith(("self_attn", ".attention")) and hasattr(m, "config")]
    assert attentions and all(m.config._attn_implementation == "eager" for m in attentions), folder
"""
    done = subprocess.run([sys.executable, "-c", script, *folders], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_remote_code_loads_without_prunus(dense_of, tmp_path):
    """The folders alone, in a process that cannot import prunus; of the second, query heads share KV heads unevenly."""
    wanted = {}
    for cut_name in ("everything", "heads_per_layer"):
        model, folder = per_layer_model(dense_of("llama"), "llama", cut_name), tmp_path / cut_name
        saved(model, folder)
        shutil.copy(pruned.__file__, folder / "modeling_pruned.py")
        config_file = folder / "config.json"
        config = json.loads(config_file.read_text())
        config["auto_map"] = {
            "AutoConfig": "modeling_pruned.PrunedLlamaConfig",
            "AutoModelForCausalLM": "modeling_pruned.PrunedLlamaForCausalLM",
        }
        config_file.write_text(json.dumps(config))
        wanted[str(folder)] = tiny.logits_of(model, IDS), tiny.greedy_by_hand(model, IDS, 3)
    torch.save({"ids": IDS, "folders": wanted}, tmp_path / "wanted.pt")
    script = """
import sys
sys.modules["prunus"] = None  # importing it would raise
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
wanted = torch.load(sys.argv[1])
for folder, (logits, text) in wanted["folders"].items():
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float64).eval()
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        out = model(input_ids=wanted["ids"], use_cache=True)
    assert torch.equal(out.logits, logits), (folder, (out.logits - logits).abs().max())
    cached = model.generate(wanted["ids"], do_sample=False, max_new_tokens=3, pad_token_id=0)
    assert torch.equal(cached, text), folder
    print(type(model).__module__, [layer.keys.shape[1] for layer in out.past_key_values.layers])
"""
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "wanted.pt"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "1",
            "PATH": "/usr/bin:/bin",
            "MKL_CBWR": os.environ["MKL_CBWR"],
        },
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all(line.startswith("transformers_modules") for line in lines)
    assert lines[1].endswith(" [4, 2, 4]")  # KV heads in the cache


def test_the_file_that_travels_imports_nothing_of_prunus():
    lines = Path(pruned.__file__).read_text().splitlines()
    imports = [line for line in lines if line.lstrip().startswith(("import ", "from "))]
    assert imports
    assert not [line for line in imports if "prunus" in line or "from ." in line]


def test_norms_that_go_with_a_sub_layer_are_those_of_the_family_table():
    model_types = {t: family for family in FAMILIES for t in family.model_types}
    assert set(pruned.BASES) == set(model_types)
    for model_type, (_, norms) in pruned.BASES.items():
        family = model_types[model_type]
        for sublayer, table in (("attention", family.attention), ("mlp", family.mlp)):
            in_the_block = {module for module in table if "." not in module}  # OLMo's have no parameters
            assert set(norms[sublayer]) == in_the_block, (model_type, sublayer)


def test_names_of_modules_are_those_of_the_family_table():
    model_types = {t: family for family in FAMILIES for t in family.model_types}
    assert set(pruned.NAMES) == set(model_types)
    for model_type, names in pruned.NAMES.items():
        family = model_types[model_type]
        assert family.blocks == f"{names['decoder']}.layers"
        for sublayer, table in (("attention", family.attention), ("mlp", family.mlp)):
            outputs = {m for m, ps in table.items() if "weight" in ps and ps["weight"].dims[0] == ("hidden",) and "." in m}
            assert outputs == {f"{names[sublayer]}.{names[f'{sublayer}_out']}"}, model_type


BIASED = ["llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3", "olmo", "olmo2", "phi3", "seed_oss"]
BIASED += ["gpt_neox_sequential"]  # Phi's matrices have their biases anyway, and so has GPT-NeoX's MLP


@pytest.mark.parametrize("case", BIASED)
def test_output_biases_of_per_layer_models_add_to_their_sub_layer(case, dense_of, tmp_path):
    """Every family takes a bias on o_proj and down_proj; by hand: hooks on the same model without them."""
    dense = dense_of(case)
    anatomy = Anatomy.of(dense.config)
    keep = keep_of(case, "intermediate_per_layer")
    plan = cut.slice_plan(anatomy, keep)
    plain = hf.build(hf.target_for(dense.config, anatomy, keep).config, cut.slice_tensors(hf.weights(dense, anatomy), plan))
    target = hf.target_for(dense.config, anatomy, keep, out_bias=frozenset({"attention", "mlp"}))
    assert target.config.model_type == f"pruned_{dense.config.model_type}"
    tensors = cut.slice_tensors(hf.weights(dense, anatomy), plan)
    added = hf.empty_weights(target, tensors, torch.float64)
    outputs = ("self_attn.o_proj", "mlp.down_proj") if "neox" not in case else ("attention.dense", "mlp.dense_4h_to_h")
    names = {f"{anatomy.block_name(i)}{m}.bias" for i in range(3) for m in outputs}
    assert set(added) == names - set(tensors)
    assert not any(t.any() for t in added.values())
    generator = torch.Generator().manual_seed(1)
    for i, name in enumerate(sorted(added)):
        added[name] = torch.randn(tiny.HIDDEN, generator=generator, dtype=torch.float64) * (i + 1) / 6
    model = hf.build(target.config, tensors | added)
    for name, bias in added.items():
        plain.get_submodule(name.removesuffix(".bias")).register_forward_hook(lambda _m, _i, out, b=bias: out + b)
    wanted = tiny.logits_of(plain, IDS)
    assert tiny.relative(tiny.logits_of(model, IDS), wanted) < 1e-9  # the same sums in float64
    again = AutoModelForCausalLM.from_pretrained(saved(model, tmp_path), dtype=torch.float64)
    assert torch.equal(tiny.logits_of(again, IDS), tiny.logits_of(model, IDS))
    assert Anatomy.of(again.config).tensors.keys() == target.anatomy.tensors.keys()


def test_cutting_a_loaded_per_layer_model_again(dense_of, tmp_path):
    """A checkpoint of ours is a source like any other, and goes back to stock once its layers are alike."""
    dense = dense_of("llama")
    anatomy = Anatomy.of(dense.config)
    first = Keep({"layers.0.intermediate": tuple(range(12)), "layers.2.attention": ()})
    target = hf.target_for(dense.config, anatomy, first)
    model = hf.build(target.config, cut.slice_tensors(hf.weights(dense, anatomy), cut.slice_plan(anatomy, first)))
    loaded = AutoModelForCausalLM.from_pretrained(saved(model, tmp_path), dtype=torch.float64)
    between = Anatomy.of(loaded.config)
    second = Keep({"layers": (0, 1), "layers.1.intermediate": tuple(range(3, 15))})
    final = hf.target_for(loaded.config, between, second)
    assert final.config.model_type == "llama"
    twice = hf.build(final.config, cut.slice_tensors(hf.weights(loaded, between), cut.slice_plan(between, second)))
    whole = first.then(second, anatomy)
    once_target = hf.target_for(dense.config, anatomy, whole)
    once = hf.build(once_target.config, cut.slice_tensors(hf.weights(dense, anatomy), cut.slice_plan(anatomy, whole)))
    assert torch.equal(tiny.logits_of(twice, IDS), tiny.logits_of(once, IDS))
    ours, stock = final.config.to_dict(), once_target.config.to_dict()
    assert {k for k in ours if ours[k] != stock.get(k)} <= {"transformers_version", "_name_or_path"}
