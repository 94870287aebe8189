"""Shards as one long array, and the one sentence for every folder that cannot be one."""

from __future__ import annotations

import json
import shutil

import checkpoints
import numpy as np
import pipeline
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline import cli
from prepared import SPLITS, made, range_of, texts

from prunus.data.shards import Manifest, Shards
from prunus.data.tokenizer import fingerprint
from prunus.errors import UserError

DOCS = texts()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return made(tmp_path_factory.mktemp("shards"), DOCS, shard_tokens=90)[1]


@pytest.fixture
def copy(folder, tmp_path):
    """A folder to spoil."""
    return shutil.copytree(folder, tmp_path / "data")


def naive(folder, which):
    """All tokens and all document starts, read file by file."""
    manifest = json.loads((folder / "manifest.json").read_text())
    tokens, starts = [], []
    for shard in manifest["ranges"][which]:
        inside = np.fromfile(folder / shard["file"].replace(".bin", ".starts.bin"), "<u8")
        starts += (inside + len(tokens)).tolist()
        tokens += np.fromfile(folder / shard["file"], "<u2").tolist()
    return tokens, starts


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(list(SPLITS)), st.floats(0, 1), st.floats(0, 1))
def test_any_piece(folder, which, x, y):
    tokens, starts = naive(folder, which)
    shards = Shards.open(folder, which)
    assert len(shards.shards) > 2 and shards.num_tokens == len(tokens) and shards.num_documents == len(starts)
    a, b = sorted((round(x * len(tokens)), round(y * len(tokens))))
    piece = shards[a:b]
    assert piece.dtype == np.int64 and piece.tolist() == tokens[a:b]
    assert shards.document_starts(a, b).tolist() == [s for s in starts if a <= s < b]


def test_pieces_are_copies_of_read_only_files(folder):
    shards = Shards.open(folder, "parent")
    piece = shards[:9]
    piece[:] = 0
    assert shards[:9].any()
    with pytest.raises(ValueError, match="read-only"):
        shards._ids(0)[0] = 1


@pytest.mark.parametrize("span", [slice(-1, 2), slice(5, 2), slice(0, 10**9), slice(0, 9, 2)])
def test_pieces_that_are_not_there(folder, span):
    with pytest.raises(IndexError):
        Shards.open(folder, "parent")[span]


def test_the_digest_is_of_the_tokens(tmp_path):
    """Not of names, licences or versions: the same text prepared elsewhere is the same data."""
    digests = []
    for i, documents in enumerate((DOCS, DOCS, DOCS[1:])):
        place = tmp_path / str(i)
        place.mkdir()
        digests.append(made(place, documents)[0].digest)
    assert digests[0] == digests[1] != digests[2]


SPOILT = {  # what is done to the manifest's JSON -> what is said
    "format": (lambda d: d | {"format": 2}, "manifest.json: format 2 is not known, only 1; prepare the data again"),
    "no format": (lambda d: {}, "format None is not known"),
    "no object": (lambda d: [1], r"is no manifest \(as a whole: "),
    "unknown field": (lambda d: d | {"colour": 1}, r"is no manifest \(colour: Extra inputs are not permitted\)"),
    "other ranges": (
        lambda d: d | {"splits": {"x": 1.0}},
        r"is no manifest \(as a whole: splits and ranges differ",
    ),
    "a path": (
        lambda d: d | {"ranges": d["ranges"] | {"parent": [d["ranges"]["parent"][0] | {"file": "../x-0.bin"}]}},
        r"is no manifest \(ranges.parent.0.file: ",
    ),
    "negative": (
        lambda d: d | {"ranges": d["ranges"] | {"parent": [d["ranges"]["parent"][0] | {"tokens": -1}]}},
        r"is no manifest \(ranges.parent.0.tokens: ",
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_broken_manifests(copy, name):
    change, message = SPOILT[name]
    path = copy / "manifest.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(UserError, match=message) as caught:
        Manifest.read(copy)
    assert "\n" not in str(caught.value)


def test_manifests_that_are_not_there(copy, tmp_path):
    path = copy / "manifest.json"
    path.write_text("{")
    with pytest.raises(UserError, match=r"manifest.json: not readable as JSON: "):
        Manifest.read(copy)
    path.rename(copy / "progress.json")
    with pytest.raises(UserError, match="is not finished; run the same prunus data prepare again, it goes on where it was"):
        Manifest.read(copy)
    (copy / "progress.json").unlink()
    with pytest.raises(UserError, match=r"there is no manifest.json in it, so it is no prepared data"):
        Manifest.read(copy)
    with pytest.raises(UserError, match="gone: no such file or folder; prunus data prepare makes one"):
        Manifest.read(tmp_path / "gone")


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"\0\0")


def change(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["parent-00001.bin", "parent-00001.starts.bin"])
def test_spoilt_files(copy, name):
    path, original = copy / name, (copy / name).read_bytes()
    for spoil in (cut, lengthen):
        spoil(path)
        with pytest.raises(
            UserError, match=rf"{name}: [\d,]+ bytes, but the manifest promises [\d,]+; the file is truncated"
        ):
            Shards.open(copy, "parent")
        Shards.open(copy, "retrain")  # another range is whole
        path.write_bytes(original)
    change(path)
    code, out, err = cli("data", "inspect", copy, "--verify", "--json")
    assert code == 2 and f"{name}: was changed since it was written (SHA-256); prepare the data again" in err
    path.unlink()
    with pytest.raises(UserError, match=rf"{name}: is missing"):
        Shards.open(copy, "parent")
    code, out, err = cli("data", "inspect", copy)
    assert code == 2 and out == "" and f"{name}: is missing" in err


def test_ranges_that_are_not_there(folder, tmp_path):
    with pytest.raises(
        UserError, match=r"unknown range of .* 'retrian' \(did you mean 'retrain'\?\): known are parent, ret"
    ):
        Shards.open(folder, "retrian")
    only = next(d for d in DOCS if range_of(d) == 2)
    manifest, out = made(tmp_path, [only])
    assert manifest.tokens("parent") == 0
    with pytest.raises(UserError, match=r"range 'parent' holds no tokens; its share of 0.4 took none of the documents"):
        Shards.open(out, "parent")


def test_another_tokenizer(folder):
    assert Shards.open(folder, "parent", tokenizer=fingerprint(pipeline.tokenizer()))
    with pytest.raises(
        UserError, match="was prepared with another tokenizer than the model's; prepare the text with the mo"
    ):
        Shards.open(folder, "parent", tokenizer=fingerprint(pipeline.tokenizer(280)))


def test_a_manifest_of_another_hand(copy):
    """Fields that are gone are missed, not guessed."""
    checkpoints.edit_json(copy / "manifest.json", eos_token_id=None)
    with pytest.raises(UserError, match=r"is no manifest \(eos_token_id: Field required\)"):
        Manifest.read(copy)
