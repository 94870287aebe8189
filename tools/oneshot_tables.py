"""Tables of docs/results.md about what was cut at once: quality, methods side by side, cost, streaming."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from typing import Any

from prunus import tables
from prunus.tables import markdown, number

CORPORA = (("wikitext2", "WikiText-2"), ("c4-unseen", "C4, unseen"))
MORE = ("wikitext2-80", "WikiText-2, 80 windows")  # scored where little was removed
RIVALS = ("flap", "llm-pruner", "wanda-sp", "slicegpt", "minitron-width", "shortgpt", "sleb", "adapt-pruner")


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
