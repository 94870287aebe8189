"""Pages of recorded studies: docs/studies/NAME.md with its tables, and its figures as SVG files, from results/studies/NAME."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from prunus.study import formats, page
from prunus.study.charts import Series, alone, leads
from prunus.study.results import LOSS, Results, load
from prunus.tables import cell, fenced, markdown

READING = "reading.md"  # what people make of it, beside the records
_MOST = 12  # figures of a page


def pages(recorded: Path, docs: Path) -> dict[Path, str]:
    """Every file that is made from the records: path -> text."""
    out: dict[Path, str] = {}
    for folder in sorted(path for path in recorded.iterdir() if path.is_dir()) if recorded.is_dir() else ():
        found = load(folder)
        drawn = page.of_study(found)
        figures = [(f"{folder.name}-{i + 1}.svg", one) for i, one in enumerate(drawn.charts[:_MOST])]
        out |= {docs / name: alone(str(one.svg)) for name, one in figures}
        out[docs / f"{folder.name}.md"] = _text(folder, found, drawn, figures)
    return out


def _text(folder: Path, found: Results, drawn: page.Page, figures: list[tuple[str, page.Drawn]]) -> str:
    reading = folder / READING
    lines = [f"# {cell(found.name)}", "", "Written by `make results` from recorded runs; nobody typed a number.", ""]
    lines += [f"- {name}: {value}" for name, value in drawn.facts] + [""]
    lines += [f"> {cell(note)}" for note in drawn.notes] + [""]
    if reading.is_file():
        lines += [reading.read_text(encoding="utf-8").strip(), ""]
    tables = formats.tables(found)
    for table in tables[:1]:
        lines += _table(table)
    lines += ["## Figures", ""]
    for name, one in figures:
        lines += [f"**{cell(one.title)}**{f' ({one.note})' if one.note else ''}", "", f"![{cell(one.title)}]({name})", ""]
    for table in tables[1:]:
        lines += _table(table)
    lines += ["## The study's file", "", *fenced(dict(drawn.sources)["The study's file"].rstrip(), "yaml"), ""]
    return "\n".join(lines)


def _table(table: formats.Table) -> list[str]:
    rows = [[cell(one) for one in row] for row in table.rows]
    return [f"## {table.title}", "", *markdown([*map(cell, table.header)], rows, left=table.left), ""]


FRONT = {  # protocol -> what the front page calls it
    "training-tokens": "ahead of fresh weights that saw the same tokens",
    "total-tokens": "ahead of fresh weights that saw the parent's tokens, too",
}


def front(recorded: Path, name: str) -> str | None:
    """The picture of the front page: what pruned weights are ahead, by method, in the first comparison of each protocol."""
    if not (recorded / name).is_dir():
        return None
    found = load(recorded / name)
    rows: list[str] = []
    drawn = []
    for protocol, told in FRONT.items():
        arms = next((" over ".join(part["arms"]) for part in found.written["compare"] if part["protocol"] == protocol), None)
        lines, places = page.by_place(found, LOSS, 1.0, protocol)
        for one in lines:
            if one.name == arms:
                rows += [row for row in places if row not in rows]
                points = tuple(replace(point, y=rows.index(places[round(point.y)])) for point in one.points)
                drawn.append(Series(told, points))
    used = [row for i, row in enumerate(rows) if any(round(p.y) == i for one in drawn for p in one.points)]
    moved = [replace(one, points=tuple(replace(p, y=used.index(rows[round(p.y)])) for p in one.points)) for one in drawn]
    svg = leads(moved, used, x="nats a token that pruned weights are ahead")
    return alone(svg) if svg else None
