"""Results about data and ledgers for people: every function prints one command's result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .printed import new_console, new_table
from .tables import big

if TYPE_CHECKING:
    from .data.shards import Manifest


def described(manifest: Manifest) -> dict[str, Any]:
    """A manifest as a result: counts instead of shards."""
    ranges = {
        name: {
            "share": manifest.splits[name],
            "documents": manifest.documents(name),
            "tokens": manifest.tokens(name),
            "text_bytes": sum(shard.text_bytes for shard in shards),
            "shards": len(shards),
        }
        for name, shards in manifest.ranges.items()
    }
    fields = ("tokenizer_sha256", "vocab_size", "eos_token_id", "dtype", "shard_tokens", "versions")
    return {
        "digest": manifest.digest,
        **{name: getattr(manifest, name) for name in fields},
        "sources": [origin.model_dump() for origin in manifest.sources],
        "ranges": ranges,
    }


def tokenizer(result: dict[str, Any]) -> None:
    """`prunus data tokenizer`."""
    new_console().print(f"{result['out']}: {result['vocab_size']:,} tokens, {result['seconds']:.1f} s")


def prepared(result: dict[str, Any]) -> None:
    """`prunus data prepare` and `inspect`."""
    console = new_console()
    vocab = f"{result['vocab_size']:,} tokens in the vocabulary, {result['dtype']}"
    console.print(f"{result['out']}: data {result['digest']}, {vocab}")
    for origin in result["sources"]:
        licence = origin["licence"] or "not given"
        console.print(f"  {origin['source']}: {origin['documents']:,} documents, licence {licence}")
    table = new_table("range", "share", "documents", "tokens", "text bytes", "shards")
    for name, row in result["ranges"].items():
        counts = (f"{row[key]:,}" for key in ("documents", "tokens", "text_bytes", "shards"))
        table.add_row(name, f"{row['share']:.4g}", *counts)
    console.print(table)
    if result.get("seconds"):
        size = sum(row["text_bytes"] for row in result["ranges"].values()) / 1e6
        console.print(f"{result['seconds']:.1f} s, {size / result['seconds']:.2f} MB of text a second")
    if result.get("verified"):
        console.print("every file is as it was written (SHA-256)")


def overlap(result: dict[str, Any]) -> None:
    """`prunus data overlap`."""
    console = new_console()
    console.print(
        f"{result['hits']:,} of {result['ngrams']:,} {result['n']}-grams of {result['evaluation']} occur in {result['data']}: "
        f"{result['share']:.2%}, in {result['documents_hit']:,} of {result['documents']:,} documents",
    )
    if result["warning"]:
        console.print(f"warning: {result['warning']}")


def ledger(result: dict[str, Any]) -> None:
    """`prunus ledger`."""
    console = new_console()
    for run in result["runs"]:
        table = new_table("stage", "of", "parameters", "tokens", "different", "train", "teacher", "scoring", left=2)
        for stage in run["stages"]:
            params = "" if stage["params"] is None else f"{stage['params']:,}"
            flops = (big(stage["flops"][kind], "FLOP") if kind in stage["flops"] else "" for kind in _KINDS)
            whose = "parent" if stage["parent"] else "run"
            table.add_row(stage["name"], whose, params, f"{stage['tokens']:,}", f"{stage['unique_tokens']:,}", *flops)
        console.print(run["run"], style="bold")
        console.print(table)
        at_least = "at least " if run["unrecorded"] else ""
        for cache in sorted({stage["teacher_cache"] for stage in run["stages"]} - {None}):
            console.print(
                f"the teacher's FLOPs were spent when its cache {cache} was written, once for all runs that read it"
            )
        console.print(f"own: {run['tokens']:,} tokens, {big(run['flops'], 'FLOP')}")
        console.print(f"in all: {at_least}{run['total_tokens']:,} tokens, {at_least}{big(run['total_flops'], 'FLOP')}")
        for what in run["unrecorded"]:
            console.print(f"without a ledger: {what}")
        console.print()
    for key, title in (("own", "their own tokens"), ("with_parents", "with all that came before")):
        if found := result.get(key):
            order = ", in the same order" if found["same_order"] else ""
            counts = f"{found['shared']:,} in both, {found['only_a']:,} and {found['only_b']:,} in one only"
            console.print(f"{title}: {found['verdict']}{order} ({counts})")
            for note in found["notes"]:
                console.print(f"  note: {note}")


_KINDS = ("train", "teacher", "scoring")
