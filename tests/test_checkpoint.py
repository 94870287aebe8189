"""Checkpoints: complete, proved, readable by others, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import checkpoints
import pipeline
import pytest
import tiny
import torch
from pipeline import result
from safetensors.torch import load_file, save_file

from prunus import api, checkpoint
from prunus.anatomy import Anatomy
from prunus.errors import UserError, VerificationError
from prunus.headers import sha256
from prunus.keep import Keep, WeightMask
from prunus.ledger import Ledger
from prunus.place import staged_files
from prunus.source import Source

KINDS = sorted(pipeline.SAVED)
IDS = tiny.tokens(2, 12, vocab=pipeline.VOCAB)


@pytest.fixture
def copied(tmp_path):
    """`copied("sparse")`: a saved checkpoint to spoil."""
    return lambda kind: Path(shutil.copytree(pipeline.saved(kind)[0], tmp_path / kind))


def amend(folder, **changes):
    """Change entries of prunus.json; what is null stays null (the commit, outside a checkout)."""
    path = folder / "prunus.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def listing(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


# -- what is written ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_complete(kind):
    folder, _, _ = pipeline.saved(kind)
    expected = {
        "config.json",
        "generation_config.json",
        "keep.json",
        "ledger.json",
        "model.safetensors",
        "prunus.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    expected |= (
        {"prunus/mask.safetensors"} if kind == "sparse" else {"prunus/statistics.safetensors", "prunus/scores.safetensors"}
    )
    expected |= {"modeling_pruned.py"} if kind == "per-layer" else set()
    assert set(listing(folder)) == expected
    assert list(folder.glob("*.safetensors")) == [folder / "model.safetensors"]  # engines glob for these
    assert not [p for p in folder.parent.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("kind", KINDS)
def test_the_ledger_says_what_the_cut_read_and_spent(kind):
    folder, _, _ = pipeline.saved(kind)
    manifest, ledger = checkpoint.read_manifest(folder), Ledger.read(folder)
    (stage,) = ledger.stages
    assert (stage.name, stage.params) == (manifest.method["name"], manifest.after["params"])
    assert stage.other_text == {manifest.calibration["sha256"]: 96} and stage.tokens == 96
    assert set(stage.flops) == {"scoring"} and stage.flops["scoring"] > 0
    assert ledger.missing == [manifest.source["name"]]


def test_a_cut_of_a_cut_has_both_in_its_ledger(monkeypatch, tmp_path):
    pipeline.verify_here(monkeypatch)
    folder, _, _ = pipeline.saved("uniform")
    code, _, said = pipeline.cli(
        "prune", folder, "-m", "magnitude-sp", "-r", "0.3", "--multiple-of", 1, "-o", tmp_path / "out"
    )
    assert code == 0, said
    ledger = Ledger.read(tmp_path / "out")
    assert ledger.parent == Ledger.read(folder)
    assert [stage.name for stage in ledger.all_stages()] == ["minitron-width", "magnitude-sp"]
    assert (ledger.tokens, ledger.flops) == (0, 0) and ledger.total_flops == ledger.parent.flops  # it reads no text


def test_a_broken_ledger_is_told_before_any_weight_is_read(monkeypatch, tmp_path):
    folder, _, _ = pipeline.saved("uniform")
    shutil.copytree(folder, tmp_path / "source")
    (tmp_path / "source" / "ledger.json").write_text("[]")
    monkeypatch.setattr(Source, "load", lambda *a, **k: pytest.fail("no weight may be read"))
    code, _, said = pipeline.cli("prune", tmp_path / "source", "-m", "magnitude-sp", "-r", "0.3", "-o", tmp_path / "out")
    assert code == 2 and "ledger.json: is no ledger" in said and len(said.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_as_readable_as_their_folder(kind):
    folder, _, _ = pipeline.saved(kind)
    mask = os.umask(0)
    os.umask(mask)
    for name in listing(folder):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o666 & ~mask, name


def test_so_are_those_that_other_commands_stage(tmp_path):
    """As quantize, trim, tune and training runs do."""
    with checkpoint.staged(tmp_path / "out", overwrite=False) as stage:
        pipeline.model("llama").save_pretrained(stage)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "out").iterdir()}
    with staged_files(tmp_path / "found.safetensors") as (file,):
        save_file({"scores": torch.ones(2)}, file)
    modes.add(stat.S_IMODE((tmp_path / "found.safetensors").stat().st_mode))
    assert len(modes) == 1, modes


@pytest.mark.parametrize("kind", KINDS)
def test_the_manifest_says_what_was_done(kind):
    folder, said, _ = pipeline.saved(kind)
    manifest = checkpoint.read_manifest(folder)
    case, *options = pipeline.SAVED[kind]
    dense = pipeline.model(str(case), dtype=torch.float32)
    total = sum(p.numel() for p in dense.parameters())
    assert manifest.source == {
        "name": f"dense-{case}-64",
        "kind": "folder",
        "sha256": sha256([pipeline.folder(str(case)) / "model.safetensors"]),
    }
    assert manifest.method["name"] == options[1] and manifest.method["request"]["method"] == options[1]
    assert manifest.before["params"] == total
    weights = load_file(folder / "model.safetensors")
    assert manifest.after["params"] == sum(t.numel() for t in weights.values()) == manifest.verified["params_on_disk"]
    assert manifest.ratios["removed_of_all"] == pytest.approx(1 - manifest.after["params"] / total)
    assert manifest.weights_sha256 == sha256([folder / "model.safetensors"])
    assert manifest.calibration["source"] == "corpus.jsonl" and manifest.calibration["windows"] == 6
    assert manifest.verified["clean_process"] is True and manifest.verified["generated_equal"] is True
    assert manifest.verified["max_logit_difference"] <= 1e-4 * max(1.0, manifest.verified["max_logit"])
    assert said["ratios"] == manifest.ratios and said["out"] == str(folder)
    stored = json.loads((folder / "config.json").read_text())
    assert stored["model_type"] == manifest.after["model_type"]
    assert stored["model_type"] == {"per-layer": "pruned_llama", "uniform": "llama", "sparse": "gemma2"}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_no_path_of_this_machine_is_written(kind):
    folder, _, _ = pipeline.saved(kind)
    for name in listing(folder):
        assert str(pipeline.scratch()).encode() not in (folder / name).read_bytes(), name


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizer_and_generation_settings_travel(kind):
    folder, _, _ = pipeline.saved(kind)
    text = "the cat sings 123 Δη 猫"
    ids = pipeline.tokenizer()(text)["input_ids"]
    assert Source.open(str(folder)).tokenizer()(text)["input_ids"] == ids
    data = json.loads((folder / "tokenizer_config.json").read_text())
    assert data["tokenizer_class"] == "PreTrainedTokenizerFast" and not {"is_local", "local_files_only"} & set(data)
    assert json.loads((folder / "generation_config.json").read_text())["max_length"] == 77


def test_the_decision_travels():
    folder, _, _ = pipeline.saved("per-layer")
    keep = checkpoint.read_keep(folder)
    after = keep.validated(Anatomy.of(pipeline.config("llama"))).anatomy_after(Anatomy.of(pipeline.config("llama")))
    assert after.shape == Source.open(str(folder)).anatomy.shape
    assert checkpoint.read_keep(pipeline.saved("sparse")[0]) is None


def test_the_mask_travels():
    folder, _, _ = pipeline.saved("sparse")
    anatomy = Source.open(str(folder)).anatomy
    mask = WeightMask.from_packed(load_file(folder / "prunus" / "mask.safetensors"), anatomy)
    weights = load_file(folder / "model.safetensors")
    for name, kept in mask.kept.items():
        assert torch.equal(kept, weights[name] != 0)
        assert (kept.reshape(kept.shape[0], -1, 4).sum(-1) == 2).all()


def test_the_losses_of_depth_travel(tmp_path, monkeypatch):
    pipeline.verify_here(monkeypatch)
    text = api.TextOptions(3, 16)
    cut = result(method="minitron-depth", ratio=0.34, calibration=str(pipeline.text_file()), text=text)
    cut.save(tmp_path / "out")
    losses = json.loads((tmp_path / "out" / "prunus" / "losses.json").read_text())
    assert losses == {"loss_without_run_at": cut.outcome.losses} and len(losses["loss_without_run_at"]) == 3


def test_saved_statistics_spare_the_next_pass(monkeypatch):
    from prunus.statistics import Sweep

    folder, _, _ = pipeline.saved("per-layer")
    ask = {"method": "flap", "calibration": str(pipeline.text_file()), "text": api.TextOptions(6, 16)}
    direct = result(**ask, ratio=0.5)
    monkeypatch.setattr(Sweep, "__init__", None)  # a pass would fail
    again = result(**ask, ratio=0.5, statistics=folder / "prunus" / "statistics.safetensors")
    assert again.outcome.keep == direct.outcome.keep


def test_sixteen_bit_checkpoints(tmp_path, monkeypatch):
    pipeline.verify_here(monkeypatch)
    manifest = result(dtype="bfloat16").save(tmp_path / "out")
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert manifest.fingerprint["dtype"] == "bfloat16" and manifest.after["weight_bytes"] == 2 * manifest.after["params"]


# -- who can read it ----------------------------------------------------------------------------------------------------

STOCK = """
import json, sys
sys.modules["prunus"] = None  # an import of prunus would fail
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
ids = torch.tensor(json.loads(sys.argv[1]))
out = []
for folder in sys.argv[2:]:
    remote = folder.endswith("per-layer")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=remote).eval()
    AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        out.append([type(model).__name__, model(input_ids=ids, use_cache=False).logits.tolist()])
print(json.dumps(out))
"""


def test_stock_transformers_loads_what_was_written(tmp_path):
    """In a process where prunus cannot be imported; a per-layer model by the code that travels with it."""
    folders = [pipeline.saved(kind)[0] for kind in KINDS]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", STOCK, json.dumps(IDS.tolist()), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    classes = {"per-layer": "PrunedLlamaForCausalLM", "sparse": "Gemma2ForCausalLM", "uniform": "LlamaForCausalLM"}
    for kind, folder, (name, logits) in zip(KINDS, folders, json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert name == classes[kind]
        expected = tiny.logits_of(Source.open(str(folder)).load(), IDS)
        torch.testing.assert_close(torch.tensor(logits), expected, rtol=1e-4, atol=1e-4)  # float32, maybe other threads


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_checkpoint_can_be_cut_again(kind, tmp_path, monkeypatch):
    pipeline.verify_here(monkeypatch)
    source = pipeline.saved(kind)[0]
    cut = result(source, method="flap", ratio=0.2, calibration=str(pipeline.text_file()), text=api.TextOptions(4, 16))
    first, second = checkpoint.read_manifest(source), cut.save(tmp_path / "twice")
    assert second.before["params"] == first.after["params"] > second.after["params"]
    assert second.source["sha256"] == first.weights_sha256
    again = Source.open(str(tmp_path / "twice"))
    torch.testing.assert_close(tiny.logits_of(again.load(), IDS), tiny.logits_of(cut.model, IDS), rtol=1e-4, atol=1e-4)


# -- looking back -------------------------------------------------------------------------------------------------------


def test_verify_in_a_clean_process(cold):
    folder, _, _ = pipeline.saved("per-layer")
    found = checkpoint.verify(folder)
    assert found["class"] == "PrunedLlamaForCausalLM" and found["generated_equal"] is True
    assert found["params_on_disk"] == checkpoint.read_manifest(folder).after["params"]


@pytest.mark.parametrize("kind", KINDS)
def test_verify_finds_nothing_wrong(kind, monkeypatch):
    pipeline.verify_here(monkeypatch)
    found = checkpoint.verify(pipeline.saved(kind)[0])
    assert found["max_logit_difference"] <= 1e-3
    assert ("sparsity" in found) == (kind == "sparse")


def respoil(folder, change):
    """Change the weights and let the manifest's hash follow."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    amend(folder, weights_sha256=sha256([folder / "model.safetensors"]))


def test_verify_finds_changed_weights(copied, monkeypatch):
    pipeline.verify_here(monkeypatch)
    folder = copied("uniform")
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(VerificationError, match=r"uniform: the weight files changed since prunus wrote them"):
        checkpoint.verify(folder)


def test_verify_finds_changed_counts(copied, monkeypatch):
    pipeline.verify_here(monkeypatch)
    folder = copied("uniform")
    after = checkpoint.read_manifest(folder).after
    amend(folder, after=after | {"params": after["params"] + 1})
    message = rf"{after['params']:,} parameters, but prunus.json says {after['params'] + 1:,}"
    with pytest.raises(VerificationError, match=message):
        checkpoint.verify(folder)


def test_verify_finds_other_logits(copied, monkeypatch):
    """The weights are the same; the config no longer is."""
    pipeline.verify_here(monkeypatch)
    folder = copied("uniform")
    checkpoints.edit_json(folder / "config.json", rms_norm_eps=0.3)
    with pytest.raises(VerificationError, match=r"logits differ by .* from those recorded when it was saved"):
        checkpoint.verify(folder)


def test_verify_finds_weights_that_compute_something_else(copied, monkeypatch):
    pipeline.verify_here(monkeypatch)
    folder = copied("per-layer")
    respoil(folder, lambda w: w["model.layers.0.mlp.down_proj.bias"].add_(1.0))
    with pytest.raises(VerificationError, match="logits differ by"):
        checkpoint.verify(folder)


def test_verify_finds_a_broken_mask(copied, monkeypatch):
    pipeline.verify_here(monkeypatch)
    folder = copied("sparse")

    def fill(weights):
        weight = weights["model.layers.1.mlp.up_proj.weight"]
        row, column = (weight == 0).nonzero()[0].tolist()
        weight[row, column] = 1e-30  # too little for any logit

    respoil(folder, fill)
    with pytest.raises(
        VerificationError, match=r"'model.layers.1.mlp.up_proj.weight' has weights outside its mask that are"
    ):
        checkpoint.verify(folder)


def test_verify_finds_another_sparsity(copied, monkeypatch):
    pipeline.verify_here(monkeypatch)
    folder = copied("sparse")
    ratios = checkpoint.read_manifest(folder).ratios
    amend(folder, ratios=ratios | {"sparsity": 0.6})
    with pytest.raises(VerificationError, match=r"the mask has sparsity 0.5, but prunus.json says 0.6"):
        checkpoint.verify(folder)


def test_verify_of_a_sparse_folder_without_its_mask(copied, monkeypatch):
    pipeline.verify_here(monkeypatch)
    folder = copied("sparse")
    (folder / "prunus" / "mask.safetensors").unlink()
    with pytest.raises((VerificationError, UserError), match=r"mask"):
        checkpoint.verify(folder)


def test_verify_finds_a_tensor_too_many(copied, monkeypatch):
    pipeline.verify_here(monkeypatch)
    folder = copied("uniform")
    respoil(folder, lambda w: w.update(extra=torch.ones(2)))
    with pytest.raises((VerificationError, UserError), match="extra"):
        checkpoint.verify(folder)


def test_a_folder_that_prunus_did_not_write():
    with pytest.raises(UserError, match=r"no prunus.json here; this is not a checkpoint that prunus wrote"):
        checkpoint.verify(pipeline.folder())


def test_manifests_are_strict(copied):
    folder = copied("uniform")
    path = folder / "prunus.json"
    good = path.read_text()
    for spoil, message in (
        (lambda d: d | {"surprise": 1}, r"prunus.json: surprise: Extra inputs are not permitted"),
        (lambda d: {k: v for k, v in d.items() if k != "method"}, r"prunus.json: method: Field required"),
        (lambda d: d | {"format": "one"}, r"prunus.json: format: "),
        (lambda d: [d], r"prunus.json: "),
    ):
        path.write_text(json.dumps(spoil(json.loads(good))))
        with pytest.raises(UserError, match=message) as caught:
            checkpoint.read_manifest(folder)
        assert "\n" not in str(caught.value)
    for data, message in ((b"{", "prunus.json: "), (b"\xff\xfe", "prunus.json: "), (b"", "prunus.json: ")):
        path.write_bytes(data)
        with pytest.raises(UserError, match=message):
            checkpoint.read_manifest(folder)


@pytest.mark.parametrize(
    ("entry", "value"),
    [("fingerprint", {}), ("fingerprint", {"ids": "x", "dtype": "float32"}), ("after", {}), ("ratios", {"sparsity": 0.5})],
)
def test_manifests_with_holes_are_refused_in_a_sentence(copied, monkeypatch, entry, value):
    """A user's edit is a wrong input, not an internal error."""
    pipeline.verify_here(monkeypatch)
    folder = copied("uniform")
    amend(folder, **{entry: value})
    with pytest.raises((UserError, VerificationError), match="uniform"):
        checkpoint.verify(folder)


@pytest.mark.parametrize("data", ["", "[]", '{"format": 1}', '{"format": 9, "keep": {}}', '{"format": 1, "keep": {"a": 3}}'])
def test_decisions_that_do_not_parse(copied, data):
    folder = copied("uniform")
    (folder / "keep.json").write_text(data)
    with pytest.raises(UserError, match=r"keep\.json"):
        checkpoint.read_keep(folder)


def test_statistics_files_that_are_none(tmp_path):
    ask = {"method": "flap", "ratio": 0.3, "calibration": str(pipeline.text_file()), "text": api.TextOptions(4, 16)}
    (tmp_path / "bad").write_bytes(b"not safetensors at all, but long enough")
    with pytest.raises(UserError, match=r"bad: .*(safetensors|statistics)"):
        result(**ask, statistics=tmp_path / "bad")
    with pytest.raises(UserError, match=str(tmp_path)):
        result(**ask, statistics=tmp_path)


def test_a_place_for_statistics_that_cannot_be_is_refused_before_the_work(tmp_path, monkeypatch):
    """Not after a pass of an hour, and in a sentence."""
    ask = {"method": "flap", "ratio": 0.3, "calibration": str(pipeline.text_file()), "text": api.TextOptions(4, 16)}
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"file"):
        result(**ask, statistics=tmp_path / "file" / "statistics.safetensors")


def test_keeps_name_the_layers_of_the_source():
    """`then` composes keep.json of two cuts in a row into one decision about the first source."""
    anatomy = Anatomy.of(pipeline.config("llama"))
    first = checkpoint.read_keep(pipeline.saved("per-layer")[0])
    after = first.anatomy_after(anatomy)
    second = Keep({"layers": (0, 2), "layers.2.intermediate": (0, 1)})
    both = first.then(second, anatomy)
    assert both.anatomy_after(anatomy).shape == second.anatomy_after(after).shape
