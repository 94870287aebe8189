"""Results for people: every function prints one command's result."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from .report import comparison_table
from .tables import big, number


def _sizes(value: Any) -> str:
    if not isinstance(value, list):
        return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return f"{min(value):,} to {max(value):,} (mean {sum(value) / len(value):,.1f})"


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True)


def _table(*columns: str, title: str | None = None, left: int = 1) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < left else "right")
    return table


def _notes(console: Console, notes: list[str]) -> None:
    for note in notes:
        console.print(Text(f"note: {note}", style="dim"))


_COUNTS = (
    ("params", "parameters", ""),
    ("block_params", "  of them in blocks", ""),
    ("flops", "forward FLOPs a window", "FLOP"),
    ("weight_bytes", "weights", "B"),
    ("kv_bytes_per_token", "KV cache a token", "B"),
)
_PER_LAYER = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


def _before_after(before: dict[str, Any], after: dict[str, Any]) -> Table:
    table = _table("", "before", "after", "change")
    for key in before["shape"]:
        old, new = before["shape"][key], after.get("shape", {}).get(key)
        if new is None:
            new = "decided by the scores" if key in _PER_LAYER else old
        table.add_row(key, _sizes(old), _sizes(new), "")
    for key, label, unit in _COUNTS:
        old, new = before[key], after.get(key)
        if new is None:
            table.add_row(label, big(old, unit), "", "")
        else:
            at_most = "at most " if after.get("at_most") else ""
            table.add_row(label, big(old, unit), at_most + big(new, unit), f"{new / old - 1:+.2%}")
    return table


def methods(result: dict[str, Any]) -> None:
    """The method table: what each does, then what it costs and what comes out."""
    console = _console()
    what = _table("method", "what it does", left=2)
    facts = _table("method", "cuts", "sweeps", "comes out", "stock engine", "reference", left=6)
    for name, row in result["methods"].items():
        what.add_row(name, row["summary"])
        cost = f"{row['sweeps']:g}" if row["sweeps"] else "no text"
        facts.add_row(name, ", ".join(row["axes"]), cost, row["comes_out"], row["stock_engine"], row["citation"])
    for table in (what, facts):
        table.columns[0].no_wrap = True
        console.print(table)
        console.print()
    console.print(
        "sweeps: forward passes over the calibration windows (an example where layers are left out one by one; prunus plan "
        "counts them); stock engine: whether one that knows nothing of prunus can serve what comes out"
    )


def plan(result: dict[str, Any]) -> None:
    """A plan: sizes and counts before and after, and what it will take."""
    console = _console()
    console.print(f"{result['method']} on {result['source']}  ({result['citation']})")
    table = _before_after(
        result["before"], {} if {"candidates", "budget"} & result.keys() else result.get("after", result["before"])
    )
    _add_latency(table, result.get("latency", {}))
    console.print(table)
    if "parts" in result:
        console.print(_parts(result["parts"]))
    if "candidates" in result:
        console.print(_candidates(result["candidates"]))
    if "budget" in result:
        budget = result["budget"]
        console.print(f"{budget['cost']} of the blocks: at most {budget['at_most']:,} of {budget['of']:,}{budget['unit']}")
    if "sparsity" in result:
        free = result["flops_if_zeros_were_free"]
        console.print(f"zeros in block matrices: {result['sparsity']:.2%}")
        console.print(
            f"FLOPs if zeros were free: {big(free['matrices'], 'FLOP')} (or {big(free['all'], 'FLOP')} in the "
            "convention that counts attention and head as sparse too)"
        )
    estimate = result["estimate"]
    console.print(
        f"estimate: {estimate['scoring_seconds']:.0f} s of scoring, {big(estimate['memory_bytes'], 'B')} of memory "
        f"({estimate['basis']})"
    )
    _notes(console, result["notes"])


def _candidates(candidates: list[dict[str, Any]]) -> Table:
    """Shapes that the loss will choose from."""
    table = _table(*("candidate " + name if not i else name for i, name in enumerate(candidates[0])), left=0)
    for row in candidates:
        table.add_row(*(f"{value:,}" for value in row.values()))
    return table


def _parts(parts: list[dict[str, Any]]) -> Table:
    """The parts of a combination; ``~`` marks what is an example because scores will decide it."""
    table = _table("part", "removes of it", "repair", "in blocks before", "after", left=3)
    for part in parts:
        about = "~" if part.get("on_example") else ""
        after, asked = part.get("after"), part["request"]
        left = "decided by the scores" if after is None else about + big(after["block_params"])
        if after is not None and after.get("at_most"):
            left = f"at most {big(after['block_params'])}"
        what = f"{part['sparsity']:.2%} zeros" if "sparsity" in part else f"{about}{asked['ratio']:.2%}"
        table.add_row(part["method"], what, part["compensator"], about + big(part["before"]["block_params"]), left)
    return table


def _add_latency(table: Table, latency: dict[str, Any]) -> None:
    """Rows of estimated milliseconds, where this machine's table has them."""
    for name, what in (("prefill_ms", "prefill of {prompt_tokens} tokens, ms"), ("decode_ms", "decode of a token, ms")):
        if latency:
            old, new = (latency[side][name] if side in latency else None for side in ("before", "after"))
            change = f"{new / old - 1:+.1%}" if old and new else ""
            told = ["" if value is None else number(value) for value in (old, new)]
            table.add_row(what.format(**latency["key"]), *told, change)


def manifest(result: dict[str, Any]) -> None:
    """A checkpoint: where it came from, sizes before and after, the proof."""
    console = _console()
    folder = result.get("out") or result.get("folder")
    console.print(f"{folder}: {result['method']['name']} on {result['source']['name']} ({result['after']['model_type']})")
    console.print(_before_after(result["before"], result["after"]))
    for part in result["method"].get("parts", []):
        before, after = (big(part["block_params"][side]) for side in ("before", "after"))
        console.print(f"{part['name']}: {before} to {after} parameters in blocks (repair: {part['compensator']})")
    if result.get("kept_units"):
        console.print(_kept(result["kept_units"]))
    ratios = ", ".join(f"{k.replace('_', ' ')} {v:.2%}" for k, v in result["ratios"].items())
    console.print(f"really: {ratios}")
    if result["calibration"]:
        c = result["calibration"]
        console.print(f"calibrated on {c['windows']} windows of {c['seq_len']} tokens of {c['source']}")
    proof = result["verified"]
    console.print(
        f"verified in a clean process: logits differ by at most {proof['max_logit_difference']:.2g}, cached generation equal"
    )
    _notes(console, result["notes"])


def _kept(units: dict[str, int]) -> Table:
    """Kept units of every axis that was cut, a row a layer."""
    whole = {name: count for name, count in units.items() if "." not in name}
    layers: dict[int, dict[str, int]] = {}
    for name, count in units.items():
        if "." in name:
            layer, kind = name.split(".")[1:]
            layers.setdefault(int(layer), {})[kind] = count
    kinds = sorted({kind for row in layers.values() for kind in row})
    title = "kept: " + ", ".join(
        [*(f"{count} of {name}" for name, count in whole.items()), *(["by layer"] if layers else [])]
    )
    table = _table("layer", *kinds, title=title)
    for layer_index, row in sorted(layers.items()):
        table.add_row(str(layer_index), *(str(row.get(kind, "all")) for kind in kinds))
    return table


def evaluation(result: dict[str, Any]) -> None:
    """Perplexity of one or more models."""
    text = result["text"]
    table = _table("model", "parameters", "perplexity", "bits per byte", "predictions")
    for row in result["models"]:
        table.add_row(
            row["model"],
            f"{row['params']:,}",
            "above e^700" if row["perplexity"] is None else f"{row['perplexity']:.4g}",
            f"{row['bits_per_byte']:.4f}",
            f"{row['predictions']:,}",
        )
    console = _console()
    console.print(table)
    which = f", documents {text['documents']}" if text["documents"] else ""
    drawn = f"{text['windows']} windows of {text['seq_len']} tokens of {text['source']}{which}"
    console.print(f"on {drawn}; no BOS, {text['seq_len'] - 1} predictions a window, {result['dtype']}")


def comparison(result: dict[str, Any]) -> None:
    """Methods side by side, as wide as the table needs: a figure that is cut off is none."""
    header, rows = comparison_table(result)
    table = _table(*header, left=2)
    for row in rows:
        table.add_row(*row)
    console = _console()
    console.width = max(console.width, Measurement.get(console, console.options.update(max_width=10_000), table).maximum)
    console.print(table)
    _notes(console, result["notes"])
    console.print(f"{result['ran']} runs now, {len(rows)} rows in all: {result['table']}, {result['picture']}")


def plotted(result: dict[str, Any]) -> None:
    """Where a picture went."""
    console = _console()
    console.print(result["picture"])
    _notes(console, result["notes"])


def verified(result: dict[str, Any]) -> None:
    """The outcome of `prunus verify`."""
    _console().print(
        f"{result['folder']}: {result['params_on_disk']:,} parameters as recorded, weights unchanged, logits within "
        f"{result['max_logit_difference']:.2g}, cached generation equal"
    )


def quickstart(result: dict[str, Any]) -> None:
    """Before and after, and what both models write."""
    console = _console()
    before, after = result["before"], result["after"]
    table = _table("", "before", "after", "change", title=f"{result['source']} cut by {result['method']}")
    for key, label, unit in _COUNTS:
        table.add_row(label, big(before[key], unit), big(after[key], unit), f"{after[key] / before[key] - 1:+.1%}")
    for key, label, style in (
        ("perplexity", "perplexity, held out", "{:.2f}"),
        ("bits_per_byte", "bits per byte, held out", "{:.3f}"),
        ("prefill_tokens_per_s", "prefill, tokens/s", "{:.0f}"),
        ("decode_tokens_per_s", "decode, tokens/s", "{:.1f}"),
    ):
        old, new = before[key], after[key]
        table.add_row(label, style.format(old), style.format(new), f"{new / old - 1:+.1%}")
    console.print(table)
    console.print(f"text: {result['text']}; speeds: batch 1, median of {result['repeats']}, on {result['machine']['cpu']}")
    for item in result["continuations"]:
        console.print(Text(f"\n{item['prompt']!r}", style="bold"))
        console.print(Text(f"  before: {item['before']!r}"))
        console.print(Text(f"  after:  {item['after']!r}"))
    console.print(
        f"\n{result['out']}: verified in a clean process. Nothing was trained yet: what a cut loses, training wins back."
    )
