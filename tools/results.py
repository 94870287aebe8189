"""Write docs/results.md, and tables of other pages, from the records in results/*.jsonl. Nobody types a number.

With --check nothing is written: exit code 1 says that a page differs from its records.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import oneshot_tables
import reliability_tables
import shipping_tables
import study_pages
import study_tables
import training_tables
from oneshot_tables import CORPORA, flags, quality_row

from prunus import record
from prunus.methods import METHODS
from prunus.tables import markdown, number

ROOT = Path(__file__).resolve().parent.parent
MARKERS = ("<!-- results: begin (written by `make results`) -->", "<!-- results: end -->")
PER_PROCESSOR = ("train-speed",)  # kinds of which every processor's newest run is shown
README_ROWS = (
    "dense", "flap --ratio 0.2", "prunus --ratio 0.2", "flap --ratio 0.3", "prunus --ratio 0.3",
    "sparsegpt --ratio 0.5", "prunus-sparse --ratio 0.5",
)  # fmt: skip


def load(folder: Path) -> list[dict[str, Any]]:
    """All records of all files; of several runs of one recipe the newest, or each processor's newest."""
    newest: dict[tuple[str, ...], dict[str, Any]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for row in record.read(path):
            where = str(row["machine"]["cpu"]) if row["kind"] in PER_PROCESSOR else ""
            newest[(row["kind"], row["recipe_hash"], where, *(str(row.get(key)) for key in ("study", "arm")))] = row
    return list(newest.values())


def page(records: list[dict[str, Any]]) -> str:
    """docs/results.md."""
    runs = [r for r in records if r["kind"] == "oneshot"]
    costs = [r for r in records if r["kind"] == "oneshot-cost"]
    streams = [r for r in records if r["kind"] == "stream"]
    lines = ["# Measured results", "", "Written by `make results` from `results/*.jsonl`; do not edit.", ""]
    if runs:
        lines += ["## Protocol", "", *oneshot_tables.protocol(runs), ""]
        by_method: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for row in runs:
            request = row["recipe"]["request"]
            by_method[request["method"] if request else "dense"].append(row)
        for method in ("dense", *(m for m in METHODS if m in by_method)):
            rows = sorted(by_method[method], key=lambda r: flags(r["recipe"]["request"]))
            lines += [f"## {method}", "", *markdown(oneshot_tables.QUALITY, [quality_row(r) for r in rows]), ""]
    if compared := oneshot_tables.comparison(runs):
        lines += ["## Structured methods side by side", "", *compared, ""]
    if costs:
        lines += ["## Cost", "", *oneshot_tables.cost_table(costs), ""]
    if streams:
        lines += ["## Streaming", "", *oneshot_tables.stream_table(streams), ""]
    trained = [r for r in records if r["kind"] == "train"]
    recovered = [r for r in records if r["kind"] == "recovery"]
    if recovered:
        lines += ["## Recovery", "", *training_tables.recovery_table(recovered), ""]
    speeds = [r for r in records if r["kind"] == "train-speed"]
    if speeds:
        lines += ["## Speed of training", "", *training_tables.speed_table(speeds), ""]
    if trained:
        lines += ["## Training", "", *training_tables.train_table(trained), ""]
    if studies := [r for r in records if r["kind"] == study_tables.KIND]:
        lines += ["## Cutting while training", "", *study_tables.tables(studies), ""]
    if pruning := [r for r in records if r["kind"] == study_tables.COST_KIND]:
        lines += ["## What cutting while training costs", "", *study_tables.cost_table(pruning), ""]
    lines += shipping_tables.parts(records)
    return "\n".join(lines).rstrip() + "\n"


def readme_table(records: list[dict[str, Any]]) -> str:
    """The few rows that the front page shows."""
    runs = {flags(r["recipe"]["request"]): r for r in records if r["kind"] == "oneshot" and r["recipe"]["seed"] is None}
    header = ["SmolLM2-135M", "parameters", "removed of block", *(f"{name} perplexity" for _, name in CORPORA)]
    rows = []
    for name in README_ROWS:
        if name in runs:
            full = quality_row(runs[name])
            rows.append([full[0], full[1], full[3], full[4], full[6]])
    for r in records:
        if r["kind"] == "recovery" and r["figures"]["tokens"]:
            f, how = r["figures"], {"plain": "trained on", "distilled": "taught by its parent on"}[r["recipe"]["arm"]]
            removed = quality_row(runs["flap --ratio 0.2"])[3]
            perplexities = [number(f[corpus]["perplexity"]) for corpus, _ in CORPORA]
            rows.append([f"`flap --ratio 0.2`, {how} {f['tokens']:,} tokens", f"{f['params']:,}", removed, *perplexities])
    return "\n".join(markdown(header, rows))


def with_table(text: str, table: str) -> str:
    """`text` with the part between the markers replaced."""
    before, _, rest = text.partition(MARKERS[0])
    _, _, after = rest.partition(MARKERS[1])
    return f"{before}{MARKERS[0]}\n{table}\n{MARKERS[1]}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    records = load(ROOT / "results")
    readme = ROOT / "README.md"
    pages = {ROOT / "docs" / "results.md": page(records)}
    if answers := shipping_tables.answers(records):
        pages[ROOT / "docs" / "answers.md"] = answers
    pages |= study_pages.pages(ROOT / "results" / "studies", ROOT / "docs" / "studies")
    if picture := study_pages.front(ROOT / "results" / "studies", "half"):
        pages[ROOT / "docs" / "front.svg"] = picture
    trust = ROOT / "docs" / "reliability.md"
    pages[trust] = with_table(
        trust.read_text(encoding="utf-8"), reliability_tables.table(records, ROOT / "results" / "suite")
    )
    pages[readme] = with_table(readme.read_text(encoding="utf-8"), readme_table(records))
    stale = [p for p, text in pages.items() if not p.exists() or p.read_text(encoding="utf-8") != text]
    for path in stale:
        if check:
            print(f"{path.relative_to(ROOT)} differs from its records; run make results", file=sys.stderr)
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(pages[path], encoding="utf-8")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
