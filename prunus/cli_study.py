"""The commands of studies. Imports nothing heavy at the top."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .cli_options import JsonOpt, tell
from .errors import UserError

studies = typer.Typer(name="study", help="Arms that are cut and trained side by side, and compared.", no_args_is_help=True)

StudyArg = Annotated[Path, typer.Argument(help="A study's .yaml file.", metavar="FILE")]
OutOpt = Annotated[Path, typer.Option("--out", "-o", help="The study's folder; one that is there goes on.")]
ProcessesOpt = Annotated[int, typer.Option("--processes", help="Steps at a time; each gets its share of the cores.")]
FAILED, BROKEN = 1, 3  # exit codes: a step that failed, a protocol that was not kept


@studies.command(name="run")
def run_study(file: StudyArg, out: OutOpt, processes: ProcessesOpt = 1, as_json: JsonOpt = False) -> None:
    """Do every step of a study that is not done yet, and prove from the ledgers what its file promises."""
    from . import show_study
    from .study import file as files
    from .study.run import run
    from .train.stopping import StoppedError

    note = (lambda text: None) if as_json else (lambda text: print(text, file=sys.stderr, flush=True))
    try:
        result = run(files.read(file), out.expanduser(), processes=processes, tell=note)
    except StoppedError as stop:
        print(f"prunus: {stop}", file=sys.stderr)
        raise typer.Exit(stop.code) from stop
    tell(result, as_json, show_study.ran)
    if result["failed"] or any(not row["holds"] for row in result["proofs"]):
        raise typer.Exit(FAILED if result["failed"] else BROKEN)


@studies.command(name="plan")
def plan_study(
    file: StudyArg,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A study's folder: only what is left to do there.")] = None,
    rate: Annotated[
        float | None, typer.Option("--rate", help="FLOPs a second that training reaches; else measured now.")
    ] = None,
    processes: ProcessesOpt = 1,
    as_json: JsonOpt = False,
) -> None:
    """List a study's steps with tokens, FLOPs, hours and disk; opens no data and no weight."""
    from . import show_study
    from .study import file as files
    from .study.plan import plan

    made = plan(files.read(file), None if out is None else out.expanduser(), rate=rate, processes=processes)
    tell(made, as_json, show_study.planned)


@studies.command(name="step")
def step_of_study(
    file: StudyArg,
    step: Annotated[str, typer.Argument(help="A step's name, as prunus study plan lists it.", metavar="STEP")],
    out: OutOpt,
    key: Annotated[
        str | None, typer.Option("--key", help="Its key when the study was begun; with another by now it is refused.")
    ] = None,
) -> None:
    """Do one step, whose needs are done: what prunus study run and cluster jobs start."""
    from . import show_study
    from .progress import Progress
    from .study import file as files
    from .study.steps import do, named
    from .train.stopping import StoppedError

    read = files.read(file)
    try:
        with Progress() as progress:
            do(read, named(read, step, key), out.expanduser(), progress=progress, say=show_study.line)
    except StoppedError as stop:
        print(f"prunus: {stop}", file=sys.stderr)
        raise typer.Exit(stop.code) from stop


@studies.command(name="gather")
def gather_study(file: StudyArg, out: OutOpt, as_json: JsonOpt = False) -> None:
    """Gather what a study has done so far, on a cluster or here, and prove its protocols; runs nothing."""
    from . import show_study
    from .study import file as files
    from .study.run import done, gather

    out = out.expanduser()
    if not out.is_dir():
        raise UserError(f"{out}: no such file or folder; give the --out of prunus study run")
    study = files.read(file)
    gather(study, out)
    tell(done(study, out), as_json, show_study.ran)


@studies.command(name="table")
def tables_of_study(
    folder: Annotated[Path, typer.Argument(help="The --out of prunus study run.", metavar="DIR")],
    form: Annotated[str, typer.Option("--format", help="text, markdown, latex or csv.")] = "text",
    to: Annotated[Path | None, typer.Option("--to", help="A file to write instead of printing.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
) -> None:
    """Tables of a study, finished or not: arms, seed by seed differences, what the ledgers prove; csv has a line a figure."""
    from . import show_study
    from .place import check_files, staged_files
    from .study import formats, results

    found = results.load(folder.expanduser())
    if form == "text":
        if to is not None:
            raise UserError("format: text is for the terminal; give --format markdown, latex or csv with --to")
        show_study.tables(formats.tables(found), found.missing)
        return
    text = formats.written(found, form)
    if to is None:
        print(text)
        return
    check_files(to, overwrite=overwrite)
    with staged_files(to) as (stage,):
        stage.write_text(text, encoding="utf-8")
    print(f"{to}: {len(found.runs)} runs")


def report(
    folder: Annotated[Path, typer.Argument(help="The folder of a study or a training run.", metavar="DIR")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The page; default: report.html in DIR.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the page.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Write one HTML page of a study or a run, finished or not: figures, tables, recipe, ledger. It loads nothing from anywhere."""
    from . import show_study
    from .study import page

    folder = folder.expanduser()
    place = folder / "report.html" if out is None else out.expanduser()
    tell(page.write(folder, place, overwrite=overwrite), as_json, show_study.reported)


def advise(
    target_params: Annotated[str, typer.Option("--target-params", help="Of the small model, such as 1B.")],
    tokens: Annotated[str, typer.Option("--tokens", help="That there are to train on, such as 50B.")],
    source: Annotated[
        str | None, typer.Argument(help="The parent: a folder, GGUF file or hub name.", metavar="SOURCE", show_default=False)
    ] = None,
    parent_params: Annotated[str | None, typer.Option("--parent-params", help="Instead of SOURCE, such as 8B.")] = None,
    own_parent: Annotated[
        bool, typer.Option("--own-parent/--released-parent", help="Whether the parent must be trained from the same tokens.")
    ] = False,
    granularity: Annotated[
        str | None, typer.Option("--granularity", help="depth, width, 'depth and width' or sparse; default: all but sparse.")
    ] = None,
    study: Annotated[
        list[Path] | None, typer.Option("--study", help="Folder of a study of your own; may be given again.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="cpu or gpu: whose hours are told.")] = "cpu",
    rate: Annotated[float | None, typer.Option("--rate", help="FLOPs a second that training reaches.")] = None,
    as_json: JsonOpt = False,
) -> None:
    """Scratch, prune, or enlarge and prune? From published rows and your own studies, with the reasons; or that nobody knows."""
    from . import show_study
    from .cli_train import count
    from .source import Source
    from .study import advise as advice

    if (source is None) == (parent_params is None):
        raise UserError("advise: give the parent as SOURCE, or its size as --parent-params")
    params = Source.open(source).anatomy.num_params if source is not None else count("--parent-params", parent_params or "")
    asked = advice.Asked(
        params, count("--target-params", target_params), count("--tokens", tokens), own_parent, granularity, device, rate
    )
    rows, silent = advice.own(folder.expanduser() for folder in study or ())
    tell(advice.advise(asked, [*rows, *advice.published()], silent), as_json, show_study.advised)


@studies.command(name="slurm")
def slurm_of_study(
    file: StudyArg,
    out: OutOpt,
    sbatch: Annotated[
        str, typer.Option("--sbatch", help="Options of every job, such as '--partition=gpu --time=4:00:00'.")
    ] = "",
    as_json: JsonOpt = False,
) -> None:
    """Write Slurm array jobs of what is left to do, and the script that submits them."""
    import shlex

    from .study import cluster
    from .study import file as files

    try:
        options = shlex.split(sbatch)
    except ValueError as error:
        raise UserError(f"sbatch: '{sbatch}' cannot be read as options ({error})") from None
    submit = cluster.write(files.read(file), out.expanduser(), options)
    tell({"submit": str(submit)}, as_json, lambda made: print(f"bash {made['submit']}"))
