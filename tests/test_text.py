"""Documents from files: what is read, and the one sentence for every file that cannot be."""

from __future__ import annotations

import json
import sys

import pytest

from prunus.data.text import documents, rows_of, select
from prunus.errors import UserError


def refused(message, source, **options):
    """`documents` refuses with one sentence that matches."""
    with pytest.raises(UserError, match=message) as caught:
        list(documents(str(source), **options))
    assert "\n" not in str(caught.value)


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.raw", "a.text", "a.rst", "a", "A.TXT"])
def test_a_plain_file_is_one_document_without_blank_lines(tmp_path, name):
    path = write(tmp_path / name, "\n = Title = \n\n \t\nfirst line\r\n\r\n  second é\n")
    assert list(documents(str(path))) == [" = Title = \nfirst line\n  second é"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    """Windows writes one: it was the first token of a text, the beginning of a prompt, and no JSON."""
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbfwords")
    rows = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "words"}\n')
    assert list(documents(str(path))) == list(documents(str(rows))) == ["words"]
    assert rows_of(path, "prompts", line="text") == rows_of(rows, "prompts") == [{"text": "words"}]


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.txt", "words")
    assert list(documents("~/a.txt")) == ["words"]


@pytest.mark.parametrize("suffix", ["jsonl", "ndjson"])
def test_each_line_of_jsonl_is_a_document(tmp_path, suffix):
    rows = [{"text": "one\n\ntwo", "id": 1}, {"text": "猫"}, {"text": ""}]
    path = write(tmp_path / f"a.{suffix}", "\n".join(map(json.dumps, rows)) + "\n\n  \n")
    assert list(documents(str(path))) == ["one\n\ntwo", "猫", ""]


def test_the_field_has_a_name(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"body": "x", "text": "y"}')
    assert list(documents(str(path), field="body")) == ["x"]


def parquet(path, **columns):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_each_row_of_parquet_is_a_document(tmp_path):
    texts = [f"document {i} é" for i in range(2500)]  # more than one batch of rows
    path = parquet(tmp_path / "a.parquet", text=texts, other=list(range(2500)))
    assert list(documents(str(path))) == texts


def test_parquet_without_the_column(tmp_path):
    path = parquet(tmp_path / "a.parquet", body=["x"], year=[1])
    refused(r"a\.parquet has no column 'text'; it has body, year \(--field names another\)", path)


def test_parquet_with_a_null(tmp_path):
    path = parquet(tmp_path / "a.parquet", text=["x", None])
    refused(r"a\.parquet: row 1 has no text under 'text'", path)


def test_rows_of_parquet_are_numbered_through(tmp_path):
    texts = ["x"] * 1500
    texts[1100] = None
    refused(r"a\.parquet: row 1100 has no text under 'text'", parquet(tmp_path / "a.parquet", text=texts))


def test_parquet_that_is_none(tmp_path):
    refused(r"a\.parquet: not a readable Parquet file", write(tmp_path / "a.parquet", b"PAR1 and nothing more"))
    refused(r"b\.parquet: not a readable Parquet file", write(tmp_path / "b.parquet", b""))


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    path = parquet(tmp_path / "a.parquet", text=["x"])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    refused(r"a\.parquet: reading Parquet needs pyarrow; pip install 'prunus\[data\]'", path)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("nul.txt", b"good line\nbad \0 line\n", r"nul\.txt: line 2 holds a NUL byte; this is a binary file"),
        ("nul.jsonl", b'{"text": "x"}\n\0\n', r"nul\.jsonl: line 2 holds a NUL byte"),
        ("latin.txt", "caf\xe9".encode("latin-1"), r"latin\.txt: not UTF-8 text"),
        ("latin.jsonl", '{"text": "caf\xe9"}'.encode("latin-1"), r"latin\.jsonl: not UTF-8 text"),
        ("a.jsonl", '{"text": "x"}\n{"text": \n', r"a\.jsonl: line 2 is not JSON \("),
        ("gap.jsonl", '{"text": "x"}\n\n\nnot json\n', r"gap\.jsonl: line 4 is not JSON \("),
        ("deep.jsonl", "[" * 100_000, r"deep\.jsonl: line 1 is not JSON \("),
        ("no.jsonl", '{"text": "x"}\n{"body": "y", "id": 3}\n', r"no\.jsonl: line 2 has no text under 'text'; it has 'body', 'id'"),
        ("num.jsonl", '{"text": 5}\n', r"num\.jsonl: line 1 has no text under 'text'"),
        ("list.jsonl", '["text"]\n', r"list\.jsonl: line 1 has no text under 'text'; it is list \(--field"),
        ("a.docx", "x", r"unknown kind of text file '\.docx'.*\.jsonl.*\.txt"),
        ("a.jsnl", "x", r"unknown kind of text file '\.jsnl' \(did you mean '\.jsonl'\?\)"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read(tmp_path, name, data, message):
    refused(message, write(tmp_path / name, data))


@pytest.mark.parametrize("name", ["missing.txt", "."])
def test_no_such_file(tmp_path, name):
    refused(r"no such text file; give a \.txt, \.jsonl or \.parquet file, or datasets:NAME", tmp_path / name)


def test_a_hub_data_set_needs_leave(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(r"datasets:wikitext: a hub data set is read over the network; --online allows it", "datasets:wikitext")
    refused(r"needs the datasets library; pip install 'prunus\[data\]'", "datasets:wikitext", online=True)


def test_a_hub_data_set_is_streamed(monkeypatch):
    """The parts of datasets:NAME:CONFIG:SPLIT:FIELD arrive where they belong; the library itself is not called."""
    asked = []

    class Fake:
        @staticmethod
        def load_dataset(name, config, *, split, streaming):
            asked.append((name, config, split, streaming))
            if name == "gone":
                raise ValueError("no such thing\nat all")
            return iter([{"text": "a", "body": "b"}, {"text": "c"}])

    monkeypatch.setitem(sys.modules, "datasets", Fake)
    assert list(documents("datasets:org/name", online=True)) == ["a", "c"]
    with pytest.raises(UserError, match=r"row 1 has no text under 'body'; it has 'text'"):
        list(documents("datasets:org/name:en:validation:body", online=True))
    assert asked == [("org/name", None, "train", True), ("org/name", "en", "validation", True)]
    refused(r"datasets:gone: the data set cannot be opened: no such thing$", "datasets:gone", online=True)


@pytest.mark.parametrize("which", [None, ":3", "2:4", "4:", "-2:", ":-1", "1:-1", "-3:-1", ":", "5:2", "9:", "0:0"])
def test_slices_are_python_s(which):
    docs = [str(i) for i in range(6)]
    first, last = (None, None) if which is None else (int(p) if p else None for p in which.split(":"))
    assert list(select(iter(docs), which)) == docs[first:last]


@pytest.mark.parametrize("which", ["", "5", "a:b", "1:2:3", "1.5:", ": :"])
def test_slices_that_are_none(which):
    with pytest.raises(UserError, match=rf"documents: '{which}' is no slice; write for example :100, 50:80 or -100:"):
        list(select(iter("abc"), which))


def test_a_slice_reads_no_further_than_it_must(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "x"}\n{"text": "y"}\nnot json\n')
    assert list(select(documents(str(path)), ":2")) == ["x", "y"]
