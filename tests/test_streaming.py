"""Streaming: the same checkpoint, byte for byte, from weights that stay in files; and nothing else in memory."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import checkpoints
import pipeline
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from prunus import METHODS, api, checkpoint, streaming, tensorfiles, verification
from prunus.errors import UserError, VerificationError
from prunus.headers import safetensors_entries
from prunus.keep import WeightMask
from prunus.methods import ONE_SHOT
from prunus.source import Source

TEXT = api.TextOptions(windows=6, seq_len=pipeline.SEQ_LEN)
REQUESTS = {
    "flap": {"method": "flap", "ratio": 0.3},
    "flap-uniform": {"method": "flap", "ratio": 0.3, "uniform": True},
    "flap-refit": {"method": "flap", "ratio": 0.3, "compensate": "least-squares"},
    "wanda": {"method": "wanda", "ratio": 0.5},
    "wanda-owl": {"method": "wanda", "ratio": 0.5, "options": {"allocation": "owl"}},
    "sparsegpt": {"method": "sparsegpt", "pattern": "2:4"},
    "magnitude": {"method": "magnitude", "ratio": 0.5},
    "wanda-sp": {"method": "wanda-sp", "ratio": 0.3},
    "ziplm": {"method": "ziplm", "ratio": 0.3},
    "osscar": {"method": "osscar", "ratio": 0.3},
    "wanda-sp-refit": {"method": "wanda-sp", "ratio": 0.3, "compensate": "least-squares"},
    "magnitude-sp": {"method": "magnitude-sp", "ratio": 0.3},
    "minitron-width": {"method": "minitron-width", "ratio": 0.3, "compensate": "gain"},
    "shortgpt": {"method": "shortgpt", "ratio": 0.34},
    "combination": {"method": "shortgpt+flap+sparsegpt", "ratio": 0.5, "split": (0.6, 0.4), "sparsity": 0.5},
    "combination-refit": {
        "method": "minitron-width+wanda-sp+wanda",
        "ratio": 0.4,
        "sparsity": 0.5,
        "compensate": "wanda-sp=least-squares",
    },
}


def _reads_text(method):
    return any(METHODS[name].needs_text for name in method.split("+"))


def prune(source, request, **more):
    text = {"calibration": str(pipeline.text_file()), "text": TEXT} if _reads_text(request["method"]) else {}
    return api.prune(str(source), **request, **text, **more)


def files_of(folder: Path) -> dict[str, bytes]:
    """Everything but the manifest. Of statistics the tensors: the library writes their metadata in any order."""
    found = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != checkpoint.MANIFEST)
    out = {p.relative_to(folder).as_posix(): p.read_bytes() for p in found}
    if "prunus/statistics.safetensors" in out:
        tensors = load_file(folder / "prunus" / "statistics.safetensors")
        out["prunus/statistics.safetensors"] = b"".join(n.encode() + t.numpy().tobytes() for n, t in sorted(tensors.items()))
    return out


def assert_same(source, request, monkeypatch, tmp_path, **more):
    """The streamed checkpoint is the one from memory: weights, decision, mask, config, statistics, all of it."""
    pipeline.verify_here(monkeypatch)
    for stream in (False, True):
        prune(source, request, stream=stream, **more).save(tmp_path / str(stream))
    plain, streamed = (files_of(tmp_path / str(stream)) for stream in (False, True))
    assert sorted(plain) == sorted(streamed)
    assert [name for name in plain if plain[name] != streamed[name]] == []
    return [checkpoint.read_manifest(tmp_path / str(stream)) for stream in (False, True)]


# -- the same ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("request_name", REQUESTS)
@pytest.mark.parametrize("case", ["llama", "llama_tied"])
def test_a_streamed_checkpoint_is_the_one_from_memory(case, request_name, monkeypatch, tmp_path):
    plain, streamed = assert_same(pipeline.folder(case), REQUESTS[request_name], monkeypatch, tmp_path)
    assert plain.weights_sha256 == streamed.weights_sha256 and plain.ratios == streamed.ratios
    assert plain.fingerprint["logsumexp"] == streamed.fingerprint["logsumexp"]
    new = verification.NEW_TOKENS_STREAMED
    assert streamed.fingerprint["generated"] == plain.fingerprint["generated"][:new]


@pytest.mark.parametrize("case", tiny.CASES)
def test_every_family_streams(case, monkeypatch, tmp_path):
    """Own names in files, tied heads, scaled embeddings, sliding windows, one norm for two sub-layers, ..."""
    made = pipeline.model(case, dtype=torch.float32, vocab_size=320)  # Qwen's tokenizer adds a token of its own
    folder = checkpoints.save_folder(tmp_path / case, made, pipeline.tokenizer())
    assert_same(folder, {"method": "flap", "ratio": 0.2}, monkeypatch, tmp_path, dtype="bfloat16")


def test_sharded_files_and_another_dtype(monkeypatch, tmp_path):
    folder = tmp_path / "sharded"
    checkpoints.save_folder(folder, pipeline.model("llama", dtype=torch.bfloat16), pipeline.tokenizer())
    pipeline.model("llama", dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="20kB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert len(list(folder.glob("*.safetensors"))) > 3
    assert_same(folder, REQUESTS["wanda-sp"], monkeypatch, tmp_path)


def test_without_a_generation_config_and_without_a_prefix(monkeypatch, tmp_path):
    """A base model's files lack the `model.` in front of their names."""
    folder = tmp_path / "bare"
    checkpoints.save_folder(folder, pipeline.model("llama_tied", dtype=torch.float32), pipeline.tokenizer())
    (folder / "generation_config.json").unlink()
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, folder / "model.safetensors", {"format": "pt"})
    assert_same(folder, REQUESTS["magnitude"], monkeypatch, tmp_path)


def test_a_cut_of_a_cut(monkeypatch, tmp_path):
    """A per-layer checkpoint of ours is a source too."""
    assert_same(pipeline.saved("per-layer")[0], REQUESTS["flap"], monkeypatch, tmp_path)


def test_saved_statistics_serve_both(tmp_path):
    file = tmp_path / "statistics.safetensors"
    first = prune(pipeline.folder(), REQUESTS["flap"], stream=True, statistics=file)
    assert file.exists()
    again = prune(pipeline.folder(), REQUESTS["flap"], statistics=file)
    assert "score" not in again.outcome.seconds and again.outcome.keep == first.outcome.keep


def test_the_command_line_streams_and_a_clean_process_verifies(tmp_path):
    """The proof reads the files by transformers and accelerate alone, module by module."""
    out = tmp_path / "out"
    words = ["-m", "flap", "-r", "0.3", "--seq-len", 16, "--windows", 6, "-c", pipeline.text_file()]
    code, said, err = pipeline.cli("prune", pipeline.folder(), *words, "-o", out, "--stream", "--json")
    assert code == 0, err
    verified = json.loads(said)["verified"]
    assert verified["streamed"] is True and verified["clean_process"] is True
    assert verified["generated_tokens"] == verification.NEW_TOKENS_STREAMED
    assert files_of(out) == files_of(pipeline.saved("per-layer")[0])
    assert pipeline.cli("verify", out)[0] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


# -- memory --------------------------------------------------------------------------------------------------------------


def real_bytes(of) -> int:
    return sum(p.nbytes for p in of.parameters() if p.device.type != "meta")


@pytest.fixture
def opened(tmp_path):
    return streaming.Files(Source.open(str(pipeline.folder())), "float32", tmp_path)


def test_only_the_block_whose_turn_it_is_holds_weights(opened):
    """Watched from inside a forward of the whole model: at most the largest part is there."""
    model, seen = opened.model, []
    for module in model.modules():
        module.register_forward_hook(lambda *_: seen.append(real_bytes(model)))
    ids = tiny.tokens(2, 8, vocab=pipeline.VOCAB)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    dense = Source.open(str(pipeline.folder())).load()
    assert torch.equal(logits, tiny.logits_of(dense, ids))
    largest = max(real_bytes(dense.model.layers[0]), real_bytes(dense.model.embed_tokens))
    assert 0 < max(seen) <= largest < real_bytes(dense) / 2
    opened.weights.release()
    assert real_bytes(model) == 0


def test_what_changed_is_there_when_the_turn_comes_back(opened):
    name, other = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    before = opened.weights[other].clone()
    opened.weights[name].mul_(2)
    doubled = opened.weights[name].clone()
    assert torch.equal(opened.weights[other], before)  # another turn
    assert torch.equal(opened.weights[name], doubled)
    opened.weights[name] = doubled * 2
    opened.weights.release()
    assert torch.equal(opened.weights[name], doubled * 2)
    assert list(opened.weights.files.maps[0]) == [name]  # what was not changed is not put aside


def test_the_source_is_left_alone(tmp_path):
    before = files_of(pipeline.folder())
    prune(pipeline.folder(), REQUESTS["sparsegpt"], stream=True)
    assert files_of(pipeline.folder()) == before


# -- files ---------------------------------------------------------------------------------------------------------------


def test_written_files_are_those_of_the_safetensors_library(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "b.10": torch.randn(3, 5, generator=generator).bfloat16(),
        "b.2": torch.randn(7, generator=generator).bfloat16(),
        "a": torch.randn(2, 2, generator=generator),
        "z": torch.randint(0, 255, (5,), generator=generator, dtype=torch.uint8),
        "h": torch.randn(4, 1, generator=generator).half(),
    }
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    specs = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    tensorfiles.write(tmp_path / "ours", specs, reversed(tensors.items()))
    loaded = load_file(tmp_path / "ours")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    for name, entry in safetensors_entries(tmp_path / "theirs").items():
        assert torch.equal(tensorfiles.read(entry), tensors[name])
        assert torch.equal(tensorfiles.read(entry, torch.float64), tensors[name].double())
    one_type = {name: t for name, t in tensors.items() if t.dtype == torch.bfloat16}
    save_file(one_type, tmp_path / "theirs", {"format": "pt"})
    tensorfiles.write(tmp_path / "ours", {name: specs[name] for name in one_type}, one_type.items())
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_pieces_do_not_matter(monkeypatch, tmp_path):
    weight = torch.randn(13, 7, generator=torch.Generator().manual_seed(0))
    save_file({"w": weight}, tmp_path / "file")
    monkeypatch.setattr(tensorfiles, "_CHUNK", 10)
    entry = safetensors_entries(tmp_path / "file")["w"]
    assert torch.equal(tensorfiles.read(entry, torch.bfloat16), weight.bfloat16())
    tensorfiles.check_finite(weight, "w")
    weight[12, 6] = torch.nan
    with pytest.raises(UserError, match="NaN"):
        tensorfiles.check_finite(weight, "w")


def test_scratch_keeps_tensors_of_any_type_and_leaves_no_name(tmp_path):
    scratch = tensorfiles.Scratch(tmp_path)
    mask, weight = torch.tensor([[True, False, True]]), torch.randn(3, 2).bfloat16()
    scratch["mask"], scratch["weight"] = mask, weight
    scratch["mask"] = ~mask
    scratch["weight"] = weight.T
    assert torch.equal(scratch["mask"], ~mask) and torch.equal(scratch["weight"], weight.T)
    assert list(scratch) == ["mask", "weight"] and WeightMask(scratch) is not None
    assert not list(tmp_path.iterdir())
    del scratch["mask"]
    assert "mask" not in scratch and len(scratch) == 1


def test_a_scratch_file_that_cannot_be_written_says_so(tmp_path):
    with pytest.raises(UserError, match="cannot be put aside"):
        tensorfiles.Scratch(tmp_path / "gone")["w"] = torch.ones(1)


# -- wrong inputs, and ends that are not happy ---------------------------------------------------------------------------


def refusal(code_said_err):
    code, _, err = code_said_err
    assert code == 2 and "Traceback" not in err
    return err


@pytest.mark.parametrize("method", [name for name, row in ONE_SHOT.items() if not row.streams])
def test_methods_that_need_the_whole_model_refuse(method, tmp_path):
    protect = ["--option", "protect=0,0"] if "protect" in METHODS[method].options else []
    words = ["-m", method, "-r", "0.34", *protect, "-c", pipeline.text_file(), "-o", tmp_path / "out", "--stream"]
    err = refusal(pipeline.cli("prune", pipeline.folder(), *words))
    assert "stream" in err and method in err and "flap" in err


def test_gguf_refuses(tmp_path):
    made = checkpoints.small_llama(vocab_size=pipeline.VOCAB)
    gguf = checkpoints.save_gguf(tmp_path / "m.gguf", made, pipeline.tokenizer())
    err = refusal(pipeline.cli("prune", gguf, "-m", "magnitude", "-r", "0.5", "-o", tmp_path / "out", "--stream"))
    assert "GGUF" in err and "safetensors" in err


def test_a_scratch_folder_must_be_one(tmp_path):
    with pytest.raises(UserError, match="scratch"):
        prune(pipeline.folder(), REQUESTS["magnitude"], stream=True, scratch=tmp_path / "nowhere")
    with pytest.raises(UserError, match="scratch"):
        prune(pipeline.folder(), REQUESTS["magnitude"], scratch=tmp_path)


def spoiled(folder, name, change):
    checkpoints.save_folder(folder, pipeline.model("llama_tied", dtype=torch.float32), pipeline.tokenizer())
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def broken(tensors):
    weight = tensors["model.layers.2.mlp.down_proj.weight"].clone()
    weight[0, 0] = torch.inf
    return weight


@pytest.mark.parametrize("request_name", ["flap", "wanda", "magnitude", "shortgpt"])
def test_infinite_weights_are_found_on_the_way(request_name, tmp_path):
    folder = spoiled(tmp_path / "in", "model.layers.2.mlp.down_proj.weight", broken)
    with pytest.raises(UserError, match=r"layers\.2\.mlp\.down_proj\.weight' holds NaN or infinite"):
        prune(folder, REQUESTS[request_name], stream=True)


def test_a_tied_head_that_differs_is_refused(tmp_path):
    folder = spoiled(tmp_path / "in", "lm_head.weight", lambda tensors: tensors["model.embed_tokens.weight"] + 1)
    with pytest.raises(UserError, match="ties the head"):
        prune(folder, REQUESTS["magnitude"], stream=True)


def test_a_tied_head_that_agrees_streams(monkeypatch, tmp_path):
    folder = spoiled(tmp_path / "in", "lm_head.weight", lambda tensors: tensors["model.embed_tokens.weight"].clone())
    assert_same(folder, REQUESTS["magnitude"], monkeypatch, tmp_path)


def test_a_type_that_cannot_be_read_is_named(tmp_path):
    folder = spoiled(
        tmp_path / "in",
        "model.layers.0.mlp.up_proj.weight",
        lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"].to(torch.float8_e4m3fn),
    )
    with pytest.raises(UserError, match="F8_E4M3"):
        prune(folder, REQUESTS["magnitude"], stream=True)


def test_a_file_that_shrinks_is_noticed(tmp_path):
    save_file({"w": torch.ones(64)}, tmp_path / "file")
    entry = safetensors_entries(tmp_path / "file")["w"]
    (tmp_path / "file").write_bytes((tmp_path / "file").read_bytes()[:-8])
    with pytest.raises(UserError, match="ends inside a tensor"):
        tensorfiles.read(entry)


@pytest.mark.parametrize("request_name", ["wanda", "flap"])
def test_a_stop_on_the_way_leaves_nothing(request_name, monkeypatch, tmp_path):
    def stop(stage, done, total):
        if stage == "score" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(pipeline.folder(), REQUESTS[request_name], stream=True, scratch=tmp_path, progress=stop)
    assert not list(tmp_path.iterdir())


def test_a_stop_while_writing_leaves_nothing(monkeypatch, tmp_path):
    result = prune(pipeline.folder(), REQUESTS["flap"], stream=True, scratch=tmp_path)
    apply, calls = streaming.Sliced.__getitem__, []

    def stop(self, name):
        calls.append(name)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return apply(self, name)

    monkeypatch.setattr(streaming.Sliced, "__getitem__", stop)
    with pytest.raises(KeyboardInterrupt):
        result.save(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_computes_something_else_is_not_left_behind(monkeypatch, tmp_path):
    """The expected logits come from the source cut again, not from the file that is under test."""
    result = prune(pipeline.folder(), REQUESTS["flap"], stream=True)
    write = tensorfiles.write

    def wrong(path, specs, tensors):
        changed = "model.layers.1.mlp.down_proj.weight"
        write(path, specs, ((name, tensor * 1.5 if name == changed else tensor) for name, tensor in tensors))

    monkeypatch.setattr(tensorfiles, "write", wrong)
    with pytest.raises(VerificationError, match="logits"):
        result.save(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_streamed_model_can_be_collected():
    """Hooks hold the weights and the weights the hooks: a circle that the collector must be able to take."""
    store = streaming.Files(Source.open(str(pipeline.folder())), "float32", pipeline.scratch())
    gone = weakref.ref(store.model)
    del store
    gc.collect()
    assert gone() is None
