"""Prints what studies will take, and what came of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text

from .printed import new_console, new_table, print_notes
from .show_train import line as line
from .tables import big, scientific


def ran(result: Mapping[str, Any]) -> None:
    """The runs that are done, what failed, and whether protocols were kept."""
    console = new_console()
    table = new_table("run", "parameters", "tokens", "with parents", "FLOPs", "with parents", "score", "")
    table.columns[0].overflow = "fold"
    for row in result["rows"]:
        first = next(iter(row["scores"]), None)
        told = ("", "") if first is None else (_score(first), f"{first['on']} {first['metric']}")
        table.add_row(
            row["run"], _big(row["params"]), _big(row["tokens"]), _big(row["total_tokens"]), _flops(row["flops"]),
            _flops(row["total_flops"]), *told,
        )  # fmt: skip
    console.print(table)
    if released := sorted({text for row in result["rows"] for text in row["unrecorded"]}):
        console.print(Text(f"with parents: but for {', '.join(released)}, of whose training nothing is known"))
    for proof in result["proofs"]:
        kept = "kept" if proof["holds"] else "NOT kept"
        console.print(Text(f"{proof['protocol']} {kept}: {' and '.join(proof['runs'])}: {proof['why']}"))
    for name, why in result["failed"].items():
        console.print(Text(f"failed: {name}: {why}"))
    for name, why in result["left"].items():
        console.print(Text(f"left: {name}, which needs {why}"))
    console.print(Text(f"all scores: prunus study table {result['out']}; one page: prunus report {result['out']}"))


def tables(shown: Sequence[Any], missing: Sequence[str]) -> None:
    """Tables of `study.formats`."""
    console = new_console()
    for table in shown:
        made = new_table(*table.header, title=table.title, left=table.left)
        for column in made.columns:
            column.overflow = "fold"  # a narrow terminal loses nothing
        for row in table.rows:
            made.add_row(*map(Text, row))
        console.print(made)
    if missing:
        console.print(Text(f"not done yet: {', '.join(missing)}"))


def reported(made: Mapping[str, Any]) -> None:
    """Where the page is."""
    print(f"{made['out']}: {made['charts']} figures, {made['tables']} tables, {big(made['bytes'], 'B')}")


def advised(made: Mapping[str, Any]) -> None:
    """A recommendation, why, and what it costs."""
    console = new_console()
    answer = made["answer"]
    said = {"unknown": "nobody knows", "scratch": "train from scratch", "prune": f"prune, by {made['method']}, and retrain"}[
        answer
    ]
    console.print(Text(said, style="bold"))
    for reason in made["reasons"]:
        console.print(Text(reason))
    for name in ("how", "alternative"):
        if name in made:
            console.print(Text(made[name] if name == "how" else f"or {made[name]}"))
    if made["expected"]:
        table = new_table("method", "nats ahead of fresh weights")
        for method, value in sorted(made["expected"].items(), key=lambda one: -one[1]):
            table.add_row(method, f"{value:+.3f}")
        console.print(table)
    cost = made["cost"]
    hours = f"about {cost['hours']:,.3g} hours at {cost['basis']}" if cost["hours"] is not None else cost["basis"]
    console.print(Text(f"cost: {big(cost['tokens'])} tokens, {scientific(cost['flops'])} FLOPs, {hours}"))
    if made["rows"]:
        console.print(Text(f"rows: {'; '.join(made['rows'])}", style="dim"))
    for folder, why in made["silent"].items():
        console.print(Text(f"no row of {folder}: {why}", style="dim"))


def planned(made: Mapping[str, Any]) -> None:
    """Steps, and what they take in all."""
    console = new_console()
    table = new_table("step", "kind", "parameters", "tokens", "FLOPs", "hours", "memory", "disk", left=2)
    table.columns[0].overflow = "fold"
    for row in made["steps"]:
        hours = "done" if row["done"] else "" if row["hours"] is None else f"{row['hours']:,.2f}"
        flops = "?" if row["flops"] is None else scientific(row["flops"])
        memory, disk = ("" if not row[name] else big(row[name], "B") for name in ("memory", "disk"))
        table.add_row(row["step"], row["kind"], _big(row["params"]), _big(row["tokens"]), flops, hours, memory, disk)
    console.print(table)
    for part in made["compare"]:
        console.print(Text(f"equal {part['protocol']}: {', '.join(part['arms'])}"))
    at_once = f" of {made['processes']} processes together" if made["processes"] > 1 else ""
    console.print(
        f"{made['study']}: {made['runs']} runs, {len(made['steps'])} steps; left to do: {big(made['tokens'])} tokens, "
        f"{scientific(made['flops'])} FLOPs, about {made['hours']:,.2f} hours at {made['basis']}{at_once}, at most "
        f"{big(made['memory'], 'B')} of memory (one device), {big(made['disk'], 'B')} of disk"
    )
    unknown = len(made["unknown"])
    uncounted = [f"{unknown} steps marked ? are not counted: of tasks, or of models that are not there yet"] * (unknown > 0)
    print_notes(console, [*made["notes"], *uncounted])


def _big(value: int | None) -> str:
    return "" if value is None else big(value)


def _flops(value: float | None) -> str:
    return "" if value is None else scientific(value)


def _score(score: Mapping[str, Any]) -> str:
    if score["metric"] == "loss":
        return f"{score['value']:.4f}"
    return f"{100 * score['value']:.1f} ± {100 * score['error']:.1f}"
