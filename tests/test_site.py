"""The site of docs/ is built strictly, holds every page, and loads nothing from elsewhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
LOADS = {"link": "href", "script": "src", "img": "src", "iframe": "src", "source": "src", "object": "data"}


def build(place: Path, config: Path = ROOT / "mkdocs.yml") -> subprocess.CompletedProcess[str]:
    """In a process of its own, as `make site` does it; a proxy that nothing listens on stands for no network."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config), "-d", str(place)]
    nowhere = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | nowhere, timeout=120)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    place = tmp_path_factory.mktemp("site")
    done = build(place)
    assert done.returncode == 0, done.stderr
    return place


class Page(HTMLParser):
    """What a browser would fetch to show a page, and how often each tag begins."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value for name, value in attrs if value and name == LOADS.get(tag)]


def elsewhere(address: str) -> bool:
    return re.match(r"(\w+:)?//", address) is not None


def test_every_page_is_there_with_all_its_blocks(site):
    """A fence inside a list, for one, would be shown as text."""
    for page in DOCS.rglob("*.md"):
        fences = re.findall(r"^ *```", page.read_text(encoding="utf-8"), re.M)
        built = Page((site / page.relative_to(DOCS)).with_suffix(".html").read_text(encoding="utf-8"))
        assert built.tags.count("pre") == len(fences) / 2, page


def test_nothing_is_loaded_from_elsewhere(site):
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    assert all(any(address.endswith(".css") for address in page.fetched) for page in pages.values())  # the parser sees them
    assert not {address for page in pages.values() for address in page.fetched if elsewhere(address)}
    for sheet in site.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        assert not [one for one in re.findall(r"(?:url\(|@import )['\"]?([^'\")\s]+)", text) if elsewhere(one)], sheet.name


@pytest.mark.parametrize("wrong", ["[a](nowhere.md)", "[a](cli.md#nowhere)", "[a](../LOG.md)"])
def test_a_link_that_leads_nowhere_ends_the_build(wrong, tmp_path):
    shutil.copytree(DOCS, tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    with (tmp_path / "docs" / "index.md").open("a", encoding="utf-8") as page:
        page.write(f"\n{wrong}\n")
    done = build(tmp_path / "site", tmp_path / "mkdocs.yml")
    assert done.returncode != 0 and wrong[4:-1] in done.stderr, done.stderr


def test_a_page_that_no_menu_has_ends_the_build(tmp_path):
    shutil.copytree(DOCS, tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    (tmp_path / "docs" / "lost.md").write_text("# Lost\n", encoding="utf-8")
    done = build(tmp_path / "site", tmp_path / "mkdocs.yml")
    assert done.returncode != 0 and "lost.md" in done.stderr
