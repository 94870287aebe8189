"""Run records: one line each, with what is needed to repeat the run and nothing of the user's machine's names."""

from __future__ import annotations

import json
import platform
import re
import resource
import socket
import subprocess
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from importlib.metadata import PackageNotFoundError

import pytest
import torch

from prunus import record
from prunus.errors import UserError


def test_a_record_is_one_line_and_comes_back(tmp_path):
    path = tmp_path / "deep" / "runs.jsonl"
    first = record.append(path, "eval", {"model": "a\nb", "windows": 3}, {"perplexity": 12.5})
    second = record.append(path, "prune", {"method": "flap"}, {})
    assert path.read_text().count("\n") == 2
    assert record.read(path) == [first, second]
    assert first["kind"] == "eval" and first["recipe"] == {"model": "a\nb", "windows": 3}
    assert first["figures"] == {"perplexity": 12.5}
    age = datetime.now(UTC) - datetime.fromisoformat(first["time"])
    assert timedelta(0) <= age < timedelta(minutes=1)


def test_blank_lines_are_no_records(tmp_path):
    (tmp_path / "a").write_text('{"kind": "x"}\n\n{"kind": "y"}\n')
    assert [r["kind"] for r in record.read(tmp_path / "a")] == ["x", "y"]


def test_the_hash_is_of_the_recipe_and_not_of_its_order(tmp_path):
    same = record.digest({"a": 1, "b": [2, {"c": None}]})
    assert same == record.digest({"b": [2, {"c": None}], "a": 1})
    assert same != record.digest({"a": 1, "b": [2, {"c": 0}]})
    assert re.fullmatch(r"[0-9a-f]{16}", same)
    written = record.append(tmp_path / "r.jsonl", "eval", {"b": 1, "a": 2}, {})
    assert written["recipe_hash"] == record.digest({"a": 2, "b": 1})


def test_versions(monkeypatch):
    found = record.versions()
    assert found["python"] == platform.python_version()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(found) == {"python", "prunus", "torch", "transformers", "safetensors", "numpy"}

    def gone(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(record, "version", gone)
    assert record.versions()["torch"] == "not installed"


def test_the_machine_has_no_name():
    found = record.machine()
    assert found["threads"] == torch.get_num_threads() and found["cores"] >= 1 and found["device"] == "cpu"
    assert socket.gethostname() not in json.dumps(found)


def test_the_commit_of_a_checkout(tmp_path, monkeypatch):
    """A repository of our own: clean, changed outside the package, changed inside, and no repository at all."""
    package = tmp_path / "prunus"
    package.mkdir()
    (package / "record.py").write_text("1\n")
    monkeypatch.setattr(record, "__file__", str(package / "record.py"))
    assert record.commit() is None

    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    head = git("rev-parse", "HEAD")[:12]
    assert record.commit() == head
    (tmp_path / "notes.txt").write_text("x")
    assert record.commit() == head
    (package / "record.py").write_text("2\n")
    assert record.commit() == head + "+"


def test_half_a_record_is_none(tmp_path):
    path = tmp_path / "records.jsonl"
    first = record.append(path, "eval", {}, {"x": 1})
    with path.open("a") as file:
        file.write('{"kind": "ev')
    assert record.read(path) == [first]
    second = record.append(path, "eval", {}, {"x": 2})
    assert record.read(path) == [first, second]
    path.write_text(path.read_text().rstrip("\n"))  # a whole line, by hand
    assert len(record.read(path)) == 2
    record.append(path, "eval", {}, {"x": 3})
    assert [line["figures"]["x"] for line in record.read(path)] == [1, 2, 3]


@contextmanager
def file_limit(size):
    """Files cannot grow beyond it: as a full disk, but for the words."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_record_that_does_not_fit_harms_no_other(tmp_path):
    path = tmp_path / "records.jsonl"
    record.append(path, "eval", {}, {})
    before = path.read_bytes()
    with (
        file_limit(len(before) + 20),
        pytest.raises(UserError, match=r"records.jsonl: the record cannot be written: .*make room"),
    ):
        record.append(path, "eval", {}, {})
    assert path.read_bytes() == before


def test_what_is_no_record_stays(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("my own notes, without an end of line")
    record.append(path, "eval", {}, {})
    assert path.read_text().startswith("my own notes, without an end of line\n{")
    with pytest.raises(UserError, match=r"notes.txt: line 1: not readable as JSON"):
        record.read(path)
