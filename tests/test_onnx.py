"""ONNX graphs: the same numbers in ONNX Runtime, with a cache, padded and of layers that differ; what is refused."""

import json

import checkpoints
import numpy as np
import onnx
import pipeline
import pytest
import tiny
import torch
from pipeline import cli

from prunus import reload
from prunus.errors import UserError, VerificationError
from prunus.export import onnx_file
from prunus.export.serving import check
from prunus.source import Source

FAMILIES = (
    "llama_bias", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3", "olmo", "olmo2", "phi", "phi3", "seed_oss",
    "gpt_neox",
)  # fmt: skip


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Layers that differ, with output biases: (source, file, what was told)."""
    source = Source.open(str(pipeline.saved("per-layer")[0]))
    out = tmp_path_factory.mktemp("onnx") / "model.onnx"
    return source, out, onnx_file.export(onnx_file.Plan.of(source, "f32"), out)


def test_layers_that_differ_compute_the_same(written):
    source, out, told = written
    assert told["verified"]["max_logit_difference"] < 1e-4 and told["verified"]["same_tokens"] == 8
    assert told["bytes"] == out.stat().st_size and not told["notes"]
    model, session = source.load(), onnx_file.Session(out)
    heads = [layer.num_key_value_heads for layer in source.anatomy.shape.layers]
    assert len(set(source.anatomy.shape.layers)) > 1  # else the cut is none of this kind
    assert [session.past[f"past_key_values.{i}.value"][0] for i in range(len(heads))] == heads
    ids = torch.randint(0, source.anatomy.shape.vocab_size, (3, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
    logits, past = session(ids.numpy(), session.start(3))
    assert np.abs(logits - wanted.numpy()).max() < 1e-4 * float(wanted.abs().max())
    assert [past[f"past_key_values.{i}.key"].shape[:3] for i in range(len(heads))] == [(3, n, 7) for n in heads]
    assert session.greedy(ids[0].tolist(), 6) == reload.greedy(model, ids[:1], 6)


def test_a_layer_without_attention_computes_the_same(tmp_path):
    """Its place in the cache holds a marker: one head of size 1."""
    source = Source.open(str(pipeline.without("layers.0.attention")))
    out = tmp_path / "model.onnx"
    told = onnx_file.export(onnx_file.Plan.of(source, "f32"), out)
    assert told["verified"]["max_logit_difference"] < 1e-4 and told["verified"]["same_tokens"] == 8
    kv_heads = source.anatomy.shape.layers[1].num_key_value_heads
    past = onnx_file.Session(out).past
    assert [past[f"past_key_values.{i}.value"] for i in (0, 1)] == [(1, 1), (kv_heads, source.anatomy.shape.head_dim)]


def test_nothing_of_this_machine_is_in_the_file(written):
    source, out, _ = written
    data = out.read_bytes()
    assert b"/site-packages" not in data and str(pipeline.scratch()).encode() not in data and b".py" not in data
    told = {entry.key: entry.value for entry in onnx.load(str(out)).metadata_props}
    assert told["prunus.source_sha256"] == source.sha256


def test_eight_bits_in_blocks_on_the_command_line(tmp_path):
    out = tmp_path / "model[8].onnx"
    words = ("export", pipeline.folder("llama_tied"), "--format", "onnx", "--type", "q8", "--out", out)
    code, said, err = cli(*words, "--json")
    assert code == 0, err
    found = json.loads(said)
    assert found["bytes"] == out.stat().st_size > 0
    assert found["verified"]["max_logit_difference"] < 0.2 * found["verified"]["max_logit"]
    kinds = {node.op_type for node in onnx.load(str(out)).graph.node}
    assert "MatMulNBits" in kinds
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    assert cli(*words)[::2] == (2, f"prunus: {out} already exists; use --overwrite, or another name\n")


def test_a_graph_that_computes_something_else_is_not_left_behind(written, tmp_path, monkeypatch):
    source, out, _ = written
    other = source.load()
    other.get_parameter("model.norm.weight").data.mul_(1.01)
    with pytest.raises(VerificationError, match="computes something else than the model: logits differ by"):
        onnx_file.compare(other, onnx_file.Session(out), exact=True)

    def fails(*arguments, **keywords):
        raise VerificationError("no")

    monkeypatch.setattr(onnx_file, "write", lambda model, path, plan: path.write_bytes(out.read_bytes()) and {})
    monkeypatch.setattr(onnx_file, "compare", fails)
    with pytest.raises(VerificationError):
        onnx_file.export(onnx_file.Plan.of(source, "f32"), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_massive_activations_are_found():
    """One token brings a thousand times the usual to one product."""
    model = pipeline.model("llama", dtype=torch.float32)
    assert onnx_file.outliers(model) == []

    def excite(module, inputs):
        (x_BTC,) = inputs
        x_BTC = x_BTC.clone()
        x_BTC[0, 0] *= 1000
        return (x_BTC,)

    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(excite)
    assert onnx_file.outliers(model) == ["model.layers.1.mlp.down_proj"]


def test_angles_that_follow_the_text(tmp_path):
    """A graph has no place for what the longest text so far was. Of several kinds of layers one is enough."""
    for case, angles in (("llama", DYNAMIC), ("gemma3", {"full_attention": DYNAMIC, "sliding_attention": DYNAMIC})):
        model = tiny.grown(pipeline.config(case, rope_parameters=angles), dtype=torch.float32)
        source = Source.open(str(checkpoints.save_folder(tmp_path / case, model, pipeline.tokenizer())))
        with pytest.raises(UserError, match="rotary angles of type dynamic follow the longest text"):
            onnx_file.Plan.of(source, "f32")
        assert check(source)["engines"]["ONNX Runtime"]["verdict"] == "no"


def test_what_cannot_be_written(monkeypatch, tmp_path):
    source = Source.open(str(pipeline.folder("llama")))
    with pytest.raises(UserError, match="unknown type 'int9'"):
        onnx_file.Plan.of(source, "int9")
    with pytest.raises(UserError, match="no such folder to write a file in"):
        onnx_file.export(onnx_file.Plan.of(source, "f32"), tmp_path / "no" / "model.onnx")
    code, _, err = cli("export", pipeline.folder("llama"), "--format", "onnx", "--modelfile", "--out", tmp_path / "m.onnx")
    assert code == 2 and "ollama runs GGUF files" in err
    monkeypatch.setattr(onnx_file, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"onnx, onnxscript, onnxruntime is not installed; pip install 'prunus\[onnx\]'"):
        onnx_file.Plan.of(source, "f32")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["f32", "int8", "q8"])
def test_large_weights_stand_beside(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "_LARGE", 0)
    out = tmp_path / "model.onnx"
    told = onnx_file.export(onnx_file.Plan.of(Source.open(str(pipeline.folder("llama"))), kind), out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert (
        told["bytes"] == sum(path.stat().st_size for path in tmp_path.iterdir())
        and "a file of the same name" in told["notes"][0]
    )
    assert onnx_file.Session(out).greedy([3, 4, 5], 2)
    with pytest.raises(UserError, match="already exists"):
        onnx_file.export(onnx_file.Plan.of(Source.open(str(pipeline.folder("llama"))), kind), out)


@pytest.mark.slow
@pytest.mark.parametrize("case", FAMILIES)
def test_every_family(case, tmp_path):
    told = onnx_file.export(onnx_file.Plan.of(Source.open(str(pipeline.folder(case))), "f32"), tmp_path / "model.onnx")
    assert told["verified"]["max_logit_difference"] < 1e-4 * max(1.0, told["verified"]["max_logit"])


@pytest.mark.slow
@pytest.mark.parametrize("case", ["mistral", "gemma2"])
def test_windows_narrower_than_the_text(case):
    """Layers that see four tokens alone, or every other layer; against transformers' own masks."""
    model = tiny.grown(tiny.tiny_config(case, sliding_window=4), dtype=torch.float32)
    ids = torch.randint(0, model.config.vocab_size, (2, 11), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    layers = model.config.num_hidden_layers
    past = [(torch.zeros(2, model.config.num_key_value_heads, 0, model.config.head_dim),) * 2 for _ in range(layers)]
    with torch.no_grad():
        ours, _ = onnx_file.WithCache(model)(ids, mask, past)
        theirs = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    assert torch.allclose(ours[mask.bool()], theirs[mask.bool()], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "q4"])
def test_fewer_bits(kind, tmp_path):
    told = onnx_file.export(onnx_file.Plan.of(Source.open(str(pipeline.folder("llama"))), kind), tmp_path / "model.onnx")
    assert np.isfinite(told["verified"]["max_logit_difference"])
    plain = onnx_file.export(onnx_file.Plan.of(Source.open(str(pipeline.folder("llama"))), "f32"), tmp_path / "plain.onnx")
    assert told["bytes"] < plain["bytes"]
