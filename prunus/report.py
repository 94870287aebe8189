"""Records become rows, and rows become pages. Reads records only; nobody types a number."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from .methods import METHODS, Method
from .tables import big, cell, flags, markdown, number

DENSE = "dense"
_UNSTEADY = 0.15  # times further apart than this say that something else was running
Spread = dict[str, float]  # mean, min, max over draws of calibration windows


def comparison(about: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row a method, request and calibration text, the dense model first; of several runs of one recipe the newest."""
    groups: dict[tuple[Any, ...], dict[Any, Mapping[str, Any]]] = {}
    texts = _calibrations(records)
    for r in records:
        request = r["recipe"]["request"]
        group = (DENSE, "", "") if request is None else (request["method"], flags(request), texts[_origin(r["recipe"])])
        groups.setdefault(group, {})[r["recipe"]["seed"]] = r
    order = [DENSE, *METHODS]
    rows = [_row(list(found.values()), group[2]) for group, found in groups.items()]
    rows.sort(
        key=lambda row: (
            order.index(row["method"].partition("+")[0]),
            row["method"],
            row["flags"].replace(_ratio(row), ""),
            row["ratio"] or 0,
        )
    )
    runs = [r for found in groups.values() for r in found.values()]
    return {"about": dict(about), "rows": rows, "notes": _notes(about, runs)}


def _ratio(row: Mapping[str, Any]) -> str:
    return f"--ratio {row['ratio']}"


def _row(runs: Sequence[Mapping[str, Any]], calibration: str) -> dict[str, Any]:
    recipe, figures = runs[0]["recipe"], [r["figures"] for r in runs]
    request = recipe["request"] or {}
    ratios = [f.get("ratios", {}) for f in figures]
    timed = [f["speed"] for f in figures if "speed" in f]
    return {
        "method": request.get("method", DENSE),
        "request": recipe["request"],
        "flags": flags(request),
        "ratio": request.get("ratio"),
        "calibration": calibration,
        "draws": len(runs),
        "removed_of_block": _mean(r.get("removed_of_block", 0.0) for r in ratios),
        "sparsity": _mean(r["sparsity"] for r in ratios) if "sparsity" in ratios[0] else None,
        **{
            name: round(_mean(f[name] for f in figures))
            for name in ("params", "block_params", "flops", "kv_bytes_per_token")
        },
        "model_type": figures[0]["model_type"],
        **{name: _spread(f[name] for f in figures) for name in ("perplexity", "bits_per_byte")},
        **{name: _spread(s[name] for s in timed) for name in ("prefill_ms", "decode_ms")},
        "prompt_tokens": timed[0]["prompt_tokens"] if timed else None,
        "cut_s": _spread(f["cut_s"] for f in figures if "cut_s" in f),
    }


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return math.fsum(listed) / len(listed)


def _spread(values: Iterable[float | None]) -> Spread | None:
    """None if there is no value, or one that is no finite number (null in a record)."""
    listed = list(values)
    finite = [v for v in listed if v is not None]
    if not finite or len(finite) < len(listed):
        return None
    return {"mean": _mean(finite), "min": min(finite), "max": max(finite)}


# -- the method table -----------------------------------------------------------------------------------------------------


def method(row: Method) -> dict[str, Any]:
    """A method's row with what follows from it: what comes out, and whether an engine without prunus can serve that."""
    if row.is_sparse:
        comes_out, engine = "same size, zeros stored densely", "yes, no faster"
    elif row.uniform:
        comes_out, engine = "smaller, layers alike", "yes"
    elif "greedy-sublayers" in row.allocators:
        comes_out, engine = "smaller, some layers without attention or MLP", "only if whole layers went"
    else:
        comes_out, engine = "smaller, layers of their own sizes", "with --uniform"
    return {**asdict(row), "comes_out": comes_out, "stock_engine": engine}


# -- what the figures mean ------------------------------------------------------------------------------------------------


def _text(provenance: Mapping[str, Any] | None) -> str:
    """Windows of a text in words; the draw is left out."""
    if provenance is None:
        return ""
    which = f", documents {provenance['documents']}" if provenance["documents"] else ""
    return f"{provenance['windows']} windows of {provenance['seq_len']:,} tokens of {provenance['source']}{which}"


Origin = tuple[str, bool, str | None]  # windows of a text in words, whether they are drawn, and the file's SHA-256


def _origin(recipe: Mapping[str, Any]) -> Origin:
    """What a row's runs have in common of their calibration windows: draws of one text are not its first windows."""
    found = recipe["calibration"]
    return _text(found), recipe["seed"] is not None, None if found is None else found.get("source_sha256")


def _calibrations(records: Iterable[Mapping[str, Any]]) -> dict[Origin, str]:
    """Each in words that no other has: files of one name are told apart by how their SHA-256 begins."""
    origins = dict.fromkeys(_origin(r["recipe"]) for r in records)
    out = {}
    for text, drawn, sha256 in origins:
        several = len({other for name, _, other in origins if name == text}) > 1
        out[text, drawn, sha256] = text + (f" ({sha256[:8]})" if several and sha256 else "") + (", drawn" if drawn else "")
    return out


def _notes(about: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Everything that a reader of the table must know to believe it."""
    scored = about["evaluation"]
    calibrated = sorted({(drawn, text) for text, drawn, _ in map(_origin, (r["recipe"] for r in runs)) if text})
    seeds = sorted({r["recipe"]["seed"] for r in runs} - {None})
    drawn = f"seed {scored['seed']}" if scored["seed"] is not None else "the first ones"
    notes = [
        f"perplexity and bits per byte: {_text(scored)} ({drawn}), no BOS, {scored['seq_len'] - 1:,} predictions a window, "
        f"{about['dtype']}; no run was trained"
    ]
    notes += [f"warning: {text}" for text in sorted({r["figures"]["warning"] for r in runs if "warning" in r["figures"]})]
    if calibrated:
        how = {True: f"draws by seed {', '.join(map(str, seeds))}", False: "the first ones"}
        notes.append(f"calibration: {'; '.join(f'{text} ({how[drawn]})' for drawn, text in calibrated)}")
    if seeds:
        notes.append("several draws: means, and in brackets the lowest and the highest")
    notes.append(
        f"parameters: all, a tied embedding once; FLOPs: forward, one window of {scored['seq_len']:,} tokens; KV: bytes of cache "
        f"a token in {about['dtype']}; zeros of sparse methods are stored and multiplied like other weights"
    )
    timed = {
        f"{t['cpu']}, {t['threads']} threads, batch 1: prefill of {t['prompt_tokens']} tokens, decode of one token (mean of "
        f"{t['new_tokens']}), medians of {t['repeats']}"
        for t in (r["recipe"]["latency"] for r in runs)
        if t
    }
    notes += [f"milliseconds: {text}" for text in sorted(timed)]
    if len(timed) > 1:
        notes.append("milliseconds were taken under more than one setting: compare them only within one")
    if (reach := _unsteady([r["figures"]["speed"] for r in runs if "speed" in r["figures"]])) > _UNSTEADY:
        notes.append(
            f"the machine was busy: its own matmul rate, or repeats of one run, varied by {reach:.0%}; differences in milliseconds "
            "below that say nothing"
        )
    if any("cut_s" in r["figures"] for r in runs):
        notes.append(
            "seconds to cut: scoring and cutting, without loading and saving; a pass that several ratios share counts for each"
        )
    commits = sorted({r["commit"] or "none" for r in runs})
    versions = sorted(
        {f"prunus {v['prunus']}, torch {v['torch']}, transformers {v['transformers']}" for v in _versions(runs)}
    )
    return [*notes, f"versions: {'; '.join(versions)}; commit {', '.join(commits)}"]


def _unsteady(speeds: Sequence[Mapping[str, float]]) -> float:
    """How far repeats of a run lie apart, or the machine's own rate between runs, as a share."""
    if not speeds:
        return 0.0
    rates = [s["gemm_flops_per_s"] for s in speeds]
    repeats = (s[f"{kind}_spread"] / s[f"{kind}_tokens_per_s"] for s in speeds for kind in ("prefill", "decode"))
    return max(max(rates) / min(rates) - 1, *repeats)


def _versions(runs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, str]]:
    return [r["versions"] for r in runs]


# -- tables ---------------------------------------------------------------------------------------------------------------


def comparison_table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and cells, the same on a page and on a terminal; columns that no row fills are left out."""
    rows = result["rows"]
    several = len({row["calibration"] for row in rows} - {""}) > 1
    columns = {
        "method": [row["method"] for row in rows],
        "request": [row["flags"] for row in rows],
        "calibration": [row["calibration"] if several else "" for row in rows],
        "draws": [str(row["draws"]) if any(r["draws"] > 1 for r in rows) else "" for row in rows],
        "block removed": [_removed(row) for row in rows],
        "parameters": [big(row["params"]) for row in rows],
        "FLOPs": [big(row["flops"]) for row in rows],
        "KV B/token": [f"{row['kv_bytes_per_token']:,}" for row in rows],
        "perplexity": [_cell(row["perplexity"], "not finite") for row in rows],
        "bits/byte": [_cell(row["bits_per_byte"], "not finite") for row in rows],
        "prefill ms": [_only_mean(row["prefill_ms"]) for row in rows],
        "decode ms": [_only_mean(row["decode_ms"]) for row in rows],
        "s to cut": [_only_mean(row["cut_s"]) for row in rows],
    }
    filled = {name: cells for name, cells in columns.items() if any(cells)}
    return list(filled), [list(cells) for cells in zip(*filled.values(), strict=True)]


def _removed(row: Mapping[str, Any]) -> str:
    zeros = [] if row["sparsity"] is None else [f"{row['sparsity']:.2%} zeros"]
    removed = [f"{row['removed_of_block']:.2%}"] if row["removed_of_block"] or not zeros else []
    return ", ".join(removed + zeros)


def _only_mean(spread: Spread | None) -> str:
    """Times differ between draws by chance alone: the size is the same."""
    return "" if spread is None else f"{spread['mean']:.3g}" if spread["mean"] < 100 else number(spread["mean"])


def _cell(spread: Spread | None, without: str) -> str:
    if spread is None:
        return without
    mean = number(spread["mean"])
    return mean if spread["min"] == spread["max"] else f"{mean} ({number(spread['min'])} to {number(spread['max'])})"


def comparison_page(result: Mapping[str, Any], picture: str) -> str:
    """The page beside the records."""
    header, rows = comparison_table(result)
    rows = [[cell(row[0]), f"`{cell(row[1])}`" if row[1] else "", *map(cell, row[2:])] for row in rows]
    title = f"# {cell(result['about']['source'])}: methods compared"
    picture_line = f"![perplexity against size, FLOPs and time]({picture})"
    return "\n".join([title, "", *markdown(header, rows, left=2), "", *(f"- {cell(note)}" for note in result["notes"])]) + (
        f"\n\n{picture_line}\n"
    )
