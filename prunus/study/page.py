"""One HTML page of a study or of a run: figures, tables that sort, recipe and ledger. No network, no library, nothing but text.

Whatever stands in records is escaped, and the page's own policy lets the browser run its one script and load nothing.
"""

from __future__ import annotations

import base64
import hashlib
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from .. import record
from ..errors import UserError
from ..ledger import Ledger
from ..place import check_files, staged_files
from ..shrink_plots import WORDS, Shrinking
from ..tables import big, scientific
from ..train.listing import begun, finished, logged
from ..train.opening import LEDGER, RECIPE
from .charts import STYLE, Point, Series, chart, leads
from .formats import Table, tables
from .results import LOSS, STUDY, Metric, Results, Run, differences, is_loss, is_seed, last, load, reach_of

_SCRIPT = """
for (const head of document.querySelectorAll("th")) {
  const sort = () => {
    const table = head.closest("table"), body = table.tBodies[0], column = [...head.parentNode.children].indexOf(head);
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const scale = {k: 1e3, M: 1e6, G: 1e9, T: 1e12};
    const key = (row) => {
      const text = row.cells[column].textContent.trim();
      const found = text.replaceAll(",", "").match(/^[+-]?\\d+(\\.\\d+)?(e[+-]?\\d+)?( ([kMGT]))?/);
      return found ? parseFloat(found[0]) * (scale[found[4]] || 1) : text;
    };
    const rows = [...body.rows].sort((a, b) => {
      const x = key(a), y = key(b);
      const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
      return up ? order : -order;
    });
    body.append(...rows);
  };
  head.addEventListener("click", sort);
  head.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
}
"""
_CURVES = 40  # runs whose curves are drawn in one picture
_KEPT = 400  # points of a curve


@dataclass
class Drawn:
    """A figure."""

    title: str
    note: str
    svg: Markup


@dataclass
class Page:
    """What a page shows, in its order."""

    kind: str
    title: str
    lead: list[str] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    charts: list[Drawn] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    sources: list[tuple[str, str]] = field(default_factory=list)

    def draw(self, title: str, note: str, series: Sequence[Series], **options: Any) -> None:
        """Add a figure, if there is anything in it."""
        self.add(title, note, chart(series, **options))

    def add(self, title: str, note: str, svg: str) -> None:
        """Add a picture, if there is one."""
        if svg:
            self.charts.append(Drawn(title, note, Markup(svg)))

    def html(self) -> str:
        """The page as text."""
        digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
        loader = PackageLoader("prunus.study", ".")
        made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=False)
        told = vars(self) | {"script": Markup(_SCRIPT), "script_hash": f"sha256-{digest}", "chart_style": Markup(STYLE)}
        return made.get_template("page.html.j2").render(told | {"version": record.versions()["prunus"]})


def write(folder: Path, out: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Writes the page of a study or a run; UserError for a folder that is neither, and for a file that is there."""
    if (folder / STUDY).is_file():
        page = of_study(load(folder))
    elif (folder / RECIPE).is_file():
        page = of_run(folder)
    else:
        what = "holds neither a study nor a training run" if folder.is_dir() else "no such file or folder"
        raise UserError(f"{folder}: {what}; give the --out of prunus study run or prunus train")
    check_files(out, overwrite=overwrite)
    text = page.html()
    with staged_files(out) as (stage,):
        stage.write_text(text, encoding="utf-8")
    return {"out": str(out), "bytes": len(text.encode()), "charts": len(page.charts), "tables": len(page.tables)}


# -- a study ----------------------------------------------------------------------------------------------------------------


def of_study(found: Results) -> Page:
    """A study as far as it is done."""
    page = Page("Study", found.name)
    kept = [p["holds"] for p in found.proofs]
    runs, total = len(found.runs), len(found.runs) + len(found.missing)
    page.facts = [
        ("runs done", f"{runs} of {total}"),
        ("protocols kept", f"{sum(kept)} of {len(kept)}" if kept else "none promised"),
        ("tokens trained on", big(sum(run.tokens for run in found.runs))),
        ("FLOPs, each run's own", scientific(sum(run.flops for run in found.runs))),
    ]
    page.lead = _found(found)
    if found.missing:
        more = " and others" if len(found.missing) > 6 else ""
        page.notes.append(f"Not done yet: {', '.join(found.missing[:6])}{more}.")
    if released := sorted({text for run in found.runs for text in run.unrecorded}):
        page.notes.append(f"Nothing is known of what went into {', '.join(released)}; costs with parents leave that out.")
    for metric in found.metrics[:4]:
        _study_charts(page, found, metric)
        for speed in dict.fromkeys(name for run in found.runs for name in run.milliseconds):
            _pareto(page, found, metric, speed)
    _curves(page, found)
    page.tables = tables(found)
    page.sources = [
        ("The study's file", yaml.safe_dump(dict(found.written), sort_keys=False, allow_unicode=True)),
        ("Where each run comes from", _origins(found.runs)),
    ]
    return page


def _found(found: Results) -> list[str]:
    """A sentence for each comparison on the first metric: how often which arm is better."""
    out = []
    metric = next(iter(found.metrics), None)
    groups: dict[tuple[str, tuple[str, str]], list[Any]] = {}
    for one in differences(found):
        if one.metric == metric:
            groups.setdefault((one.protocol, one.arms), []).append(one)
    for (protocol, arms), rows in groups.items():
        said = [row.verdict for row in rows]
        counted = ", ".join(f"{text}: {said.count(text)}" for text in dict.fromkeys(said))
        mean = statistics.fmean(row.mean for row in rows)
        unit = f"{mean:+.4f} nats a token" if is_loss(rows[0].metric) else f"{100 * mean:+.1f} points"
        equal = protocol.replace("-", " ")
        out.append(
            f"At equal {equal}, {arms[0]} less {arms[1]}: {unit} on {metric[0] if metric else ''} on average ({counted})."
        )
    return out


def _study_charts(page: Page, found: Results, metric: Metric) -> None:
    name = " ".join(metric)
    scale = 1.0 if is_loss(metric) else 100.0
    if any(last(key) == "tokens" for run in found.runs for key in run.place):
        lines = _by_tokens(found, metric, scale)
        note = "means over seeds, ± half of their 95 % interval"
        page.draw(f"{name} against tokens", note, lines, x="tokens trained on", y=name, log_x=True)
    ahead = "nats a token" if is_loss(metric) else "points"
    note = "right of zero the first arm is; ± half of the 95 % interval over seeds"
    for protocol in dict.fromkeys(part["protocol"] for part in found.written["compare"]):
        lines, rows = by_place(found, metric, scale, protocol)
        title = f"Who is ahead on {name}, equal {protocol.replace('-', ' ')}"
        page.add(title, note, leads(lines, rows, x=f"ahead, {ahead}"))
    spent: dict[str, list[Point]] = {}
    for run in found.runs:
        if run.total_flops and metric in run.scores:
            spent.setdefault(run.arm, []).append(
                Point(float(run.total_flops), scale * run.scores[metric].value, label=run.name)
            )
    dots = [Series(arm, tuple(points), joined=False) for arm, points in spent.items()]
    if sum(len(one.points) for one in dots) > 1:
        page.draw(
            f"{name} against what it cost",
            "every run, with its parents",
            dots,
            x="FLOPs",
            y=name,
            log_x=True,
            known=arms_of(found),
        )
    note = "first arm less second" + ("; below zero the first is better" if is_loss(metric) else "")
    for key in dict.fromkeys(k for run in found.runs for k in run.place if last(k) == "ratio"):
        lines = _advantages(found, metric, key, scale)
        page.draw(f"Advantage on {name} by ratio", note, lines, x="share removed", y="difference", zero=True)


def by_place(found: Results, metric: Metric, scale: float, protocol: str) -> tuple[list[Series], list[str]]:
    """What first arms of comparisons are ahead, by methods and cuts; what hangs on tokens has a picture of its own."""
    pairs: dict[str, list[tuple[str, Point]]] = {}
    sign = -scale if is_loss(metric) else scale
    for one in differences(found):
        if one.metric == metric and one.protocol == protocol and "tokens" not in map(last, one.place):
            name = " over ".join(one.arms)
            row = ", ".join(map(str, one.place.values())) or one.arms[0]
            error = None if one.reach is None else scale * one.reach
            seeds = f"{one.seeds} seed{'s' if one.seeds > 1 else ''}"
            pairs.setdefault(name, []).append((row, Point(sign * one.mean, 0, error, seeds)))
    rows = list(dict.fromkeys(row for points in pairs.values() for row, _ in points))
    lines = [
        Series(name, tuple(replace(point, y=rows.index(row)) for row, point in points)) for name, points in pairs.items()
    ]
    return lines, rows


def _pareto(page: Page, found: Results, metric: Metric, speed: str) -> None:
    """Quality against measured milliseconds: means over seeds, and the line that nothing lies beyond."""
    scale = 1.0 if is_loss(metric) else 100.0
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in found.runs:
        if metric in run.scores and speed in run.milliseconds:
            groups.setdefault((run.arm, run.group), []).append(run)
    arms: dict[str, list[Point]] = {}
    for (arm, group), runs in groups.items():
        values = [scale * run.scores[metric].value for run in runs]
        at = statistics.fmean(run.milliseconds[speed] for run in runs)
        arms.setdefault(arm, []).append(Point(at, statistics.fmean(values), reach_of(values), group))
    best, front = math.inf, []
    sign = 1 if is_loss(metric) else -1
    for point in sorted((p for points in arms.values() for p in points), key=lambda p: (p.x, sign * p.y)):
        if sign * point.y < best:
            best = sign * point.y
            front.append(Point(point.x, point.y, label=point.label))
    name = " ".join(metric)
    dots = [Series(arm, tuple(points), joined=False) for arm, points in arms.items()]
    lines = [*dots, Series("nothing beyond", tuple(front))] if len(front) > 1 else dots
    if sum(len(points) for points in arms.values()) < 2:
        return
    title, note = f"{name} against time to {speed}", "measured here, one at a time; means over seeds"
    page.draw(title, note, lines, x="milliseconds", y=name, known=arms_of(found))


def arms_of(found: Results) -> list[str]:
    """Its arms, in their order: each looks alike wherever it is drawn by itself."""
    return list(dict.fromkeys(run.arm for run in found.runs))


def _by_tokens(found: Results, metric: Metric, scale: float) -> list[Series]:
    """Means over seeds, a line for every arm and place."""
    lines: dict[str, dict[float, list[float]]] = {}
    for run in found.runs:
        if metric in run.scores and run.tokens:
            place = ", ".join(str(v) for k, v in run.place.items() if not is_seed(k) and last(k) != "tokens")
            name = f"{run.arm}, {place}" if place else run.arm
            lines.setdefault(name, {}).setdefault(float(run.tokens), []).append(scale * run.scores[metric].value)
    out = []
    for name, points in lines.items():
        drawn = [Point(at, statistics.fmean(ys), reach_of(ys), f"{len(ys)} runs") for at, ys in sorted(points.items())]
        out.append(Series(name, tuple(drawn)))
    return out


def _advantages(found: Results, metric: Metric, key: str, scale: float) -> list[Series]:
    lines: dict[str, list[Point]] = {}
    for one in differences(found):
        if one.metric != metric:
            continue
        at = one.place.get(key)
        if not isinstance(at, int | float):  # a share, not the name of one
            continue
        others = [str(value) for other, value in one.place.items() if other != key]
        name = ", ".join([" - ".join(one.arms), *([" ".join(others)] if others else [])])
        error = None if one.reach is None else scale * one.reach
        lines.setdefault(name, []).append(Point(float(at), scale * one.mean, error, f"{one.seeds} seeds"))
    return [Series(name, tuple(sorted(points, key=lambda p: p.x))) for name, points in lines.items()]


def _curves(page: Page, found: Results) -> None:
    drawn = [run for run in found.runs if len(run.curve) > 1]
    if 0 < len(drawn) <= _CURVES:
        lines = [Series(run.arm, tuple(Point(float(a), b, label=run.name) for a, b in _thin(run.curve))) for run in drawn]
        page.draw(
            "Validation while training",
            "every run, a colour an arm",
            lines,
            x="tokens trained on",
            y=" ".join(LOSS),
            known=arms_of(found),
        )


def _origins(runs: Sequence[Run]) -> str:
    return "\n".join(f"{run.name}: recipe {run.recipe_hash or '-'}, commit {run.commit or '-'}" for run in runs)


# -- a run ------------------------------------------------------------------------------------------------------------------


def of_run(folder: Path) -> Page:
    """A training run as far as it is: losses, rate, parameters alive. UserError for files that are no run's."""
    try:
        return _of_run(folder)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: cannot be read as a run ({type(error).__name__}: {error})") from error


def _of_run(folder: Path) -> Page:
    recipe = begun(folder)
    lines = logged(folder)
    done = finished(folder)
    updates = [line for line in lines if "loss" in line]
    watched = [line for line in lines if "validation" in line]
    page = Page("Training run", folder.name)
    planned = recipe["tokens"] // recipe["batch_tokens"] * recipe["batch_tokens"]
    seen = updates[-1]["tokens"] if updates else 0
    page.facts = [("tokens", f"{big(seen)} of {big(planned)}")]
    if watched:
        page.facts.append(("validation loss", f"{watched[-1]['validation']['loss']:.4f}"))
    if done is not None:
        figures = done.figures
        page.facts += [("parameters", big(figures.params)), ("FLOPs", scientific(sum(figures.flops.values())))]
        page.facts.append(("seconds", f"{figures.seconds:,.0f}"))
    else:
        page.notes.append("This run is not finished: what it has logged so far.")
    thin = _thin(updates)
    seen_losses = [
        ("training", _points(thin, "loss")),
        ("validation", _points([w | w["validation"] for w in watched], "loss")),
    ]
    page.draw("Loss", "nats a token", [Series(name, points) for name, points in seen_losses if points], x="tokens", y="loss")
    page.draw("Learning rate", "", [Series("rate", _points(thin, "lr"))], x="tokens", y="rate")
    if len({line.get("params") for line in updates}) > 1:
        alive = Series("parameters", _points(thin, "params"))
        page.draw("Parameters", "how the model shrinks", [alive], x="tokens", y="parameters")
    _shrinking(page, lines)
    if (folder / LEDGER).is_file():
        page.tables.append(_ledger(Ledger.read(folder)))
    page.sources.append(("The recipe", yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)))
    if done is not None:
        told = done.model_dump(include={"commit", "recipe_hash", "time", "versions", "machine"})
        page.sources.append(("Where it comes from", yaml.safe_dump(told, sort_keys=False)))
    return page


def _shrinking(page: Page, lines: Sequence[dict[str, Any]]) -> None:
    """What a run that cuts cut: how much of each axis, and what its next group was worth."""
    found = Shrinking.of(lines)
    if found is None:
        return
    gone, worth = [], []
    for kind in found.candidates:
        shares, edges = found.gone(kind), found.edges
        steps = [(at, share) for i, share in enumerate(shares) for at in edges[i : i + 2]]  # level between cuts
        gone.append(Series(WORDS[kind], tuple(Point(float(at), 100 * share) for at, share in _thin(steps))))
        told = [Point(float(e.tokens), e.saliency[kind]) for e in found.events if kind in e.saliency]
        worth.append(Series(WORDS[kind], tuple(_thin(told))))
    page.draw("How much of each axis was cut", "of all layers together", gone, x="tokens", y="% that went")
    note = "saliency over price; the least went first"
    page.draw("What the next group of each kind was worth", note, worth, x="tokens", y="saliency", log_y=True)


def _points(lines: Sequence[dict[str, Any]], name: str) -> tuple[Point, ...]:
    return tuple(Point(float(line["tokens"]), float(line[name])) for line in lines)


def _ledger(ledger: Ledger) -> Table:
    rows = [
        (
            stage["name"], "parent" if stage["parent"] else "this run", big(stage["tokens"]), big(stage["unique_tokens"]),
            scientific(sum(stage["flops"].values())), " ".join(stage["data"]),
        )
        for stage in ledger.summary()["stages"]
    ]  # fmt: skip
    return Table("Ledger", ("stage", "of", "tokens", "different", "FLOPs", "data"), tuple(rows), 2)


def _thin(points: Sequence[Any]) -> Sequence[Any]:
    """At most `_KEPT` of many points, the last among them."""
    step = -(-len(points) // _KEPT)
    return [*points[:-1:step], points[-1]] if step > 1 else points
