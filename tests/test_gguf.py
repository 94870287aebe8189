"""GGUF files: every tensor and size against the checkpoint, what is refused, and (slow) what llama.cpp itself says."""

import json
import shutil

import checkpoints
import gguf
import numpy as np
import pipeline
import pytest
import torch
from pipeline import cli
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from prunus.errors import UserError
from prunus.export.gguf_file import Plan, export
from prunus.export.serving import check
from prunus.export.vocabulary import RULES, Vocabulary
from prunus.source import Source

CASES = ("llama", "llama_tied", "llama_bias", "llama_gqa4", "qwen2", "qwen3")


QWEN = {"vocab_size": 304, "use_sliding_window": False, "sliding_window": None, "layer_types": None}


def folder_of(case):
    """A checkpoint; transformers gives Qwen2's tokenizer a token more."""
    if not case.startswith("qwen2"):
        return pipeline.folder(case)
    path = pipeline.scratch() / "qwen2-wide"
    if not path.exists():
        checkpoints.save_folder(path, pipeline.model(case, dtype=torch.float32, **QWEN), pipeline.tokenizer())
    return path


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """Layers that differ, with output biases."""
    out = tmp_path_factory.mktemp("cut") / "out"
    words = ("-m", "flap", "-r", 0.4, "-c", pipeline.text_file(), "--windows", 4, "--seq-len", 16, "--multiple-of", 1)
    assert cli("prune", pipeline.folder("llama_tied"), *words, "-o", out)[0] == 0
    return out


def written(folder, tmp_path, kind="f32"):
    out = tmp_path / "model.gguf"
    told = export(Plan.of(Source.open(str(folder)), kind), out)
    return told, gguf.GGUFReader(out)


def tensors_of(reader):
    return {
        t.name: gguf.dequantize(t.data, t.tensor_type).reshape(tuple(reversed(t.shape.tolist()))) for t in reader.tensors
    }


def naive_interleaved(weight, heads, size):
    """Row 2 i + k of a head is row i + k * size / 2: halves become neighbours."""
    out = np.empty_like(weight)
    for h in range(heads):
        for i in range(size // 2):
            for k in range(2):
                out[h * size + 2 * i + k] = weight[h * size + i + k * size // 2]
    return out


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_is_there(case, tmp_path):
    folder = folder_of(case)
    told, reader = written(folder, tmp_path)
    source, found = Source.open(str(folder)), tensors_of(reader)
    model, shape = source.load("float32"), source.anatomy.shape
    assert len(found) == len(source.anatomy.tensors) == sum(told["tensors"].values())
    own = {name: p.detach().numpy() for name, p in model.named_parameters()}
    for i in range(shape.num_hidden_layers):
        at = f"model.layers.{i}."
        same = {"mlp.down_proj": "ffn_down", "self_attn.v_proj": "attn_v", "input_layernorm": "attn_norm"}
        for mine, theirs in same.items():
            assert np.array_equal(found[f"blk.{i}.{theirs}.weight"], own[f"{at}{mine}.weight"])
        for name, theirs, heads in (
            ("q", "attn_q", shape.layers[i].num_attention_heads),
            ("k", "attn_k", shape.layers[i].num_key_value_heads),
        ):
            weight = own[f"{at}self_attn.{name}_proj.weight"]
            turned = naive_interleaved(weight, heads, shape.head_dim) if told["architecture"] == "llama" else weight
            assert np.array_equal(found[f"blk.{i}.{theirs}.weight"], turned)
    assert np.array_equal(found["token_embd.weight"], own["model.embed_tokens.weight"])
    assert ("output.weight" in found) != shape.tie_word_embeddings
    value = lambda key: reader.fields[f"{told['architecture']}.{key}"].contents()  # noqa: E731
    assert (value("embedding_length"), value("block_count")) == (shape.hidden_size, shape.num_hidden_layers)
    assert value("attention.layer_norm_rms_epsilon") == pytest.approx(source.config.rms_norm_eps, rel=1e-6)


def test_layers_that_differ(cut, tmp_path):
    told, reader = written(cut, tmp_path)
    layers = Source.open(str(cut)).anatomy.shape.layers
    assert told["architecture"] == "deci" and len(set(layers)) > 1
    assert reader.fields["deci.feed_forward_length"].contents() == [x.intermediate_size for x in layers]
    assert reader.fields["deci.attention.head_count"].contents() == [x.num_attention_heads for x in layers]
    assert reader.fields["deci.attention.head_count_kv"].contents() == [x.num_key_value_heads for x in layers]
    assert any(t.name.endswith("ffn_down.bias") for t in reader.tensors)


def test_a_window_bounds_the_context(tmp_path):
    told, reader = written(pipeline.folder("mistral"), tmp_path)
    assert reader.fields["llama.context_length"].contents() == 4 and "cut to the window of 4" in told["notes"][0]


def test_the_tokenizer_goes_along(tmp_path):
    told, reader = written(pipeline.folder(), tmp_path)
    tokenizer = pipeline.tokenizer()
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    kinds = reader.fields["tokenizer.ggml.token_type"].contents()
    assert {token: i for i, token in enumerate(tokens)} == tokenizer.get_vocab()
    assert [i for i, kind in enumerate(kinds) if kind == 3] == [0, 1, 2] and told["splits_text_as"] == "gpt-2"
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert reader.fields["tokenizer.ggml.merges"].contents() == [" ".join(m) for m in merges]
    ids = [reader.fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("bos", "eos", "padding")]
    assert ids == [1, 2, 0]


def test_several_chat_templates(tmp_path):
    """One for tools beside the usual one, as Hermes and Command R have; transformers then gives a dict."""
    folder = shutil.copytree(pipeline.folder(), tmp_path / "tools")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = {"default": "plain", "tool_use": "with tools", "rag": "with text"}
    tokenizer.save_pretrained(folder)
    fields = written(folder, tmp_path)[1].fields
    told = {
        name: fields[f"tokenizer.{name}"].contents()
        for name in ("chat_template", "chat_template.tool_use", "chat_templates")
    }
    assert list(told.values()) == ["plain", "with tools", ["rag", "tool_use"]]


@pytest.mark.parametrize(("kind", "worst"), [("f16", 1e-3), ("bf16", 8e-3), ("q8_0", 1.2e-2)])
def test_narrower_types(kind, worst, tmp_path):
    """Relative to the largest weight of a row: half a step of 10, 7 and 7 bits; rows of 24 have no block of 32 and stay f16."""
    told, reader = written(pipeline.folder(), tmp_path, kind)
    (tmp_path / "wide").mkdir()
    plain = tensors_of(written(pipeline.folder(), tmp_path / "wide")[1])
    for name, tensor in tensors_of(reader).items():
        if tensor.ndim == 2:
            scale = np.abs(plain[name]).max(1, keepdims=True)
            assert float((np.abs(tensor - plain[name]) / scale).max()) < worst, name
        else:
            assert np.array_equal(tensor, plain[name])
    if kind == "q8_0":
        down = [t for t in reader.tensors if "ffn_down" in t.name]
        assert {t.tensor_type.name for t in down} == {"F16"} and len(told["notes"]) == 1
        assert "3 matrices have rows that are no multiple of 32" in told["notes"][0]


def _tokenizer(model, split=None, normalizer=None):
    made = Tokenizer(model)
    made.decoder = decoders.ByteLevel()
    if split is not None:
        made.pre_tokenizer = split
    if normalizer is not None:
        made.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=made)


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
SPELT = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
SPLITS = {
    "gpt-2": BYTES,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES]),
    **{
        name: pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(patterns[0]), "isolated"), SPELT])
        for (patterns, _, _), name in RULES.items()
        if patterns
    },
}


@pytest.mark.parametrize("name", SPLITS)
def test_rules_are_known_by_what_they_do(name):
    assert Vocabulary.of(_tokenizer(models.BPE(vocab={"a": 0}, merges=[]), SPLITS[name]), 3).rule == name


def test_ids_without_a_token_are_unused():
    found = Vocabulary.of(_tokenizer(models.BPE(vocab={"a": 0}, merges=[]), BYTES), 3)
    assert found.tokens == ["a", "[PAD1]", "[PAD2]"] and found.kinds == [1, 5, 5] and not found.adds_bos


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (_tokenizer(models.WordLevel({"a": 0}, unk_token="a")), "the tokenizer is WordLevel; only byte-level BPE"),
        (_tokenizer(models.BPE(vocab={"a": 0}, merges=[], byte_fallback=True)), "BPE with byte fallback"),
        (_tokenizer(models.BPE(vocab={"a": 0}, merges=[]), BYTES, normalizers.Lowercase()), "normalises text"),
        (
            _tokenizer(models.BPE(vocab={"a": 0}, merges=[]), pre_tokenizers.Whitespace()),
            "a rule that is none of gpt-2, smollm",
        ),
        (
            _tokenizer(models.BPE(vocab={"a": 0}, merges=[]), pre_tokenizers.ByteLevel(add_prefix_space=True)),
            "a rule that is none of",
        ),
    ],
)
def test_tokenizers_that_would_read_otherwise(tokenizer, message):
    with pytest.raises(UserError, match=message):
        Vocabulary.of(tokenizer, 4)


def test_what_llama_cpp_cannot_run(tmp_path):
    with pytest.raises(UserError, match="gemma is not written; llama, mistral, qwen2, qwen3 are"):
        Plan.of(Source.open(str(pipeline.folder("gemma"))), "f16")
    with pytest.raises(UserError, match="f16"):
        Plan.of(Source.open(str(pipeline.folder())), "q9")
    scaled = tmp_path / "scaled"
    shutil.copytree(pipeline.folder(), scaled)
    config = json.loads((scaled / "config.json").read_text(encoding="utf-8"))
    config["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    (scaled / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match="rotary angles of type linear"):
        Plan.of(Source.open(str(scaled)), "f16")
    large = pipeline.model("llama", dtype=torch.float32)
    large.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e5
    folder = checkpoints.save_folder(tmp_path / "large", large, pipeline.tokenizer())
    with pytest.raises(UserError, match="beyond what float16 holds"):
        export(Plan.of(Source.open(str(folder)), "f16"), tmp_path / "x.gguf")
    assert not list(tmp_path.glob("*x.gguf*"))


@pytest.mark.parametrize(
    ("gone", "message", "reason"),
    [
        ("layers.1.mlp", "layer 1 has no MLP", "attention of a layer without an MLP"),
        ("layers.0.attention", "layer 0 has no attention", "size of all heads from layer 0"),
        ("layers.1.attention", None, None),
    ],
)
def test_sub_layers_that_are_gone(gone, message, reason):
    """llama.cpp skips the block of a layer without an MLP, and takes the head size from layer 0."""
    source = Source.open(str(pipeline.without(gone)))
    verdict = check(source)["engines"]["llama.cpp"]
    if message is None:
        assert verdict["verdict"] == "yes" and Plan.of(source, "f32").architecture.name == "deci"
        return
    assert verdict["verdict"] == "no" and reason in verdict["reason"]
    with pytest.raises(UserError, match=message):
        Plan.of(source, "f32")


def test_qwen3_with_biases(tmp_path):
    """llama.cpp would leave them out."""
    model = pipeline.model("qwen3", dtype=torch.float32, attention_bias=True)
    source = Source.open(str(checkpoints.save_folder(tmp_path / "biased", model, pipeline.tokenizer())))
    assert "attention_bias" in check(source)["engines"]["llama.cpp"]["reason"]
    with pytest.raises(UserError, match="qwen3 with attention_bias has biases"):
        Plan.of(source, "f32")


def test_another_activation(tmp_path):
    """llama.cpp would run it as silu. What export refuses, the table of engines does, too."""
    model = pipeline.model("llama", dtype=torch.float32, hidden_act="gelu")
    source = Source.open(str(checkpoints.save_folder(tmp_path / "gelu", model, pipeline.tokenizer())))
    with pytest.raises(UserError, match="hidden_act is gelu, and"):
        Plan.of(source, "f32")
    found = check(source)["engines"]
    assert "hidden_act is gelu" in found["llama.cpp"]["reason"] and found["ONNX Runtime"]["verdict"] == "yes"


def test_on_the_command_line(tmp_path):
    out = tmp_path / "model.gguf"
    code, said, _ = cli("export", pipeline.folder(), "--type", "f32", "-o", out, "--modelfile")
    assert code == 0 and "gguf, llama" in said
    assert (tmp_path / "model.gguf.Modelfile").read_text(encoding="utf-8") == 'FROM ./model.gguf\nPARAMETER stop "</s>"\n'
    before = out.read_bytes()
    wrong = cli("export", pipeline.folder(), "-o", out)
    assert wrong[::2] == (2, f"prunus: {out} already exists; use --overwrite, or another name\n")
    assert out.read_bytes() == before
    assert (
        cli("export", pipeline.folder(), "-o", out, "--overwrite", "--type", "q8_0")[0] == 0 and out.read_bytes() != before
    )
    assert cli("export", pipeline.folder(), "-o", tmp_path / "no" / "x")[0] == 2
    code, _, err = cli("export", pipeline.folder(), "-o", out, "--format", "gguff")
    assert code == 2 and "gguf" in err


# -- the engine itself ----------------------------------------------------------------------------------------------------


def greedy(path, prompt, count):
    """Tokens that llama.cpp continues with, its KV cache in float32."""
    import xllamacpp

    asked = xllamacpp.CommonParams()
    asked.model.path, asked.n_ctx, asked.n_parallel, asked.warmup = str(path), 64, 1, False
    asked.cpuparams.n_threads = asked.cpuparams_batch.n_threads = 1
    asked.cache_type_k = asked.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    told = xllamacpp.Server(asked).handle_completions(
        {"prompt": prompt, "n_predict": count, "temperature": 0.0, "n_probs": 1, "ignore_eos": True, "cache_prompt": False}
    )
    assert "choices" in told, told
    return [token["id"] for token in told["choices"][0]["logprobs"]["content"]]


@pytest.mark.slow
@pytest.mark.parametrize("case", [*CASES, "cut", "layers.1.attention"])
def test_llama_cpp_writes_the_same(case, cut, tmp_path):
    """Float32 files: greedy tokens as transformers', from tokens and from text."""
    pytest.importorskip("xllamacpp")
    folder = pipeline.without(case) if case.startswith("layers") else cut if case == "cut" else folder_of(case)
    out = tmp_path / "model.gguf"
    export(Plan.of(Source.open(str(folder)), "f32"), out)
    source = Source.open(str(folder))
    model, tokenizer = source.load("float32"), AutoTokenizer.from_pretrained(folder)
    text = "the cat sings under 12 old trees"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    wanted, row = [], torch.tensor([ids])
    for _ in range(12):
        row = torch.cat([row, model(input_ids=row).logits[:, -1:].argmax(-1)], 1)
        wanted.append(int(row[0, -1]))
    for prompt in (ids, text):
        found = greedy(out, prompt, 12)  # tokens that end inside a character are not told: a subsequence
        left = iter(wanted)
        assert len(found) >= 4 and all(token in left for token in found), (found, wanted)
