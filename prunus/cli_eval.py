"""The commands that score models and time them. Import nothing heavy at the top."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from .cli_options import (
    DocumentsOpt,
    DtypeOpt,
    FieldOpt,
    JsonOpt,
    OnlineOpt,
    RecordOpt,
    SeedOpt,
    SeqLenOpt,
    SourceArg,
    numbers_of,
    tell,
)
from .errors import UserError


def evaluate(
    source: SourceArg,
    text: Annotated[
        list[str] | None, typer.Option("--text", "-t", help="Text, JSONL, Parquet, or datasets:NAME; may be given again.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", help="Zero-shot tasks with commas, such as arc_easy,piqa; seven or eight: a paper's."),
    ] = None,
    task_data: Annotated[
        Path | None,
        typer.Option("--task-data", help="A folder with NAME/SPLIT.jsonl of every task; else the hub, with --online."),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Only the first rows of every task.")] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="What models write behind these, side by side: lines, JSON or JSONL.")
    ] = None,
    new_tokens: Annotated[int, typer.Option("--new-tokens", help="With --prompts: how much they write at most.")] = 64,
    chat: Annotated[bool, typer.Option("--chat", help="With --prompts: as answers in a chat.")] = False,
    first: Annotated[int | None, typer.Option("--first", help="With --prompts: only so many of them.")] = None,
    judge: Annotated[
        str | None, typer.Option("--judge", help="With --prompts: who says what is better, program:COMMAND or model:SOURCE.")
    ] = None,
    page: Annotated[Path | None, typer.Option("--page", help="With --prompts: also write a Markdown page.")] = None,
    baseline: Annotated[
        list[str] | None, typer.Option("--baseline", help="Another model to score on the same windows and items.")
    ] = None,
    protocol: Annotated[
        str | None, typer.Option("--protocol", help="Windows as a paper cuts them: sixteen, gptq, papers, strided.")
    ] = None,
    windows: Annotated[int, typer.Option("--windows", help="Number of windows; 0: all full ones.")] = 16,
    seq_len: SeqLenOpt = 1024,
    stride: Annotated[
        int | None,
        typer.Option("--stride", help="Windows overlap: the next begins so many tokens later, which alone count."),
    ] = None,
    seed: SeedOpt = None,
    documents: DocumentsOpt = None,
    field: FieldOpt = "text",
    dtype: DtypeOpt = "float32",
    record: RecordOpt = None,
    online: OnlineOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Perplexity on windows of text, zero-shot tasks, and several models on the same items."""
    from . import api, appraisal, generations, show
    from .place import check_files
    from .progress import Progress
    from .tasks.local import named

    options = api.TextOptions(windows, seq_len, seed, documents, field, stride)
    if (known := appraisal.protocol(protocol)) is not None:
        if options != api.TextOptions(16, 1024, None, documents, field):
            raise UserError("protocol: it says how windows are cut; drop --windows, --seq-len, --stride and --seed")
        options = replace(known, documents=documents, field=field)
    read = () if prompts is None else generations.prompts(prompts, first)
    if prompts is None and (first is not None or page is not None):
        raise UserError("prompts: --first and --page belong to --prompts; name a file, or drop them")
    if page is not None:
        check_files(page, overwrite=False)
    question = appraisal.Question(
        tuple(text or ()), options, named(tasks) if tasks is not None else (), task_data, limit,
        read, new_tokens, chat, judge, dtype, online,
    )  # fmt: skip
    with Progress(quiet=as_json) as progress:
        result = appraisal.appraise([source, *(baseline or [])], question, progress=progress, record=record)
    if page is not None:
        generations.write_page(page, result["models"], read, new_tokens=new_tokens)
    tell(result, as_json, show.evaluation)


def measure(
    source: SourceArg,
    baseline: Annotated[
        list[str] | None,
        typer.Option("--baseline", help="Another model, timed in turns with the first; may be given again."),
    ] = None,
    threads: Annotated[
        str | None, typer.Option("--threads", help="Numbers of threads; default 1,2,4,8 where there are.")
    ] = None,
    batches: Annotated[str, typer.Option("--batches", help="Numbers of prompts that run together.")] = "1,4",
    contexts: Annotated[str, typer.Option("--contexts", help="Tokens of a prompt.")] = "128,512",
    new_tokens: Annotated[int, typer.Option("--new-tokens", help="Tokens that are written behind a prompt.")] = 16,
    repeats: Annotated[int, typer.Option("--repeats", help="Of each, behind one to warm up.")] = 5,
    train: Annotated[bool, typer.Option("--train", help="Time an update by AdamW, too.")] = False,
    dtype: DtypeOpt = "float32",
    record: RecordOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """What models cost to run here: parameters, FLOPs, bytes, memory, and milliseconds by threads, batch and context."""
    from . import bench, show_bench
    from .progress import Progress

    asked = bench.Asked(
        bench.usual_threads() if threads is None else numbers_of(threads, "--threads"),
        numbers_of(batches, "--batches"), numbers_of(contexts, "--contexts"), new_tokens, repeats, train, dtype,
    )  # fmt: skip
    with Progress(quiet=as_json) as progress:
        result = bench.run([source, *(baseline or [])], asked, progress=progress, record=record)
    tell(result, as_json, show_bench.measured)
