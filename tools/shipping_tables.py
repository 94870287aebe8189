"""Tables of what models score and cost to run, from records of `prunus eval`, `prunus measure` and benchmarks/."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

from prunus.tables import markdown, number, win_rate
from prunus.tasks.table import TASKS

Row = dict[str, Any]


def named(row: Row) -> str:
    """What a model is, by its method where it is a cut."""
    f = row["figures"]
    if "method" not in f:
        return f["model"]
    method = f["method"]
    return f"`{method['method']} --ratio {method['ratio']:g}`" if "ratio" in method else f"`{method['method']}`"


def score(found: Row | None) -> str:
    """Per cent with its standard error."""
    return "" if found is None else f"{100 * found['mean']:.1f} ± {100 * found['error']:.1f}"


def score_tables(rows: list[Row]) -> list[str]:
    """A table for each number of items and dtype: tasks down, models across, the largest first."""
    groups: dict[tuple[int, str], list[Row]] = defaultdict(list)
    for row in rows:
        if tasks := row["recipe"].get("tasks"):
            limit = next(iter(tasks.values())).get("limit")
            groups[limit or 0, row["recipe"]["dtype"]].append(row)
    lines = []
    for (limit, dtype), some in sorted(groups.items()):
        some = sorted(merged(some), key=lambda r: (-r["figures"]["params"], r["figures"]["model"]))
        body = [["parameters", *(f"{r['figures']['params']:,}" for r in some)]]
        for k, text in enumerate(some[0]["figures"]["texts"]):
            name = f"{text['text']['source']}, {text['text']['windows']} x {text['text']['seq_len']:,} tokens: perplexity"
            body.append([name, *(number(r["figures"]["texts"][k]["perplexity"]) for r in some)])
        for task in TASKS:
            for metric in ("acc", "acc_norm"):
                found = [r["figures"]["tasks"].get(task, {}).get(metric) for r in some]
                if any(found):
                    items = next(one for one in found if one)["items"]
                    body.append([f"{task}, {metric}, {items:,} items", *map(score, found)])
        for mean in ("seven", "eight"):
            found = [r["figures"].get("means", {}).get(mean) for r in some]
            if any(found):
                body.append([f"mean of {mean}", *map(score, found)])
        what = f"the first {limit} rows of every task" if limit else "every row of every task that is there"
        commits = ", ".join(sorted({r["commit"] or "unknown" for r in some}))
        lines += [f"`prunus eval`, {what}, {dtype}, zero-shot; per cent ± standard error; commit {commits}.", ""]
        lines += [*markdown(["", *map(named, some)], body), ""]
    return lines[:-1]


def merged(rows: list[Row]) -> list[Row]:
    """Runs of one model on other tasks, as one row; means only of the run that has them."""
    out: dict[str, Row] = {}
    for row in rows:
        f = row["figures"]
        known = out.setdefault(f["weights_sha256"], row | {"figures": f | {"tasks": {}, "means": {}, "texts": []}})[
            "figures"
        ]
        known["tasks"] |= f["tasks"]
        known["means"] |= f.get("means", {})
        known["texts"] = known["texts"] or f["texts"]
    return list(out.values())


def answers(records: list[Row]) -> str:
    """The page of what models wrote behind the same prompts, side by side; the prompts are others', and are not repeated."""
    rows = [r for r in records if r["kind"] == "eval" and r["figures"].get("written")]
    if not rows:
        return ""
    newest = max(rows, key=lambda r: r["time"])["recipe"]["written"]
    asked = {key: newest[key] for key in ("prompts", "sha256")}
    rows = [r for r in rows if {key: r["recipe"]["written"][key] for key in asked} == asked]
    models = [r["figures"] for r in sorted(rows, key=lambda r: "judged" not in r["figures"])]
    lines = ["# Answers, side by side", "", "Written by `make results` from `results/*.jsonl`; do not edit.", ""]
    how = "as a chat" if newest["chat"] else "as text"
    lines += [
        f"The first {asked['prompts']} prompts of AlpacaEval (CC BY-NC 4.0, so they are not repeated; SHA-256 of all "
        f"`{asked['sha256'][:16]}`), greedy, at most {newest['new_tokens']} tokens, {how}, by `prunus eval --prompts`.",
        "",
    ]
    for other, said in models[0].get("judged", {}).items():
        lines += [f"- {models[0]['model']} against {other}: {win_rate(said)}."]
    for i in range(asked["prompts"]):
        lines += ["", f"## Prompt {i + 1}"]
        for one in models:
            fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", one["written"][i])), default=0))
            lines += ["", f"**{one['model']}**", "", f"{fence}text", one["written"][i], fence]
    return "\n".join(lines) + "\n"


def form_tables(rows: list[Row]) -> list[str]:
    """`benchmarks/quantize.py`: every form of a checkpoint."""
    lines = []
    for row in rows:
        recipe, m, forms, text = row["recipe"], row["machine"], row["figures"]["forms"], row["recipe"]["text"]
        header = ["engine", "form", "MB", "perplexity", "prompt, ms", "token, ms"]
        cells = [
            [
                f["engine"], f["form"], f"{f['bytes'] / 1e6:,.1f}", number(f["perplexity"]),
                *(f"{f[k]['median']:,.1f} ({f[k]['least']:,.1f} to {f[k]['most']:,.1f})" for k in ("prompt_ms", "token_ms")),
            ]
            for f in forms
        ]  # fmt: skip
        lines += [
            f"`benchmarks/quantize.py` on {recipe['source']}, {row['figures']['params']:,} parameters: perplexity of "
            f"{text['windows']} windows of {text['seq_len']:,} tokens of {text['source']}; a prompt of {recipe['context']} "
            f"tokens and 16 tokens after it, medians (least to most) of {recipe['repeats']}, forms taking turns; "
            f"{m['cpu']}, {recipe['threads']} threads; commit {row['commit']}.",
            "", *markdown(header, cells, left=2), "",
        ]  # fmt: skip
    return lines[:-1]


def cost_tables(rows: list[Row]) -> list[str]:
    """`prunus measure`: models that were timed together."""
    together: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        together[(*row["figures"]["beside"], row["recipe"]["dtype"])].append(row)
    lines = []
    for some in together.values():
        some = sorted(some, key=lambda r: -r["figures"]["params"])
        figures = [r["figures"] for r in some]
        body = [[label, *(form(f) for f in figures)] for label, form in COUNTS]
        for i, cell in enumerate(figures[0]["cells"]):
            place = f"{cell['threads']} threads, batch {cell['batch']}, {cell['context']} tokens"
            cells = [f["cells"][i] for f in figures]
            body.append([f"{place}: prompt, ms", *(f"{c['first_token_ms']['median']:,.1f}" for c in cells)])
            body.append([f"{place}: token, ms", *(f"{c['decode_ms']['median']:,.1f}" for c in cells)])
            if "update_ms" in cell:
                body.append([f"{place}: update, ms", *(f"{c['update_ms']['median']:,.0f}" for c in cells)])
        recipe, m = some[0]["recipe"], some[0]["machine"]
        lines += [
            f"`prunus measure`, {recipe['dtype']}, medians of {recipe['repeats']}, models taking turns; {m['cpu']}, "
            f"{m['cores']} cores; commit {some[0]['commit']}.",
            "", *markdown(["", *(f["model"] for f in figures)], body), "",
        ]  # fmt: skip
    return lines[:-1]


COUNTS = (
    ("parameters", lambda f: f"{f['params']:,}"),
    ("without embeddings", lambda f: f"{f['params_without_embeddings']:,}"),
    ("MFLOPs a token", lambda f: f"{f['flops_per_token'] / 1e6:,.1f}"),
    ("weights, MB", lambda f: f"{f['weight_bytes'] / 1e6:,.1f}"),
    ("KV cache a token, KB", lambda f: f"{f['kv_bytes_per_token'] / 1e3:,.2f}"),
    ("peak memory, MB", lambda f: f"{f['memory']['peak_bytes'] / 1e6:,.0f}" if f["memory"] else "not known"),
)


def floor_tables(rows: list[Row]) -> list[str]:
    """`benchmarks/measure.py`: times over the least that the machine could take."""
    lines = []
    for row in rows:
        f, m = row["figures"], row["machine"]
        rates = "; ".join(
            f"{count} threads {r['flops_per_s'] / 1e9:,.0f} GFLOP/s and {r['bytes_per_s'] / 1e9:,.1f} GB/s"
            for count, r in f["rates"].items()
        )
        cells = [
            [
                name, *(str(c[k]) for k in ("threads", "batch", "context")),
                *(f"{c[k]:.2f}" for k in ("prompt_times_floor", "token_times_floor")),
            ]
            for name, some in f["models"].items()
            for c in some
        ]  # fmt: skip
        header = ["model", "threads", "batch", "tokens", "a prompt's time over its floor", "a token's"]
        lines += [
            f"`benchmarks/measure.py`, {row['recipe']['asked']['dtype']}: floors are products at the measured rate and bytes "
            f"at the measured bandwidth ({rates}); {m['cpu']}; commit {row['commit']}.",
            "", *markdown(header, cells), "",
        ]  # fmt: skip
    return lines[:-1]


def evaluate_tables(rows: list[Row]) -> list[str]:
    """`benchmarks/evaluate.py`: ours against lm-eval's own loop."""
    lines = []
    for row in rows:
        f, recipe, m = row["figures"], row["recipe"], row["machine"]
        ours, theirs = f["ours_s"], f["hflm_s"]
        body = [[name, f"{ours[name]:,.1f}", f"{theirs[name]:,.1f}", f"{theirs[name] / ours[name]:.2f}"] for name in ours]
        body.append(["all", f"{sum(ours.values()):,.1f}", f"{sum(theirs.values()):,.1f}", f"{f['ratio']:.2f}"])
        same = "every score is the same" if f["apart"]["same_scores"] else "scores differ"
        lines += [
            f"`benchmarks/evaluate.py`: the first {recipe['limit']} rows of each task, {recipe['dtype']}, `HFLM` at its best batch "
            f"size, {f['hflm_batch']}; {same}, log-probabilities differ by at most {f['apart']['log_prob']:.1e} nats; "
            f"{m['cpu']}, {m['threads']} threads; commit {row['commit']}.",
            "", *markdown(["task", "ours, s", "`HFLM`, s", "times"], body), "",
        ]  # fmt: skip
    return lines[:-1]


def text_tables(rows: list[Row]) -> list[str]:
    """Models that were scored on texts alone, the largest first."""
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if not row["recipe"].get("tasks"):
            texts = tuple((t["text"]["source"], t["text"]["windows"], t["text"]["seq_len"]) for t in row["figures"]["texts"])
            groups[row["recipe"]["dtype"], *texts].append(row)
    lines = []
    for (dtype, *texts), some in groups.items():
        header = ["model", "parameters"]
        for source, windows, seq_len in texts:
            header += [f"{source}, {windows} windows of {seq_len:,}: perplexity", "bits/byte"]
        cells = [
            [
                named(r), f"{r['figures']['params']:,}",
                *(cell for t in r["figures"]["texts"] for cell in (number(t["perplexity"]), f"{t['bits_per_byte']:.4f}")),
            ]
            for r in sorted(some, key=lambda r: -r["figures"]["params"])
        ]  # fmt: skip
        commits = ", ".join(sorted({r["commit"] or "unknown" for r in some}))
        lines += [f"`prunus eval`, {dtype}; commit {commits}.", "", *markdown(header, cells), ""]
    return lines[:-1]


def tune_tables(rows: list[Row]) -> list[str]:
    """Runs of `prunus tune`."""
    header = [
        "model",
        "rows",
        "epochs",
        "lr",
        "tokens",
        "updates",
        "minutes",
        "answers held out: loss before",
        "after",
        "commit",
    ]
    cells = []
    for row in rows:
        f, recipe = row["figures"], row["recipe"]["recipe"]
        cells.append(
            [
                row["recipe"]["source"], f"{f['rows']:,}", f"{recipe['epochs']:g}", f"{recipe['lr']:g}", f"{f['tokens']:,}",
                str(f["updates"]), f"{f['seconds'] / 60:.1f}", f"{f['loss_before']:.4f}", f"{f['loss_after']:.4f}",
                row["commit"] or "",
            ]
        )  # fmt: skip
    return [f"`prunus tune`, one seed, data `{rows[0]['recipe']['data']}`.", "", *markdown(header, cells)]


def exact_tables(rows: list[Row]) -> list[str]:
    """`benchmarks/evaluate.py --exact`: how far log-probabilities lie from a float64 model's."""
    lines = []
    for r in rows:
        ours, hflm = r["figures"]["ours"], r["figures"]["hflm"]
        body = [[name, f"{ours[name]:.1e}", f"{hflm[name]:.1e}"] for name in ours]
        body.append(["all", f"{max(ours.values()):.1e}", f"{max(hflm.values()):.1e}"])
        what = f"the first {r['recipe']['limit']} rows of each task, {r['recipe']['dtype']}; commit {r['commit']}"
        lines += [
            f"`benchmarks/evaluate.py --exact`: {what}. The largest distance of an answer's log-probability, in nats.",
            "",
        ]
        lines += [*markdown(["task", "ours", "`HFLM`"], body), ""]
    return lines[:-1]


PARTS = (
    ("eval", "Scores", score_tables),
    ("eval", "Texts alone", text_tables),
    ("tune", "Instruction tuning", tune_tables),
    ("evaluate-speed", "Speed of evaluation", evaluate_tables),
    ("evaluate-exact", "Exactness of evaluation", exact_tables),
    ("measure", "What models cost to run", cost_tables),
    ("measure-floor", "Against the floor", floor_tables),
    ("quantize-speed", "Fewer bits", form_tables),
)


def parts(records: list[Row]) -> list[str]:
    """Sections of docs/results.md."""
    lines = []
    for kind, title, table in PARTS:
        if (rows := [r for r in records if r["kind"] == kind]) and (found := table(rows)):
            lines += [f"## {title}", "", *found, ""]
    return lines
