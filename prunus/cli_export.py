"""The commands that hand checkpoints over: to other engines, with a card, to the hub. Import nothing heavy at the top."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_options import DtypeOpt, FieldOpt, JsonOpt, OnlineOpt, SourceArg, tell
from .errors import UserError, unknown

FORMATS = {"gguf": "f16", "onnx": "f32"}  # with the type that is written unless another is asked for


def export(
    source: Annotated[str, typer.Argument(help="A Hugging Face folder, such as one that prunus wrote.", metavar="DIR")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The file to write.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Write nothing: say which engines can serve it.")] = False,
    form: Annotated[
        str, typer.Option("--format", "-f", help="gguf: for llama.cpp and what is built on it; onnx: for ONNX Runtime.")
    ] = "gguf",
    kind: Annotated[
        str | None,
        typer.Option("--type", help="Of matrices. gguf: f32, f16 (as without it), bf16, q8_0; onnx: f32, int8, q8, q4."),
    ] = None,
    modelfile: Annotated[bool, typer.Option("--modelfile", help="Write FILE.Modelfile for ollama beside it.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it is there.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Write a checkpoint in the form that another engine serves."""
    if form not in FORMATS:
        raise unknown("format", form, FORMATS)
    from . import show_bench
    from .source import Source

    if check:
        from .export import serving

        tell(serving.check(Source.open(source)), as_json, show_bench.served)
        return
    if out is None:
        raise UserError("Missing option '--out', the file to write; --check writes none")
    opened, out, kind = Source.open(source), out.expanduser(), kind or FORMATS[form]
    if form == "onnx":
        if modelfile:
            raise UserError("--modelfile: ollama runs GGUF files, not ONNX; drop it, or use --format gguf")
        from .export import onnx_file

        written = onnx_file.export(onnx_file.Plan.of(opened, kind), out, overwrite=overwrite)
    else:
        from .export import gguf_file

        written = gguf_file.export(gguf_file.Plan.of(opened, kind), out, modelfile=modelfile, overwrite=overwrite)
    tell(written, as_json, show_bench.exported)


def quantize(
    source: Annotated[str, typer.Argument(help="A Hugging Face folder, such as one that prunus wrote.", metavar="DIR")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    scheme: Annotated[
        str, typer.Option("--scheme", "-s", help="8w8a: weights and activations in 8 bits; int8, int4: weights alone.")
    ] = "8w8a",
    group_size: Annotated[int | None, typer.Option("--group-size", help="int4: weights that share a scale (32).")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="Of all else: float32, bfloat16 or float16.")] = "bfloat16",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that prunus quantize wrote.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Write a checkpoint in fewer bits through torchao, and prove in a clean process that it is the one that was made."""
    from . import quantize as quantizing
    from . import show_bench
    from .source import Source

    plan = quantizing.Plan.of(Source.open(source), scheme, group_size, dtype)
    tell(quantizing.quantize(plan, out.expanduser(), overwrite=overwrite), as_json, show_bench.quantized)


def trim(
    source: SourceArg,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    text: Annotated[
        list[str] | None, typer.Option("--text", "-t", help="Text of the kind that the model will read; may be given again.")
    ] = None,
    coverage: Annotated[
        float, typer.Option("--coverage", help="The share of its tokens that must stay as they are.")
    ] = 0.999,
    field: FieldOpt = "text",
    dtype: DtypeOpt = "float32",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that prunus trim wrote.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Cut the vocabulary to what a corpus uses: embedding, head and tokenizer; text of kept tokens is read as before."""
    from . import show_bench
    from . import trim as trimming
    from .progress import Progress
    from .source import Source

    with Progress(quiet=as_json) as progress:
        made = trimming.trim(
            Source.open(source), text or (), coverage, out.expanduser(),
            field=field, dtype=dtype, overwrite=overwrite, progress=progress,
        )  # fmt: skip
    tell(made, as_json, show_bench.trimmed)


def card(
    folder: Annotated[Path, typer.Argument(help="A checkpoint that prunus wrote, or a training run.", metavar="DIR")],
    results: Annotated[
        list[Path] | None, typer.Option("--results", help="Records of prunus eval on these weights; may be given again.")
    ] = None,
    base: Annotated[str | None, typer.Option("--base-model", help="The source's public name, such as ORG/NAME.")] = None,
    licence: Annotated[str | None, typer.Option("--licence", help="The source's licence, such as apache-2.0.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a README.md that prunus did not write.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Write a model card (README.md) from what is on record: method, sizes, tokens, results, licence, how to load."""
    from . import show_bench
    from .export import card as cards

    given = cards.Given(tuple(results or ()), base, licence)
    tell(cards.write(folder, given, overwrite=overwrite), as_json, show_bench.carded)


def push(
    folder: Annotated[Path, typer.Argument(help="A checkpoint with its card.", metavar="DIR")],
    repo: Annotated[str, typer.Argument(help="Where to: ORG/NAME on the Hugging Face hub.")],
    private: Annotated[bool, typer.Option("--private", help="A new repository is seen by its owner alone.")] = False,
    online: OnlineOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Upload a checkpoint to the Hugging Face hub, once it has a card and verifies. Only with --online."""
    from . import show_bench
    from .export import hub

    tell(hub.push(folder, repo, private=private, online=online), as_json, show_bench.pushed)
