"""What the records of studies say: differences seed by seed, tables in every form, the index, and pages nothing breaks into."""

import csv
import io
import json
import math
import re
import sqlite3
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import shrinking
import training
from pipeline import cli

from prunus.errors import UserError
from prunus.study import claims, formats, page, results
from prunus.study.charts import Point, Series, chart, leads

BROWSER = Path(__file__).with_name("browser.py")
EVIL = "</title><script>alert(1)</script>\"'&<img src=x onerror=alert(1)>"


def line(arm, seed, loss, *, ratio=0.5, accuracy=None, flops=100, tokens=10, name=None):
    """A record as `gather` writes it."""
    figures = {
        "params": 7, "tokens": tokens,
        "validation": [{"tokens": tokens // 2, "validation": {"loss": loss + 1}}, {"tokens": tokens, "validation": {"loss": loss}}],
    }  # fmt: skip
    tasks = {} if accuracy is None else {"piqa": {"metric": "acc", "acc": {"mean": accuracy, "error": 0.02, "items": 100}}}
    scored = {
        "params": 7,
        "texts": [{"loss": loss / 2, "text": {"source": "w.txt", "documents": None}}],
        "tasks": tasks,
        "means": {},
    }
    stages = [
        {"name": "x", "parent": False, "params": 7, "tokens": tokens, "unique_tokens": tokens, "flops": {"train": flops}}
    ]
    ledger = {
        "tokens": tokens,
        "flops": flops,
        "total_tokens": 2 * tokens,
        "total_flops": 10**22,
        "unrecorded": [],
        "stages": stages,
    }
    place = {"cut.ratio": ratio, "data.seed": seed}
    run = name or f"{arm}_ratio={ratio}_seed={seed}"
    return {
        "run": run, "arm": arm, "place": place, "figures": figures, "evaluations": [{"figures": scored}], "ledger": ledger,
        "recipe_hash": "abc", "commit": "def",
    }  # fmt: skip


def folder(tmp_path, lines, *, missing=(), compare=None, name="half", proofs=()):
    out = tmp_path / "study"
    out.mkdir()
    compare = [{"protocol": "training-tokens", "arms": ["P-R", "S"]}] if compare is None else compare
    told = {"name": name, "file": {"name": name, "compare": compare}, "runs": [one["run"] for one in lines] + list(missing)}
    (out / "study.json").write_text(json.dumps(told), encoding="utf-8")
    (out / "records.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8")
    (out / "proofs.json").write_text(json.dumps(list(proofs)), encoding="utf-8")
    return out


def three_seeds():
    """P-R ahead by 0.15, 0.2, 0.25: mean 0.2, standard deviation 0.05, standard error 0.0289, half of the interval 0.1242."""
    return [line("P-R", s, 3.85 - 0.05 * s) for s in range(3)] + [line("S", s, 4.0) for s in range(3)]


def test_differences_are_seed_by_seed(tmp_path):
    found = results.load(folder(tmp_path, three_seeds()))
    one = next(d for d in results.differences(found) if d.metric == results.LOSS)
    assert one.seeds == 3 and one.mean == pytest.approx(-0.2) and one.error == pytest.approx(0.05 / math.sqrt(3))
    assert one.verdict == "P-R better" and one.group == "ratio=0.5"
    text = next(d for d in results.differences(found) if d.metric == ("w.txt", "loss"))
    assert text.mean == pytest.approx(-0.1)


@pytest.mark.parametrize(
    ("apart", "verdict"),
    [
        ((0.1, 0.1, 0.1), "S better"),
        ((0.1, 0.2, 0.3), "within noise"),  # 3.46 standard errors from zero: of three seeds not far enough
        ((0.15, 0.2, 0.25), "S better"),
        ((-0.1, -0.1, -0.1), "P-R better"),
        ((0.1, -0.1, 0.05), "within noise"),
        ((0.0, 0.0, 0.0), "within noise"),
    ],
)  # fmt: skip
def test_verdicts_take_the_interval_of_so_few_seeds(apart, verdict, tmp_path):
    lines = [line("P-R", s, 4.0 + d) for s, d in enumerate(apart)] + [line("S", s, 4.0) for s in range(3)]
    one = next(d for d in results.differences(results.load(folder(tmp_path, lines))) if d.metric == results.LOSS)
    assert one.verdict == verdict


@pytest.mark.parametrize("count", [2, 3, 5, 11, 12, 13, 20, 60, 1000])
def test_the_interval_is_student_s(count):
    """The density of t, summed by Simpson's rule from 0 to the quantile, is 0.475."""
    freedom, end, steps = count - 1, results.half_interval(1.0, count), 20_000
    scale = math.exp(math.lgamma(count / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    density = [scale * (1 + (i * end / steps) ** 2 / freedom) ** (-count / 2) for i in range(steps + 1)]
    total = (density[0] + density[-1] + 4 * sum(density[1:-1:2]) + 2 * sum(density[2:-1:2])) * end / steps / 3
    assert total == pytest.approx(0.475, abs=1e-4)


def test_more_is_better_of_accuracy_and_one_seed_has_the_papers_rule(tmp_path):
    lines = [line("P-R", 0, 4.0, accuracy=0.65), line("S", 0, 4.0, accuracy=0.62)]
    found = results.load(folder(tmp_path, lines))
    by = {d.metric: d for d in results.differences(found)}
    assert by["piqa", "acc"].verdict == "P-R better" and by["piqa", "acc"].noise == 0.02
    assert by[results.LOSS].verdict == "one run each"
    close = [line("P-R", 0, 4.0, accuracy=0.63), line("S", 0, 4.0, accuracy=0.62)]
    (tmp_path / "b").mkdir()
    found = results.load(folder(tmp_path / "b", close))
    assert {d.metric: d for d in results.differences(found)}["piqa", "acc"].verdict == "within noise"


@pytest.mark.parametrize("keys", [("seed+data.seed", "data.seed"), ("seed", "data.seed"), ("seed", "seed+data.seed")])
def test_a_repetition_meets_its_like_whatever_its_seeds_are_called(keys, tmp_path):
    lines = [one | {"place": {"cut.ratio": 0.5, keys[one["arm"] == "S"]: i % 3}} for i, one in enumerate(three_seeds())]
    found = results.load(folder(tmp_path, lines))
    one = next(d for d in results.differences(found) if d.metric == results.LOSS)
    assert one.seeds == 3 and one.mean == pytest.approx(-0.2) and one.error == pytest.approx(0.05 / math.sqrt(3))
    (claim,) = claims.verdicts(replace(found, written=found.written | {"claims": [{"says": "x", "better": ["P-R", "S"]}]}))
    assert claim.told == "0.5 +0.2000 ± 0.1242; 3 seeds"


def test_an_arm_that_is_trained_once_is_compared_with_every_seed(tmp_path):
    parent = line("S", 0, 4.0)
    parent["place"] = {}
    found = results.load(folder(tmp_path, [line("P-R", 0, 3.8), line("P-R", 1, 3.6), parent]))
    one = next(d for d in results.differences(found) if d.metric == results.LOSS)
    assert one.seeds == 2 and one.mean == pytest.approx(-0.3)


def test_tables_say_the_same_in_every_form(tmp_path):
    found = results.load(folder(tmp_path, three_seeds(), missing=["S_ratio=0.9"]))
    text = formats.written(found, "markdown")
    assert "| P-R - S | ratio=0.5 | validation loss | 3.8000 | 4.0000 | -0.2000 ± 0.1242 | 3 | P-R better |" in text
    assert "3.8000 (3.7500 to 3.8500)" in text and "without 1 run that is not done" in text
    tex = formats.written(found, "latex")
    assert r"-0.2000 $\pm$ 0.1242" in tex and tex.count(r"\begin{tabular}") == tex.count(r"\end{tabular}") == 2
    rows = list(csv.DictReader(io.StringIO(formats.written(found, "csv"))))
    assert len(rows) == 12 and {row["cut.ratio"] for row in rows} == {"0.5"}
    assert sum(float(r["value"]) for r in rows if r["arm"] == "S" and r["on"] == "validation") == pytest.approx(12.0)
    with pytest.raises(UserError, match="unknown format 'latx'"):
        formats.written(found, "latx")


def test_the_index_holds_every_figure(tmp_path):
    found = results.load(folder(tmp_path, three_seeds()))
    base = sqlite3.connect(results.index(found))
    sql = "select avg(value) from scores join runs using (run) where arm = 'P-R' and \"on\" = 'validation'"
    assert base.execute(sql).fetchone()[0] == pytest.approx(3.8)
    assert base.execute("select count(*), max(total_flops) from runs").fetchone() == (6, 1e22)
    assert base.execute("select count(*) from places where key = 'data.seed'").fetchone()[0] == 6
    base.close()
    results.index(found)  # made again


def test_folders_that_hold_no_study(tmp_path):
    with pytest.raises(UserError, match="holds no study; give the --out of prunus study run"):
        results.load(tmp_path)
    out = folder(tmp_path, three_seeds())
    (out / "study.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="cannot be read"):
        results.load(out)
    code, _, err = cli("report", tmp_path / "nothing", "--out", tmp_path / "x.html")
    assert code == 2 and "nothing: no such file or folder; give the --out of" in err
    (tmp_path / "empty").mkdir()
    code, _, err = cli("report", tmp_path / "empty", "--out", tmp_path / "x.html")
    assert code == 2 and "holds neither a study nor a training run" in err


# -- charts -----------------------------------------------------------------------------------------------------------------


def test_charts_are_xml_and_show_every_point():
    series = [Series(EVIL, (Point(1, 2, 0.5, EVIL), Point(10, 3))), Series("b", (Point(5, 2.5),), joined=False)]
    svg = chart(series, x=EVIL, y="loss", log_x=True)
    root = ET.fromstring(svg)
    marks = [one for one in root.iter() if one.tag in ("circle", "rect", "polygon")]
    titles = [one.text for one in root.iter("title")]
    assert len(titles) == 3 and len(marks) == 3 + 2 and len(list(root.iter("polyline"))) == 1
    assert titles[0] == f"{EVIL}\n1: 2 ± 0.5\n{EVIL}" and not list(root.iter("script"))
    _, _, width, height = map(float, root.get("viewBox").split())
    for one in root.iter("circle"):
        assert 0 < float(one.get("cx")) < width and 0 < float(one.get("cy")) < height


def test_series_of_one_name_share_colour_and_legend():
    lines = [Series("a", (Point(0, i), Point(1, i + 1))) for i in range(3)] + [Series("b", (Point(0, 9), Point(1, 9)))]
    root = ET.fromstring(chart(lines, x="x", y="y"))
    assert [one.get("class") for one in root.iter("g") if one.find("polyline") is not None] == ["c0", "c0", "c0", "c1"]
    assert [one.text for one in root.iter("text")][-2:] == ["a", "b"]


def test_a_point_lies_where_its_numbers_say():
    svg = chart([Series("a", (Point(0, 0), Point(10, 1), Point(5, 0.5)))], x="x", y="y")
    found = [(float(a), float(b)) for a, b in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="4.5"/></g>', svg)]
    (x0, y0), (x1, y1), (x2, y2) = found[:3]
    assert (
        x2 == pytest.approx((x0 + x1) / 2, abs=0.1) and y2 == pytest.approx((y0 + y1) / 2, abs=0.1) and x0 < x1 and y0 > y1
    )


@pytest.mark.parametrize(
    "points", [(), (Point(math.nan, 1.0),), (Point(0.0, 1.0),), (Point(-1.0, 1.0), Point(1.0, math.inf))], ids=str
)
def test_nothing_to_show_is_no_chart(points):
    assert chart([Series("a", points)], x="x", y="y", log_x=True) == ""


def test_one_point_and_equal_points_have_axes():
    for points in ((Point(1e9, 3.0),), (Point(1.0, 3.0), Point(1.0, 3.0)), (Point(0.0, 0.0),)):
        root = ET.fromstring(chart([Series("a", points)], x="x", y="y"))
        assert len([one for one in root.iter("line") if one.get("class") == "grid"]) >= 2
        assert all(0 < float(one.get("cx")) < 480 for one in root.iter("circle"))


def test_rows_of_leads_stand_where_their_numbers_say():
    rows = ["depth", EVIL, "wanda"]
    both = [
        Series("a", (Point(-0.2, 0, 0.1), Point(0.4, 2, 0.1, "3 seeds"))),
        Series("b", (Point(0.1, 1), Point(math.nan, 1))),
    ]
    root = ET.fromstring(leads(both, rows, x="ahead"))
    titles = [one.text for one in root.iter("title")]
    assert titles == ["a\ndepth: -0.2 ± 0.1", "a\nwanda: 0.4 ± 0.1\n3 seeds", f"b\n{EVIL}: 0.1"]
    spots = [
        (float(m.get("cx")), float(m.get("cy")))
        for g in root.iter("g")
        if g.find("title") is not None
        for m in g.iter("circle")
    ]
    grid = [float(one.get("y1")) for one in root.iter("line") if one.get("class") == "grid"]
    zero = next(float(one.get("x1")) for one in root.iter("line") if one.get("class") == "zero")
    assert len(grid) == 3 and [min(range(3), key=lambda i: abs(grid[i] - y)) for _, y in spots] == [0, 2, 1]
    assert spots[0][0] < zero < spots[2][0] < spots[1][0]
    assert (spots[1][0] - zero) / (zero - spots[0][0]) == pytest.approx(2, rel=0.01)
    assert leads([Series("a", (Point(math.nan, 0),))], rows, x="ahead") == ""


def test_a_logarithmic_height_leaves_out_what_is_not_above_zero():
    svg = chart(
        [Series("a", (Point(0, 1e-6), Point(1, 1e-3), Point(2, 1.0), Point(3, 0.0), Point(4, -1.0)))],
        x="x",
        y="y",
        log_y=True,
    )
    found = [float(b) for _, b in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="4.5"/></g>', svg)][:3]
    assert len(re.findall("<title>", svg)) == 3 and found[0] - found[1] == pytest.approx(found[1] - found[2], abs=0.2)


# -- pages ------------------------------------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Tags, and what they could load."""

    def __init__(self):
        super().__init__()
        self.tags, self.loads = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [(tag, name) for name, value in attrs if name in ("src", "href", "onerror", "onload", "onclick")]


def test_a_page_of_hostile_names_holds_one_script_and_loads_nothing(tmp_path):
    lines = [line(EVIL, 0, 3.0, name=EVIL), line("S", 0, 3.2), line("P-R", 0, 3.0, ratio=EVIL)]
    proofs = [{"protocol": "training-tokens", "runs": [EVIL, EVIL], "holds": False, "why": EVIL}]
    out = folder(
        tmp_path, lines, name=EVIL, missing=[EVIL], proofs=proofs, compare=[{"protocol": EVIL, "arms": [EVIL, "S"]}]
    )
    text = page.of_study(results.load(out)).html()
    reader = Reader()
    reader.feed(text)
    assert reader.tags.count("script") == 1 and not reader.loads and "img" not in reader.tags
    assert "alert(1)" in text and "<script>alert" not in text and "http://" not in text and "https://" not in text
    assert "default-src 'none'" in text and len(text.encode()) < 5e6


def test_the_policy_names_the_script_that_is_there(tmp_path):
    import base64
    import hashlib

    text = page.of_study(results.load(folder(tmp_path, three_seeds()))).html()
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text


def test_a_page_shows_what_the_tables_say(tmp_path):
    ratios = [
        line(arm, s, loss + 0.1 * s, ratio=r) for r in (0.3, 0.6) for arm, loss in (("P-R", 3.0), ("S", 3.4)) for s in (0, 1)
    ]
    out = folder(tmp_path, ratios, missing=["S_more"])
    made = cli("report", out, "--json")
    assert made[0] == 0, made[2]
    text = (out / "report.html").read_text(encoding="utf-8")
    for want in (
        "8 of 9",
        "Not done yet: S_more",
        "P-R better",
        "Advantage on validation loss by ratio",
        "-0.4000 ± 0.0000",
        "-0.4000 nats a token",
    ):
        assert want in text, want
    for svg in re.findall(r"<svg.*?</svg>", text, re.S):
        ET.fromstring(svg)
    assert cli("report", out)[0] == 2 and cli("report", out, "--overwrite")[0] == 0


def test_a_line_is_of_one_place_whatever_its_values_hold(tmp_path):
    """Commas and equal signs are in values, too; a batch's tokens are not a run's."""
    lines = [
        line(arm, s, loss, ratio=r, name=f"{arm}{r}{len(at)}{s}")
        | {"place": {"cut.ratio": r, "mix": at, "batch_tokens": 8, "seed": s}}
        for arm, loss in (("P-R", 3.0), ("S", 3.4))
        for r in (0.3, 0.6)
        for at in (["a, b=1"], ["a, b=1", "c"])
        for s in (0, 1)
    ]
    found = results.load(folder(tmp_path, lines))
    made = page._advantages(found, results.LOSS, "cut.ratio", 1.0)
    assert {one.name: len(one.points) for one in made} == {"P-R - S, ['a, b=1'] 8": 2, "P-R - S, ['a, b=1', 'c'] 8": 2}
    assert page.by_place(found, results.LOSS, 1.0, "training-tokens")[1] == [
        f"{r}, {at}, 8" for r in (0.3, 0.6) for at in (["a, b=1"], ["a, b=1", "c"])
    ]


def timed(one, decode):
    cell = {"first_token_ms": {"median": 10 * decode}, "decode_ms": {"median": decode}}
    return one | {"measured": {"models": [{"cells": [cell]}]}}


def test_quality_against_milliseconds_has_the_line_that_nothing_lies_beyond(tmp_path):
    """Of (2 ms, 3.4), (1 ms, 3.9) and (3 ms, 3.5) the last is slower and worse than the first."""
    lines = [
        timed(line("P-R", 0, 3.4), 2.0),
        timed(line("S", 0, 3.9), 1.0),
        timed(line("T", 0, 3.5), 3.0),
        line("U", 0, 1.0),
    ]
    made = page.of_study(results.load(folder(tmp_path, lines)))
    drawn = {one.title: str(one.svg) for one in made.charts}
    svg = drawn["validation loss against time to a token"]
    front = [one.split("\n") for one in re.findall("<title>(nothing beyond[^<]*)</title>", svg)]
    assert [one[1] for one in front] == ["1: 3.9", "2: 3.4"] and "validation loss against time to first token" in drawn
    assert "U" not in re.findall("<text[^>]*>([^<]*)</text>", svg)


def test_a_page_shows_who_is_ahead_by_method(tmp_path):
    lines = [line(arm, s, loss, name=f"{arm}{m}{s}") | {"place": {"cut.method": m, "data.seed": s}}
             for m in ("flap", "wanda") for s in (0, 1) for arm, loss in (("P-R", 3.0 + s), ("S", 3.5 + s))]  # fmt: skip
    made = page.of_study(results.load(folder(tmp_path, lines)))
    svg = next(str(one.svg) for one in made.charts if one.title == "Who is ahead on validation loss, equal training tokens")
    pair = "P-R over S"
    assert re.findall("<title>([^<]*)</title>", svg) == [f"{pair}\n{m}: 0.5\n2 seeds" for m in ("flap", "wanda")]


def test_a_page_of_a_run_that_cuts_shows_what_went(tmp_path):
    out = tmp_path / "run"
    shrinking.run(out, shrinking.pruning(saliency={"metric": "second"}))
    page.write(out, tmp_path / "run.html")
    text = (tmp_path / "run.html").read_text(encoding="utf-8")
    cuts = shrinking.events(out)
    assert "How much of each axis was cut" in text and "What the next group of each kind was worth" in text
    whole, left = (tiny_sizes(out, which) for which in ("begin", "end"))
    assert cuts and f"{100 * (1 - left / whole):.4g}"[:4] in text


def tiny_sizes(out, which):
    """FFN channels of all layers, before the first cut and after the last."""
    cuts = shrinking.events(out)
    sizes = cuts[-1]["pruned"]["shape"]["intermediate_size"]
    layers = cuts[-1]["pruned"]["shape"]["num_hidden_layers"]
    left = sum(sizes) if isinstance(sizes, list) else sizes * layers
    gone = sum(len(units) for cut in cuts for name, units in cut["pruned"]["units"].items() if name.endswith("intermediate"))
    return left if which == "end" else left + gone


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1100])
def test_a_page_in_a_real_browser(width, scheme, tmp_path):
    """Nothing is refused, fails or is loaded; the page fits the screen, a click sorts a table, and the picture is no blank one."""
    pytest.importorskip("PySide6.QtWebEngineWidgets", exc_type=ImportError)
    ratios = [
        line(arm, s, loss + 0.1 * s, ratio=r) for r in (0.3, 0.6) for arm, loss in (("P-R", 3.0), ("S", 3.4)) for s in (0, 1)
    ]
    page.write(folder(tmp_path, ratios), tmp_path / "report.html")
    words = [sys.executable, str(BROWSER), str(tmp_path / "report.html"), str(tmp_path / "page.png"), str(width), scheme]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["said"] == [] and {url.split(":")[0] for url in seen["requests"]} == {"file"}
    assert seen["width"] <= seen["inner"] <= width and min(seen["drawn"]) > 0.7 * min(width, 480)
    assert seen["up"] == sorted(seen["up"]) and seen["down"] == seen["up"][::-1] and seen["sorted"] == "descending"
    light = sum(map(int, re.findall(r"\d+", seen["ground"])[:3])) > 3 * 128
    assert light == (scheme == "light") and len((tmp_path / "page.png").read_bytes()) > 20_000


def test_a_page_of_a_run_finished_or_not(tmp_path):
    done = training.finished()
    made = page.write(done, tmp_path / "run.html")
    text = (tmp_path / "run.html").read_text(encoding="utf-8")
    last = json.loads((done / "record.jsonl").read_text().splitlines()[-1])["figures"]
    assert made["charts"] == 2 and f"{last['validation'][-1]['validation']['loss']:.4f}" in text and "Ledger" in text
    half = tmp_path / "half"
    half.mkdir()
    (half / "recipe.json").write_text((done / "recipe.json").read_text())
    (half / "log.jsonl").write_text("\n".join((done / "log.jsonl").read_text().splitlines()[:3]) + "\n")
    page.write(half, tmp_path / "half.html")
    assert "not finished" in (tmp_path / "half.html").read_text(encoding="utf-8")
    (half / "recipe.json").write_text("{")
    with pytest.raises(UserError, match="half: cannot be read as a run"):
        page.write(half, tmp_path / "broken.html")


def test_an_arm_looks_alike_in_every_chart():
    point = (Point(1.0, 2.0), Point(2.0, 3.0))
    both = chart([Series("A", point), Series("B", point)], x="x", y="y", known=["A", "B"])
    one = chart([Series("B", point)], x="x", y="y", known=["A", "B"])
    assert 'class="c1"' in both and 'class="c1"' in one and 'class="c0"' not in one
    assert 'class="c2"' in chart([Series("C", point)], x="x", y="y", known=["A", "B"])
