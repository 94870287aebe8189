"""Results for people: every function prints one command's result."""

from __future__ import annotations

from functools import partial
from typing import Any

from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from .printed import ANY_WIDTH, new_console, new_table, print_notes
from .report import comparison_table
from .tables import big, number, win_rate


def _sizes(value: Any) -> str:
    if not isinstance(value, list):
        return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return f"{min(value):,} to {max(value):,} (mean {sum(value) / len(value):,.1f})"


_COUNTS = (
    ("params", "parameters", ""),
    ("block_params", "  of them in blocks", ""),
    ("flops", "forward FLOPs a window", "FLOP"),
    ("weight_bytes", "weights", "B"),
    ("kv_bytes_per_token", "KV cache a token", "B"),
)
_PER_LAYER = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


def _before_after(before: dict[str, Any], after: dict[str, Any]) -> Table:
    table = new_table("", "before", "after", "change")
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
    console = new_console()
    what = new_table("method", "what it does", left=2)
    facts = new_table("method", "cuts", "sweeps", "comes out", "stock engine", "reference", left=6)
    for name, row in result["methods"].items():
        what.add_row(name, row["summary"])
        cost = "trains" if row["trains"] else f"{row['sweeps']:g}" if row["sweeps"] else "no text"
        facts.add_row(name, ", ".join(row["axes"]), cost, row["comes_out"], row["stock_engine"], row["citation"])
    for table in (what, facts):
        table.columns[0].no_wrap = True
        console.print(table)
        console.print()
    console.print(
        "sweeps: forward passes over the calibration windows (an example where layers are left out one by one; prunus plan "
        "counts them; trains: on --tokens of text); stock engine: whether one that knows nothing of prunus can serve what comes out"
    )


def plan(result: dict[str, Any]) -> None:
    """A plan: sizes and counts before and after, and what it will take."""
    console = new_console()
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
    print_notes(console, result["notes"])


def _candidates(candidates: list[dict[str, Any]]) -> Table:
    """Shapes that the loss will choose from."""
    table = new_table(*("candidate " + name if not i else name for i, name in enumerate(candidates[0])), left=0)
    for row in candidates:
        table.add_row(*(f"{value:,}" for value in row.values()))
    return table


def _parts(parts: list[dict[str, Any]]) -> Table:
    """The parts of a combination; ``~`` marks what is an example because scores will decide it."""
    table = new_table("part", "removes of it", "repair", "in blocks before", "after", left=3)
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
    console = new_console()
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
    print_notes(console, result["notes"])


def _kept(units: dict[str, int]) -> Table | str:
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
    if not layers:
        return title
    table = new_table("layer", *kinds, title=title)
    for layer_index, row in sorted(layers.items()):
        table.add_row(str(layer_index), *(str(row.get(kind, "all")) for kind in kinds))
    return table


def evaluation(result: dict[str, Any]) -> None:
    """Perplexity and task scores of one or more models, and what sets the first apart."""
    console = new_console()
    models = result["models"]
    for i, text in enumerate(one["text"] for one in models[0]["texts"]):
        rows = [row["texts"][i] for row in models]
        table = new_table("model", "parameters", "perplexity", "a word", "bits per byte", "predictions")
        for row, own in zip(models, rows, strict=True):
            told = [_perplexity(own[name]) for name in ("perplexity", "word_perplexity")]
            table.add_row(
                row["model"], f"{row['params']:,}", *told, f"{own['bits_per_byte']:.4f}", f"{own['predictions']:,}"
            )
        console.print(table)
        which = f", documents {text['documents']}" if text["documents"] else ""
        apart = f", {text['stride']} apart" if "stride" in text else ""
        drawn = f"{text['windows']} windows of {text['seq_len']} tokens{apart} of {text['source']}{which}"
        console.print(f"on {drawn}; no BOS, {rows[0]['predictions']:,} predictions, {result['dtype']}")
        for other in result.get("against", ()):
            if (found := other["texts"][i])["loss"] is not None:  # else the two read other tokens
                error = "" if found["error"] is None else f" ± {found['error']:.4f}"
                console.print(Text(f"{models[0]['model']} less {other['model']}: {found['loss']:+.4f}{error} nats a token"))
    if "tasks" in models[0]:
        console.print(_task_table(result))
        console.print(f"± the standard error of that score; {result['dtype']}, zero-shot, by lm-eval")
    for i, prompt in enumerate(result.get("prompts", ())):
        console.print(_written(prompt, [(row["model"], row["written"][i]) for row in models]), width=min(console.width, 160))
    for other, said in models[0].get("judged", {}).items():
        console.print(Text(f"{models[0]['model']} against {other}: {win_rate(said)}"))
    if "against" in result and "tasks" in models[0]:
        console.print("(d ± its standard error on the same items, McNemar's p; ~: less than the other's own standard error)")
    print_notes(console, result["notes"])


def _written(prompt: str, told: list[tuple[str, str]]) -> Table:
    """What models wrote behind a prompt, side by side; as text, whatever it looks like."""
    table = Table(title=Text(prompt), title_justify="left", title_style="bold", expand=True, show_lines=False)
    for name, _ in told:
        table.add_column(Text(name), ratio=1, overflow="fold")
    table.add_row(*(Text(text) for _, text in told))
    return table


def _perplexity(value: float | None) -> str:
    return "above e^700" if value is None else f"{value:.4g}"


def _task_table(result: dict[str, Any]) -> Table:
    """A row a task and a mean, a column a model; beside each other model how the first differs from it."""
    first, *others = result["models"]
    against = result.get("against", [])
    columns = [first["model"], *(name for row in others for name in (row["model"], "d"))]
    table = new_table("task", "metric", *columns, left=2)
    for name, task in first["tasks"].items():
        for metric in (m for m in task if m != "metric"):
            cells = [_score(first["tasks"][name][metric])]
            for row, apart in zip(others, against, strict=True):
                shown = _apart(apart["tasks"][name]) if metric == task["metric"] else ""
                cells += [_score(row["tasks"][name][metric]), shown]
            table.add_row(name, metric, *cells)
    for name in first["means"]:
        cells = [_score(first["means"][name])]
        for row, apart in zip(others, against, strict=True):
            cells += [_score(row["means"][name]), _apart(apart["means"][name])]
        table.add_row(f"mean of {name}", "", *cells)
    return table


def _score(score: dict[str, Any]) -> str:
    return f"{100 * score['mean']:.1f} ± {100 * score['error']:.1f}"


def _apart(difference: dict[str, Any]) -> str:
    p = "" if difference["p"] is None else f", p {difference['p']:.2g}"
    return (
        f"{100 * difference['mean']:+.1f} ± {100 * difference['error']:.1f}{p}{' ~' if difference['within_noise'] else ''}"
    )


def comparison(result: dict[str, Any]) -> None:
    """Methods side by side, as wide as the table needs: a figure that is cut off is none."""
    header, rows = comparison_table(result)
    table = new_table(*header, left=2)
    for row in rows:
        table.add_row(*row)
    console = new_console()
    console.width = max(console.width, Measurement.get(console, console.options.update(max_width=ANY_WIDTH), table).maximum)
    console.print(table)
    print_notes(console, result["notes"])
    console.print(f"{result['ran']} runs now, {len(rows)} rows in all: {result['table']}, {result['picture']}")


def plotted(result: dict[str, Any]) -> None:
    """Where a picture went."""
    console = new_console()
    console.print(result["picture"])
    print_notes(console, result["notes"])


def verified(result: dict[str, Any]) -> None:
    """The outcome of `prunus verify`."""
    new_console().print(
        f"{result['folder']}: {result['params_on_disk']:,} parameters as recorded, weights unchanged, logits within "
        f"{result['max_logit_difference']:.2g}, cached generation equal"
    )


def quickstart(result: dict[str, Any]) -> None:
    """The model, what was cut of it, and that trained on, side by side; and what they write."""
    console = new_console()
    models = result["models"]
    title = f"{result['source']}, cut by {result['method']}, and trained on {big(result['trained_tokens'])} tokens"
    table = new_table("", *(one["name"] for one in models), title=title)
    first = models[0]
    for key, label, shown in (
        ("params", "parameters", big),
        ("weight_bytes", "weights", partial(big, unit="B")),
        ("kv_bytes_per_token", "KV cache a token", partial(big, unit="B")),
        ("prefill_tokens_per_s", "prefill, tokens/s", "{:.0f}".format),
        ("decode_tokens_per_s", "decode, tokens/s", "{:.1f}".format),
        ("perplexity", "perplexity, held out", "{:.2f}".format),
        ("bits_per_byte", "bits per byte, held out", "{:.3f}".format),
    ):
        change = [f" ({one[key] / first[key] - 1:+.1%})" if one is not first else "" for one in models]
        table.add_row(label, *(shown(one[key]) + more for one, more in zip(models, change, strict=True)))
    console.print(table)
    console.print(Text(f"text: {result['text']}; speeds: batch 1, on {result['machine']['cpu']}"))
    for i, prompt in enumerate(result["prompts"]):
        console.print(Text(f"\n{prompt!r}", style="bold"))
        for one in models:
            console.print(Text(f"  {one['name'] + ':':<10} {one['writes'][i]!r}"))
    console.print(Text(f"\none page of it all: {result['report']}"))
    console.print(Text(f"a study like any other: prunus study plan {result['out']}/study.yaml"))
