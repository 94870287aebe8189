"""What a pipe gets: every name and figure whole, on one line, for whoever searches or cuts it."""

from __future__ import annotations

import io
import sys

import pytest

from prunus.printed import new_console, new_table, print_notes
from prunus.progress import Progress

NAME = "evaluate-" + "a_cut=of-many-words_" * 20


def test_a_pipe_has_no_edge(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    table = new_table("step", "tokens")
    table.add_row(NAME, "1,234")
    new_console().print(table)
    header, row = capsys.readouterr().out.splitlines()
    assert row.split() == [NAME, "1,234"] and len(row) == len(header) == len(NAME) + 2 + len("tokens")


def test_a_width_that_is_asked_for_is_kept(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    table = new_table("step", "tokens")
    table.columns[0].overflow = "fold"
    table.add_row(NAME, "1,234")
    new_console().print(table)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) == 60 and "".join(line[:52].strip() for line in lines[1:]) == NAME


@pytest.mark.parametrize("name", ["half [/b] x", "[bold]half", "of :heart: and [link=x]y[/link]", "a\\[b]"])
def test_no_name_is_markup(name, capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    table = new_table(name, title=name)
    table.add_row(name)
    console = new_console()
    console.print(name)
    console.print(table)
    print_notes(console, [name])
    assert [line.strip() for line in capsys.readouterr().out.splitlines()] == [name, name, name, name, f"note: {name}"]


def test_no_name_in_a_bar_is_markup(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress() as progress:
        progress("[/b] [red]x", 1, 2)
        progress.say("said: [/b]")
    said = sys.stderr.getvalue()
    assert "[/b] [red]x" in said and "said: [/b]" in said
