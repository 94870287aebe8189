"""Opening models: good ones load as they are, broken ones are named before any weight is read."""

from __future__ import annotations

import json
import shutil
import struct

import checkpoints
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from prunus.api import positions
from prunus.errors import UserError
from prunus.source import Source

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="session")
def pristine(tmp_path_factory, tiny_tokenizer):
    root = tmp_path_factory.mktemp("pristine")
    model = checkpoints.small_llama()
    checkpoints.save_folder(root / "model", model, tiny_tokenizer)
    checkpoints.save_gguf(root / "model.gguf", model, tiny_tokenizer)
    return root, model, tiny_tokenizer


@pytest.fixture
def folder(pristine, tmp_path):
    return shutil.copytree(pristine[0] / "model", tmp_path / "model")


@pytest.fixture
def gguf_file(pristine, tmp_path):
    return shutil.copy(pristine[0] / "model.gguf", tmp_path / "model.gguf")


def refused(name, message, what=lambda source: source.anatomy):
    """Opening, or else `what` on the opened source, says `message` in one line that names the source."""
    with pytest.raises(UserError, match=message) as caught:
        what(Source.open(str(name)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- good ones --------------------------------------------------------------------------------------------------------


def test_a_folder_loads_as_it_was_saved(folder, pristine):
    source = Source.open(str(folder))
    assert (source.kind, source.label, source.notes) == ("folder", "model", ())
    assert source.anatomy.num_params == sum(p.numel() for p in pristine[1].parameters())
    model = source.load()
    assert not model.training
    for name, p in pristine[1].named_parameters():
        assert torch.equal(model.get_parameter(name), p)
    assert {p.dtype for p in source.load("bfloat16").parameters()} == {torch.bfloat16}
    assert source.tokenizer().encode("a cat") == pristine[2].encode("a cat")


def test_the_checksum_is_over_the_weights(folder):
    import hashlib

    wanted = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    assert Source.open(str(folder)).sha256 == wanted


def test_shards_load_together(pristine, tmp_path):
    pristine[1].save_pretrained(tmp_path, max_shard_size="20KB")
    source = Source.open(str(tmp_path))
    assert len(source.weight_files) > 1
    assert source.anatomy.num_params == sum(p.numel() for p in pristine[1].parameters())
    for name, p in source.load().named_parameters():
        assert torch.equal(p, pristine[1].get_parameter(name))


def test_weights_of_the_bare_decoder_have_no_prefix(tmp_path):
    """A decoder saved without its (tied) head names its tensors without `model.`; transformers loads that."""
    model = checkpoints.small_llama(tie_word_embeddings=True)
    model.model.save_pretrained(tmp_path)
    assert "norm.weight" in load_file(tmp_path / WEIGHTS)
    source = Source.open(str(tmp_path))
    assert source.anatomy.num_params == sum(p.numel() for p in model.parameters())
    loaded = source.load()
    assert all(torch.equal(p, loaded.get_parameter(n)) for n, p in model.named_parameters())


# -- wrong names and configs ------------------------------------------------------------------------------------------


def test_names_that_lead_nowhere(tmp_path):
    refused(tmp_path / "nope", r"nope: no such file or folder, and not in the local Hugging Face cache; --online")
    refused("someone/no-such-model", "someone/no-such-model: no such file or folder")
    (tmp_path / "weights.bin").write_bytes(b"x")
    refused(tmp_path / "weights.bin", r"a model is a Hugging Face folder or a .gguf file; got a file '.bin'")


def test_no_config(folder):
    (folder / "config.json").unlink()
    refused(folder, "no config.json in this folder")


@pytest.mark.parametrize("text", ["", "{", "nonsense", "\x00", "[" * 100_000])
def test_configs_that_are_no_json(folder, text):
    (folder / "config.json").write_text(text)
    refused(folder, r"config.json: not readable as JSON")


def test_configs_that_are_no_text(folder):
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")
    refused(folder, r"config.json: not readable as JSON")


@pytest.mark.parametrize("text", ["[]", "3", '"llama"'])
def test_configs_that_are_no_object(folder, text):
    (folder / "config.json").write_text(text)
    refused(folder, r"config.json: expected a JSON object")


@pytest.mark.parametrize("model_type", [None, 3, ["llama"]])
def test_configs_without_a_type(folder, model_type):
    checkpoints.edit_json(folder / "config.json", model_type=model_type)
    refused(folder, r"config.json: model_type is (None|3|\['llama'\])")


@pytest.mark.parametrize(("model_type", "near"), [("lama", "llama"), ("bloom", None), ("mixtral", "mistral")])
def test_unknown_families(folder, model_type, near):
    checkpoints.edit_json(folder / "config.json", model_type=model_type)
    message = refused(folder, f"unknown model family '{model_type}'")
    assert "gemma2" in message
    assert "seed_oss" in message
    assert "docs/add-a-family.md" in message
    assert ("did you mean" in message) == (near is not None)
    assert near is None or f"(did you mean '{near}'?)" in message


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "many"},
        {"hidden_size": -32},
        {"head_dim": 0},
        {"head_dim": -8},
        {"num_attention_heads": 0},
        {"num_key_value_heads": 0},
        {"num_key_value_heads": 3},
        {"num_hidden_layers": "2"},
        {"intermediate_size": 2.5},
        {"vocab_size": [61]},
        {"head_dim": "8"},
        {"rope_parameters": "none"},
        {"rms_norm_eps": "small"},
    ],
)
def test_sizes_that_cannot_be(folder, changes):
    """Whatever the first complaint is about, it is a user's error of one line, and no traceback."""
    checkpoints.edit_json(folder / "config.json", **changes)
    refused(folder, "config")


def test_configs_of_nothing(folder):
    """No layer, room for one token alone, a padding token that no row stands for."""
    checkpoints.edit_json(folder / "config.json", num_hidden_layers=0)
    refused(folder, "config.json: num_hidden_layers is 0; a model has at least one layer")
    checkpoints.edit_json(folder / "config.json", num_hidden_layers=2, max_position_embeddings=1)
    refused(folder, "max_position_embeddings is 1 in its config, but a prediction takes two tokens", positions)
    checkpoints.edit_json(folder / "config.json", max_position_embeddings=64, pad_token_id=10**6)
    refused(folder, "the weights cannot be read: Padding_idx must be within num_embeddings", lambda source: source.load())


def test_a_depth_that_the_files_cannot_have_is_refused_before_anything_is_built(folder):
    checkpoints.edit_json(folder / "config.json", num_hidden_layers=10**9)
    refused(folder, r"asks for 1,000,000,000 layers \(num_hidden_layers\), but the weight files hold only \d+ tensors")


# -- wrong weight files -----------------------------------------------------------------------------------------------


def test_no_weights(folder):
    (folder / WEIGHTS).unlink()
    refused(folder, r"model.safetensors is missing, found none")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt"])
def test_pickles_are_never_opened(folder, name):
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    refused(folder, f"model.safetensors is missing, found only {name}, which would have to be unpickled; convert it")


@pytest.mark.parametrize("length", [0, 3, 8, 100, -1, -5000])
def test_truncated_weights(folder, length):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:length])
    refused(folder, r"model.safetensors: .*(truncated|corrupt)")
    refused(folder, r"truncated|corrupt", lambda source: source.load())


def test_weights_with_something_behind_them(folder):
    with (folder / WEIGHTS).open("ab") as file:
        file.write(b"more")
    refused(folder, r"model.safetensors: \d+ bytes, but its header promises \d+")


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 101_000_000) + b"{}",
        checkpoints.safetensors_with(b"\xff\xfe{}"),
        checkpoints.safetensors_with(b"not json"),
        checkpoints.safetensors_with(b"[" * 100_000),
        checkpoints.safetensors_with(b'{"a":' * 20_000 + b"1" + b"}" * 20_000),
        checkpoints.safetensors_with([1, 2]),
        checkpoints.safetensors_with("text"),
        checkpoints.safetensors_with({"w": 3}),
        checkpoints.safetensors_with({"w": {"shape": [2]}}, b"\0" * 8),
        checkpoints.safetensors_with({"w": GOOD | {"data_offsets": [0]}}, b"\0" * 8),
        checkpoints.safetensors_with({"w": GOOD | {"shape": ["x"]}}, b"\0" * 8),
        checkpoints.safetensors_with({"w": GOOD | {"shape": None}}, b"\0" * 8),
        checkpoints.safetensors_with({"w": GOOD}, b"\0" * 7),
        checkpoints.safetensors_with({"w": GOOD}, b"\0" * 9),
    ],
    ids=range(15),
)
def test_corrupt_headers(folder, data):
    (folder / WEIGHTS).write_bytes(data)
    refused(folder, r"model.safetensors: .*(truncated|corrupt)")


def test_every_flipped_header_byte_is_survived(folder):
    """A flip may still be a lawful header (a letter of a name), but nothing else than a user's error comes out."""
    data = (folder / WEIGHTS).read_bytes()
    refusals = 0
    for position in [*range(8), *range(8, 700, 7)]:
        (folder / WEIGHTS).write_bytes(data[:position] + bytes([data[position] ^ 0x15]) + data[position + 1 :])
        try:
            Source.open(str(folder)).anatomy  # noqa: B018
        except UserError:
            refusals += 1
    assert refusals > 50


def test_weights_of_another_shape(folder):
    checkpoints.edit_json(folder / "config.json", intermediate_size=25)
    refused(folder, r"'model.layers.0.mlp.gate_proj.weight' has shape \[24, 32\], but config.json asks for \[25, 32\]")


def test_weights_that_lack_a_tensor(folder):
    tensors = load_file(folder / WEIGHTS)
    del tensors["model.layers.1.self_attn.v_proj.weight"]
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    refused(folder, r"the weights lack 'model.layers.1.self_attn.v_proj.weight', which config.json asks for")


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_shards_outside_the_folder(folder, shard):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
    refused(folder, r"model.safetensors.index.json: a shard's name leaves the folder; the index is corrupt")


@pytest.mark.parametrize("index", [{"weight_map": ["a"]}, {"weight_map": {"a": 3}}, {"weight_map": {"a": None}}, [], {}])
def test_corrupt_indices(folder, index):
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "model")


def test_shards_beside_a_whole_file(folder):
    """transformers loads the whole file; what was checked, hashed and streamed was in the shards."""
    other = {name: tensor + 1 for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(other, folder / "shard.safetensors", metadata={"format": "pt"})
    index = folder / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(other, "shard.safetensors")}))
    refused(folder, "holds model.safetensors and an index of other shards, and nothing says which weights are meant")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(other, WEIGHTS)}))
    assert Source.open(str(folder)).anatomy


def test_a_missing_shard(folder):
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "model-00001-of-00002.safetensors is missing")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers(folder, value):
    tensors = load_file(folder / WEIGHTS)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    source = Source.open(str(folder))
    assert source.anatomy.num_params > 0  # the headers are in order
    with pytest.raises(UserError, match=r"'model.layers.1.mlp.up_proj.weight' holds NaN or infinite weights"):
        source.load()


# -- wrong tokenizers -------------------------------------------------------------------------------------------------


def test_no_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    refused(folder, "the tokenizer cannot be read|has no tokenizer.json", lambda source: source.tokenizer())


@pytest.mark.parametrize("text", ["", "{}", "nonsense", "[]"])
def test_corrupt_tokenizers(folder, text):
    (folder / "tokenizer.json").write_text(text)
    refused(folder, "the tokenizer cannot be read|has no tokenizer.json", lambda source: source.tokenizer())


def test_merges_that_lead_out_of_the_vocabulary(folder, gguf_file, tmp_path):
    """The tokenizers library raises a bare Exception for these."""
    data = json.loads((folder / "tokenizer.json").read_text())
    data["model"]["merges"][3] = ["x", "y"]
    (folder / "tokenizer.json").write_text(json.dumps(data))
    refused(folder, "the tokenizer cannot be read", lambda source: source.tokenizer())
    data = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(data.replace("Ġ 12".encode(), "Ġ 7!".encode()))
    refused(gguf_file, "the tokenizer cannot be read", lambda source: source.tokenizer())


def test_the_tokenizer_of_a_larger_model(folder, byte_level_tokenizer):
    byte_level_tokenizer(tiny.VOCAB + 3).save(str(folder / "tokenizer.json"))
    refused(
        folder,
        "the tokenizer has token 63, but the model's vocabulary ends at 60; it is another model's",
        lambda source: source.tokenizer(),
    )


def test_a_tokenizer_may_know_fewer_tokens(folder, byte_level_tokenizer):
    byte_level_tokenizer(tiny.VOCAB - 3).save(str(folder / "tokenizer.json"))
    assert len(Source.open(str(folder)).tokenizer()) == tiny.VOCAB - 3


# -- GGUF -------------------------------------------------------------------------------------------------------------


def test_gguf_weights_are_those_of_the_folder(gguf_file, pristine):
    source = Source.open(str(gguf_file))
    assert source.kind == "gguf"
    assert "dequantised" in source.notes[0]
    assert source.all_notes == list(source.notes)
    model = source.load()
    assert source.anatomy.num_params == sum(p.numel() for p in pristine[1].parameters())
    assert model.config.rms_norm_eps == 1e-5  # not float32's 9.999999747378752e-06
    for name, p in pristine[1].named_parameters():
        assert torch.equal(model.get_parameter(name), p), name
    ids = tiny.tokens(2, 9)  # float32, one model attends by SDPA and the other eagerly
    assert tiny.relative(tiny.logits_of(model, ids), tiny.logits_of(pristine[1], ids)) < 1e-5


def test_a_gguf_model_saves_as_a_folder(gguf_file, tmp_path):
    model = Source.open(str(gguf_file)).load()
    model.save_pretrained(tmp_path / "saved")
    again = Source.open(str(tmp_path / "saved")).load()
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())


TEXT = "a cat  12  a dog   12 1122    mat12"


def test_digits_split_as_smollm_splits_them(gguf_file, byte_level_tokenizer):
    """The vocabulary has tokens for '12' and ' 12'; `tokenizer.ggml.pre = smollm` says that none may be used."""
    tokenizer = Source.open(str(gguf_file)).tokenizer()
    vocab = byte_level_tokenizer(tiny.VOCAB).get_vocab()
    assert {"12", "Ġ12"} <= set(vocab)
    pieces = tokenizer.convert_ids_to_tokens(tokenizer.encode(TEXT, add_special_tokens=False))
    assert [p for p in pieces if any(c.isdigit() for c in p)] == list("12121122" + "12")
    assert "".join(pieces).replace("Ġ", " ") == TEXT
    assert tokenizer.decode(tokenizer.encode(TEXT, add_special_tokens=False)) == TEXT


def test_other_pretokenizers_leave_digits_together(pristine, tmp_path):
    _, model, tokenizer = pristine
    file = checkpoints.save_gguf(tmp_path / "model.gguf", model, tokenizer, pre="gpt-2")
    source = Source.open(str(file))
    pieces = source.tokenizer().convert_ids_to_tokens(source.tokenizer().encode(TEXT, add_special_tokens=False))
    assert any("12" in p for p in pieces)
    assert source.all_notes == list(source.notes)
    other = checkpoints.save_gguf(tmp_path / "other.gguf", model, tokenizer, pre="tekken")
    assert "'tekken'" in Source.open(str(other)).all_notes[-1]


def test_a_gguf_without_endoftext_has_the_tokens_of_its_model(pristine, tmp_path):
    """As Llama 3's: GPT2Tokenizer, which transformers builds from it, adds '<|endoftext|>' behind the vocabulary."""
    _, model, tokenizer = pristine
    file = checkpoints.save_gguf(tmp_path / "m.gguf", model, tokenizer, renamed={"<|endoftext|>": "<|end_of_text|>"})
    loaded = Source.open(str(file)).tokenizer()
    assert sorted(loaded.get_vocab().values()) == list(range(tiny.VOCAB))
    assert loaded.convert_tokens_to_ids("<|end_of_text|>") == 0
    assert loaded.encode("a cat", add_special_tokens=False) == tokenizer.encode("a cat", add_special_tokens=False)


def test_gguf_with_another_beginning(gguf_file, tmp_path):
    data = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(b"GGML" + data[4:])
    refused(gguf_file, "not a GGUF file")


@pytest.mark.parametrize("version", [0, 1, 4, 2**24])
def test_gguf_of_unknown_versions(gguf_file, tmp_path, version):
    data = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(data[:4] + struct.pack("<I", version) + data[8:])
    refused(gguf_file, f"GGUF version {version} is not supported")


@pytest.mark.parametrize("length", [0, 2, 6, 20, 60, 500, 1500])
def test_gguf_that_ends_in_its_header(gguf_file, tmp_path, length):
    data = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(data[:length])
    refused(gguf_file, "the GGUF file ends inside its header|not a GGUF file")


@pytest.mark.parametrize("missing", [1, 33, 4096, 20_000])
def test_gguf_that_ends_in_its_data(gguf_file, tmp_path, missing):
    data = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(data[:-missing])
    refused(gguf_file, r"model.gguf: \d+ bytes, but its header promises \d+; the file is truncated")


def test_gguf_of_an_unknown_family(tmp_path):
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "m.gguf", "lama")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(tmp_path / "m.gguf", r"unknown model family 'lama' \(did you mean 'llama'\?\)")


def test_every_flipped_gguf_header_byte_is_survived(gguf_file, tmp_path):
    """Flips in lengths, kinds, counts and offsets: opening says so, or finds nothing wrong; it never falls over."""
    file = tmp_path / "model.gguf"
    data = file.read_bytes()
    end = data.index(b"output_norm.weight") + 60
    refusals = 0
    for position in range(0, end, 5):
        for mask in (0x05, 0x80):
            file.write_bytes(data[:position] + bytes([data[position] ^ mask]) + data[position + 1 :])
            try:
                Source.open(str(gguf_file))
            except UserError:
                refusals += 1
    assert refusals > 100
