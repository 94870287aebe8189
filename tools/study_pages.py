"""Pages of recorded studies: docs/studies/NAME.md with its tables, and its figures as SVG files, from results/studies/NAME."""

from __future__ import annotations

from pathlib import Path

from prunus.study import formats, page
from prunus.study.charts import alone
from prunus.study.results import Results, load
from prunus.tables import markdown

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
    lines = [f"# {found.name}", "", "Written by `make results` from recorded runs; nobody typed a number.", ""]
    lines += [f"- {name}: {value}" for name, value in drawn.facts] + [""]
    lines += [f"> {note}" for note in drawn.notes] + [""]
    if reading.is_file():
        lines += [reading.read_text(encoding="utf-8").strip(), ""]
    tables = formats.tables(found)
    for table in tables[:1]:
        lines += _table(table)
    lines += ["## Figures", ""]
    for name, one in figures:
        lines += [f"**{one.title}**{f' ({one.note})' if one.note else ''}", "", f"![{one.title}]({name})", ""]
    for table in tables[1:]:
        lines += _table(table)
    lines += ["## The study's file", "", "```yaml", dict(drawn.sources)["The study's file"].rstrip(), "```", ""]
    return "\n".join(lines)


def _table(table: formats.Table) -> list[str]:
    rows = [[formats.cell(cell) for cell in row] for row in table.rows]
    return [f"## {table.title}", "", *markdown([*table.header], rows, left=table.left), ""]


def lead_picture(recorded: Path, name: str) -> str | None:
    """The first figure of who is ahead, for the front page."""
    if not (recorded / name).is_dir():
        return None
    drawn = page.of_study(load(recorded / name)).charts
    return next((alone(str(one.svg)) for one in drawn if one.title.startswith("Who is ahead")), None)
