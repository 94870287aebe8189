"""What commands have in common: options, the reading of those that typer cannot read, and how a result is printed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import UserError
from .methods import METHODS

METHOD_HELP = (
    "One of: "
    + "; ".join(f"{m.name} ({m.summary})" for m in METHODS.values())
    + ". Or several from coarse to fine, joined by +, such as shortgpt+flap+wanda."
)

SourceArg = Annotated[str, typer.Argument(help="A Hugging Face folder, a .gguf file, or a hub name.", metavar="SOURCE")]
MethodOpt = Annotated[str, typer.Option("--method", "-m", help=METHOD_HELP)]
RatioOpt = Annotated[
    float | None,
    typer.Option("--ratio", "-r", help="Fraction of block parameters to remove; for sparse methods the share of zeros."),
]
PatternOpt = Annotated[str | None, typer.Option("--pattern", help="n:m sparsity, such as 2:4 (keep 2 of every 4).")]
TargetOpt = Annotated[
    list[str] | None, typer.Option("--target", help="SIZE=NUMBER to reach instead of a ratio, such as hidden_size=512.")
]
UniformOpt = Annotated[bool, typer.Option("--uniform", help="Make all layers alike, so that stock engines can load it.")]
MultipleOpt = Annotated[
    str | None, typer.Option("--multiple-of", help="Sizes become multiples of this; auto: of what this machine is fast at.")
]
CompensateOpt = Annotated[
    str | None,
    typer.Option("--compensate", help="What repairs the rest: none, bias, gain. Of a combination PART=VALUE[,PART=VALUE]."),
]
OptionOpt = Annotated[
    list[str] | None, typer.Option("--option", help="NAME=VALUE, an option of the method; of a combination PART.NAME=VALUE.")
]
SparsityOpt = Annotated[
    float | None, typer.Option("--sparsity", help="Share of zeros that a combination's sparse last part makes.")
]
SplitOpt = Annotated[
    str | None,
    typer.Option("--split", help="Shares of the removed parameters, one for each other part of a combination: 0.5,0.5."),
]
AllocateOpt = Annotated[
    str | None, typer.Option("--allocate", help="Where the cut falls, of the method's allocators: see prunus methods.")
]
CostOpt = Annotated[
    str | None,
    typer.Option(
        "--cost", help="What the ratio is of, and scores are divided by: params, flops, kv-bytes, prefill-ms, decode-ms."
    ),
]
OrderOpt = Annotated[
    bool | None,
    typer.Option(
        "--sequential/--dense", help="Whether a block's statistics see the cut blocks before it (default: the method's)."
    ),
]
WindowsOpt = Annotated[int, typer.Option("--windows", help="Number of calibration windows.")]
SeqLenOpt = Annotated[int, typer.Option("--seq-len", help="Tokens a window.")]
SeedOpt = Annotated[int | None, typer.Option("--seed", help="Draw the windows at random instead of taking the first.")]
DocumentsOpt = Annotated[str | None, typer.Option("--documents", help="A slice of the documents, such as :800 or -100:.")]
BatchOpt = Annotated[int, typer.Option("--batch-size", help="Windows that go through a block together.")]
FieldOpt = Annotated[str, typer.Option("--field", help="The field of a JSONL or Parquet row that holds the text.")]
DtypeOpt = Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")]
TokensOpt = Annotated[
    str | None, typer.Option("--tokens", help="Of a method that trains: how many it trains on, such as 200k or 4M.")
]
TokensFolderOpt = Annotated[
    str | None, typer.Option("--data", help="Of such a method: a folder of prepared tokens, instead of --calibration.")
]
OnlineOpt = Annotated[bool, typer.Option("--online", help="Allow downloads from the Hugging Face hub.")]
RecordOpt = Annotated[Path | None, typer.Option("--record", help="Append a JSON line with recipe, versions and figures.")]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]


def check_processes(arguments: list[str]) -> None:
    """UserError if torchrun started a command that would do the same in every process; of others, all fail together."""
    count = os.environ.get("WORLD_SIZE", "1")
    if count != "1" and arguments[:1] not in (["train"], ["prune"]):
        asked = arguments[0] if arguments else "prunus"
        raise UserError(
            f"{asked}: torchrun started {count} processes, but only train and prune share their work; start it alone"
        )
    if count != "1":
        from .distributed import fail_with_others

        fail_with_others()


def pairs(items: list[str] | None, option: str) -> dict[str, str]:
    """What an option that is given as NAME=VALUE again and again says; UserError for anything else."""
    out = {}
    for item in items or []:
        name, equals, value = item.partition("=")
        if not (name and equals and value):
            raise UserError(f"{option}: '{item}' is not NAME=VALUE")
        out[name] = value
    return out


def sizes_of(items: list[str] | None) -> dict[str, int]:
    """What --target says."""
    out = {}
    for name, value in pairs(items, "--target").items():
        if not (value.isascii() and value.isdigit()):
            raise UserError(f"--target: {name}={value} is not a whole number")
        out[name] = int(value)
    return out


def multiple_of(text: str | None, source: str, dtype: str, *, online: bool) -> int | None:
    """What --multiple-of says: a number, or by `auto` the least that products of the source's width are fast at here."""
    if text is None or text.removeprefix("-").isdecimal():
        return None if text is None else int(text)
    if text != "auto":
        raise UserError(f"--multiple-of: {text} is no whole number, and not auto")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("--multiple-of: several processes may measure differently; give a number, which auto alone tells")
    from . import api, measure
    from .source import DTYPES, Source

    shape = Source.open(source, online=online).anatomy.shape
    widest = max(layer.intermediate_size for layer in shape.layers)
    return measure.multiple(shape.hidden_size, widest, DTYPES[api.dtype_named(dtype)])


def numbers_of(text: str, option: str) -> tuple[int, ...]:
    """Whole numbers with commas."""
    parts = [part.strip() for part in text.split(",")]
    if wrong := [part for part in parts if not (part.isascii() and part.isdigit())]:
        raise UserError(f"{option}: {wrong[0]!r} is not a whole number; give some with commas, such as 1,2")
    return tuple(dict.fromkeys(int(part) for part in parts))


def split_of(text: str | None) -> tuple[float, ...]:
    """What --split says."""
    try:
        return tuple(float(share) for share in text.split(",")) if text is not None else ()
    except ValueError as error:
        raise UserError(f"--split: '{text}' is no list of shares such as 0.5,0.5") from error


def order_of(sequential: bool | None) -> str | None:
    """What --sequential/--dense says."""
    return None if sequential is None else "sequential" if sequential else "dense"


def tell(result: dict[str, Any], as_json: bool, show: Any) -> None:
    """Print a result: as one JSON object, or as `show` does for people."""
    if as_json:
        print(json.dumps(result, allow_nan=False))
    else:
        show(result)
