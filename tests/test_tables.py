"""Numbers and requests as text."""

from __future__ import annotations

import json

from pipeline import cli

from prunus import report
from prunus.methods import METHODS
from prunus.planning import Request
from prunus.tables import big, flags, markdown, number, scientific


def test_numbers():
    assert [big(134_515_008), big(19.2e9, "FLOP"), big(12, "B"), big(0.5)] == ["134.5 M", "19.2 GFLOP", "12 B", "0.5"]
    assert [number(46.0712), number(1337.4), number(0.12345)] == ["46.07", "1,337", "0.1235"]
    assert [scientific(value) for value in (4.2e22, 1e7, 123, 0.0)] == ["4.2e22", "1e7", "123", "0"]


def test_a_request_as_the_command_line_says_it():
    request = Request("flap", 0.2, uniform=True, multiple_of=8, target={"hidden_size": 3}, options={"a": "b"})
    assert flags(request.describe()) == "--ratio 0.2 --target hidden_size=3 --uniform --multiple-of 8 --option a=b"
    assert flags({"method": "flap"}) == ""
    combined = Request("shortgpt+flap+wanda", 0.2, sparsity=0.5, split=(0.25, 0.75), options={"wanda.allocation": "owl"})
    said = "--ratio 0.2 --option wanda.allocation=owl --sparsity 0.5 --split 0.25,0.75"
    assert flags(combined.describe()) == said


def test_markdown():
    assert markdown(["a", "b"], [["x", "1"]]) == ["| a | b |", "| --- | ---: |", "| x | 1 |"]


def test_what_comes_out_of_a_method():
    """In words that follow from the row; every method has them."""
    told = {name: report.method(row) for name, row in METHODS.items()}
    assert (
        told["wanda"]["comes_out"] == "same size, zeros stored densely" and told["wanda"]["stock_engine"] == "yes, no faster"
    )
    assert told["shortgpt"]["stock_engine"] == "yes" and told["flap"]["stock_engine"] == "with --uniform"
    assert told["sublayer-greedy"]["stock_engine"] == "only if whole layers went"
    assert json.loads(cli("methods", "--json")[1])["methods"].keys() == METHODS.keys()
    out = cli("methods")[1]
    assert "stock engine" in out and all(f"\n{name} " in "\n" + out for name in METHODS)


def test_the_help_of_method_is_the_table():
    out = "".join(cli("prune", "--help")[1].split())  # names are broken at their hyphens
    assert all(name in out for name in METHODS)
