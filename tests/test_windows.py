"""Windows are the first full pieces of the whole text's tokens, no more and no less."""

from __future__ import annotations

import hashlib
import json

import pipeline
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus.data.windows import pack
from prunus.errors import UserError

DOCS = pipeline.corpus()


def naive(docs, count, seq_len, tokenizer=None):
    """Tokenise the whole joined text, cut it up."""
    tokenizer = tokenizer or pipeline.tokenizer()
    ids = tokenizer("\n\n".join(d for d in docs if d.strip()), add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: count * seq_len]).reshape(count, seq_len)


def predicted_bytes(ids_NT, tokenizer):
    """Bytes that tokens 1.. of every window stand for: a byte-level piece has one character a byte."""
    return sum(len(piece) for row in ids_NT for piece in tokenizer.convert_ids_to_tokens(row[1:].tolist()))


def jsonl(path, docs, tail=""):
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in docs) + tail, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(("count", "seq_len"), [(1, 2), (3, 16), (7, 33)])
def test_packed_full_from_the_whole_text(tmp_path, count, seq_len):
    source = jsonl(tmp_path / "a.jsonl", [DOCS[0], "", "  \n", *DOCS[1:]])
    windows = pack(pipeline.tokenizer(), source, windows=count, seq_len=seq_len)
    assert windows.ids_NT.dtype == torch.int64
    assert torch.equal(windows.ids_NT, naive(DOCS, count, seq_len))
    assert (windows.num_windows, windows.seq_len, windows.num_tokens) == (count, seq_len, count * seq_len)


def test_no_padding_and_no_special_tokens(tmp_path):
    windows = pack(pipeline.tokenizer(), jsonl(tmp_path / "a.jsonl", DOCS), windows=20, seq_len=16)
    assert int(windows.ids_NT.min()) >= 3


@pytest.mark.parametrize("lines", [1, 4, 25])
def test_the_reader_stops_early_with_the_same_tokens(tmp_path, lines):
    """The line behind the text is broken: it is not reached, and the tokens are those of the whole text all the same."""
    docs = [line for doc in DOCS for line in [doc] * lines]
    source = jsonl(tmp_path / "a.jsonl", docs, tail="not json\n")
    windows = pack(pipeline.tokenizer(), source, windows=4, seq_len=16)
    assert torch.equal(windows.ids_NT, naive(docs, 4, 16))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(st.sampled_from("ab é\n 12猫"), max_size=30), min_size=20, max_size=60), st.integers(2, 9))
def test_stopping_early_never_changes_a_token(tmp_path_factory, docs, seq_len):
    docs = [*docs, "x" * 40]
    source = jsonl(tmp_path_factory.getbasetemp() / "hypothesis.jsonl", docs)
    tokens = pipeline.tokenizer()("\n\n".join(d for d in docs if d.strip()), add_special_tokens=False)["input_ids"]
    available = len(tokens) // seq_len
    for count in {1, max(1, available // 2), available}:
        windows = pack(pipeline.tokenizer(), source, windows=count, seq_len=seq_len)
        assert windows.ids_NT.flatten().tolist() == tokens[: count * seq_len]


def test_a_slice_of_the_documents(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", DOCS)
    windows = pack(pipeline.tokenizer(), source, windows=2, seq_len=16, docs="10:20")
    assert torch.equal(windows.ids_NT, naive(DOCS[10:20], 2, 16))
    assert windows.documents == "10:20"


def test_a_seed_draws_full_windows_without_replacement(tmp_path):
    docs = [f"{i * 7919 % 10007} stones fall from {i * 104729 % 99991} trees" for i in range(200)]
    source = jsonl(tmp_path / "a.jsonl", docs)
    whole = pipeline.tokenizer()("\n\n".join(docs), add_special_tokens=False)["input_ids"]
    available = len(whole) // 16
    pool = {tuple(whole[i * 16 : (i + 1) * 16]): i for i in range(available)}
    assert len(pool) == available  # all different, so that a window says where it is from

    def drawn(seed, count):
        ids = pack(pipeline.tokenizer(), source, windows=count, seq_len=16, seed=seed).ids_NT
        return [pool[tuple(row)] for row in ids.tolist()]

    every = drawn(0, available)
    assert sorted(every) == list(range(available))
    assert drawn(0, 8) == drawn(0, 8) == every[:8]
    assert drawn(1, 8) != drawn(0, 8)
    assert max(drawn(0, 8)) >= 8  # from the whole text, not from its beginning


def test_seeds_leave_the_global_generator_alone(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", DOCS)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    pack(pipeline.tokenizer(), source, windows=2, seq_len=16, seed=3)
    assert torch.equal(torch.rand(3), expected)


def test_provenance(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", DOCS)
    windows = pack(pipeline.tokenizer(), source, windows=3, seq_len=16, seed=4, docs=":30")
    little_endian = b"".join(int(t).to_bytes(8, "little") for t in windows.ids_NT.flatten())
    assert windows.sha256 == hashlib.sha256(little_endian).hexdigest()
    assert windows.source_sha256 == hashlib.sha256((tmp_path / "a.jsonl").read_bytes()).hexdigest()
    assert windows.provenance() == {
        "source": "a.jsonl",  # no folder of the user's machine
        "documents": ":30",
        "seed": 4,
        "sha256": windows.sha256,
        "source_sha256": windows.source_sha256,
        "num_bytes": windows.num_bytes,
        "windows": 3,
        "seq_len": 16,
    }
    assert pack(pipeline.tokenizer(), source, windows=3, seq_len=16, stride=5).provenance()["stride"] == 5
    other = pack(pipeline.tokenizer(), source, windows=3, seq_len=16, seed=5, docs=":30")
    assert other.sha256 != windows.sha256 and other.source_sha256 == windows.source_sha256


@pytest.mark.parametrize("trim_offsets", [None, False, True])
@pytest.mark.parametrize(("count", "seq_len"), [(1, 2), (6, 16), (40, 3)])
def test_bytes_of_the_predicted_text(tmp_path, count, seq_len, trim_offsets):
    """Also where the tokenizer's offsets leave out leading spaces (Llama 3's post-processor): a space is predicted too."""
    tokenizer = pipeline.tokenizer(trim_offsets=trim_offsets)
    docs = [" ".join(w for w in doc.split() if w.isascii()) for doc in DOCS]
    windows = pack(tokenizer, jsonl(tmp_path / "a.jsonl", docs), windows=count, seq_len=seq_len)
    assert windows.num_bytes == predicted_bytes(windows.ids_NT, tokenizer)


def test_bytes_of_multi_byte_text(tmp_path):
    """A character whose bytes fall on both sides of a window's first token may be counted whole: 3 bytes a window at most."""
    tokenizer = pipeline.tokenizer()
    windows = pack(tokenizer, jsonl(tmp_path / "a.jsonl", ["é猫🐈ß Δ" * 50]), windows=4, seq_len=31)
    exact = predicted_bytes(windows.ids_NT, tokenizer)
    assert exact > 4 * 30  # several bytes a character, each token at least one
    assert abs(windows.num_bytes - exact) <= 4 * 3


def test_bytes_of_characters_that_are_tokens(tmp_path):
    """Where no character is split the count is exact, in bytes and not in characters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    text = "aé猫🐈" * 10
    made = Tokenizer(models.WordLevel({c: i for i, c in enumerate("aé猫🐈")}, unk_token="a"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    windows = pack(tokenizer, jsonl(tmp_path / "a.jsonl", [text]), windows=3, seq_len=7)
    expected = sum(len(text[i * 7 + 1 : (i + 1) * 7].encode()) for i in range(3))
    assert windows.num_bytes == expected


def test_too_short_a_text(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", DOCS[:1])
    tokens = len(pipeline.tokenizer()(DOCS[0], add_special_tokens=False)["input_ids"])
    message = rf"a\.jsonl: {tokens} tokens of text, but 50 windows of 16 need 800; give more text or fewer windows"
    for seed in (None, 0):
        with pytest.raises(UserError, match=message):
            pack(pipeline.tokenizer(), source, windows=50, seq_len=16, seed=seed)


def test_exactly_enough_text(tmp_path):
    tokens = pipeline.tokenizer()(DOCS[0], add_special_tokens=False)["input_ids"]
    source = jsonl(tmp_path / "a.jsonl", DOCS[:1])
    windows = pack(pipeline.tokenizer(), source, windows=1, seq_len=len(tokens))
    assert windows.ids_NT.tolist() == [tokens]
    with pytest.raises(UserError, match=f"1 windows of {len(tokens) + 1} need"):
        pack(pipeline.tokenizer(), source, windows=1, seq_len=len(tokens) + 1)


@pytest.mark.parametrize("docs", [[], [""], [" \n\t"]])
def test_no_text_at_all(tmp_path, docs):
    with pytest.raises(UserError, match=r"a\.jsonl: there is no text in it"):
        pack(pipeline.tokenizer(), jsonl(tmp_path / "a.jsonl", docs), windows=1, seq_len=4)


def test_text_that_utf8_cannot_say(tmp_path):
    """JSON may escape half a surrogate pair; no tokenizer takes it."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "half \\ud83d of a cat"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl: line 2"):
        pack(pipeline.tokenizer(), str(path), windows=1, seq_len=8)


def test_tokens_outside_the_vocabulary(tmp_path):
    windows = pack(pipeline.tokenizer(), jsonl(tmp_path / "a.jsonl", DOCS), windows=3, seq_len=16)
    highest = int(windows.ids_NT.max())
    windows.check_fits(highest + 1, "a.jsonl")
    with pytest.raises(UserError, match=rf"a\.jsonl: token {highest} does not exist in a vocabulary of {highest}; wrong"):
        windows.check_fits(highest, "a.jsonl")
