"""What the records of studies say: a table a study, every arm against one that all are compared with, seed by seed."""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import Any

from prunus.tables import markdown

KIND = "study"
REFERENCE = ("systems", "few-shot")  # study and arm; a study with such an arm of its own is compared with that
HEADER = ["arm", "parameters", "shape", "tokens", "FLOPs", "seeds", "validation loss", "against few-shot", "commit"]


def loss(row: dict[str, Any]) -> float:
    """The last look at the validation range, in nats a token."""
    return float(row["figures"]["validation"][-1]["validation"]["loss"])


def place(row: dict[str, Any]) -> str:
    """How many tokens, and in which order: runs of one place saw the same."""
    return f"{row['figures']['tokens']} {row['place'].get('data.seed')}"


def mean(values: list[float]) -> str:
    """Mean, and the least and the most."""
    text = f"{statistics.fmean(values):.4f}"
    return text if len(values) == 1 else f"{text} ({min(values):.4f} to {max(values):.4f})"


def difference(rows: list[dict[str, Any]], reference: dict[str, float]) -> str:
    """Mean of the differences on the same order of tokens, and twice its standard error."""
    found = [loss(row) - reference[place(row)] for row in rows if place(row) in reference]
    if not found or len(found) < len(rows):
        return ""
    text = f"{statistics.fmean(found):+.4f}"
    return text if len(found) == 1 else f"{text} ± {2 * statistics.stdev(found) / len(found) ** 0.5:.4f}"


def shape(row: dict[str, Any]) -> str:
    """hidden x layers, KV heads, FFN: what a pruning run came to."""
    told = (row["figures"].get("pruning") or {}).get("shape")
    if not told:
        return ""
    return f"{told['hidden_size']} x {told['num_hidden_layers']}, {told['num_key_value_heads']}, {told['intermediate_size']}"


def tables(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown of all studies."""
    studies: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        grid = {k: v for k, v in row["place"].items() if k != "data.seed"}
        arm = " ".join([row["arm"], *(f"{key}={value:g}" for key, value in grid.items())])
        studies[row["study"]][arm].append(row)
    lines = [
        "`tools/while_training.py`: `prunus study run` of the files in `studies/while-training`. Validation loss in nats a token; "
        "differences are of runs on the same order of the same tokens, ± twice the standard error of their mean. Shapes: stem x "
        f"layers, KV groups, FFN channels.{_parent(rows)}",
        "",
    ]
    for name, arms in studies.items():
        own = arms.get(REFERENCE[1]) or studies[REFERENCE[0]][REFERENCE[1]]
        reference = {place(row): loss(row) for row in own}
        cells = [_row(arm, found, reference) for arm, found in arms.items()]
        lines += [f"### {name}", "", *markdown(HEADER, cells), ""]
    return lines[:-1]


def _parent(rows: list[dict[str, Any]]) -> str:
    """What comes besides for every arm, and what all were trained on."""
    found = next((row for row in rows if row["study"] == "parent"), None)
    if found is None:
        return ""
    f, data = found["figures"], found["recipe"]["data"]
    files = ", ".join(f"{name} `{d['manifest']}`" for name, d in data.items())
    return (
        " Tokens and FLOPs are an arm's own; its parent's, in the table of parents, come besides, but for arms from fresh weights. "
        f"Seeds are orders of the tokens; fresh weights are drawn once. Loss is that of "
        f"{f['validation'][-1]['validation']['sequences']} sequences; data: {files}."
    )


def _row(arm: str, found: list[dict[str, Any]], reference: dict[str, float]) -> list[str]:
    f = [row["figures"] for row in found]
    params = sorted({x["params"] for x in f})
    return [
        arm,
        f"{params[0]:,}" if len(params) == 1 else f"{params[0]:,} to {params[-1]:,}",
        "; ".join(sorted({shape(row) for row in found})),
        f"{f[0]['tokens']:,}",
        f"{statistics.fmean(sum(x['flops'].values()) for x in f):.3g}",
        str(len(found)),
        mean([loss(row) for row in found]),
        difference(found, reference),
        ", ".join(sorted({row["commit"] or "" for row in found})),
    ]


COST_KIND = "prune-speed"


def cost_table(rows: list[dict[str, Any]]) -> list[str]:
    """`benchmarks/prune_while_training.py`: what pruning costs a training run, each figure against its target."""
    cells = []
    for row in rows:
        f, aim = row["figures"], row["recipe"]["targets"]
        least = {"speed behind the last slice, of a fresh run's": (f["speed"]["ratio"], aim["speed"])}
        most = {f"peak memory, {name}, of plain": (f["memory"][name], aim["memory"]) for name in ("watching", "slicing")}
        most |= {f"step without a cut, {name}, of plain": (step["ratio"], aim["step"]) for name, step in f["step"].items()}
        most |= {"a cut, in steps": (f["cut"]["ratio"], aim["cut"])}
        most |= {"a cut and its slice, in steps": (f["cut_sliced"]["ratio"], aim["cut"])}
        for found, word, met in ((most, "at most", float.__le__), (least, "at least", float.__ge__)):
            for name, (value, bound) in found.items():
                verdict = "met" if met(float(value), float(bound)) else "missed"
                cells.append(
                    [row["recipe"]["shape"], name, f"{value:.3f}", f"{word} {bound:g}", verdict, row["commit"] or ""]
                )
    about, machine = rows[0]["recipe"], rows[0]["machine"]
    sequences, micro, length = about["batch"]
    return [
        f"`benchmarks/prune_while_training.py`: updates of {sequences} sequences of {length} tokens in micro-batches of {micro}, "
        f"{about['precision']}, with and without the pruner in turns, {about['pairs']} pairs; {machine['cpu']}, "
        f"{machine['threads']} threads.",
        "",
        *markdown(["shape", "what", "ratio", "target", "", "commit"], cells),
    ]
