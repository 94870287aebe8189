"""Pages agree with the code and the records: figures, commands, links."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from prunus.methods import METHODS
from prunus.train import recipe as recipes

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_figures_on_pages_are_those_of_the_records():
    done = subprocess.run([sys.executable, str(ROOT / "tools" / "results.py"), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of every fenced block."""
    return re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.S | re.M)


def lines_of(text: str) -> list[str]:
    """The commands of a block, each on one line, without comments."""
    lines = [re.sub(r"(^| )#.*", "", line).strip() for line in text.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line]


def commands() -> list[tuple[str, str]]:
    """(page, command) of every command line of ours."""
    pages = [page.relative_to(ROOT).as_posix() for page in PAGES]
    found = [
        (page, line) for page in pages for language, text in blocks(page) if language == "bash" for line in lines_of(text)
    ]
    return [(page, line) for page, line in found if line.startswith("prunus ")]


@pytest.mark.parametrize(("page", "line"), commands())
def test_commands_on_pages_parse(page, line, capsys):
    """Every option exists and every argument has its place: a missing model is the only thing left to complain about."""
    from prunus.cli import run

    words = shlex.split(line)[1:]
    if words[0] == "quickstart":
        words += ["--source", "./nowhere"]
    code = run(words)
    said = capsys.readouterr()
    if code:
        wanted = ("no such file or folder", "already exists", "not a checkpoint that prunus wrote", "No such option")
        assert any(text in said.err for text in wanted[:3]), said.err
        assert "No such option" not in said.err


def test_links_lead_somewhere():
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)} -> {target}")
    assert not broken


def test_every_method_has_a_page_that_names_its_deviations_and_source():
    for name, row in METHODS.items():
        text = " ".join((ROOT / "docs" / "methods" / f"{name}.md").read_text(encoding="utf-8").split())
        assert row.citation.split("arXiv ")[-1] in text, name
        for deviation in row.deviations:
            assert deviation in text, (name, deviation)


def test_every_recipe_that_prunes_has_a_page_that_is_linked():
    overview = "pruning-while-training.md"
    pages = {page.stem for page in (ROOT / "docs" / "systems").glob("*.md")}
    assert {name for name in recipes.shipped() if recipes.read(name).prune is not None} == pages
    for page in (overview, "index.md"):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        assert pages == set(re.findall(r"\]\(systems/([\w-]+)\.md\)", text)), page
    for name in pages:
        text = (ROOT / "docs" / "systems" / f"{name}.md").read_text(encoding="utf-8")
        assert f"prunus train {name} " in text, name
        assert re.search(r"arXiv \d{4}\.\d{5}", text) or name == "prunus", f"{name} names no paper"  # ours has none


def test_pages_say_nothing_of_the_machine_they_were_written_on():
    for page in [*PAGES, ROOT / "LOG.md"]:
        assert not re.search(r"(?<![\w.])/(home|root|tmp|work)/", page.read_text(encoding="utf-8")), page.name
