"""n-grams by hashes are n-grams by sets."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline import cli
from prepared import jsonl, made, texts

from prunus.data import overlap as module
from prunus.data.overlap import Overlap, text_overlap, token_overlap
from prunus.data.shards import Shards, prepared_documents
from prunus.errors import UserError


def grams(items, n):
    return [tuple(items[i : i + n]) for i in range(len(items) - n + 1)]


def naive(evaluation, data, n):
    """(n-grams, hits, documents that are hit) by Python's sets."""
    known = {g for items in data for g in grams(items, n)}
    per_document = [[g in known for g in grams(items, n)] for items in evaluation]
    return sum(map(len, per_document)), sum(map(sum, per_document)), sum(map(any, per_document))


def plain(text):
    return re.findall(r"\w+", text.lower())


documents = st.lists(st.text(st.sampled_from("ab c\n,é"), max_size=25), max_size=8)


@settings(max_examples=100, deadline=None)
@given(documents, documents, st.integers(1, 4))
def test_words(evaluation, data, n):
    found = text_overlap(evaluation, data, n=n)
    assert (found.ngrams, found.hits, found.documents_hit) == naive(map(plain, evaluation), map(plain, data), n)
    assert found.documents == sum(bool(text.strip()) for text in evaluation)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 40))
def test_tokens_in_pieces(seed, n, chunk):
    """The data is read in pieces; an n-gram over the border of two is found."""
    generator = np.random.default_rng(seed)
    evaluation = generator.integers(0, 3, (4, 12))
    data = generator.integers(0, 3, 60)
    before, module._CHUNK = module._CHUNK, chunk
    try:
        found = token_overlap(evaluation, data, n=n)
    finally:
        module._CHUNK = before
    assert (found.ngrams, found.hits, found.documents_hit) == naive(evaluation.tolist(), [data.tolist()], n)


def test_case_and_punctuation_do_not_hide_a_copy():
    text = "The Cat sat, on the mat; and then -- it slept for twelve long hours, they say."
    found = text_overlap([text], ["Before. " + text.upper().replace(",", "") + " After."])
    assert found.share == 1.0 and found.n == 13


def test_nothing_in_common():
    found = text_overlap(["one two three"] * 3, ["four five six"], n=2)
    assert (found.share, found.documents_hit, found.warning("a", "b")) == (0.0, 0, None)
    assert text_overlap(["too short"], ["too short"]).share == 0.0
    assert text_overlap([], ["x"]).share == text_overlap(["x"], []).share == 0.0


def test_the_order_of_words_counts():
    assert text_overlap(["a b c d"], ["d c b a", "b a d c"], n=2).hits == 0


def test_the_warning():
    assert Overlap(13, 1000, 9, 3, 1).warning("wiki.txt", "c4.jsonl") is None
    said = Overlap(13, 1000, 25, 3, 1).warning("wiki.txt", "c4.jsonl")
    assert said == "2.5% of the 13-grams of wiki.txt occur in c4.jsonl; scores on it do not measure unseen text"


def test_no_length():
    with pytest.raises(UserError, match="n: 0 is no length of an n-gram"):
        text_overlap(["a"], ["a"], n=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return made(tmp_path_factory.mktemp("overlap"), DOCS, shard_tokens=120)[1]


DOCS = texts()


@pytest.mark.parametrize("piece", [1 << 18, 60, 5])
def test_prepared_data_is_read_back_as_text(folder, monkeypatch, piece):
    from prunus.data import shards

    monkeypatch.setattr(shards, "_DECODED", piece)
    back = list(prepared_documents(str(folder)))
    assert sorted(back) == sorted(DOCS)
    assert len(list(prepared_documents(f"{folder}:validation"))) == Shards.open(folder, "validation").num_documents
    assert prepared_documents("c4.jsonl") is None


def test_windows_against_shards(folder):
    shards = Shards.open(folder, "parent")
    windows = np.stack([shards[i * 20 : i * 20 + 20] for i in range(4)])
    assert token_overlap(windows, shards).share == 1.0
    other = Shards.open(folder, "retrain")
    found = token_overlap(windows, other)
    assert (found.ngrams, found.hits, found.documents_hit) == naive(windows.tolist(), [other[:].tolist()], 13)


def test_the_command(tmp_path, folder):
    inside, outside = jsonl(tmp_path / "in.jsonl", DOCS[:10]), jsonl(tmp_path / "out.jsonl", texts(10, seed=9))
    for data in (folder, jsonl(tmp_path / "all.jsonl", DOCS)):
        code, said, err = cli("data", "overlap", inside, data, "--ngram", 3, "--json")
        result = json.loads(said)
        assert code == 0 and result["share"] == 1.0 and "do not measure unseen text" in result["warning"], err
    code, said, err = cli("data", "overlap", outside, f"{folder}:parent", "--ngram", 8, "--json")
    assert code == 0 and json.loads(said)["hits"] == 0 and json.loads(said)["warning"] is None
    code, said, err = cli("data", "overlap", inside, folder, "--ngram", 3)
    assert code == 0 and "warning: 100.0% of the 3-grams" in said
    for words, message in (
        ((tmp_path / "gone.txt", folder), "no such file or folder"),
        ((inside, tmp_path / "gone.txt"), "no such file or folder"),
        ((inside, f"{folder}:retrian"), "unknown range"),
        ((inside, tmp_path), "there is no manifest.json in it"),
        ((inside, folder, "--ngram", 0), "is no length of an n-gram"),
    ):
        code, said, err = cli("data", "overlap", *words)
        assert code == 2 and said == "" and message in err and err.count("\n") == 1, err
