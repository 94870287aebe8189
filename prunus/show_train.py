"""What training prints for people: one line an interval, and tables of runs."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .printed import new_console, new_table
from .tables import big, scientific


def line(found: Mapping[str, Any]) -> None:
    """One interval, on standard error."""
    if "sweep" in found:
        loss = found["sweep"]["loss"]
        text = f"lr {found['sweep']['lr']:.0e}: loss {'none' if loss is None else format(loss, '.4f')} after {found['step']} steps"
    elif "pruned" in found:
        gone = ", ".join(f"{count} x {kind}" for kind, count in found["pruned"]["groups"].items())
        before, after = found["loss_before"], found["loss_after"]
        told = ["none" if loss is None else f"{loss:.4f}" for loss in (before, after)]
        change = f"loss {told[0]} -> {told[1]}"
        text = f"step {found['pruned']['step']:>6}  cut {gone}: {big(found['pruned']['params'])} params, {change}"
    elif "note" in found:
        text = f"note: {found['note']}"
    elif "validation" in found:
        text = f"step {found['step']:>6}  validation loss {found['validation']['loss']:.4f}"
    else:
        left, after = found["seconds_left"], found.get("next_cut")
        alive = " alive" if "next_cut" in found else ""
        alive += "" if after is None else f"  next cut in {after} update{'s' * (after != 1)}"
        text = (
            f"step {found['step']:>6}  {big(found['tokens'])} tokens  loss {found['loss']:.4f}  lr {found['lr']:.2e}  "
            f"{big(found['params'])} params{alive}  {found['tokens_per_s']:,.0f} tokens/s  {found['share_of_peak']:.0%} of peak  "
            f"{left / 60:.0f} min left{_masks(found)}"
        )
    print(text, file=sys.stderr, flush=True)


def _masks(found: Mapping[str, Any]) -> str:
    """How far masks have come, while they learn."""
    if "masks" not in found:
        return ""
    told = found["masks"]
    return "  masks " + ", ".join(f"{kind} {n:.1f} (to {told['asked'][kind]:.1f})" for kind, n in told["expected"].items())


def result(record: Mapping[str, Any], out: Path) -> None:
    """A finished run."""
    figures = record["figures"]
    cost = sum(figures["flops"].values())
    print(f"{out}: {big(figures['tokens'])} tokens in {figures['seconds'] / 60:.1f} min, {scientific(cost)} FLOPs")
    if figures["validation"]:
        first, last = figures["validation"][0]["validation"]["loss"], figures["validation"][-1]["validation"]["loss"]
        print(f"validation loss {first:.4f} at the first look, {last:.4f} at the end")
    pruning = figures["pruning"]
    if pruning is not None and not pruning["met"]:
        left, asked = pruning["measured"], pruning["target"]
        print(f"the target was not met: {left:,} is left, {asked:,} was asked for; raise prune.pace.prune or tokens")
    if pruning is not None and "clock_ms" in pruning:
        print(f"{pruning['measure']}: {pruning['measured']:.4g} by the table, {pruning['clock_ms']:.4g} measured at the end")
    print(f"model: {out / 'model'} (loads in a clean process: {figures['verified']['class']})")


def table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Runs side by side."""
    made = new_table("run", "recipe", "state", "tokens", "of", "loss", "best validation", "tokens/s", left=3)
    for row in rows:
        loss, best, speed = row["loss"], row["best"], row["tokens_per_s"]
        made.add_row(
            row["run"],
            row["recipe"],
            row["state"],
            big(row["tokens"]),
            big(row["budget"]),
            "" if loss is None else f"{loss:.4f}",
            "" if best is None else f"{best:.4f}",
            "" if speed is None else f"{speed:,.0f}",
        )
    new_console().print(made)


def plan(result: Mapping[str, Any]) -> None:
    """What a run will take."""
    print(
        f"{result['recipe']}: {big(result['params'])} parameters, {big(result['tokens'])} tokens in {result['steps']:,} updates"
    )
    parts = ("weights", "gradients", "moments", "activations", "logits")
    listed = ", ".join(f"{name} {big(result[name], 'B')}" for name in parts)
    print(f"memory of each of {result['devices']} devices: {big(result['memory'], 'B')} ({listed})")
    if result["teacher_cache"] is not None:
        print(f"disk: {big(result['teacher_cache'], 'B')} of what the teacher says (prunus teach)")
    cuts = result["pruning"]
    about = "" if cuts is None or "unknown" in cuts else "about "
    print(f"speed: {about}{result['tokens_per_s']:,.0f} tokens/s, {about}{result['hours']:,.2f} hours ({result['basis']})")
    print(f"work: {about}{scientific(result['flops'])} FLOPs")
    if cuts is not None and "unknown" in cuts:
        print(f"cuts: {cuts['unknown']}")
    elif cuts is not None:
        less = "less" if cuts["saved"] >= 0 else "more, scoring included,"
        print(
            f"cuts: to {about}{big(cuts['params'])} parameters; {about}{abs(cuts['saved']):.0%} {less} work than without them"
        )
        print(f"about means: {cuts['assumed']}")
    for note in result["notes"]:
        print(f"note: {note}")
    if "mend" in result:
        print(f"does not fit: {result['mend']}")


def teaching(plan: Mapping[str, Any]) -> str:
    """What `prunus teach` will write, before it does."""
    written = plan["bytes"] - plan["bytes_left"]
    there = f", {big(written, 'B')} of it there already" if written else ""
    return (
        f"{plan['out']}: {plan['tokens']:,} tokens x {plan['bytes_per_token']:,} bytes (top {plan['top_k']}) = "
        f"{big(plan['bytes'], 'B')}{there}; "
        f"{big(plan['bytes_free'], 'B')} free; the teacher takes {big(plan['flops_left'], 'FLOP')}"
    )


def taught(result: Mapping[str, Any]) -> None:
    """What `prunus teach` wrote."""
    print(f"{result['out']}: {result['tokens']:,} tokens of {result['teacher']}, {big(result['bytes'], 'B')}")
    print(f"train with --set teacher.cache={result['out']}")


def tuned(result: Mapping[str, Any]) -> None:
    """What `prunus tune` wrote."""
    f = result["figures"]
    print(
        f"{result['out']}: {f['rows']:,} rows, {f['tokens']:,} tokens, {f['updates']} updates; answers of {f['held_out']} rows "
        f"held out: loss {f['loss_before']:.4f} before, {f['loss_after']:.4f} after"
    )
