"""Write docs/results.md, and tables of other pages, from the records in results/*.jsonl. Nobody types a number.

With --check nothing is written: exit code 1 says that a page differs from its records.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Any

import reliability_tables
import shipping_tables
import study_pages
import study_tables

from prunus import record, tables
from prunus.methods import METHODS
from prunus.tables import markdown, number

ROOT = Path(__file__).resolve().parent.parent
MARKERS = ("<!-- results: begin (written by `make results`) -->", "<!-- results: end -->")
CORPORA = (("wikitext2", "WikiText-2"), ("c4-unseen", "C4, unseen"))
PER_PROCESSOR = ("train-speed",)  # kinds of which every processor's newest run is shown
MORE = ("wikitext2-80", "WikiText-2, 80 windows")  # scored where little was removed
RIVALS = ("flap", "llm-pruner", "wanda-sp", "slicegpt", "minitron-width", "shortgpt", "sleb", "adapt-pruner")
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


def flags(request: dict[str, Any] | None) -> str:
    """A run as the command line says it."""
    return "dense" if request is None else f"{request['method']} {tables.flags(request)}"


def quality_row(row: dict[str, Any]) -> list[str]:
    """One run of the grid."""
    f = row["figures"]
    ratios = f.get("ratios", {})
    cells = [f"`{flags(row['recipe']['request'])}`", f"{f['params']:,}"]
    if "sparsity" in ratios:
        cells += ["0", f"{ratios['sparsity']:.2%} zeros"]
    else:
        cells += [f"{ratios.get('removed_of_all', 0):.2%}", f"{ratios.get('removed_of_block', 0):.2%}"]
    for corpus, _ in CORPORA:
        cells += [number(f[corpus]["perplexity"]), f"{f[corpus]['bits_per_byte']:.3f}"]
    seed = row["recipe"]["seed"]
    return [*cells, "first" if seed is None else str(seed), row["commit"] or ""]


QUALITY = ["run", "parameters", "removed of all", "removed of block"]
QUALITY += [cell for _, name in CORPORA for cell in (f"{name} perplexity", "bits/byte")]
QUALITY += ["calibration windows", "commit"]


def protocol(rows: list[dict[str, Any]]) -> list[str]:
    """What the numbers were measured on, in words and hashes."""
    recipe = rows[0]["recipe"]
    out = [f"Source: `{recipe['source']}`, SHA-256 of the weights `{recipe['source_sha256'][:16]}`; {recipe['dtype']}."]
    for corpus, name in CORPORA:
        e = recipe["evaluation"][corpus]
        which = f", documents `{e['documents']}`" if e["documents"] else ""
        out.append(
            f"{name}: {e['windows']} windows of {e['seq_len']:,} tokens of `{e['source']}`{which} (file SHA-256 "
            f"`{e['source_sha256'][:16]}`, ids `{e['sha256'][:16]}`), no BOS, {e['seq_len'] - 1:,} predictions a window, exp of "
            "the mean."
        )
    calibrated = next((r["recipe"]["calibration"] for r in rows if r["recipe"]["calibration"]), None)
    if calibrated:
        out.append(
            f"Calibration: {calibrated['windows']} windows of {calibrated['seq_len']} tokens of `{calibrated['source']}` (ids "
            f"`{calibrated['sha256'][:16]}`), never scored."
        )
    v = rows[0]["versions"]
    out.append(
        f"Versions: Python {v['python']}, torch {v['torch']}, transformers {v['transformers']}, prunus {v['prunus']}."
    )
    return out


def page(records: list[dict[str, Any]]) -> str:
    """docs/results.md."""
    runs = [r for r in records if r["kind"] == "oneshot"]
    costs = [r for r in records if r["kind"] == "oneshot-cost"]
    streams = [r for r in records if r["kind"] == "stream"]
    lines = ["# Measured results", "", "Written by `make results` from `results/*.jsonl`; do not edit.", ""]
    if runs:
        lines += ["## Protocol", "", *protocol(runs), ""]
        by_method: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for row in runs:
            request = row["recipe"]["request"]
            by_method[request["method"] if request else "dense"].append(row)
        for method in ("dense", *(m for m in METHODS if m in by_method)):
            rows = sorted(by_method[method], key=lambda r: flags(r["recipe"]["request"]))
            lines += [f"## {method}", "", *markdown(QUALITY, [quality_row(r) for r in rows]), ""]
    if compared := comparison(runs):
        lines += ["## Structured methods side by side", "", *compared, ""]
    if costs:
        lines += ["## Cost", "", *cost_table(costs), ""]
    if streams:
        lines += ["## Streaming", "", *stream_table(streams), ""]
    trained = [r for r in records if r["kind"] == "train"]
    recovered = [r for r in records if r["kind"] == "recovery"]
    if recovered:
        lines += ["## Recovery", "", *recovery_table(recovered), ""]
    speeds = [r for r in records if r["kind"] == "train-speed"]
    if speeds:
        lines += ["## Speed of training", "", *speed_table(speeds), ""]
    if trained:
        lines += ["## Training", "", *train_table(trained), ""]
    if studies := [r for r in records if r["kind"] == study_tables.KIND]:
        lines += ["## Cutting while training", "", *study_tables.tables(studies), ""]
    if pruning := [r for r in records if r["kind"] == study_tables.COST_KIND]:
        lines += ["## What cutting while training costs", "", *study_tables.cost_table(pruning), ""]
    lines += shipping_tables.parts(records)
    return "\n".join(lines).rstrip() + "\n"


def comparison(runs: list[dict[str, Any]]) -> list[str]:
    """Ours against every rival at every ratio: mean over draws of calibration windows, and from the least to the most."""
    found: dict[tuple[float, str], dict[str, dict[Any, float]]] = defaultdict(lambda: defaultdict(dict))
    corpora = (*CORPORA, MORE)
    for row in runs:
        request = row["recipe"]["request"] or {}
        name, more = request.get("method"), request.get("compensate") or request.get("pattern")
        if name == "prunus" or (name in RIVALS and not request.get("uniform") and not more):
            label = f"{name} --uniform" if request.get("uniform") else str(name)
            for corpus, _ in corpora:
                if corpus in row["figures"]:
                    value = row["figures"][corpus]["perplexity"]
                    found[request["ratio"], label][corpus][row["recipe"]["seed"]] = float("inf") if value is None else value
    lines = []
    for ratio in sorted({ratio for ratio, _ in found}):
        here = {label: values for (at, label), values in found.items() if at == ratio}
        shown = [(corpus, name) for corpus, name in corpora if any(corpus in values for values in here.values())]
        names = [label for label in ("prunus", "prunus --uniform", *RIVALS) if label in here]
        rows = [
            [
                f"`{label}`",
                *(_spread(here[label].get(corpus, {}).values()) for corpus, _ in shown),
                str(max(map(len, here[label].values()))),
            ]
            for label in names
        ]
        missing = [name for name in RIVALS if name not in here]
        lines += [f"Ratio {ratio:g}:", "", *markdown(["method", *(name for _, name in shown), "draws"], rows), ""]
        if missing:
            lines += [f"Not run yet: {', '.join(missing)}.", ""]
        if "prunus" in here:
            leads = [_lead(here, corpus, name) for corpus, name in shown]
            lines += [*(lead for lead in leads if lead), ""]
    return lines[:-1]


def _spread(values: Collection[float]) -> str:
    if not values:
        return ""
    mean = number(sum(values) / len(values))
    return mean if len(values) == 1 else f"{mean} ({number(min(values))} to {number(max(values))})"


def _lead(here: dict[str, dict[str, dict[Any, float]]], corpus: str, name: str) -> str:
    means = {label: sum(v[corpus].values()) / len(v[corpus]) for label, v in here.items() if v.get(corpus)}
    rivals = {label: mean for label, mean in means.items() if label in RIVALS}
    if "prunus" not in means or not rivals:
        return ""
    best = min(rivals, key=lambda label: rivals[label])
    return f"- {name}: `prunus` is {means['prunus'] / rivals[best] - 1:+.1%} from the best rival, `{best}`."


def recovery_table(rows: list[dict[str, Any]]) -> list[str]:
    """A cut model before and after it is trained on, and its parent."""
    order = ("parent", "cut", "plain", "distilled")
    header = ["model", "parameters", "tokens", "lr", "FLOPs", "minutes", *(name for _, name in CORPORA), "commit"]
    cells = []
    for r in sorted(rows, key=lambda r: order.index(r["recipe"]["arm"])):
        f = r["figures"]
        cells.append(
            [
                r["recipe"]["arm"], f"{f['params']:,}", f"{f['tokens']:,}", f"{f['lr']:g}" if "lr" in f else "",
                f"{sum(f['flops'].values()):.3g}" if "flops" in f else "",
                f"{f['seconds'] / 60:.1f}" if "seconds" in f else "",
                *(number(f[corpus]["perplexity"]) for corpus, _ in CORPORA), r["commit"] or "",
            ]
        )  # fmt: skip
    trained = next((r["recipe"]["recipe"] for r in rows if "recipe" in r["recipe"]), None)
    how = ""
    if trained:
        how = (
            f" Trained on C4 that no evaluation reads, sequences of {trained['data']['seq_len']}, "
            f"{trained['batch_tokens']:,} tokens an update, {trained['schedule']['kind']}, {trained['precision']}; "
            "one seed; perplexity."
        )
    return [
        f"`tools/recover.py`: SmolLM2-135M cut by `flap --ratio 0.2`, then trained on.{how}",
        "",
        *markdown(header, cells),
    ]


def speed_table(rows: list[dict[str, Any]]) -> list[str]:
    """`benchmarks/train.py`: what a step and each option of a recipe costs, against a bare loop in the same run."""
    header = [
        "processor",
        "shape",
        "precision",
        "row",
        "tokens/s",
        "times the bare loop",
        "of the matmul rate",
        "first step, s",
    ]
    header += ["kept for the way back, MiB", "commit"]
    cells, besides = [], []
    for r in rows:
        f, recipe = r["figures"], r["recipe"]
        bare, peak = f["step_s"]["bare loop"], f["gemm_flops_per_s"]
        for name, seconds in f["step_s"].items():
            kept = f["kept_bytes"].get(name)
            cells.append(
                [
                    r["machine"]["cpu"], recipe["shape"], recipe["precision"], name, f"{f['tokens'] / seconds:,.0f}",
                    f"{bare / seconds:.2f}", f"{f['step_flops'] / seconds / peak:.0%}", f"{f['first_step_s'][name]:.0f}",
                    "" if kept is None else f"{kept / 2**20:,.0f}", r["commit"] or "",
                ]
            )  # fmt: skip
        besides.append(
            f"{recipe['shape']}, {r['machine']['cpu']}: {sum(f['besides_s'].values()) / f['step_s']['plain']:.2%}"
        )
    m = rows[0]["machine"]
    return [
        "`benchmarks/train.py --options`, rows taking turns in one run, each in a process of its own; "
        f"{m['threads']} threads. What a run does besides its steps (reading, log, ledger), of a plain step: {'; '.join(besides)}.",
        "",
        *markdown(header, cells),
    ]


def train_table(rows: list[dict[str, Any]]) -> list[str]:
    """Runs of `prunus train`: what they saw, what they cost, what they reached."""
    header = [
        "run",
        "parameters",
        "tokens",
        "training FLOPs",
        "minutes",
        "tokens/s",
        "of the matmul rate",
        "precision",
        "validation loss",
        "by tokens seen",
        "commit",
    ]
    cells = []
    for r in rows:
        f, recipe = r["figures"], r["recipe"]["recipe"]
        losses = [(line["tokens"], line["validation"]["loss"]) for line in f["validation"]]
        curve = ", ".join(f"{tokens / 1e6:.1f} M: {loss:.2f}" for tokens, loss in losses)
        cells.append(
            [
                recipe["name"], f"{f['params']:,}", f"{f['tokens']:,}", f"{sum(f['flops'].values()):.3g}",
                f"{f['seconds'] / 60:.1f}",
                f"{f['tokens'] / f['seconds']:,.0f}", f"{f['share_of_peak']:.0%}" if "share_of_peak" in f else "",
                recipe["precision"], f"{losses[-1][1]:.4f}" if losses else "", curve,
                r["commit"] or "",
            ]
        )  # fmt: skip
    data = sorted(
        {f"{name} (`{d['manifest']}`, range {d['range']})" for r in rows for name, d in r["recipe"]["data"].items()}
    )
    m = rows[0]["machine"]
    return [
        f"`prunus train`; loss in nats a token on the validation range; data: {', '.join(data)}; {m['cpu']}, {m['threads']} "
        "threads.",
        "",
        *markdown(header, cells),
    ]


BARE = {"forward": "bare forward", "back": "bare forward and backward"}


def cost_table(rows: list[dict[str, Any]]) -> list[str]:
    """The benchmark: ratios to the bare pass over the same windows, in one run."""
    header = ["method", "seconds", "bare pass", "its seconds", "ratio", "limit", "peak, GiB"]
    header += ["above load and bare forward, GiB", "windows", "WikiText-2 perplexity", "commit"]
    cells = [
        [
            f["method"],
            f"{f['method_s']:.2f}",
            BARE[f.get("bare", "forward")],
            f"{f['bare_s']:.2f}",
            f"{f['ratio']:.2f}",
            "" if f.get("limit") is None else f"{f['limit']:.2f}" + ("" if f["met"] else ", missed"),
            f"{f['peak_gib']:.2f}",
            f"{f['peak_above_gib']:.2f}",
            str(f["windows"]),
            number(f["wikitext2"]["perplexity"]) if "wikitext2" in f else "",
            r["commit"] or "",
        ]
        for r in rows
        for f in [r["figures"]]
    ]
    f, m = rows[0]["figures"], rows[0]["machine"]
    scored = next((r["figures"]["evaluation"] for r in rows if "evaluation" in r["figures"]), None)
    return [
        f"`make bench`: scoring and cutting on windows of {f['seq_len']} tokens, batches of {f['batch_size']}, "
        f"float32, {m['cpu']}, {m['threads']} threads."
        + (f" Perplexity is of {scored['windows']} windows of {scored['seq_len']:,} tokens." if scored else ""),
        "",
        *markdown(header, cells),
    ]


def stream_table(rows: list[dict[str, Any]]) -> list[str]:
    """Peak memory of `--stream` on a random model, whose quality means nothing."""
    header = ["run", "parameters", "weights, GiB", "peak, GiB", "seconds", "commit"]
    cells = [
        [
            f"`{flags(r['recipe']['request'])} --stream`",
            f"{f['before']['params']:,}",
            f"{f['before']['weight_bytes'] / 2**30:.2f}",
            f"{max(f['peak_gib'], f['children_peak_gib']):.2f}",
            f"{f['seconds']:,.0f}",
            r["commit"] or "",
        ]
        for r in rows
        for f in [r["figures"]]
    ]
    recipe = rows[0]["recipe"]
    return [
        f"`tools/stream_1b.py`: a random Llama, {recipe['dtype']}, {recipe['windows']} windows of {recipe['seq_len']} tokens. "
        "The peak is `ru_maxrss` of the larger of two processes, the one that cuts and the clean one that verifies, libraries "
        "included.",
        "",
        *markdown(header, cells),
    ]


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
