"""Folders of few bits: the same again in a clean process, close to what they were made from, and refused where they cannot go."""

import json
import shutil

import checkpoints
import pipeline
import pytest
import torch
from pipeline import cli

from prunus import quantize
from prunus.errors import UserError
from prunus.ledger import Ledger, Stage
from prunus.source import QUANTIZED, Source

IDS = torch.randint(0, 200, (2, 16), generator=torch.Generator().manual_seed(3))
ERROR = {"8w8a": 0.1, "int8": 0.1, "int4": 0.6}  # of the largest logit; a step is 2^-8 of a row's largest weight, or 2^-4


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """`folders("int8")`: (source, folder, what was told), made once."""
    made = {}

    def make(scheme, case="llama"):
        if (scheme, case) not in made:
            source = Source.open(str(pipeline.folder(case) if case != "per-layer" else pipeline.saved(case)[0]))
            group = 8 if scheme == "int4" else None
            out = tmp_path_factory.mktemp("quantized") / f"{case}-{scheme}"
            made[scheme, case] = source, out, quantize.quantize(quantize.Plan.of(source, scheme, group), out)
        return made[scheme, case]

    return make


@pytest.mark.parametrize(("scheme", "case"), [(s, "llama") for s in quantize.SCHEMES] + [("8w8a", "per-layer")])
def test_it_is_close_and_loads_again(scheme, case, folders):
    source, out, told = folders(scheme, case)
    assert told["verified"]["clean_process"] and told["matrices"] == 7 * source.anatomy.shape.num_hidden_layers
    model, plain = Source.open(str(out), quantized=True).load("bfloat16"), source.load("bfloat16")
    with torch.no_grad():
        ours, theirs = model(input_ids=IDS).logits.float(), plain(input_ids=IDS).logits.float()
    assert 0 < float((ours - theirs).abs().max() / theirs.abs().max()) < ERROR[scheme]
    assert json.loads((out / QUANTIZED).read_text())["source"]["sha256"] == source.sha256
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert head.dtype == embedding.dtype == torch.bfloat16


def test_weights_by_hand(folders):
    """int8: every weight within half a step, a row's largest being 127 of them; and within what bfloat16 rounds the scale by."""
    source, out, _ = folders("int8")
    few = Source.open(str(out), quantized=True).load("bfloat16").model.layers[0].mlp.up_proj.weight.dequantize().float()
    plain = source.load("bfloat16").model.layers[0].mlp.up_proj.weight.float()
    step = plain.abs().amax(1, keepdim=True) / 127
    assert ((few - plain).abs() <= step * 0.5 + 2**-7 * plain.abs() + 1e-6).all()


def test_it_is_scored_and_measured_and_nothing_else(folders, tmp_path):
    source, out, _ = folders("8w8a")
    words = ("--text", pipeline.text_file(), "--windows", 2, "--seq-len", 16, "--dtype", "bfloat16", "--json")
    code, said, err = cli("eval", out, "--baseline", source.path, *words)
    assert code == 0, err
    one, other = (row["texts"][0]["perplexity"] for row in json.loads(said)["models"])
    assert one != other and one == pytest.approx(other, rel=0.05)
    cell = ("--threads", 1, "--batches", 1, "--contexts", 8, "--new-tokens", 2, "--repeats", 1, "--dtype", "bfloat16")
    code, said, err = cli("measure", out, *cell, "--json")
    assert code == 0, err
    assert json.loads(said)["models"][0]["weight_bytes"] == (out / "model.safetensors").stat().st_size
    for command in (
        ("prune", out, "-m", "magnitude", "-r", 0.5, "-o", tmp_path / "a"),
        ("export", out, "-o", tmp_path / "a.gguf"),
    ):
        code, _, err = cli(*command)
        assert code == 2 and "its weights are quantised (torchao), which eval and measure can run" in err
    assert cli("eval", out, *words[:-3])[::2] == (
        2, f"prunus: {out}: its scales and its other weights are bfloat16; give --dtype bfloat16\n",
    )  # fmt: skip


def test_on_the_command_line(tmp_path):
    words = ("quantize", pipeline.folder("llama_tied"), "--scheme", "int4", "--out", tmp_path / "q")
    code, said, err = cli(*words)
    assert code == 0 and "int4 in groups of 32" in said and "the same in a clean process" in said, err
    assert "stay bfloat16" in said and "a byte each" in said
    code, _, err = cli(*words)
    assert code == 2 and "already exists; give another --out, or --overwrite" in err
    assert cli(*words, "--overwrite")[0] == 0
    (tmp_path / "theirs").mkdir()
    code, _, err = cli(*words[:-1], tmp_path / "theirs", "--overwrite")
    assert code == 2 and "is not a folder that prunus quantize wrote" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q", "theirs"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("int9",), "unknown scheme 'int9'"),
        (("int8", 32), "int8 has a scale a row and no groups"),
        (("int4", 1), "1 weights are no group"),
        (("int4", 1000), r"no row is a multiple of 1000 \(they have .*\); give --group-size \d+"),
        (("int8", None, "int8"), "unknown dtype 'int8'"),
    ],
)
def test_wrong_plans(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        quantize.Plan.of(Source.open(str(pipeline.folder("llama"))), *arguments)


def test_weights_that_are_no_numbers(tmp_path):
    """Also of a token that the comparison never asks, and in the type that all else will have."""
    model = pipeline.model("llama", dtype=torch.float32)
    model.model.embed_tokens.weight.data[7, 0] = 1e5
    large = checkpoints.save_folder(tmp_path / "large", model, pipeline.tokenizer())
    with pytest.raises(UserError, match=r"large: 'model\.embed_tokens\.weight' holds NaN or infinite weights"):
        quantize.quantize(quantize.Plan.of(Source.open(str(large)), "int8", None, "float16"), tmp_path / "few")
    assert [path.name for path in tmp_path.iterdir()] == ["large"]


def test_a_run_s_model_keeps_the_run_s_ledger(tmp_path, monkeypatch):
    """Which lies beside the model, not in it."""
    pipeline.verify_here(monkeypatch)
    shutil.copytree(pipeline.folder("llama"), tmp_path / "run" / "model")
    stage = Stage(name="train", params=7)
    stage.consume_text("0" * 64, 10)
    Ledger(stages=[stage]).write(tmp_path / "run" / "ledger.json")
    monkeypatch.chdir(tmp_path / "run" / "model")
    quantize.quantize(quantize.Plan.of(Source.open("."), "int8"), tmp_path / "few")
    assert Ledger.read(tmp_path / "few") == Ledger.read(tmp_path / "run")


def test_turned_streams_are_refused(tmp_path, monkeypatch):
    pipeline.verify_here(monkeypatch)
    words = ("-m", "slicegpt", "--option", "rotation=per-block", "-r", 0.2, "--windows", 4, "--seq-len", 16)
    out = tmp_path / "out"
    assert cli("prune", pipeline.folder("llama"), *words, "-c", pipeline.text_file(), "-o", out)[0] == 0
    with pytest.raises(UserError, match="its layers hand on a turned stream"):
        quantize.Plan.of(Source.open(str(out)), "int8")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["mistral", "qwen3", "smollm3", "gemma3", "olmo2", "phi", "phi3", "seed_oss", "gpt_neox"])
def test_every_family(case, tmp_path):
    told = quantize.quantize(quantize.Plan.of(Source.open(str(pipeline.folder(case))), "8w8a"), tmp_path / "out")
    assert told["verified"]["generated_equal"]


def test_without_torchao(monkeypatch):
    monkeypatch.setattr(quantize, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'prunus\[quantize\]'"):
        quantize.Plan.of(Source.open(str(pipeline.folder("llama"))), "int8")


def test_the_same_twice_byte_for_byte(folders, tmp_path):
    """Each tensor has a line of metadata, and the library that writes them keeps no order."""
    source, first, _ = folders("int8")
    quantize.quantize(quantize.Plan.of(source, "int8", None), tmp_path / "again")
    names = [path.name for path in sorted(first.glob("*.safetensors"))]
    assert names and all((first / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)
