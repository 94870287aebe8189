"""The command line: exit codes, one JSON object, one sentence for every wrong input, and nothing left behind."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from pathlib import Path

import checkpoints
import pipeline
import pytest
import tiny
import torch
from pipeline import cli
from safetensors.torch import load_file, save_file
from test_destination import lie

from prunus import api, checkpoint, show
from prunus.data.windows import pack
from prunus.methods import METHODS
from prunus.source import Source

SMALL = ("--windows", 4, "--seq-len", 16)


def strict_json(text):
    """One JSON object and nothing else; NaN and Infinity are no JSON."""

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def one_sentence(err, progress=False):
    """The only line on standard error, lines of progress aside."""
    lines = err.split("\n")
    if progress:
        lines = [line for line in lines if not re.match(r"(load|score|verify|eval .*): \d+/\d+, ", line)]
    assert len(lines) == 2 and lines[0].startswith("prunus: ") and lines[1] == "", err
    return lines[0].removeprefix("prunus: ")


def refused(message, *arguments, code=2):
    """Exit code 2, one matching sentence on stderr and, with --json, the same in one object on stdout."""
    found, out, err = cli(*arguments)
    assert found == code, (out, err)
    assert out == ""
    assert re.search(message, one_sentence(err, progress=True)), err
    found, out, err = cli(*arguments, "--json")
    assert found == code and strict_json(out) == {"error": one_sentence(err), "exit_code": code}


# -- what works ---------------------------------------------------------------------------------------------------------


def test_methods():
    code, out, err = cli("methods", "--json")
    assert (code, err) == (0, "")
    assert set(strict_json(out)["methods"]) == set(METHODS)
    code, out, err = cli("methods")
    assert code == 0 and all(name in out for name in METHODS)


@pytest.mark.parametrize("method", ["flap", "magnitude", "minitron-depth", "minitron-width", "wanda"])
def test_plan(method):
    """A method that reads no text is not asked how long its windows are (the default is longer than this model's 64)."""
    options = SMALL if METHODS[method].needs_text else ()
    code, out, err = cli("plan", pipeline.folder(), "-m", method, "-r", 0.4, *options, "--json")
    assert (code, err) == (0, "")
    report = strict_json(out)
    assert report["method"] == method and report["source"] == pipeline.folder().name
    params = sum(p.numel() for p in pipeline.model("llama").parameters())
    assert report["before"]["params"] == params and report["after"]["params"] <= params
    assert report["estimate"]["memory_bytes"] >= 4 * params
    assert (report["estimate"]["scoring_flops"] > 0) == METHODS[method].needs_text
    code, out, err = cli("plan", pipeline.folder(), "-m", method, "-r", 0.4, *options)
    assert (code, err) == (0, "") and method in out and f"{report['before']['shape']['hidden_size']}" in out


def test_plan_reads_no_weight(tmp_path):
    """A folder whose weights are all NaN can be planned and not pruned."""
    assert cli("plan", damaged(tmp_path), "-m", "wanda", "-r", 0.5, *SMALL)[0] == 0


@pytest.mark.parametrize("kind", sorted(pipeline.SAVED))
def test_prune_says_one_object(kind):
    """The run that wrote the shared checkpoints: quiet on stderr, everything but the fingerprint on stdout."""
    folder, said, err = pipeline.saved(kind)
    assert err == ""
    manifest = checkpoint.read_manifest(folder).model_dump(exclude={"fingerprint"})
    assert said == {"out": str(folder), **manifest}


def test_prune_for_people(tmp_path, monkeypatch):
    pipeline.verify_here(monkeypatch)
    code, out, err = cli("prune", pipeline.folder(), "-m", "flap", "-r", 0.3, "-c", pipeline.text_file(), "-o",
                         tmp_path / "out", *SMALL)  # fmt: skip
    assert code == 0
    assert "verified" in out and "removed of block" in out and "pruned_llama" in out
    assert "score: 3/3" in err and "verify: 1/1" in err and "Traceback" not in err


def test_prune_takes_every_option_to_its_place(tmp_path, monkeypatch):
    seen = {}

    def fake(source, **arguments):
        seen.update(arguments, source=source)
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "prune", fake)
    code, out, err = cli(
        "prune", "model", "-m", "flap", "-o", tmp_path / "out", "-r", 0.25, "-c", "text.txt", "--pattern", "2:4",
        "--target", "hidden_size=8", "--target", "intermediate_size=16", "--uniform", "--multiple-of", 8, "--compensate",
        "none", "--option", "reduction=l2", "--sparsity", 0.5, "--split", "0.25,0.75",
        "--windows", 7, "--seq-len", 9, "--seed", 3, "--documents", ":5", "--field",
        "body", "--batch-size", 2, "--statistics", "s", "--dtype", "bfloat16", "--online", "--stream",
        "--allocate", "search", "--cost", "flops", "--dense",
    )  # fmt: skip
    assert code == 130 and out == "" and err == "prunus: stopped; nothing half-written was left behind\n"
    assert seen.pop("world").alone
    del seen["progress"]
    assert seen == {
        "source": "model",
        "method": "flap",
        "ratio": 0.25,
        "calibration": "text.txt",
        "pattern": "2:4",
        "target": {"hidden_size": 8, "intermediate_size": 16},
        "uniform": True,
        "multiple_of": 8,
        "compensate": "none",
        "options": {"reduction": "l2"},
        "sparsity": 0.5,
        "split": (0.25, 0.75),
        "allocate": "search",
        "cost": "flops",
        "order": "dense",
        "text": api.TextOptions(7, 9, 3, ":5", "body"),
        "statistics": Path("s"),
        "batch_size": 2,
        "dtype": "bfloat16",
        "online": True,
        "stream": True,
        "scratch": tmp_path,
    }
    cli("methods")  # goes offline again
    assert os.environ["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize("kind", sorted(pipeline.SAVED))
def test_inspect(kind):
    folder, said, _ = pipeline.saved(kind)
    code, out, err = cli("inspect", folder, "--json")
    found = strict_json(out)
    assert (code, err) == (0, "") and found["ratios"] == said["ratios"]
    assert bool(found["kept_units"]) == (kind != "sparse")
    code, out, err = cli("inspect", folder)
    assert (code, err) == (0, "") and said["method"]["name"] in out and str(folder) in out


def test_whole_layers_that_stay_are_a_line_and_no_empty_table(capsys):
    _, said, _ = pipeline.saved("uniform")
    show.manifest(said | {"kept_units": {"layers": 2}})
    assert "kept: 2 of layers\nreally: " in capsys.readouterr().out


def test_verify(monkeypatch):
    pipeline.verify_here(monkeypatch)
    folder, said, _ = pipeline.saved("uniform")
    code, out, err = cli("verify", folder, "--json")
    assert (code, err) == (0, "") and strict_json(out)["params_on_disk"] == said["after"]["params"]
    code, out, err = cli("verify", folder)
    assert (code, err) == (0, "") and f"{said['after']['params']:,} parameters as recorded" in out


def naive_score(folder, count, seq_len):
    """Perplexity and bits per byte from log-probabilities in float64."""
    model = Source.open(str(folder)).load()
    windows = pack(pipeline.tokenizer(), str(pipeline.text_file()), windows=count, seq_len=seq_len)
    ids = windows.ids_NT
    log_p = tiny.logits_of(model, ids).double().log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])
    return math.exp(-float(log_p.mean())), -float(log_p.sum()) / math.log(2) / windows.num_bytes


def test_eval(tmp_path):
    cut, dense, log = pipeline.saved("uniform")[0], pipeline.folder("llama_tied"), tmp_path / "runs.jsonl"
    command = ("eval", cut, "--baseline", dense, "-t", pipeline.text_file(), "--windows", 3, "--seq-len", 20)
    code, out, err = cli(*command, "--record", log, "--json")
    assert (code, err) == (0, "")
    rows = strict_json(out)["models"]
    for folder, row in zip((cut, dense), rows, strict=True):
        perplexity, bits = naive_score(folder, 3, 20)
        (text,) = row["texts"]
        assert text["perplexity"] == pytest.approx(perplexity, rel=1e-5)  # softmax in float32
        assert text["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
        assert text["predictions"] == 3 * 19
        assert text["word_perplexity"] == pytest.approx(math.exp(text["loss"] * 3 * 19 / text["words"]))
        assert row["params"] == sum(t.numel() for t in load_file(folder / "model.safetensors").values())
    assert rows[0]["method"]["method"] == "minitron-width" and "method" not in rows[1]
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["figures"]["texts"] for line in lines] == [row["texts"] for row in rows]
    assert str(pipeline.scratch()) not in log.read_text()
    code, out, err = cli(*command)
    assert (
        code == 0
        and f"{rows[0]['texts'][0]['bits_per_byte']:.4f}" in out
        and "on 3 windows of 20 tokens of corpus.jsonl" in out
    )


def test_eval_of_a_wrecked_model_is_still_json(tmp_path):
    """A loss beyond 700 nats has no finite perplexity; JSON has no Infinity."""
    folder = Path(shutil.copytree(pipeline.folder(), tmp_path / "wrecked"))
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] *= 1e4
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    code, out, _ = cli("eval", folder, "-t", pipeline.text_file(), "--windows", 2, "--seq-len", 16, "--json")
    assert code == 0 and strict_json(out)["models"][0]["texts"][0]["loss"] > 700
    assert cli("eval", folder, "-t", pipeline.text_file(), "--windows", 2, "--seq-len", 16)[0] == 0


# -- exit codes ---------------------------------------------------------------------------------------------------------


def test_nothing_asked():
    code, out, _ = cli()
    assert code == 2 and "prune" in out and "eval" in out


def test_help_is_no_error():
    code, out, err = cli("prune", "--help")
    assert (code, err) == (0, "") and "--calibration" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("prume",), r"No such command 'prume'"),
        (("plan", "x"), r"Missing option '--method'"),
        (("plan", "x", "-m", "flap", "--ration", "0.2"), r"No such option: --ration"),
        (("plan", "x", "-m", "flap", "-r", "much"), r"Invalid value for '--ratio'.*number"),
        (("plan", "x", "-m", "flap", "--target", "hidden_size"), r"--target: 'hidden_size' is not NAME=VALUE"),
        (("plan", "x", "-m", "flap", "--target", "hidden_size=big"), r"--target: hidden_size=big is not a whole number"),
        (("plan", "x", "-m", "flap", "--target", "hidden_size=²"), r"--target: hidden_size=² is not a whole number"),
        (("plan", "x", "-m", "flap", "--option", "=l2"), r"--option: '=l2' is not NAME=VALUE"),
        (("inspect", "nowhere"), r"nowhere: no prunus.json here"),
        (("verify", "nowhere"), r"nowhere: no prunus.json here"),
    ],
)
def test_commands_that_are_none(arguments, message):
    refused(message, *arguments)


@pytest.mark.parametrize("as_json", [(), ("--json",)])
def test_stopped_by_the_user(tmp_path, monkeypatch, as_json):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Source, "load", stop)
    code, out, err = cli("prune", pipeline.folder(), "-m", "magnitude", "-r", 0.5, "-o", tmp_path / "out", *as_json)
    assert (code, out) == (130, "") and err.endswith("prunus: stopped; nothing half-written was left behind\n")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_does_not_verify(tmp_path, monkeypatch):
    whole, _, _ = pipeline.saved("uniform")  # before checks are told lies
    pipeline.verify_here(monkeypatch, lie)
    ask = ("prune", pipeline.folder(), "-m", "magnitude", "-r", 0.5, "-o", tmp_path / "out", "--json")
    code, out, err = cli(*ask)
    assert code == 3 and strict_json(out) == {"error": one_sentence(err), "exit_code": 3}
    assert "logits of the reloaded model differ" in err and not list(tmp_path.iterdir())
    folder = Path(shutil.copytree(whole, tmp_path / "spoilt"))
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    refused("the weight files changed since prunus wrote them", "verify", folder, code=3)


def test_out_of_memory_has_a_remedy(tmp_path, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:115] DefaultCPUAllocator: can't allocate memory: you tried to")

    monkeypatch.setattr(Source, "load", full)
    code, out, err = cli("prune", pipeline.folder(), "-m", "magnitude", "-r", 0.5, "-o", tmp_path / "out", "--json")
    assert code == 1 and strict_json(out)["exit_code"] == 1 and "out of memory: lower --windows" in one_sentence(err)


# -- wrong inputs -------------------------------------------------------------------------------------------------------


def damaged(tmp_path, value=float("nan")):
    folder = Path(shutil.copytree(pipeline.folder(), tmp_path / "damaged"))
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][2, 3] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def wrong_config(tmp_path, **changes):
    folder = Path(shutil.copytree(pipeline.folder(), tmp_path / "model"))
    checkpoints.edit_json(folder / "config.json", **changes)
    return folder


def truncated(tmp_path):
    folder = Path(shutil.copytree(pipeline.folder(), tmp_path / "model"))
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    return folder


def corrupted(tmp_path):
    folder = Path(shutil.copytree(pipeline.folder(), tmp_path / "model"))
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[8:40] = b"\xff" * 32
    (folder / "model.safetensors").write_bytes(data)
    return folder


def without(tmp_path, *names):
    folder = Path(shutil.copytree(pipeline.folder(), tmp_path / "model"))
    for name in names:
        (folder / name).unlink()
    return folder


def other_tokenizer(tmp_path):
    folder = Path(shutil.copytree(pipeline.folder(), tmp_path / "model"))
    pipeline.tokenizer(400).save_pretrained(folder)
    return folder


def text(tmp_path, data, name="text.txt"):
    path = tmp_path / name
    path.write_bytes(data)
    return path


GOOD = lambda t: pipeline.folder()  # noqa: E731
WRONG = {  # what -> (model, options, calibration text, message)
    "no such model": (lambda t: t / "nowhere", ("-r", 0.3), None, r"nowhere: no such file or folder, and not in the local"),
    "hub name not cached": (lambda t: "nobody/nothing", ("-r", 0.3), None, r"nobody/nothing: .*--online would download it"),
    "family": (lambda t: wrong_config(t, model_type="lama"), ("-r", 0.3), None, r"unknown model family 'lama' \(did you mean"),
    "config key": (lambda t: wrong_config(t, intermediate_size="x"), ("-r", 0.3), None, r"model.*(intermediate_size|config)"),
    "config lies": (lambda t: wrong_config(t, intermediate_size=20), ("-r", 0.3), None, r"has shape \[24, 32\], but config"),
    "method": (GOOD, ("-r", 0.3, "-m", "flop"), None, r"unknown method 'flop' \(did you mean 'flap'\?\)"),
    "ratio": (GOOD, ("-r", 1.3), None, r"ratio: 1.3 is not between 0 and 1"),
    "no ratio": (GOOD, (), None, r"ratio: flap needs to know how much to cut; give --ratio"),
    "below one unit": (GOOD, ("-r", 0.0001), None, r"ratio: 0.0001 is below one unit of this model; ask for more than"),
    "unreachable": (GOOD, ("-r", 0.97), None, r"ratio: the least that can stay .* ask for a smaller ratio"),
    "dtype": (GOOD, ("-r", 0.3, "--dtype", "fp16"), None, r"unknown dtype 'fp16' \(did you mean 'float16'\?\)"),
    "batch": (GOOD, ("-r", 0.3, "--batch-size", 0), None, r"batch_size: 0 windows at a time are too few"),
    "windows": (GOOD, ("-r", 0.3, "--windows", 0), None, r"windows: 0 windows of calibration text are too few"),
    "short windows": (GOOD, ("-r", 0.3, "--seq-len", 1), None, r"seq_len: 1 tokens a window of calibration text; it must"),
    "long windows": (GOOD, ("-r", 0.3, "--seq-len", 65), None, r"seq_len: 65 tokens a window .* 2 to 64, the positions"),
    "slice": (GOOD, ("-r", 0.3, "--documents", "all"), None, r"documents: 'all' is no slice"),
    "field": (GOOD, ("-r", 0.3, "--field", "body"), None, r"line 1 has no text under 'body'; it has 'text' \(--field"),
    "no text": (GOOD, ("-r", 0.3), "", r"calibration: flap needs text; give a .txt, .jsonl or .parquet file"),
    "missing text": (GOOD, ("-r", 0.3), lambda t: t / "gone.txt", r"gone.txt: no such text file"),
    "little text": (GOOD, ("-r", 0.3), lambda t: text(t, b"a cat"), r"text.txt: \d+ tokens of text, but 4 windows of 16 need"),
    "empty text": (GOOD, ("-r", 0.3), lambda t: text(t, b""), r"text.txt: there is no text in it"),
    "blank text": (GOOD, ("-r", 0.3), lambda t: text(t, b" \n\n"), r"text.txt: there is no text in it"),
    "binary text": (GOOD, ("-r", 0.3), lambda t: text(t, b"a\0b"), r"text.txt: line 1 holds a NUL byte"),
    "latin text": (GOOD, ("-r", 0.3), lambda t: text(t, b"caf\xe9"), r"text.txt: not UTF-8 text"),
    "bad line": (GOOD, ("-r", 0.3), lambda t: text(t, b"{", "t.jsonl"), r"t.jsonl: line 1 is not JSON"),
    "hub text": (GOOD, ("-r", 0.3), lambda t: "datasets:x", r"datasets:x: a hub data set is read over the network"),
    "no weights": (lambda t: without(t, "model.safetensors"), ("-r", 0.3), None, r"model.safetensors is missing, found none"),
    "truncated": (truncated, ("-r", 0.3), None, r"model.safetensors: \d+ bytes, but its header promises \d+; .* fetch it"),
    "corrupted": (corrupted, ("-r", 0.3), None, r"model.safetensors: the safetensors header is corrupt .* fetch the file"),
    "no config": (lambda t: without(t, "config.json"), ("-r", 0.3), None, r"no config.json in this folder"),
    "no tokenizer": (
        lambda t: without(t, "tokenizer.json", "tokenizer_config.json"), ("-r", 0.3), None, r"model: the tokenizer"
    ),
    "other tokenizer": (
        other_tokenizer, ("-r", 0.3), None, r"the tokenizer has token 399, but the model's vocabulary ends at 299"
    ),
    "nan": (damaged, ("-r", 0.3), None, r"'model.layers.1.mlp.up_proj.weight' holds NaN or infinite weights; .* damaged"),
    "infinite": (lambda t: damaged(t, math.inf), ("-r", 0.3), None, r"holds NaN or infinite weights"),
    "statistics of none": (
        GOOD, ("-r", 0.3, "-m", "magnitude", "--statistics", "s"), "", r"statistics: magnitude needs no statistics; drop"
    ),
    "text for none": (GOOD, ("-r", 0.3, "-m", "magnitude"), None, r"calibration: magnitude reads no text; drop"),
    "contradiction": (
        GOOD, ("-m", "minitron-width", "-r", 0.3, "--target", "hidden_size=8"), None, r"target: sizes and --ratio contradict"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_wrong_inputs_of_prune(what, tmp_path):
    """Every one is a sentence with the value and the mend, and the output's place stays empty."""
    model, options, calibration, message = WRONG[what]
    place = tmp_path / "place"
    place.mkdir()
    source = model(tmp_path)
    arguments = ["prune", source, "-m", "flap", "-o", place / "out"]
    if "magnitude" not in options:
        arguments += SMALL
    if calibration is None:
        arguments += ["-c", pipeline.text_file()]
    elif calibration:
        arguments += ["-c", calibration(tmp_path)]
    refused(message, *arguments, *options)
    assert not list(place.iterdir())


@pytest.mark.parametrize(
    "what", ["no such model", "family", "truncated", "corrupted", "no config", "other tokenizer", "nan"]
)
def test_wrong_models_of_eval(what, tmp_path):
    source = WRONG[what][0](tmp_path)
    refused(WRONG[what][3], "eval", source, "-t", pipeline.text_file(), "--windows", 2, "--seq-len", 16)


@pytest.mark.parametrize("what", ["no such model", "family", "config lies", "ratio", "no ratio", "below one unit", "dtype"])
def test_wrong_requests_of_plan(what, tmp_path):
    model, options, _, message = WRONG[what]
    refused(message, "plan", model(tmp_path), "-m", "flap", *options)


def test_wrong_texts_of_eval(tmp_path):
    ask = ("eval", pipeline.folder(), "--windows", 2, "--seq-len", 16, "-t")
    refused(r"gone.txt: no such text file", *ask, tmp_path / "gone.txt")
    refused(r"text.txt: there is no text in it", *ask, text(tmp_path, b"\n"))
    refused(r"seq_len: 1024 tokens a window of evaluation text", "eval", pipeline.folder(), "-t", pipeline.text_file())


def test_a_record_that_cannot_be_written(tmp_path):
    ask = ("eval", pipeline.folder(), "-t", pipeline.text_file(), "--windows", 2, "--seq-len", 16, "--record")
    refused(rf"{tmp_path}", *ask, tmp_path)


def test_places_that_cannot_be_written(tmp_path, monkeypatch):
    ask = ("prune", pipeline.folder(), "-m", "magnitude", "-r", 0.5, "-o")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("x")
    refused(r"thesis: already exists; give another --out, or --overwrite", *ask, tmp_path / "thesis")
    refused(r"thesis: is not a folder that prunus wrote", *ask, tmp_path / "thesis", "--overwrite")
    refused(r"no right to write in", *ask, tmp_path / "thesis" / "chapter.txt" / "out")
    monkeypatch.setattr(os, "access", lambda *_: False)
    refused(rf"out: no right to write in {tmp_path}", *ask, tmp_path / "out")
    assert [p.name for p in tmp_path.rglob("*")] == ["thesis", "chapter.txt"]


def test_the_place_is_checked_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(api, "prune", lambda *a, **k: pytest.fail("the place is checked first"))
    (tmp_path / "out").mkdir()
    refused("already exists", "prune", "nowhere", "-m", "magnitude", "-r", 0.5, "-o", tmp_path / "out")


def test_mistakes_in_the_request_are_found_before_the_weights_are_read(tmp_path, monkeypatch):
    """And before the text: an hour of loading must not end in a typing mistake."""
    monkeypatch.setattr(Source, "load", lambda *a, **k: pytest.fail("no weight may be read"))
    for what in ("ratio", "no text", "missing text", "little text", "dtype", "batch", "windows", "other tokenizer"):
        place = tmp_path / what
        place.mkdir()
        test_wrong_inputs_of_prune(what, place)


def test_a_ratio_that_no_cut_reaches_is_found_before_the_weights_are_read(tmp_path, monkeypatch):
    """What the floors cost stands in the config."""
    monkeypatch.setattr(Source, "load", lambda *a, **k: pytest.fail("no weight may be read"))
    test_wrong_inputs_of_prune("unreachable", tmp_path)


def test_torch_is_left_as_it_was(tmp_path):
    """The command line of one run must not change the settings of the next in the same process."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    cli("plan", pipeline.folder(), "-m", "flap", "-r", 0.3)
    assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, dtype)
