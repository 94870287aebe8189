"""What a teacher said, on disk: refused where it does not fit or is damaged; the command that writes it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pipeline
import pytest
from lessons import K, another_teacher, copied, taught_by, teach, written
from pipeline import cli
from training import SEQ, asked, data, flip, other_data, tiny_shape

from prunus.cli import run as command_line
from prunus.distributed import World
from prunus.errors import UserError
from prunus.train import teaching
from prunus.train.cache import MANIFEST, files
from prunus.train.opening import prepare as opened

pytestmark = pytest.mark.usefixtures("short_lessons")


# -- what is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__seed": 1}, r"written for another recipe \(data.seed differs: 0 there, 1 here\); run prunus teach"),
        ({"data__range": "parent", "tokens": 64}, r"\(data.domains or data.range differs\)"),
        ({"data__domains": "BOTH"}, r"\(data.domains or data.range differs\)"),
        ({"data__domains": "OTHER"}, r"\(data.domains or data.range differs\)"),
        ({"data__seq_len": 8}, r"\(data.seq_len differs: 16 there, 8 here\)"),
        ({"data__separate_documents": True}, r"\(data.separate_documents differs: False there, True here\)"),
        ({"teacher__temperature": 1.0}, r"\(teacher.temperature differs: 2.0 there, 1.0 here\)"),
        ({"teacher__top_k": 7}, r"\(teacher.top_k differs: 8 there, 7 here\)"),
        (
            {"teacher__source": "ANOTHER"},
            r"holds the words of dense-llama-64, whose weights are not those of teacher.source",
        ),
        ({"tokens": 9 * 4 * SEQ}, "holds 32 of the 36 sequences that the run reads; run prunus teach with this recipe"),
        ({"teacher__cache": "/nowhere"}, "/nowhere: no such file or folder; prunus teach writes what a teacher says"),
        ({"teacher__top_k": 301}, "teacher.top_k: 301 are more than the vocabulary's 300"),
    ],
)
def test_a_cache_of_something_else_is_refused(tmp_path, changes, message):
    domains = {"BOTH": [data(), other_data()], "OTHER": [other_data()]}
    changes = {"teacher__source": str(pipeline.folder()), "teacher__cache": str(written())} | changes
    if changes["teacher__source"] == "ANOTHER":
        changes["teacher__source"] = str(another_teacher())
    if changes.get("data__domains") in domains:
        changes["data__domains"] = [{"folder": str(folder)} for folder in domains[changes["data__domains"]]]
    base = {"teacher__mix": 0.7, "teacher__temperature": 2.0, "teacher__top_k": K, "validate__every": 0}
    recipe = asked(**{**base, "model__shape": tiny_shape(intermediate_size=8), **changes})
    with pytest.raises(UserError, match=message) as caught:
        opened(recipe, tmp_path / "run")
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def _edit(folder: Path, **changes) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _wider(path: Path) -> None:
    np.save(path, np.load(path).astype(np.float32))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: flip(files(folder, 1)[0]), "ids-00001.npy: changed since it was written; remove the folder and"),
        (lambda folder: flip(files(folder, 6)[1]), "logs-00006.npy: changed since it was written"),
        (lambda folder: files(folder, 2)[1].write_bytes(b"x"), "logs-00002.npy: changed since it was written"),
        (lambda folder: _wider(files(folder, 2)[1]), "logs-00002.npy: changed since it was written"),
        (lambda folder: files(folder, 2)[1].unlink(), "logs-00002.npy: is missing; copy the folder again"),
        (lambda folder: (folder / MANIFEST).unlink(), "there is no manifest.json in it; prunus teach writes"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "manifest.json: not readable as JSON: .*; write it again"),
        (lambda folder: _edit(folder, format=2), "manifest.json: is nothing that prunus teach wrote"),
        (lambda folder: _edit(folder, tokenizer_sha256="0" * 64), r"another recipe \(the tokenizer differs\)"),
        (lambda folder: _edit(folder, vocab_size=301), r"\(the vocabulary's size differs: 301 there, 300 here\)"),
    ],
)
def test_a_damaged_cache_is_refused(tmp_path, damage, message):
    folder = copied(tmp_path)
    damage(folder)
    with pytest.raises(UserError, match=message):
        opened(taught_by(folder), tmp_path / "run")
    with pytest.raises(
        UserError, match=r"changed since|is missing|manifest\.json|differs|holds nothing that prunus teach wrote"
    ):
        teach(folder)


@pytest.mark.parametrize(
    ("teacher", "more", "message"),
    [
        ({}, {}, "teacher: give source, the parent that teaches, cache, .* or else snapshot"),
        ({"source": "a", "cache": "b"}, {}, "teacher: a cache holds likeliest tokens only; give top_k"),
        ({"source": "a", "top_k": 0}, {}, "field 'teacher.top_k': 0 is wrong"),
        (
            {"cache": "b", "top_k": 4}, {"data__mixing": {"references": {"tokens": 1.0}}, "validate__every": 2},
            "teacher.cache is of an order of the data that is known beforehand, which data.mixing settles as it goes",
        ),
    ],
)  # fmt: skip
def test_recipes_that_make_no_sense(teacher, more, message):
    with pytest.raises(UserError, match=message):
        asked(teacher=teacher, **more)


def test_what_cannot_be_taught_is_refused(tmp_path, monkeypatch):
    mixing = {"data__mixing": {"references": {"tokens": 1.0}}, "validate__every": 2}
    source = {"source": str(pipeline.folder())}
    for recipe, message in (
        (asked(), r"run: the recipe has no teacher.source, so there is nothing to write down"),
        (asked(teacher=source), "the recipe has no teacher.top_k"),
        (asked(teacher={"cache": "x", "top_k": 4}), "the recipe has no teacher.source"),
        (taught_by(**mixing), "data.mixing: the order of the data is settled while the run goes"),
        (taught_by(tokens=10**6), "budget: 1,000,000 tokens are asked for"),
    ):
        with pytest.raises(UserError, match=message):
            teaching.prepare(recipe, tmp_path / "cache")
    with pytest.raises(UserError, match=r"--out: where to\? give it, or teacher.cache in the recipe"):
        teaching.prepare(taught_by())
    with pytest.raises(UserError, match=r"was written for something else \(seed differs\); give another --out"):
        teaching.prepare(taught_by(data__seed=1), written())
    with pytest.raises(UserError, match="is there already and holds nothing that prunus teach wrote"):
        teaching.prepare(taught_by(), another_teacher())
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: type("D", (), {"free": 16_383})())
        with pytest.raises(UserError, match=r"needs 0.0 MB, but 0.0 MB are free there; lower tokens or teacher.top_k"):
            teaching.prepare(taught_by(), tmp_path / "cache")
        assert teaching.prepare(taught_by(), written()).bytes == 0
    assert not (tmp_path / "cache").exists()


def test_only_the_first_process_hashes(tmp_path, monkeypatch):
    folder = copied(tmp_path)
    flip(files(folder, 1)[0])
    monkeypatch.setenv("RANK", "1")
    assert opened(taught_by(folder), tmp_path / "run").cache is not None


# -- the command ----------------------------------------------------------------------------------------------------------


def test_the_command_line(tmp_path):
    """The same recipe writes and reads; what it takes on disk is said before."""
    recipe = taught_by(tmp_path / "cache", tokens=2 * 4 * SEQ)
    (tmp_path / "r.yaml").write_text(json.dumps(recipe.plain()))
    code, out, err = cli("teach", tmp_path / "r.yaml")
    assert code == 0 and "128 tokens x 32 bytes (top 8) = 4.096 kB; " in err and "train with --set teacher.cache=" in out, (
        err
    )
    code, out, err = cli("teach", tmp_path / "r.yaml", "--json")
    assert code == 0 and json.loads(out)["bytes_left"] == 0 and "4.096 kB of it there already" in err, err
    code, out, err = cli("train", tmp_path / "r.yaml", "--out", tmp_path / "run", "--json")
    assert code == 0 and json.loads(out)["figures"]["teacher_cache"]["tokens"] == 128, err
    code, out, err = cli("plan", tmp_path / "r.yaml", "--train", "--rate", "1e9")
    assert code == 0 and "disk: 4.096 kB of what the teacher says" in out, err
    code, _, err = cli("teach", "scratch", "--out", tmp_path / "other")
    assert code == 2 and "scratch" in err


def test_ctrl_c_leaves_something_to_go_on_with(tmp_path, monkeypatch, capsys):
    (tmp_path / "r.yaml").write_text(json.dumps(taught_by().plain()))

    def write(work, progress):
        raise KeyboardInterrupt

    monkeypatch.setattr(teaching, "write", write)
    with pytest.raises(SystemExit) as stop:
        command_line(["teach", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "cache")])
    assert stop.value.code == 130 and "the same command goes on behind the last shard" in capsys.readouterr().err


def test_an_idle_process_asks_for_a_position_that_is_there():
    """With as many processes as sequences every share has one, so the sequence that an idle one repeats exists."""
    for size in range(1, 6):
        for rank in range(size):
            assert World(rank, size).share(5).start < 5
