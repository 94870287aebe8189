"""`prunus data ...` and `prunus ledger`. Imports nothing heavy at the top."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_options import FieldOpt, JsonOpt, OnlineOpt, tell
from .errors import UserError

app = typer.Typer(
    help="Prepare training text: tokenizers, token shards, and whether texts overlap.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

SourcesArg = Annotated[list[str], typer.Argument(help="Text, JSONL, Parquet, or datasets:NAME.", metavar="TEXT...")]
SeparatorOpt = Annotated[
    str | None, typer.Option("--separator", help="What stands between documents of plain text, such as <|endoftext|>.")
]
FolderArg = Annotated[Path, typer.Argument(help="A folder of prepared data.")]


def _splits(items: list[str] | None) -> dict[str, float | None] | None:
    out: dict[str, float | None] = {}
    for item in items or []:
        name, _, share = item.partition("=")
        try:
            if name in out:
                raise ValueError
            out[name] = None if share == "rest" else float(share)
        except ValueError as error:
            raise UserError(f"--split: '{item}' is not NAME=SHARE or NAME=rest, each name once") from error
    return out or None


@app.command()
def tokenizer(
    sources: SourcesArg,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    vocab_size: Annotated[int, typer.Option("--vocab-size", help="Number of tokens, <|endoftext|> included.")],
    field: FieldOpt = "text",
    separator: SeparatorOpt = None,
    online: OnlineOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Train a byte-level BPE tokenizer of a given size, for small experiments."""
    from . import checkpoint, show_data
    from .data.prepare import Text
    from .data.tokenizer import fingerprint, train_tokenizer

    texts = [Text(source, field, separator, online=online) for source in sources]
    for text in texts:
        text.check()
    checkpoint.check_destination(out, overwrite=False, needed_bytes=0)
    started = time.monotonic()
    made = train_tokenizer((d for text in texts for d in text.documents()), vocab_size, ", ".join(sources))
    with checkpoint.staged(out, overwrite=False) as stage:
        made.save_pretrained(stage)
    result = {"out": str(out), "vocab_size": vocab_size, "sha256": fingerprint(made)}
    tell(result | {"seconds": time.monotonic() - started}, as_json, show_data.tokenizer)


@app.command()
def prepare(
    sources: SourcesArg,
    tokenizer: Annotated[str, typer.Option("--tokenizer", "-t", help="A folder with tokenizer.json, or a hub name.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write; an unfinished one goes on.")],
    split: Annotated[
        list[str] | None,
        typer.Option(
            "--split",
            help="NAME=SHARE of the documents, or NAME=rest; give it again for more. "
            "Default: validation=0.01, parent=0.495, retrain=rest.",
        ),
    ] = None,
    field: FieldOpt = "text",
    separator: SeparatorOpt = None,
    licence: Annotated[str | None, typer.Option("--licence", help="The texts' licence, for the manifest.")] = None,
    shard_tokens: Annotated[int, typer.Option("--shard-tokens", help="Tokens a shard.")] = 1 << 27,
    processes: Annotated[int, typer.Option("--processes", help="Processes that tokenise.")] = 1,
    online: OnlineOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Turn text into memory-mapped token shards, every document in one range. Run again, it goes on where it was."""
    from . import show_data
    from .data.prepare import SPLITS, Text, check_folder, check_splits
    from .data.prepare import prepare as run
    from .data.tokenizer import open_tokenizer
    from .progress import Progress

    splits = _splits(split) or SPLITS
    check_splits(splits)
    check_folder(out)
    texts = [Text(source, field, separator, licence, online) for source in sources]
    for text in texts:
        text.check()
    opened = open_tokenizer(tokenizer, online=online)
    started = time.monotonic()
    options: dict[str, Any] = {"splits": splits, "shard_tokens": shard_tokens, "processes": processes}
    try:
        with Progress(quiet=as_json) as progress:
            manifest = run(texts, opened, out, **options, progress=progress)
    except KeyboardInterrupt:  # unlike other commands, this one leaves something to go on with
        print("prunus: stopped; the same command goes on where it was", file=sys.stderr)
        raise SystemExit(130) from None
    result = {"out": str(out), **show_data.described(manifest), "seconds": time.monotonic() - started}
    tell(result, as_json, show_data.prepared)


@app.command()
def inspect(
    folder: FolderArg,
    verify: Annotated[bool, typer.Option("--verify", help="Hold every file against its SHA-256.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Show what prepared data is, and check that its files are there and whole."""
    from . import show_data
    from .data.shards import Manifest
    from .progress import Progress

    manifest = Manifest.read(folder)
    with Progress(quiet=as_json) as progress:
        if verify:
            manifest.verify(folder, progress)
        for which in manifest.ranges:
            manifest.check_files(folder, which)
    tell({"out": str(folder), **show_data.described(manifest), "verified": verify}, as_json, show_data.prepared)


@app.command()
def overlap(
    evaluation: Annotated[str, typer.Argument(help="Evaluation text.")],
    data: Annotated[str, typer.Argument(help="Calibration or training text, or FOLDER or FOLDER:RANGE of prepared data.")],
    n: Annotated[int, typer.Option("--ngram", help="Words of an n-gram.")] = 13,
    field: FieldOpt = "text",
    separator: SeparatorOpt = None,
    online: OnlineOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Say which share of the n-grams of an evaluation text occurs in calibration or training text."""
    from . import show_data
    from .data.overlap import text_overlap
    from .data.prepare import Text
    from .data.shards import prepared_documents
    from .data.text import is_plain

    def text(source: str) -> Text:
        made = Text(source, field, separator if is_plain(source) else None, online=online)
        made.check()
        return made

    asked = text(evaluation)
    documents = prepared_documents(data)
    if documents is None:
        documents = text(data).documents()
    found = text_overlap(asked.documents(), documents, n=n)
    result = {"evaluation": evaluation, "data": data, **found.to_json(), "warning": found.warning(evaluation, data)}
    tell(result, as_json, show_data.overlap)


def ledger(
    first: Annotated[Path, typer.Argument(help="A checkpoint folder or its ledger.json.", metavar="A")],
    second: Annotated[Path | None, typer.Argument(help="Another one to compare it with.", metavar="B")] = None,
    as_json: JsonOpt = False,
) -> None:
    """Show what a model's tokens and FLOPs were; of two models, whether they saw the same, disjoint or overlapping tokens."""
    from dataclasses import asdict

    from . import show_data
    from .ledger import Ledger, compare

    ledgers = [Ledger.read(path) for path in (first, second) if path is not None]
    runs = [str(path) for path in (first, second) if path is not None]
    result: dict[str, Any] = {"runs": [{"run": run, **one.summary()} for run, one in zip(runs, ledgers, strict=True)]}
    if len(ledgers) == 2:
        result["own"] = asdict(compare(*ledgers))
        result["with_parents"] = asdict(compare(*ledgers, parents=True))
    tell(result, as_json, show_data.ledger)
