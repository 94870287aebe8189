"""The study files that ship with the source: every recipe in them is one, and arms that are compared train on the same tokens."""

import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from test_study_results import folder, line

from prunus.study import file as studies
from prunus.study.plan import plan

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "studies" / "while-training").glob("*.yaml"))
ALL = sorted(set((ROOT / "studies").glob("*/*.yaml")) - set((ROOT / "studies" / "paper").glob("*")))  # those: test_papers.py
sys.path.insert(0, str(ROOT / "tools"))
import study_pages  # noqa: E402  (tools, not of the package)
import study_tables  # noqa: E402


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_arms_of_a_study_train_on_the_same_tokens_in_the_same_order(path):
    seen = {}
    for cell in studies.read(path).cells:
        recipe = cell.recipe
        order = (recipe.data.model_dump_json(), recipe.tokens, recipe.batch_tokens, recipe.validate_.sequences)
        assert seen.setdefault(str(cell.place.get("data.seed")), order) == order


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_studies_can_be_planned_and_keep_what_they_promise(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = plan(studies.read(path), rate=1e11)
    assert made["tokens"] > 0 and len(made["steps"]) >= made["runs"]


def row(arm, seed, loss, study="systems", **place):
    validation = [{"validation": {"loss": 9.0}}, {"validation": {"loss": loss}}]
    figures = {"params": 10, "tokens": 20, "flops": {"train": 30, "scoring": 10}, "validation": validation}
    return {"study": study, "arm": arm, "place": {"data.seed": seed, **place}, "figures": figures, "commit": "abc"}


def test_differences_are_of_runs_on_the_same_order():
    rows = [row("few-shot", 0, 4.0), row("few-shot", 1, 5.0), row("other", 0, 3.9), row("other", 1, 4.7)]
    text = "\n".join(study_tables.tables(rows))
    # differences -0.1 and -0.3: mean -0.2, standard deviation 0.1414, standard error 0.1
    assert "| other | 10 |  | 20 | 40 | 2 | 4.3000 (3.9000 to 4.7000) | -0.2000 ± 0.2000 | abc |" in text


def test_an_arm_whose_order_few_shot_never_had_is_not_compared():
    rows = [row("few-shot", 0, 4.0), row("x", 7, 3.0, "rates", **{"optimizer.lr": 1e-3})]
    more = row("longer", 0, 3.0, "more")
    more["figures"]["tokens"] = 40
    assert "| longer | 10 |  | 40 | 40 | 1 | 3.0000 |  | abc |" in "\n".join(study_tables.tables([rows[0], more]))
    assert "| x optimizer.lr=0.001 | 10 |  | 20 | 40 | 1 | 3.0000 |  | abc |" in "\n".join(study_tables.tables(rows))


def test_the_page_of_a_recorded_study_has_its_tables_its_figures_and_what_people_make_of_it(tmp_path):
    lines = [line(arm, seed, loss + 0.1 * seed) for arm, loss in (("P-R", 3.0), ("S", 3.4)) for seed in (0, 1)]
    recorded = tmp_path / "recorded"
    recorded.mkdir()
    folder(recorded, lines, missing=["S_later"]).rename(recorded / "small")
    (recorded / "small" / "reading.md").write_text("We make **this** of it.\n", encoding="utf-8")
    made = study_pages.pages(recorded, tmp_path / "docs")
    text = made[tmp_path / "docs" / "small.md"]
    assert "-0.4000 ± 0.0000" in text and "We make **this** of it." in text and "Not done yet: S_later" in text
    drawn = {path: svg for path, svg in made.items() if path.suffix == ".svg"}
    assert drawn and all(f"]({path.name})" in text for path in drawn)
    for svg in drawn.values():
        root = ET.fromstring(svg)
        assert root.tag == "{http://www.w3.org/2000/svg}svg" and "prefers-color-scheme: dark" in svg and "<script" not in svg
    front = study_pages.front(recorded, "small")
    titles = [one.text for one in ET.fromstring(front).iter("{http://www.w3.org/2000/svg}title")]
    assert titles == ["ahead of fresh weights that saw the same tokens\n0.5: 0.4\n2 seeds"]
    assert study_pages.front(recorded, "none") is None and study_pages.pages(tmp_path / "nowhere", tmp_path) == {}
