"""The command that compares methods."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_options import (
    BatchOpt,
    DocumentsOpt,
    DtypeOpt,
    FieldOpt,
    JsonOpt,
    OnlineOpt,
    RecordOpt,
    SeqLenOpt,
    SourceArg,
    WindowsOpt,
    tell,
)


def compare_methods(
    source: SourceArg,
    names: Annotated[
        str,
        typer.Option(
            "--methods", "-m", help="Methods, with commas between; NAME+uniform or NAME+OPTION=VALUE sets options."
        ),
    ],
    ratios: Annotated[list[float], typer.Option("--ratio", "-r", help="Ratio of every method; give it again for more.")],
    text: Annotated[str, typer.Option("--text", "-t", help="Evaluation text.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder of the comparison; one that is there goes on.")],
    calibration: Annotated[str | None, typer.Option("--calibration", "-c", help="Calibration text.")] = None,
    seeds: Annotated[int, typer.Option("--seeds", help="Draws of calibration windows; 1 takes the first ones.")] = 1,
    windows: WindowsOpt = 32,
    seq_len: SeqLenOpt = 512,
    documents: DocumentsOpt = None,
    eval_windows: Annotated[
        int, typer.Option("--eval-windows", help="Number of evaluation windows; 0: all full ones.")
    ] = 16,
    eval_seq_len: Annotated[int, typer.Option("--eval-seq-len", help="Tokens an evaluation window.")] = 1024,
    eval_documents: Annotated[
        str | None, typer.Option("--eval-documents", help="A slice of the evaluation documents, such as -100:.")
    ] = None,
    field: FieldOpt = "text",
    batch_size: BatchOpt = 4,
    latency: Annotated[bool, typer.Option("--latency/--no-latency", help="Time prefill and decoding of every cut.")] = True,
    dtype: DtypeOpt = "float32",
    record: RecordOpt = None,
    online: OnlineOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Cut one model by several methods, score every cut on the same text, and write one table and one picture."""
    from . import api, comparison, show
    from .progress import Progress

    question = comparison.Question(
        source,
        comparison.split_methods(names),
        ratios,
        text,
        calibration,
        seeds,
        api.TextOptions(windows, seq_len, None, documents, field),
        api.TextOptions(eval_windows, eval_seq_len, None, eval_documents, field),
        dtype,
        batch_size,
        latency,
        online,
    )
    with Progress(quiet=as_json) as progress:
        result = comparison.run(question, out, also=record, progress=progress)
    tell(result, as_json, show.comparison)
