"""What commands have in common: options, the reading of those that typer cannot read, and how a result is printed."""

from __future__ import annotations

import json
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
MultipleOpt = Annotated[int | None, typer.Option("--multiple-of", help="Sizes become multiples of this.")]
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
OnlineOpt = Annotated[bool, typer.Option("--online", help="Allow downloads from the Hugging Face hub.")]
RecordOpt = Annotated[Path | None, typer.Option("--record", help="Append a JSON line with recipe, versions and figures.")]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]


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
