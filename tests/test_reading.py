"""Small files of others: what is no file, no text, no JSON or no YAML, and records that are not what they should be."""

import base64
import json
import os
import shutil
import struct
import zlib

import checkpoints
import numpy as np
import pipeline
import pytest
import training

from prunus import checkpoint, record, source, train_plots
from prunus.data import tokenizer
from prunus.data.shards import Shards, prepared_documents
from prunus.data.tokenizer import open_tokenizer
from prunus.errors import UserError
from prunus.export import card
from prunus.headers import gguf_metadata, safetensors_entries
from prunus.ledger import Intervals, Ledger
from prunus.reading import bytes_of, check_tokenizer, json_of, rows_of, table_of, yaml_of
from prunus.sealed import sealed, unsealed
from prunus.source import Source
from prunus.study import page
from prunus.tasks.harness import Known
from prunus.train import log, saved
from prunus.train import recipe as recipes
from prunus.train.listing import begun, listed, logged


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "not readable as JSON"), (b"[" * 100_000, "nested too deeply"), (b"\xff", "can't decode byte"), (b"9" * 6000,
        "not readable"),
        (b"[1]", "expected a JSON object, got list"),
    ],
)  # fmt: skip
def test_json_that_is_none(tmp_path, text, message):
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(UserError, match=rf"x\.json: .*{message}.*; mend it") as caught:
        table_of(tmp_path / "x.json", "mend it")
    assert "\n" not in str(caught.value)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "round").symlink_to("round")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "round", "zero", "none", "."):
        with pytest.raises(UserError, match=r"no file that can be read|no such file|cannot be read"):
            bytes_of(tmp_path / name)
    (tmp_path / "large").write_bytes(b"x" * 11)
    with pytest.raises(UserError, match="11 bytes, but a file of its kind has at most 10"):
        bytes_of(tmp_path / "large", most_bytes=10)


def test_lines_have_numbers(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": "\\u2028 \u2028"}\n\n[1]\n', encoding="utf-8")
    assert [number for number, _ in rows_of(path.read_bytes(), str(path))] == [1, 3]
    with pytest.raises(UserError, match="line 3 is no record"):
        record.read(path)


def test_yaml_aliases_that_are_harmless():
    assert yaml_of("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}", "x")["c"] == {"x": 1, "y": 2}
    assert yaml_of("", "x") is None


def test_half_characters_are_refused_where_they_are_read(tmp_path):
    """No file and no terminal can hold them: a page of such a study was a traceback, an hour behind the reading."""
    (tmp_path / "x.json").write_text('{"a": ["\\uD800"]}', encoding="utf-8")
    with pytest.raises(UserError, match=r"x\.json: not readable as JSON: .*surrogates not allowed"):
        json_of(tmp_path / "x.json")
    with pytest.raises(UserError, match=r"x: not readable as YAML: .*surrogates not allowed"):
        yaml_of('a: "\\ud800"', "x")
    (tmp_path / "x.json").write_text('{"a": "\\ud83d\\udc08"}', encoding="utf-8")
    assert json_of(tmp_path / "x.json") == {"a": "\U0001f408"}


def test_names_that_no_system_takes(tmp_path):
    code, _, err = pipeline.cli("runs", tmp_path / ("x" * 300))
    assert code == 2 and "File name too long; give another name" in err and err.count("\n") == 1


# -- what prunus wrote itself, and somebody changed ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("after", {"model_type": None}, "after.model_type|after: "), ("before", {"params": -1}, "before"),
        ("verified", {}, "verified"),
        ("fingerprint", {"ids": [["1"]]}, "fingerprint: ids"), ("fingerprint", {"ids": [[1], [1, 2]]}, "fingerprint: .*not of one"),
        ("fingerprint", {"top_ids": []}, "fingerprint: .*not of one"), ("format", 2, "format"),
        ("method", [], "method"), ("ratios", {"x": float("nan")}, "ratios"), ("calibration", {"source": 1}, "calibration"),
    ],
)  # fmt: skip
def test_a_manifest_with_other_things_in_it(tmp_path, part, value, message):
    folder = shutil.copytree(pipeline.saved("uniform")[0], tmp_path / "out")
    told = json.loads((folder / "prunus.json").read_text(encoding="utf-8"))
    told[part] = told[part] | value if value and isinstance(value, dict) else value
    (folder / "prunus.json").write_text(json.dumps(told), encoding="utf-8")
    with pytest.raises(UserError, match=rf"prunus\.json: ({message})"):
        checkpoint.read_manifest(folder)


def test_manifests_that_prunus_writes_are_whole():
    for name in pipeline.SAVED:
        folder = pipeline.saved(name)[0]
        read = checkpoint.read_manifest(folder)
        assert json.loads(read.model_dump_json()) == json.loads((folder / "prunus.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "line", ["[1]", '{"loss": "x", "lr": 1}', '{"loss": 1}', '{"validation": {"loss": "x"}}', '{"loss": NaN, "lr": 1}', "{"]
)
def test_logs_with_other_lines(tmp_path, line):
    run = shutil.copytree(training.finished(), tmp_path / "run")
    assert len(logged(run)) > 8 and begun(run)["tokens"] == 512
    whole = (run / "log.jsonl").read_text(encoding="utf-8")
    (run / "log.jsonl").write_text(f"{whole}half a li", encoding="utf-8")
    assert listed(run)[0]["state"] == "done"
    (run / "log.jsonl").write_text(f"{whole}{line}\n", encoding="utf-8")
    for read in (logged, listed) if "loss" in line else (logged,):  # a table parses only what it shows
        with pytest.raises(UserError, match=r"log\.jsonl: line \d+"):
            read(run)


def test_records_of_something_else(tmp_path):
    model = shutil.copytree(pipeline.folder(), tmp_path / "model")
    sha256 = Source.open(str(model)).sha256
    for figures in (
        {"texts": [3]},
        {"texts": {}, "tasks": {"x": {"acc": None}}},
        {"texts": [{"text": {}, "perplexity": "x"}]},
    ):
        line = {"kind": "eval", "recipe": {}, "figures": {"weights_sha256": sha256} | figures}
        (tmp_path / "r.jsonl").write_text(json.dumps(line), encoding="utf-8")
        with pytest.raises(UserError, match=r"r\.jsonl is no record of prunus eval"):
            card.write(model, card.Given(records=(tmp_path / "r.jsonl",)))


def test_a_fingerprint_of_tokens_that_the_model_does_not_have(tmp_path, monkeypatch):
    folder = shutil.copytree(pipeline.saved("uniform")[0], tmp_path / "out")
    told = json.loads((folder / "prunus.json").read_text(encoding="utf-8"))
    told["fingerprint"]["top_ids"][0][0][0] = pipeline.VOCAB
    (folder / "prunus.json").write_text(json.dumps(told), encoding="utf-8")
    pipeline.verify_here(monkeypatch)
    code, _, err = pipeline.cli("verify", folder)
    assert code == 3 and f"names token {pipeline.VOCAB}, which the model does not have" in err


def test_cards_of_records_and_cards_of_others(tmp_path):
    run = shutil.copytree(training.finished(), tmp_path / "run")
    whole = json.loads((run / "record.jsonl").read_text(encoding="utf-8"))
    for change in ({"figures": []}, {"recipe": {"recipe": 3}}, {"figures": {"tokens": 3, "pruning": []}}):
        (run / "record.jsonl").write_text(json.dumps(whole | change) + "\n", encoding="utf-8")
        for read in (lambda: card.write(run, card.Given()), lambda: page.of_run(run), lambda: train_plots.Curve.read(run)):
            with pytest.raises(UserError, match=r"record\.jsonl: is no record of a training run"):
                read()
    model = shutil.copytree(pipeline.folder(), tmp_path / "model")
    for head in ("license: 2020-99-99", "license: " + "[" * 3000, "license: [mit]"):
        (model / "README.md").write_text(f"---\n{head}\n---\nA model.\n", encoding="utf-8")
        assert card._licence(Source.open(str(model)), card.Given())[0] is None


@pytest.mark.parametrize(
    ("part", "value"),
    [("step", -1), ("tokens", "8"), ("flops", None), ("rng", "0g"), ("best", []), ("files", {"../x.safetensors": "0"})],
)
def test_states_with_other_things_in_them(tmp_path, part, value):
    run = shutil.copytree(training.finished(), tmp_path / "run")
    folder = sorted((run / "checkpoints").iterdir())[-1]
    told = unsealed((folder / "state.json").read_text(encoding="utf-8"))
    for text in (sealed(told | {part: value}), json.dumps(told | {part: value})):
        (folder / "state.json").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=rf"state\.json: {part}"):
            saved.read_state(folder)


def test_logs_are_cut_back_whatever_their_lines_say(tmp_path):
    lines = [b'{"step": 1}', b'{"step": 1' + b"0" * 400 + b"}", b"[" * 100_000, b"\xff", b'{"step": 3}', b"3"]
    (tmp_path / "log.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    log.cut(tmp_path, 2)
    assert (tmp_path / "log.jsonl").read_bytes() == lines[0] + b"\n"


def test_answers_on_disk_that_are_none(tmp_path):
    (tmp_path / "known").write_text('["a", -1.5, true]\n3\n[1, 2]\n' + "[" * 100_000 + '\n["b", -2', encoding="utf-8")
    assert set(Known(tmp_path / "known").answers) == {"a"}


def test_starts_and_tokens_that_cannot_be(tmp_path):
    data = shutil.copytree(training.data(), tmp_path / "data")
    opened = Shards.open(data, "retrain")
    shard = opened.shards[0]
    starts = np.fromfile(data / shard.starts, "<u8")
    (data / shard.starts).write_bytes(np.zeros_like(starts).tobytes())
    with pytest.raises(UserError, match=r"starts\.bin: starts of documents do not ascend"):
        list(prepared_documents(f"{data}:retrain") or ())
    (data / shard.file).write_bytes(b"\xff" * (data / shard.file).stat().st_size)
    with pytest.raises(
        UserError, match=r"data: range 'retrain' has token 65535 between 0 and 9, but the manifest's vocabulary"
    ):
        Shards.open(data, "retrain")[0:9]


def test_ledgers_that_consumed_what_they_do_not_have(tmp_path):
    (tmp_path / "ledger.json").write_text(
        json.dumps({"stages": [{"name": "x", "consumed": {"a": [[0, 4]]}}]}), encoding="utf-8"
    )
    with pytest.raises(UserError, match=r"ledger\.json: is no ledger \(stages\.0: .*consumed names domain 'a'"):
        Ledger.read(tmp_path)


def packed(numbers: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(numbers.tobytes(), 9)).decode()


@pytest.mark.parametrize(
    ("intervals", "message"),
    [
        ([[0, 2**70]], "pairs of whole numbers"), ([[0, {}]], "pairs of whole numbers"),
        ({"unit": 2**70, "packed": packed(np.arange(16))}, "cannot be read"),
        ({"unit": 1, "packed": packed(np.zeros((1 << 28) + 16, np.uint8))}, "unfold to more than 268,435,456 bytes"),
        ({"unit": 1, "packed": packed(np.arange(16))[:12]}, "cut short|cannot be read"),
    ],
    ids=["large", "table", "unit", "bomb", "short"],
)  # fmt: skip
def test_intervals_that_cannot_be(intervals, message):
    with pytest.raises(ValueError, match=message):
        Intervals.of(intervals)


def test_recipes_of_numbers_that_nothing_counts_to(tmp_path):
    data = training.asked().plain()
    data["data"]["seq_len"] = 10**30
    (tmp_path / "r.yaml").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(UserError, match=r"r\.yaml: data\.seq_len: 10+ is more than 2\^64"):
        recipes.read(str(tmp_path / "r.yaml"))


# -- what others make -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["vocab", "added_tokens"])
def test_token_ids_that_nobody_has(tmp_path, place):
    """The library makes room for every id below the largest: 8 GB for this one."""
    model = shutil.copytree(pipeline.folder(), tmp_path / "model")
    told = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    if place == "vocab":
        told["model"]["vocab"]["a"] = 2**31
    else:
        told["added_tokens"][0]["id"] = 2**31
    (model / "tokenizer.json").write_text(json.dumps(told), encoding="utf-8")
    for read in (Source.open(str(model)).tokenizer, lambda: open_tokenizer(str(model))):
        with pytest.raises(UserError, match=r"tokenizer\.json: has a token with the id 2147483648, but ids end below"):
            read()


def test_a_tokenizer_at_which_its_library_panics(tmp_path, monkeypatch):
    """Panics are no `Exception`; this one is seen before, so here nobody looks."""
    model = shutil.copytree(pipeline.folder(), tmp_path / "model")
    told = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    told["model"]["continuing_subword_prefix"] = "]]>"
    (model / "tokenizer.json").write_text(json.dumps(told), encoding="utf-8")
    reads = (Source.open(str(model)).tokenizer, lambda: open_tokenizer(str(model)))
    for read in reads:
        with pytest.raises(UserError, match="does not begin with ']]>'; the file is corrupt"):
            read()
    for module in (source, tokenizer):
        monkeypatch.setattr(module, "check_tokenizer", lambda path: None)
    for read in reads:
        with pytest.raises(UserError, match="model: the tokenizer cannot be read: "):
            read()


def test_shards_of_names_that_are_too_long(tmp_path):
    model = shutil.copytree(pipeline.folder(), tmp_path / "model")
    index = {"weight_map": {"model.norm.weight": "x" * 300 + ".safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(UserError, match=r"index\.json: a shard's name has more than 255 bytes"):
        Source.open(str(model))


def test_a_command_without_its_command_tells_what_there_is():
    code, out, err = pipeline.cli("data")
    assert code == 2 and out.startswith("Usage: ") and not err


# -- headers ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offsets", [[-(2**62), 8], [4, 0], [-4, 4], [0, 2**70], [0, 10**400]])
def test_tensors_lie_in_their_file(tmp_path, offsets):
    header = {
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": offsets},
    }
    (tmp_path / "x.safetensors").write_bytes(checkpoints.safetensors_with(header, b"\0" * 8))
    with pytest.raises(UserError, match=r"x\.safetensors: (the safetensors header is corrupt|.* its header promises)"):
        safetensors_entries(tmp_path / "x.safetensors")


def _text(text):
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(("kind", "value"), [("I", 0), ("f", float("nan")), ("i", -32)])
def test_alignments_that_are_none(tmp_path, kind, value):
    code = {"I": 4, "f": 6, "i": 5}[kind]
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + _text(b"general.alignment") + struct.pack("<I" + kind, code, value)
    (tmp_path / "x.gguf").write_bytes(head + b"\0" * 64)
    with pytest.raises(UserError, match=r"general\.alignment is .*, which is no number of bytes"):
        gguf_metadata(tmp_path / "x.gguf")


def test_arrays_are_skipped_not_read(tmp_path):
    """Of 2^60 numbers, which the file does not hold, and of as many as it does."""
    for count, good in ((2**60, False), (2**61, False), (16, True)):
        array = struct.pack("<IIQ", 9, 4, count) + b"\0" * 128
        (tmp_path / "x.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + _text(b"x") + array)
        if good:
            assert gguf_metadata(tmp_path / "x.gguf") == {"x": None}
            continue
        with pytest.raises(UserError, match="ends inside its header"):
            gguf_metadata(tmp_path / "x.gguf")


def test_json_of_any_kind(tmp_path):
    (tmp_path / "x.json").write_text("[1, null]", encoding="utf-8")
    assert json_of(tmp_path / "x.json") == [1, None]


@pytest.mark.parametrize("merges", [["a b"], [["a", "#b"], ["a", "é"]], [["a"]], [7]])
def test_a_prefix_that_merged_parts_lack(tmp_path, merges):
    """The library takes it off unseen, in the midst of a character, and then ends the process."""
    model = {"type": "BPE", "continuing_subword_prefix": "#", "vocab": {"a": 0, "#b": 1}, "merges": merges}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": model}), encoding="utf-8")
    with pytest.raises(UserError, match=r"tokenizer.json: merges .* does not begin with '#'; the file is corrupt"):
        check_tokenizer(path)
    for good in ({"merges": ["a #b", "#b #b"]}, {"continuing_subword_prefix": None}):
        path.write_text(json.dumps({"model": model | good}), encoding="utf-8")
        check_tokenizer(path)


@pytest.mark.parametrize("read", [safetensors_entries, gguf_metadata, bytes_of])
def test_pipes_are_not_waited_for(tmp_path, read):
    os.mkfifo(tmp_path / "x")
    with pytest.raises(UserError, match=r"x: no file that can be read"):
        read(tmp_path / "x")


def test_a_manifest_names_its_source(tmp_path):
    folder = shutil.copytree(pipeline.saved("per-layer")[0], tmp_path / "cut")
    checkpoints.edit_json(folder / "prunus.json", source={"kind": "folder"})
    with pytest.raises(UserError, match=r"prunus.json: source: name: Field required"):
        checkpoint.read_manifest(folder)


def test_a_record_with_a_number_that_is_too_large_is_none(tmp_path):
    folder, path = pipeline.saved("per-layer")[0], tmp_path / "eval.jsonl"
    code, _, err = pipeline.cli(
        "eval", folder, "-t", pipeline.text_file(), "--windows", 2, "--seq-len", 16, "--record", path
    )
    assert code == 0, err
    (row,) = record.read(path)
    row["figures"]["texts"][0]["bits_per_byte"] = 10**400
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"eval.jsonl is no record of prunus eval \(OverflowError"):
        card._results([path], Source.open(str(folder)).sha256)
