"""A cut that is learned, as a method of `prunus prune`: gates train with the weights for the whole budget (Sheared LLaMA).

The work is that of `prunus train sheared-llama`, in the folder `.OUT.training` beside OUT, by which a run that was stopped goes on.
What is left is a checkpoint like that of any method; the run's record and log lie in it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import checkpoint
from ..axes import kind_of
from ..combination import planned
from ..data.prepare import Text
from ..data.prepare import prepare as prepare_data
from ..distributed import leads, processes
from ..errors import UserError
from ..hf import target_for
from ..job import Outcome, Progress, no_progress
from ..keep import Keep
from ..ledger import Ledger
from ..network import offline
from ..source import DTYPES, Source
from . import log, saved
from . import recipe as recipes
from .opening import CHECKPOINTS, LEDGER, MODEL, Run, prepare
from .run import Say, execute
from .shrink.part import SIZES

if TYPE_CHECKING:
    from ..planning import Plan, Request
    from .recipe import Recipe

SPLITS = {"validation": 0.05, "retrain": None}  # of a text that is not prepared yet
_SEQUENCES = 2  # of an update, as in the recipe


def shear(
    source: str,
    request: Request,
    out: Path,
    *,
    tokens: int,
    data: str | None = None,
    text: Text | None = None,
    seq_len: int = 512,
    seed: int = 0,
    dtype: str = "float32",
    overwrite: bool = False,
    online: bool = False,
    progress: Progress = no_progress,
    say: Say = lambda line: None,
) -> checkpoint.Manifest | None:
    """Learn a cut on so many tokens of `data` (a prepared folder) or of `text`, and save it; None in all processes but the first.

    StoppedError is raised as by `execute`: the same call goes on. UserError, before any weight is read, for what cannot be.
    """
    offline(online)
    opened = Source.open(source, online=online)
    Ledger.check(opened.path)
    plan = planned(opened.config, opened.anatomy, request)
    assert plan.target is not None and plan.method.trains
    needed = plan.target.anatomy.weight_bytes(DTYPES[dtype].itemsize)
    checkpoint.check_destination(out, overwrite=overwrite, needed_bytes=needed)
    work = out.absolute().parent / f".{out.name}.training"
    recipe = recipe_of(source, plan, str(_tokens(opened, data, text, work, progress)), tokens, seq_len, seed)
    run = prepare(recipe, work / "run", online=online)
    for note in run.notes:
        say({"note": note})
    record = execute(run, say=say)
    if not leads():
        return None
    manifest = checkpoint.save(_outcome(run, plan, opened, dtype, record), opened, run.tokenizer, out, calibration=None,
                               overwrite=overwrite)  # fmt: skip
    shutil.rmtree(work)
    return manifest


def recipe_of(source: str, plan: Plan, folder: str, tokens: int, seq_len: int, seed: int) -> Recipe:
    """The recipe that ships, to the plan's sizes, with masks for all of its updates."""
    assert plan.target is not None
    before, after = _sizes(plan.anatomy.axes), _sizes(plan.target.anatomy.axes)
    sizes = {name: after[kind] for name, kind in SIZES.items() if after.get(kind, 0) < before.get(kind, 0)}
    fields = {
        "model.source": source,
        "data.domains": [{"folder": folder}],
        "data.seq_len": seq_len,
        "data.seed": seed,
        "seed": seed,
        "tokens": tokens,
        "batch_tokens": _SEQUENCES * seq_len,
        "prune.target": sizes,
        "prune.axes": [SIZES[name] for name in sizes],
        "prune.masks.end": 1.0,
    }
    return recipes.read(plan.method.name, (), fields)


def _sizes(axes: Any) -> dict[str, int]:
    return {kind_of(axis.name): axis.size for axis in axes.values()}


def _tokens(source: Source, data: str | None, text: Text | None, work: Path, progress: Progress) -> Path:
    """The folder of prepared tokens; a text is prepared in the work's own, in one process."""
    if (data is None) == (text is None):
        raise UserError("data: give the text to train on, as --data FOLDER of prepared tokens or as --calibration FILE")
    if data is not None:
        return Path(data).expanduser()
    assert text is not None
    if processes() > 1:
        raise UserError("calibration: several processes train on prepared tokens; give --data FOLDER (prunus data prepare)")
    text.check()
    work.mkdir(parents=True, exist_ok=True)
    prepare_data([text], source.tokenizer(), work / "tokens", splits=SPLITS, progress=progress)
    return work / "tokens"


def _outcome(run: Run, plan: Plan, source: Source, dtype: str, record: dict[str, Any]) -> Outcome:
    """What the run left, as that of any method."""
    at = max(saved.steps(run.out / CHECKPOINTS))
    state = saved.read_state(saved.folder_of(run.out / CHECKPOINTS, at))
    kept = Keep.from_json(state["pruning"]["kept"], "state.json")
    figures = record["figures"]
    note = (figures["pruning"]["masks"] or {}).get("note")
    told = [json.loads(line) for line in log.lines(run.out)]
    return Outcome(
        plan,
        Source.open(str(run.out / MODEL)).load(dtype).eval(),
        target_for(source.config, source.anatomy, kept),
        keep=kept,
        measured={"training": record, "log": told},
        seconds={"train": figures["seconds"]},
        notes=() if note is None else (note,),
        ledger=Ledger.read(run.out / LEDGER),
    )
