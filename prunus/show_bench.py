"""Prints what models cost to run, and what was written for other engines."""

from __future__ import annotations

from typing import Any

from .printed import new_console, new_table, print_notes

_COUNTED = (
    ("params", "parameters", 1, "{:,.0f}"),
    ("params_without_embeddings", "  without embeddings", 1, "{:,.0f}"),
    ("flops_per_token", "MFLOPs a token", 1e6, "{:,.1f}"),
    ("prefill_flops", "GFLOPs of a prompt", 1e9, "{:,.1f}"),
    ("weight_bytes", "weights, MB", 1e6, "{:,.1f}"),
    ("kv_bytes_per_token", "KV cache a token, KB", 1e3, "{:,.2f}"),
)


def measured(result: dict[str, Any]) -> None:
    """Counts, memory, and a row for every cell: medians, and how the first model compares with the next."""
    models, out = result["models"], new_console()
    counts = new_table("", *(row["model"] for row in models))
    for name, label, unit, form in _COUNTED:
        counts.add_row(label, *(form.format(row[name] / unit) for row in models))
    memory = [row["memory"] for row in models]
    counts.add_row("peak memory, MB", *(f"{m['peak_bytes'] / 1e6:,.0f}" if m else "not known" for m in memory))
    counts.add_row("  libraries before", *(f"{m['libraries_bytes'] / 1e6:,.0f}" if m else "" for m in memory))
    out.print(counts)
    trains = "update_ms" in models[0]["cells"][0]
    heads = ["first token, ms", "prefill, tokens/s", "decode, ms", *(["update, ms"] if trains else [])]
    times = new_table("threads x batch x context", "model", *heads, left=2)
    for i, cell in enumerate(models[0]["cells"]):
        for k, row in enumerate(models):
            own = row["cells"][i]
            place = f"{cell['threads']} x {cell['batch']} x {cell['context']}" if k == 0 else ""
            parts = [_spread(own["first_token_ms"]), f"{own['prefill_tokens_per_s']:,.0f}", _spread(own["decode_ms"])]
            times.add_row(place, row["model"], *parts, *([_spread(own["update_ms"])] if trains else []))
    out.print(times)
    first = models[0]
    for other in models[1:]:
        pairs = list(zip(first["cells"], other["cells"], strict=True))
        told = [
            f"{label} {_range([b[name]['median'] / a[name]['median'] for a, b in pairs])}"
            for name, label in (("first_token_ms", "prefill"), ("decode_ms", "decode"))
        ]
        out.print(f"{first['model']} is so many times as fast as {other['model']}: {', '.join(told)}")
    machine = result["machine"]
    out.print(
        f"{machine['cpu']}, {machine['cores']} cores, {result['dtype']}; medians (least to most); matrix products reach "
        f"{result['gemm_flops_per_s'] / 1e9:,.0f} GFLOP/s"
    )
    print_notes(out, result["notes"])


def exported(result: dict[str, Any]) -> None:
    """A file for another engine."""
    out, size = new_console(), f"{result['bytes'] / 1e6:,.1f} MB"
    if "tensors" in result:
        kinds = ", ".join(f"{count} {kind}" for kind, count in result["tensors"].items())
        told = f"{result['architecture']}, {size}, tensors {kinds}"
    else:
        found = result["verified"]
        told = (
            f"{result['type']}, {size}; in ONNX Runtime {found['onnxruntime']} logits differ by at most "
            f"{found['max_logit_difference']:.2g} of {found['max_logit']:.2g}, and {found['same_tokens']} of {found['tokens']} "
            "greedy tokens are the same"
        )
    out.print(f"{result['out']}: {result['format']}, {told}")
    print_notes(out, result["notes"])


def trimmed(result: dict[str, Any]) -> None:
    """A smaller vocabulary."""
    r = result
    new_console().print(
        f"{r['out']}: {r['vocab']:,} of {r['vocab_before']:,} tokens, {r['params']:,} of {r['params_before']:,} parameters; "
        f"{r['covered']:.3%} of {r['corpus_tokens']:,} tokens of the text are kept as they are, and {r['same_lines']:,} "
        "lines of these alone are read as before; compare bits per byte (prunus eval), not perplexity",
    )


def quantized(result: dict[str, Any]) -> None:
    """A folder of fewer bits."""
    out, group = new_console(), f" in groups of {result['group_size']}" if result["group_size"] else ""
    out.print(
        f"{result['out']}: {result['scheme']}{group}, {result['matrices']} matrices, {result['bytes'] / 1e6:,.1f} MB "
        f"(before {result['bytes_before'] / 1e6:,.1f}), everything else {result['dtype']}; the same in a clean process",
    )
    print_notes(out, result["notes"])


def served(result: dict[str, Any]) -> None:
    """Verdicts of engines."""
    out, found = new_console(), new_table("engine", "version", "verdict", "how, or why not", left=4)
    for name, row in result["engines"].items():
        why = row["how"] if "how" in row else f"{row['reason']}; {row['mend']}"
        found.add_row(name, row["version"], row["verdict"], why)
    out.print(found)
    print_notes(
        out, [f"{result['architecture']}: what was not run here is read, with its source in --json", *result["notes"]]
    )


def carded(result: dict[str, Any]) -> None:
    """A model card."""
    told = f"{result['out']}: {result['results']} results, licence {result['licence'] or 'not on record (--licence)'}"
    new_console().print(told)


def pushed(result: dict[str, Any]) -> None:
    """An upload."""
    new_console().print(result["url"])


def _spread(found: dict[str, float]) -> str:
    return f"{found['median']:,.1f} ({found['least']:,.1f} to {found['most']:,.1f})"


def _range(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"
