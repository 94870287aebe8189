"""The commands of training: `prunus train`, `prunus teach`, `prunus runs`, `prunus recipe`. Imports nothing heavy at the top."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_options import JsonOpt, OnlineOpt, tell
from .errors import UserError

if TYPE_CHECKING:
    from .planning import Request

recipes = typer.Typer(name="recipe", help="Training recipes.", no_args_is_help=True)

SetOpt = Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE with a dotted name, such as optimizer.lr=1e-3.")]
RECIPE = typer.Argument(help="A .yaml file, or the bare name of a recipe that ships.", metavar="RECIPE")
RecipeArg = Annotated[str, RECIPE]
SourceOpt = Annotated[str | None, typer.Option("--source", help="Short for model.source.")]
DataOpt = Annotated[str | None, typer.Option("--data", help="Short for data.domains: one folder of prepared data.")]
TokensOpt = Annotated[str | None, typer.Option("--tokens", help="Short for tokens, such as 200k or 4M.")]
EpochsOpt = Annotated[int | None, typer.Option("--epochs", help="Short for data.epochs: how often data may be seen.")]
ParamsOpt = Annotated[
    str | None,
    typer.Option(
        "--target-params",
        help="Such as 10M: short for prune.target.params where the recipe prunes, else for model.target_params, the size of "
        "fresh weights.",
    ),
]
TokenizerOpt = Annotated[str | None, typer.Option("--tokenizer", help="Short for model.tokenizer.")]


def _fields(
    source: str | None, data: str | None, tokens: str | None, tokenizer: str | None, epochs: int | None, params: str | None
) -> dict[str, Any]:
    """Flags as the fields that they stand for."""
    named: dict[str, Any] = {
        "model.source": source,
        "data.domains": [{"folder": data}] if data else None,
        "model.tokenizer": tokenizer,
        "tokens": None if tokens is None else count("--tokens", tokens),
        "data.epochs": epochs,
        "target_params": None if params is None else count("--target-params", params),
    }
    return {name: value for name, value in named.items() if value is not None}


def count(option: str, text: str) -> int:
    """``4M`` -> 4,000,000."""
    scale = {"k": 10**3, "m": 10**6, "b": 10**9}.get(text[-1:].lower())
    try:
        return round(float(text[:-1]) * scale) if scale else int(text)
    except (ValueError, OverflowError) as error:
        raise UserError(f"{option}: '{text}' is no number; write for example 200000, 200k or 4M") from error


def tune(
    source: Annotated[str, typer.Argument(help="A Hugging Face folder, such as one that prunus wrote.", metavar="DIR")],
    data: Annotated[Path, typer.Option("--data", help="Rows with instruction, output and perhaps input: JSON or JSONL.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    recipe: Annotated[str, typer.Option("--recipe", help="A .yaml file, or one that ships: alpaca.")] = "alpaca",
    changes: SetOpt = None,
    record: Annotated[Path | None, typer.Option("--record", help="Append a JSON line with recipe and figures.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that prunus tune wrote.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Teach a checkpoint to follow instructions, through TRL: the loss of answers alone, the chat template kept."""
    from . import show_train
    from .progress import Progress
    from .source import Source
    from .train import tuning

    asked = tuning.read(recipe, changes or ())
    with Progress(quiet=as_json) as progress:
        made = tuning.tune(
            Source.open(source), data, asked, out.expanduser(), overwrite=overwrite, progress=progress, to=record
        )
    tell(made, as_json, show_train.tuned)


def train(
    out: Annotated[Path, typer.Option("--out", "-o", help="The run's folder; one that is there goes on.")],
    recipe: Annotated[str | None, RECIPE] = None,
    searched: Annotated[
        Path | None,
        typer.Option(
            "--from-scratch-at-searched-shape",
            metavar="RUN",
            help="Instead of a recipe: fresh weights of the shape that this pruning run came to, and all else as it had it: "
            "tokens, their order, batches, rate, seeds.",
        ),
    ] = None,
    changes: SetOpt = None,
    source: SourceOpt = None,
    data: DataOpt = None,
    tokens: TokensOpt = None,
    tokenizer: TokenizerOpt = None,
    epochs: EpochsOpt = None,
    target_params: ParamsOpt = None,
    track: Annotated[
        list[str] | None, typer.Option("--track", help="tensorboard or trackio, besides the run's own log.jsonl.")
    ] = None,
    online: OnlineOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Train by a recipe: from fresh weights, on from a checkpoint, or taught by a parent. Stopped anywhere, it goes on."""
    from . import show_train
    from .distributed import leads
    from .train import recipe as recipes_
    from .train import track as tracking
    from .train.estimate import too_large
    from .train.opening import prepare
    from .train.run import execute
    from .train.searched import recipe_of
    from .train.stopping import StoppedError

    for kind in track or ():
        tracking.check(kind)
    if (recipe is None) == (searched is None):
        raise UserError("train: give either RECIPE or --from-scratch-at-searched-shape RUN, which stands for one")
    fields = _fields(source, data, tokens, tokenizer, epochs, target_params)
    if searched is not None:
        asked = recipe_of(searched, changes or (), fields)
    else:
        asked = recipes_.read(str(recipe), changes or (), fields)
    run = prepare(asked, out, online=online)
    for note in (*run.notes, *filter(None, [too_large(run)])) if leads() else ():
        print(f"note: {note}", file=sys.stderr)
    sinks = [tracking.sink(kind, out) for kind in track or ()] + ([] if as_json else [show_train.line])

    def say(line: Any) -> None:
        for sink in sinks:
            sink(line)

    try:
        result = execute(run, say=say)
    except StoppedError as stop:
        if leads():
            print(f"prunus: {stop}", file=sys.stderr)
        raise typer.Exit(stop.code) from stop
    if not leads():
        return
    if as_json:
        print(json.dumps(result, allow_nan=False))
    else:
        show_train.result(result, out)


def refuse_training(method: str, **given: str | None) -> None:
    """UserError for what is of methods that train, beside one that does not."""
    for name, value in given.items():
        if value is not None:
            raise UserError(f"{name}: {method} does not train; drop --{name}, or take sheared-llama")


def check_shearing(method: str, tokens: str | None, refused: Mapping[str, bool], *, stray_field: bool) -> None:
    """UserError for a method that trains, without tokens or with an option that it has no use for."""
    if tokens is None:
        raise UserError(f"tokens: {method} trains with what it cuts; give --tokens, such as --tokens 4M")
    if wrong := [name for name, given in refused.items() if given]:
        raise UserError(f"{wrong[0]}: {method} trains, and does not take it; drop --{wrong[0].replace('_', '-')}")
    if stray_field:
        raise UserError("field: prepared tokens have none; drop --field, or give --calibration")


def shear(
    source: str,
    request: Request,
    out: Path,
    tokens: str,
    data: str | None,
    text: tuple[str, str] | None,
    seq_len: int,
    seed: int,
    dtype: str,
    overwrite: bool,
    online: bool,
    as_json: bool,
) -> None:
    """What `prunus prune` does by a method that trains; `text` is a file and the field of its rows."""
    from . import show, show_train
    from .api import dtype_named
    from .data.prepare import Text
    from .progress import Progress
    from .train.shearing import shear as sheared
    from .train.stopping import StoppedError

    try:
        with Progress(quiet=as_json) as progress:
            manifest = sheared(
                source,
                request,
                out,
                tokens=count("--tokens", tokens),
                data=data,
                text=None if text is None else Text(*text, online=online),
                seq_len=seq_len,
                seed=seed,
                dtype=dtype_named(dtype),
                overwrite=overwrite,
                online=online,
                progress=progress,
                say=(lambda line: None) if as_json else show_train.line,
            )
    except StoppedError as stop:
        print(f"prunus: {stop}", file=sys.stderr)
        raise typer.Exit(stop.code) from stop
    if manifest is not None:
        tell({"out": str(out), **manifest.model_dump(exclude={"fingerprint"})}, as_json, show.manifest)


def teach(
    recipe: RecipeArg,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The folder to write, or to go on with; default: teacher.cache.")
    ] = None,
    changes: SetOpt = None,
    source: SourceOpt = None,
    data: DataOpt = None,
    tokens: TokensOpt = None,
    tokenizer: TokenizerOpt = None,
    epochs: EpochsOpt = None,
    target_params: ParamsOpt = None,
    online: OnlineOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Write down what a recipe's teacher says of the tokens that the run will read; the run then needs no teacher.

    Give the recipe, --set and the rest as the run will have them. What it takes on disk is said before it begins.
    """
    from . import show_train
    from .progress import Progress
    from .train import recipe as recipes_
    from .train import teaching

    asked = recipes_.read(recipe, changes or (), _fields(source, data, tokens, tokenizer, epochs, target_params))
    work = teaching.prepare(asked, out, online=online)
    plan = work.describe()
    print(f"note: {show_train.teaching(plan)}", file=sys.stderr, flush=True)
    try:
        with Progress(quiet=as_json) as progress:
            manifest = teaching.write(work, progress)
    except KeyboardInterrupt:
        print("prunus: stopped; the same command goes on behind the last shard", file=sys.stderr)
        raise SystemExit(130) from None
    result = {**plan, "digest": manifest.digest, "shards": len(manifest.shards), "flops": manifest.flops}
    tell(result, as_json, show_train.taught)


def runs(
    folder: Annotated[Path, typer.Argument(help="A folder whose sub-folders are runs.")] = Path("runs"),
    as_json: JsonOpt = False,
) -> None:
    """List the training runs of a folder, side by side: where each stands, and what it reached."""
    from . import show_train
    from .train.listing import listed

    rows = listed(folder)
    if as_json:
        print(json.dumps({"runs": rows}, allow_nan=False))
    else:
        show_train.table(rows)


def plan(
    recipe: str, changes: list[str], devices: int, rate: float | None, memory: float | None, latency: bool, as_json: bool
) -> None:
    """What `prunus plan --train` prints."""
    from . import show_train
    from .train import recipe as recipes_
    from .train.estimate import planned

    result = planned(recipes_.read(recipe, changes), devices=devices, rate=rate, memory=memory, latency=latency)
    tell(result, as_json, show_train.plan)


@recipes.command()
def schema() -> None:
    """Print the JSON schema of recipes."""
    from .train.recipe import schema as of_recipes

    print(json.dumps(of_recipes(), indent=1))


@recipes.command(name="list")
def names() -> None:
    """List the recipes that ship."""
    from .train.recipe import shipped

    for name, text in shipped().items():
        print(f"{name:<16} {text.splitlines()[0].removeprefix('# ')}")


@recipes.command()
def show(recipe: RecipeArg, changes: SetOpt = None) -> None:
    """Print a recipe with every field said."""
    import yaml

    from .train.recipe import read

    print(yaml.safe_dump(read(recipe, changes or ()).plain(), sort_keys=False), end="")
