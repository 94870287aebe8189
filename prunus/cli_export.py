"""The commands that hand checkpoints over: to other engines, with a card, to the hub. Import nothing heavy at the top."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_options import JsonOpt, OnlineOpt, tell
from .errors import UserError, unknown

FORMATS = ("gguf",)


def export(
    source: Annotated[str, typer.Argument(help="A Hugging Face folder, such as one that prunus wrote.", metavar="DIR")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The file to write.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Write nothing: say which engines can serve it.")] = False,
    form: Annotated[str, typer.Option("--format", "-f", help="gguf: for llama.cpp and what is built on it.")] = "gguf",
    kind: Annotated[str, typer.Option("--type", help="Of matrices: f32, f16, bf16 or q8_0.")] = "f16",
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
    from .export import gguf_file

    plan = gguf_file.Plan.of(Source.open(source), kind)
    tell(gguf_file.export(plan, out.expanduser(), modelfile=modelfile, overwrite=overwrite), as_json, show_bench.exported)


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
