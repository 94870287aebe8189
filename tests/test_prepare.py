"""Shards hold every document once, in its range, in order; whoever is stopped goes on and writes the same bytes."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pipeline
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline import cli
from prepared import SHARES, SPLITS, files, ids_of, jsonl, made, range_of, texts

from prunus.data import prepare as module
from prunus.data import writer
from prunus.data.encode import document_hash
from prunus.data.prepare import Text, check_splits, prepare
from prunus.data.shards import Shards
from prunus.data.tokenizer import END, fingerprint, open_tokenizer, train_tokenizer
from prunus.errors import UserError
from prunus.sealed import sealed, unsealed

DOCS = texts()
NAMES = list(SPLITS)


def test_every_document_lies_once_in_its_range_in_order(tmp_path):
    documents = [DOCS[0], "", *DOCS[1:], "  \n"]
    manifest, out = made(tmp_path, documents)
    for i, name in enumerate(NAMES):
        expected = [ids_of(d) for d in documents if d.strip() and range_of(d) == i]
        shards = Shards.open(out, name)
        assert shards[:].tolist() == list(itertools.chain(*expected))
        assert shards.num_documents == manifest.documents(name) == len(expected) > 0
        starts = np.cumsum([0, *map(len, expected)])[:-1]
        assert shards.document_starts(0, shards.num_tokens).tolist() == starts.tolist()
        assert sum(s.text_bytes for s in shards.shards) == sum(
            len(d.encode()) for d in documents if d.strip() and range_of(d) == i
        )
    assert [origin.documents for origin in manifest.sources] == [len(DOCS)]
    assert sorted(p.name for p in out.iterdir() if p.suffix == ".json") == ["manifest.json", "tokenizer.json"]


def test_shards_are_full_and_no_document_is_cut(tmp_path):
    manifest, _ = made(tmp_path, DOCS)
    longest = max(len(ids_of(d)) for d in DOCS)
    for shards in manifest.ranges.values():
        assert len(shards) > 1
        assert all(200 <= shard.tokens < 200 + longest for shard in shards[:-1])


def test_copies_of_a_document_share_a_range(tmp_path):
    """Also copies that differ in blanks: no copy of a validation document is ever trained on."""
    documents = [copy for d in DOCS for copy in (d, d, "  " + d.replace(" ", "\n ") + "\n")]
    _, out = made(tmp_path, documents)
    seen = []
    tokenizer = pipeline.tokenizer()
    for name in NAMES:
        shards = Shards.open(out, name)
        pieces = np.split(shards[:], shards.document_starts(1, shards.num_tokens))
        seen.append({" ".join(tokenizer.decode(p[:-1]).split()) for p in pieces})
    assert not any(a & b for a, b in itertools.combinations(seen, 2))
    assert sum(map(len, seen)) == len(DOCS)


def test_shares_are_met_by_many_documents():
    """A binomial count: five standard deviations of 20,000 draws are 1.8 % of all at most."""
    counts = np.bincount([range_of(f"document {i}") for i in range(20_000)], minlength=3) / 20_000
    assert np.abs(counts - SHARES).max() < 0.018


def test_text_that_spells_the_end_token_is_text(tmp_path):
    _, out = made(tmp_path, ["a cat </s> sat <pad> here"], splits={"train": None})
    ids = Shards.open(out, "train")[:].tolist()
    assert ids.count(pipeline.tokenizer().eos_token_id) == 1 and 0 not in ids
    assert pipeline.tokenizer().decode(ids[:-1]) == "a cat </s> sat <pad> here"


@settings(max_examples=15, deadline=None)
@given(st.lists(st.text(st.sampled_from("ab é\n 12猫"), max_size=20), min_size=1, max_size=25), st.integers(1, 60))
def test_any_text_comes_back(tmp_path_factory, documents, shard_tokens):
    folder = tmp_path_factory.mktemp("any")
    documents = [*documents, "x"]
    _, out = made(folder, documents, shard_tokens=shard_tokens, splits={"all": None})
    shards = Shards.open(out, "all")
    back = [pipeline.tokenizer().decode(p[:-1]) for p in np.split(shards[:], shards.document_starts(1, shards.num_tokens))]
    assert back == [d for d in documents if d.strip()]


def test_a_large_vocabulary_takes_four_bytes(tmp_path, monkeypatch):
    _, small = made(tmp_path, DOCS)
    monkeypatch.setattr(module, "SMALL_VOCAB", pipeline.VOCAB)
    folder = tmp_path / "large"
    folder.mkdir()
    manifest, large = made(folder, DOCS)
    assert manifest.dtype == "uint32"
    for name in NAMES:
        assert np.array_equal(Shards.open(small, name)[:], Shards.open(large, name)[:])


def test_processes_and_batches_change_no_byte(tmp_path, monkeypatch):
    source = Text(str(jsonl(tmp_path / "a.jsonl", DOCS)))
    options = {"splits": SPLITS, "shard_tokens": 200}
    prepare([source], pipeline.tokenizer(), tmp_path / "one", **options)
    monkeypatch.setattr(module, "_BATCH_CHARS", 700)
    prepare([source], pipeline.tokenizer(), tmp_path / "small", **options)
    prepare([source], pipeline.tokenizer(), tmp_path / "two", processes=2, **options)
    assert files(tmp_path / "one") == files(tmp_path / "small") == files(tmp_path / "two")


class StoppedError(Exception):
    pass


STOPS = {  # what is cut short -> how many calls of it go well first
    "encode": (0, 2, 5),
    "_save": (0, 1, 3),
    "writer.sha256": (1, 3, 8),  # of shards that are being closed
}


@pytest.mark.parametrize(("what", "calls"), [(what, n) for what, counts in STOPS.items() for n in counts])
def test_stopped_anywhere_and_gone_on_with(tmp_path, monkeypatch, what, calls):
    monkeypatch.setattr(os, "fsync", lambda file: None)  # slow, and only a power cut would tell
    monkeypatch.setattr(module, "_BATCH_CHARS", 900)
    sources = [Text(str(jsonl(tmp_path / f"{i}.jsonl", DOCS[i * 40 : i * 40 + 40]))) for i in range(2)]
    options = {"splits": SPLITS, "shard_tokens": 150, "checkpoint_tokens": 1 if calls % 2 else 500}
    prepare(sources, pipeline.tokenizer(), tmp_path / "whole", **options)
    where, what = (writer, "sha256") if what == "writer.sha256" else (module, what)
    original, left = getattr(where, what), calls

    def cut_short(*arguments):
        nonlocal left
        left -= 1
        if left < 0:
            raise StoppedError
        return original(*arguments)

    out = tmp_path / "stopped"
    monkeypatch.setattr(where, what, cut_short)
    for _ in range(2):  # twice: the second run is stopped as well, further on
        left = calls
        with pytest.raises(StoppedError):
            prepare(sources, pipeline.tokenizer(), out, **options)
            raise StoppedError  # it may have come to an end the second time
    monkeypatch.setattr(where, what, original)
    prepare(sources, pipeline.tokenizer(), out, **options)
    assert files(out) == files(tmp_path / "whole")


def test_between_a_shard_and_the_word_that_it_is_done(tmp_path, monkeypatch):
    """Files that took their places after the last saved state are taken back and written again."""
    monkeypatch.setattr(module, "_BATCH_CHARS", 600)
    source = [Text(str(jsonl(tmp_path / "a.jsonl", DOCS)))]
    options = {"splits": SPLITS, "shard_tokens": 150, "checkpoint_tokens": 400}
    prepare(source, pipeline.tokenizer(), tmp_path / "whole", **options)
    write = module.Manifest.write

    def stop(*arguments):
        raise StoppedError

    monkeypatch.setattr(module.Manifest, "write", stop)
    with pytest.raises(StoppedError):
        prepare(source, pipeline.tokenizer(), tmp_path / "out", **options)
    monkeypatch.setattr(module.Manifest, "write", write)
    before = json.loads((tmp_path / "out" / "progress.json").read_text())
    assert len(before["ranges"]["retrain"]["shards"]) < len(list((tmp_path / "out").glob("retrain-*.starts.bin")))
    prepare(source, pipeline.tokenizer(), tmp_path / "out", **options)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for the workers in /proc")
def test_killed_for_real(tmp_path):
    """SIGKILL, with two processes at work: they end too, and the folder goes on."""
    many = texts(2500)
    source, out = jsonl(tmp_path / "a.jsonl", many), tmp_path / "out"
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from types import SimpleNamespace\n"
        "from tokenizers import Tokenizer\n"  # alone: transformers takes seconds to import
        "from prunus.data import prepare as m\n"
        "if __name__ == '__main__':\n"
        "    m._BATCH_CHARS = 4000\n"
        "    made = Tokenizer.from_file(sys.argv[2] + '/tokenizer.json')\n"
        "    tokenizer = SimpleNamespace(backend_tokenizer=made, eos_token_id=2, get_vocab=made.get_vocab)\n"
        "    m.prepare([m.Text(sys.argv[1])], tokenizer, Path(sys.argv[3]), shard_tokens=9000,\n"
        "              checkpoint_tokens=2000, processes=int(sys.argv[4]))\n"
    )
    (tmp_path / "run.py").write_text(program)
    pipeline.tokenizer().save_pretrained(tmp_path / "tok")
    environment = os.environ | {"PYTHONPATH": str(Path(module.__file__).parents[2])}
    ask = [sys.executable, str(tmp_path / "run.py"), str(source), str(tmp_path / "tok"), str(out), "2"]
    run = subprocess.Popen(ask, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(out.glob("*-00001.bin")):
        time.sleep(0.005)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert (out / "progress.json").exists() and not (out / "manifest.json").exists(), "it was not killed half-way"
    while time.monotonic() < deadline and any(alive(int(pid)) for pid in children):
        time.sleep(0.02)
    assert not any(alive(int(pid)) for pid in children)
    read = sum(json.loads((out / "progress.json").read_text())["read"])
    assert 0 < read < len(many)
    tokenizer = open_tokenizer(str(tmp_path / "tok"))
    for folder in (out, tmp_path / "whole"):
        prepare([Text(str(source))], tokenizer, folder, shard_tokens=9000)
    assert files(out) == files(tmp_path / "whole")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_finished_folder_is_left_as_it_is(tmp_path):
    first, out = made(tmp_path, DOCS)
    (out / "progress.json").write_text("{}")  # the kill came just before it was removed
    made(tmp_path, DOCS)
    assert not (out / "progress.json").exists()
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    second, _ = made(tmp_path, DOCS)
    assert second == first and {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


# -- plain text with a mark between documents ---------------------------------------------------------------------------


def test_separated_text(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text("one\n\ntwo é\n<|endoftext|>\nthree<|endoftext|>four<|endoftext|>\n\n", encoding="utf-8")
    assert list(Text(str(path), separator="<|endoftext|>").documents()) == ["one\n\ntwo é", "three", "four", ""]
    assert list(Text(str(path)).documents()) == ["one\ntwo é\n<|endoftext|>\nthree<|endoftext|>four<|endoftext|>"]


def test_a_hub_data_set(tmp_path, monkeypatch):
    """Streamed row by row; its length is unknown, so the end is always one document away."""
    import datasets

    rows = [{"body": text} for text in DOCS]
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **options: iter(rows))
    told = []
    source = Text("datasets:tiny::train:body", online=True)
    options = {"splits": {"train": None}, "progress": lambda *step: told.append(step)}
    manifest = prepare([source], pipeline.tokenizer(), tmp_path / "out", **options)
    assert (manifest.sources[0].sha256, manifest.sources[0].bytes, manifest.documents("train")) == (None, None, len(DOCS))
    assert told == [("prepare", len(DOCS), len(DOCS) + 1)]


@pytest.mark.parametrize("kind", ["jsonl", "txt", "parquet"])
def test_progress_comes_to_its_end(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(module, "_BATCH_CHARS", 900)
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"text": DOCS}), path)
    else:
        jsonl(path, DOCS) if kind == "jsonl" else path.write_text("<|x|>".join(DOCS), encoding="utf-8")
    told = []
    source = Text(str(path), separator="<|x|>" if kind == "txt" else None)
    prepare([source], pipeline.tokenizer(), tmp_path / "out", splits={"t": None}, progress=lambda *s: told.append(s[1:]))
    assert [done for done, _ in told] == sorted(done for done, _ in told) and len(told) > 3
    assert told[-1][0] == len(DOCS) and told[-1][1] - len(DOCS) in (0, 1)  # a last line may end in a line break or not


# -- tokenizers ---------------------------------------------------------------------------------------------------------


def test_a_trained_tokenizer_has_the_size_and_gives_text_back(tmp_path):
    trained = train_tokenizer(iter([*DOCS, ""]), 380)
    assert len(trained) == 380 and trained.eos_token == END
    for text in (*DOCS[:5], "never seen: ∂ 4711", f"{END} spelt"):
        assert trained.decode(trained(text, add_special_tokens=False)["input_ids"]) == text
    digits = trained.convert_ids_to_tokens(trained("1234")["input_ids"])
    assert digits == ["1", "2", "3", "4"]
    assert fingerprint(train_tokenizer(iter(DOCS), 380)) == fingerprint(trained)
    trained.save_pretrained(tmp_path / "t")
    assert fingerprint(open_tokenizer(str(tmp_path / "t"))) == fingerprint(trained)


def test_fingerprints_tell_tokenizers_apart():
    ours = train_tokenizer(iter(DOCS), 380)
    prints = {fingerprint(t) for t in (ours, train_tokenizer(iter(DOCS), 381), train_tokenizer(iter(DOCS[:60]), 380))}
    assert len(prints) == 3
    padded = train_tokenizer(iter(DOCS), 380)
    padded.padding_side = "left"
    padded(["a", "b c"], padding=True)  # leaves its mark in the backend, not in the ids of a text
    assert fingerprint(padded) == fingerprint(ours)


def test_tokenizers_that_cannot_be(tmp_path):
    with pytest.raises(UserError, match=r"vocab_size: 256 is too small; 256 bytes and .* alone are 257 tokens"):
        train_tokenizer(iter(DOCS), 256)
    with pytest.raises(UserError, match=r"the text gives \d+ tokens only, not 5,000; give more text or ask for fewer"):
        train_tokenizer(iter(DOCS[:2]), 5000)
    with pytest.raises(UserError, match=r"a.txt: there is no text in it"):
        train_tokenizer(iter([" "]), 300, "a.txt")
    with pytest.raises(UserError, match=r"there is no tokenizer.json in it"):
        open_tokenizer(str(tmp_path))
    pipeline.tokenizer().save_pretrained(tmp_path / "t")
    (tmp_path / "t" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="the tokenizer cannot be read"):
        open_tokenizer(str(tmp_path / "t"))


# -- wrong inputs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"a": 0.5, "b": 0.6}, r"split: the shares add up to 1.1; make it 1"),
        ({"a": 0.5}, r"the shares add up to 0.5; make it 1"),
        ({"a": 1.0, "b": None}, "leave some for the rest"),
        ({"a": None, "b": None}, "a and b: give every range a share, and at most one the rest"),
        ({}, "no range"),
        ({"a": 0.0, "b": None}, "a=0 is no share"),
        ({"a": float("nan"), "b": None}, "a=nan is no share"),
        ({"a-b": None}, "'a-b' is no name for a range"),
        ({"../a": None}, "is no name for a range"),
    ],
)
def test_splits_that_are_no_shares(splits, message):
    with pytest.raises(UserError, match=message):
        check_splits(splits)


def test_splits_are_filled_up():
    assert check_splits({"a": 0.25, "b": None}) == {"a": 0.25, "b": 0.75}
    assert check_splits(dict.fromkeys("ab", 0.5)) == {"a": 0.5, "b": 0.5}


@pytest.fixture
def ask(tmp_path):
    """`ask(*more, text=...)`: the words of a `prunus data prepare` that would work."""
    pipeline.tokenizer().save_pretrained(tmp_path / "tok")
    jsonl(tmp_path / "a.jsonl", DOCS)

    def words(*more, text="a.jsonl", out="out", tok="tok"):
        return ("data", "prepare", tmp_path / text, "-t", tmp_path / tok, "-o", tmp_path / out, *more)

    return words


def refused(message, *arguments):
    import re

    code, out, err = cli(*arguments)
    lines = [line for line in err.splitlines() if not line.startswith("prepare: ")]
    assert code == 2 and out == "" and len(lines) == 1, (code, out, err)
    assert re.search(message, lines[0]), err


def test_the_command(tmp_path, ask):
    code, said, err = cli(*ask("--licence", "CC-BY", "--shard-tokens", 300, "--split", "train=rest", "--json"))
    assert code == 0, err
    result = json.loads(said)
    assert result["ranges"]["train"]["documents"] == len(DOCS) and result["sources"][0]["licence"] == "CC-BY"
    assert result["sources"][0]["source"] == "a.jsonl"  # no folder of the user's machine
    for arguments in (("inspect", tmp_path / "out", "--verify"), ("inspect", tmp_path / "out")):
        code, said, err = cli("data", *arguments)
        assert code == 0 and "train" in said and ("SHA-256" in said) == ("--verify" in arguments), err
    code, said, err = cli("data", "tokenizer", tmp_path / "a.jsonl", "--vocab-size", 300, "-o", tmp_path / "t", "--json")
    assert code == 0 and json.loads(said)["vocab_size"] == len(open_tokenizer(str(tmp_path / "t"))) == 300, err


def test_wrong_inputs_before_any_work(tmp_path, ask):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("mine")
    (tmp_path / "x.docx").write_text("x")
    refused(r"gone.txt: no such file or folder", *ask(text="gone.txt"))
    refused(r"empty.txt: there is no text in it", *ask(text="empty.txt"))
    refused(r"x.docx: is no text", *ask(text="x.docx"))
    refused(r"separator: .*a.jsonl has its own documents", *ask("--separator", "<|x|>"))
    refused(r"separator: ' ' is not a mark within one line", *ask("--separator", " "))
    refused(r"nowhere: no such file or folder; give a folder with tokenizer.json", *ask(tok="nowhere"))
    refused(r"foreign: already exists and holds no prepared data", *ask(out="foreign"))
    refused(r"a.jsonl: already exists and is no folder", *ask(out="a.jsonl"))
    refused(r"--split: 'parent' is not NAME=SHARE", *ask("--split", "parent"))
    refused(r"the shares add up to 0.3; make it 1", *ask("--split", "parent=0.3"))
    refused(r"both must be 1 or more", *ask("--processes", 0))
    refused(
        r"a hub data set is read over the network; --online allows it",
        *ask(text="../../datasets:x")[:2],
        "datasets:x",
        *ask()[3:],
    )
    assert (tmp_path / "foreign" / "thesis.txt").read_text() == "mine"
    assert not (tmp_path / "out").exists()


def test_text_that_turns_out_wrong_leaves_nothing(tmp_path, ask, monkeypatch):
    monkeypatch.setattr(module, "_BATCH_CHARS", 100)
    path = tmp_path / "b.jsonl"
    path.write_text((tmp_path / "a.jsonl").read_text() + "{broken\n")
    refused(r"b.jsonl: line 81 is not JSON", *ask(text="b.jsonl"))
    assert not (tmp_path / "out").exists()
    path.write_text('{"text": " "}\n')
    refused(r"b.jsonl: there is no text in it", *ask(text="b.jsonl"))
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_right_to_write(tmp_path, ask):
    (tmp_path / "locked").mkdir(mode=0o500)
    refused(r"no right to write in .*locked", *ask(out="locked/out"))


def test_no_right_to_write_is_seen_before_any_work(tmp_path, ask, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: mode == os.R_OK)
    refused(r"out: no right to write in ", *ask())
    assert not (tmp_path / "out").exists()


def test_going_on_with_something_else(tmp_path, ask):
    train_tokenizer(iter(DOCS), 301).save_pretrained(tmp_path / "other")
    assert cli(*ask())[0] == 0
    for state in ("finished", "unfinished"):
        refused(r"out: already exists, made with another tokenizer; give another --out", *ask(tok="other"))
        refused(r"made with other splits", *ask("--split", "train=rest"))
        refused(
            r"made with other splits",
            *ask("--split", "retrain=0.495", "--split", "parent=0.495", "--split", "validation=rest"),
        )
        refused(r"made with another shard size", *ask("--shard-tokens", 77))
        refused(r"made with other sources, or sources that have changed since", *ask("--licence", "MIT"))
        kept = (tmp_path / "a.jsonl").read_text()
        (tmp_path / "a.jsonl").write_text(kept + json.dumps({"text": "new"}) + "\n")
        refused(r"made with other sources, or sources that have changed since", *ask())
        (tmp_path / "a.jsonl").write_text(kept)
        if state == "finished":
            unfinished(tmp_path, ask)


def unfinished(tmp_path, ask):
    """Leave a folder at whose beginning the work was stopped."""
    import shutil

    shutil.rmtree(tmp_path / "out")
    original = module.encode
    module.encode = lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt)
    try:
        with pytest.raises(SystemExit) as stopped:
            cli(*ask())
        assert stopped.value.code == 130
    finally:
        module.encode = original
    assert (tmp_path / "out" / "progress.json").exists()


def test_two_at_once(tmp_path, ask):
    unfinished_folder = tmp_path / "out"
    assert cli(*ask())[0] == 0
    with module._locked(unfinished_folder):
        refused(r"out: another prunus data prepare is at work there", *ask())


def test_a_broken_or_cut_state(tmp_path, ask, monkeypatch):
    assert cli(*ask())[0] == 0
    unfinished(tmp_path, ask)
    path = tmp_path / "out" / "progress.json"
    state = unsealed(path.read_text())
    state["ranges"]["retrain"]["open"] = [10, 2, 40]
    path.write_text(sealed(state))
    refused(r"retrain-00000.bin.partial: 0 bytes where 20 were; remove the folder and begin again", *ask())
    for part, value in (("read", [1, 2]), ("done", {}), ("ranges", {}), ("ranges", {"retrain": 3}), ("asked", None)):
        path.write_text(sealed(state | {part: value}))
        refused(r"progress.json: is broken; remove the folder and begin again", *ask())
    path.write_text("{")
    refused(r"progress.json: is broken; remove the folder and begin again", *ask())


def test_a_full_disk(tmp_path, ask, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device", str(tmp_path / "out"))

    monkeypatch.setattr(module.RangeWriter, "add", full)
    refused(r"out: cannot be written: No space left on device", *ask())
    monkeypatch.undo()
    assert cli(*ask())[0] == 0  # and it goes on


def test_hashing_ignores_blanks_only():
    assert document_hash(" a  b\n") == document_hash("a b") != document_hash("A b")
