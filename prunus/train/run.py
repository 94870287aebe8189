"""One training run in a folder: begun, stopped anywhere, gone on with, finished with a model that is proven to load.

RUN/recipe.json   what was asked for, every field said       RUN/checkpoints/   weights, moments and where it stood
RUN/log.jsonl     one line an interval, and log.1.jsonl ...   RUN/model/         the trained model, at the end
RUN/ledger.json   tokens and FLOPs                           RUN/record.jsonl   the figures
RUN/latency.json  milliseconds, where a recipe prunes by them
RUN/stops/        models on the way, where a recipe prunes and names them
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import heap, measure, record
from ..anatomy import Anatomy
from ..distributed import World
from ..errors import UserError
from ..latency import Table
from ..place import locked, staged_files
from . import log, lora, optim, saved
from .assembly import learner_of, model_of, optimizer_of, tensors_of
from .export import export
from .loop import Hook, Sparse, Training, train_, validate
from .opening import CHECKPOINTS, LEDGER, MODEL, RECIPE, RECORD, Run
from .recipe import Recipe
from .shrink.clocked import clock_of, clocked, table_of
from .shrink.cutting import Cutting
from .shrink.masks import Masks
from .shrink.pruner import Pruner
from .stopping import StoppedError, asked_to_stop
from .sweep import Sweep, swept
from .teaching import taught

KIND = "train"
STOPS = "stops"  # models on the way to a target
Say = Callable[[Mapping[str, Any]], None]


# -- the run --------------------------------------------------------------------------------------------------------------


def execute(run: Run, *, say: Say = lambda line: None, hooks: tuple[Hook, ...] = ()) -> dict[str, Any]:
    """Train to the end of the budget, from the last checkpoint if there is one; returns the record.

    StoppedError is raised at Ctrl-C or SIGTERM, once a checkpoint stands. Under torchrun all its processes work on the run; the
    first writes and says what there is to say.
    """
    recipe, out = run.recipe, run.out
    with World.joined() as world, locked(out) if world.first else nullcontext(), heap.kept():
        _check_shares(recipe, world)
        cutting, table = _clocked(run, world)
        done = world.agree(_begin(run, table) if world.first else None)
        if done is not None:
            return done
        tried = None
        if recipe.optimizer.sweeps:
            tried = swept(recipe, out, lambda rate: _training(run, hooks, rate, world), say, world)
            if tried.note is not None and world.first:
                say({"note": tried.note})
        rate = tried.best if tried is not None else float(recipe.optimizer.lr)  # type: ignore[arg-type]

        def tell(line: Mapping[str, Any]) -> None:
            if world.first:
                log.append(out, line)
                say(line)

        spending, pruner = _Spending(run), None
        if cutting is not None:
            pruner = (Pruner if cutting.part.masks is None else Masks)(cutting, recipe, tell, partial(_left, run, tried))
        training = _training(run, (spending, *hooks, *([pruner] if pruner else [])), rate, world)
        _resume_(run, training, pruner)
        if pruner is not None:
            pruner.begin(training)
        peak = world.total(measure.gemm_rate(dtype=torch.float32 if recipe.precision == "float32" else torch.bfloat16))
        with asked_to_stop() as asked:
            began, before = training.step, run.clock.seconds

            def each(training: Training) -> None:
                run.clock.stop()
                whole = training.step == recipe.steps
                if training.step % recipe.log_every == 0 or whole:
                    speed = (training.step - began) * recipe.batch_tokens / max(run.clock.seconds - before, 1e-9)
                    tell(_line(run, training, pruner, speed, spending.last / recipe.batch_tokens * speed / peak))
                every = recipe.validate_.every
                if every and (training.step % every == 0 or whole):
                    tell(_validated(run, training))
                if whole and pruner is not None:
                    pruner.end(training)
                stop = int(world.most(asked()))
                if stop or whole or (recipe.save.every and training.step % recipe.save.every == 0):
                    _save(run, training, pruner)
                if stop and not whole:
                    raise StoppedError(stop, training.step)
                run.clock.start()

            run.clock.start()
            train_(training, recipe.steps, each)
        return _finish(run, training, pruner, tried)


class _Spending(Hook):
    """Counts what updates cost, each of the model as it is then: the first hook, so that none has cut it yet."""

    def __init__(self, run: Run) -> None:
        self.run, self.of, self.last = run, None, 0

    def after_step(self, run: Training) -> None:
        """The last update's FLOPs."""
        model: Any = run.learner.model
        if model is not self.of:
            recipe = self.run.recipe
            self.of, self.last = model, 3 * Anatomy.of(model.config).flops(recipe.data.seq_len) * recipe.sequences
        self.run.spent += self.last


def _check_shares(recipe: Recipe, world: World) -> None:
    """UserError for a recipe that several processes cannot share."""
    if recipe.sequences < world.size:
        raise UserError(
            f"batch_tokens: {world.size} processes cannot share updates of {recipe.sequences} sequences; give at least "
            f"{world.size * recipe.data.seq_len}, or start fewer processes"
        )
    if recipe.compile and not world.alone:
        raise UserError("compile: is for one process only; set it to false to train with several")
    pace = None if recipe.prune is None else recipe.prune.pace
    if pace is not None and pace.kind == "once" and pace.samples < world.size:
        raise UserError(
            f"prune.pace.samples: {world.size} processes cannot share {pace.samples} sequences; give at least {world.size}"
        )


def _line(run: Run, training: Training, pruner: Pruner | None, speed: float, share: float) -> dict[str, Any]:
    """What is told of the last update."""
    recipe = run.recipe
    return {
        "step": training.step,
        "tokens": training.tokens,
        **training.last,
        "flops": run.spent,
        **({"params": run.anatomy.num_params} if pruner is None else pruner.outlook(training.tokens)),
        "tokens_per_s": speed,
        "share_of_peak": share,
        "seconds_left": (recipe.steps - training.step) * recipe.batch_tokens / speed,
    }


def _validated(run: Run, training: Training) -> dict[str, Any]:
    """Loss on the validation range; remembers the best."""
    feeds = run.feeds
    sequences, micro = feeds.validation_sequences, run.recipe.micro_batch
    found = validate(training.learner, feeds.validation, sequences, micro, training.world)
    found["by_domain"] = {feeds.validation.domains[int(k)].name: loss for k, loss in found["by_domain"].items()}
    if not run.best or found["loss"] < run.best["loss"]:
        run.best = {"loss": found["loss"], "step": training.step}
    line = {"step": training.step, "tokens": training.tokens, "flops": run.spent, "validation": found}
    if feeds.mixer is not None:
        line["mixing"] = feeds.remix_(training.position, found["by_domain"])
    return line


def _clocked(run: Run, world: World) -> tuple[Cutting | None, Table | None]:
    """What is cut, with milliseconds measured in one process for all, where they decide; nothing is written into the folder yet.

    UserError for a target that they put out of reach.
    """
    cutting = run.cutting
    if cutting is None or not cutting.part.timed:
        return cutting, None
    found = table_of(cutting.part, run.config, run.anatomy, run.recipe.dtype, run.out) if world.first else None
    table = world.agree(found)
    assert table is not None
    return clocked(cutting, table), table


def _begin(run: Run, table: Table | None) -> dict[str, Any] | None:
    """Write down the recipe, and the milliseconds that it goes by; the record, if the run is at its end."""
    run.out.mkdir(parents=True, exist_ok=True)
    if table is not None:
        table.saved({})
    if not (run.out / RECIPE).exists():
        with staged_files(run.out / RECIPE) as (stage,):
            stage.write_text(json.dumps(run.recipe.plain(), indent=1) + "\n", encoding="utf-8")
    for left in [
        path
        for place in (run.out, *(run.out / STOPS).glob("*"))
        for kind in ("partial", "replaced")
        for path in place.glob(f".*.{kind}-*")
    ]:  # by a killed process, whose number comes again
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    saved.clear_partial(run.out / CHECKPOINTS)
    done = record.read(run.out / RECORD) if (run.out / RECORD).exists() else []
    return done[-1] if done else None


def _training(run: Run, hooks: tuple[Hook, ...], lr: float, world: World) -> Training:
    """The run's live parts."""
    recipe = run.recipe
    torch.manual_seed(recipe.seed)  # for dropout, where a model has it
    model, fill = model_of(recipe, run.source, run.config, world)
    run.adapters = None if recipe.lora is None else lora.attach_(model, run.anatomy, recipe.lora, recipe.seed)
    learner = learner_of(recipe, model, run.anatomy, world, fill)
    if run.mask is not None:
        sparse = Sparse(learner.trained, {name: world.part(kept) for name, kept in run.mask.kept.items()})
        sparse.after_step(None)
        hooks = (*hooks, sparse)
    return Training(
        learner, optimizer_of(recipe, learner, lr), run.feeds.training, recipe.rates(lr), recipe.sequences, recipe.micro_batch,
        recipe.optimizer.clip, taught(run), run.feeds.starts if recipe.data.separate_documents else None,
        recipe.skip_spikes, hooks, world,
    )  # fmt: skip


# -- checkpoints ----------------------------------------------------------------------------------------------------------


def _save(run: Run, training: Training, pruner: Pruner | None) -> None:
    for hook in training.hooks:
        if isinstance(hook, Sparse):
            hook.check()
    state = {
        "recipe": run.recipe.hash,
        "step": training.step,
        "tokens": training.tokens,
        "updates": optim.steps_done(training.optimizer),
        "skipped": training.skipped,
        "usual": training.usual,
        "best": run.best,
        "seconds": run.clock.seconds,
        "flops": run.spent,
        "pruning": None if pruner is None else pruner.state(),
        "mixing": run.feeds.mixing_state(),
        "data": run.feeds.identity(),
        "rng": torch.get_rng_state().numpy().tobytes().hex(),
        "versions": record.versions(),
    }
    tensors = tensors_of(training.learner, training.optimizer) | (pruner.tensors() if pruner is not None else {})
    saved.write(run.out / CHECKPOINTS, training.step, tensors, state, training.world)
    if training.world.first:
        _prune(run)
    heap.give_back()  # what a save took; else it stays for good, with new gaps from each save


def _prune(run: Run) -> None:
    best = run.best.get("step")
    saved.prune(run.out / CHECKPOINTS, run.recipe.save.keep, None if best is None else int(best))


def _resume_(run: Run, training: Training, pruner: Pruner | None) -> None:
    """Changes `training` and `pruner`: as they stood at the last checkpoint, if there is one; the log is cut back to it."""
    world = training.world
    at = world.agree(max(saved.steps(run.out / CHECKPOINTS), default=0))
    if at:
        folder = saved.folder_of(run.out / CHECKPOINTS, at)
        state = saved.read_state(folder)
        if state["recipe"] != run.recipe.hash:
            raise UserError(f"{folder}: is of another recipe; delete it")
        if state.get("data", run.feeds.identity()) != run.feeds.identity():  # none: of an older version
            raise UserError(
                f"{folder}: was trained on what data.domains held then, which is other data now; give another --out"
            )
        training.step, training.tokens, training.skipped = state["step"], state["tokens"], state["skipped"]
        if pruner is not None:
            pruner.shape_(training, state["pruning"])
        known = pruner.tensors() if pruner is not None else {}
        saved.read_(folder, tensors_of(training.learner, training.optimizer) | known, world)
        if pruner is not None:
            pruner.remember(known)
        optim.start_slots_(training.optimizer, state["updates"])
        run.feeds.remember_(state["mixing"])
        training.usual, run.best, run.clock.seconds = state["usual"], state["best"], state["seconds"]
        run.spent = state["flops"]
        torch.set_rng_state(torch.frombuffer(bytearray.fromhex(state["rng"]), dtype=torch.uint8))
    if world.first:
        log.cut(run.out, at)
        _prune(run)


# -- the end --------------------------------------------------------------------------------------------------------------


def _finish(run: Run, training: Training, pruner: Pruner | None, tried: Sweep | None) -> dict[str, Any]:
    """Save the model, load it in a clean process, write ledger and record."""
    weights: Mapping[str, Tensor] = training.learner.trained
    if run.adapters is not None:
        weights = lora.merge_(training.learner, run.adapters)
    verified = _exported(run, training, weights, run.out)
    if training.world.first:
        _write_ledger(run, training, pruner, tried, run.out)
    return training.world.agree(_recorded(run, training, pruner, verified, tried) if training.world.first else {})


def _left(run: Run, tried: Sweep | None, pruner: Pruner, training: Training, share: float) -> None:
    """A checkpoint at a stop on the way, with its own ledger: ready to be recovered by itself."""
    run.clock.stop()
    place = run.out / STOPS / f"{share:g}"
    if training.world.first:
        place.mkdir(parents=True, exist_ok=True)
    training.world.barrier()
    _exported(run, training, training.learner.trained, place)
    training.learner.model.train()
    if training.world.first:
        _write_ledger(run, training, pruner, tried, place)
    run.clock.start()


def _exported(run: Run, training: Training, weights: Mapping[str, Tensor], place: Path) -> dict[str, Any]:
    training.learner.model.eval()
    return export(training.learner, weights, run.tokenizer, place / MODEL, training.world)


def _flops(run: Run, training: Training, pruner: Pruner | None) -> dict[str, int]:
    """By kind of work, so far."""
    flops = {"train": run.spent} | ({} if pruner is None else pruner.flops)
    if run.teacher_flops is not None:
        flops["teacher"] = run.teacher_flops * training.tokens // run.recipe.data.seq_len
    return flops


def _write_ledger(run: Run, training: Training, pruner: Pruner | None, tried: Sweep | None, place: Path) -> None:
    beginnings = [] if tried is None else [steps * run.recipe.sequences for steps in tried.read]
    ledger = run.feeds.ledger(
        run.recipe, training.tokens // run.recipe.data.seq_len, _flops(run, training, pruner),
        Anatomy.of(training.learner.model.config).num_params, run.source, beginnings,
        None if run.cache is None else run.cache.describe()["digest"],
    )  # fmt: skip
    with staged_files(place / LEDGER) as (stage,):
        stage.write_text(json.dumps(ledger, indent=1) + "\n", encoding="utf-8")


def _recorded(
    run: Run, training: Training, pruner: Pruner | None, verified: dict[str, Any], tried: Sweep | None
) -> dict[str, Any]:
    """Write the record."""
    lines = [json.loads(line) for line in log.lines(run.out)]
    last = next(line for line in reversed(lines) if "loss" in line)
    figures = {
        "params": Anatomy.of(training.learner.model.config).num_params,
        "tokens": training.tokens,
        "steps": training.step,
        "skipped": training.skipped,
        "lr": training.schedule.peak,
        "sweep": None if tried is None else {"steps": tried.steps, "losses": list(tried.losses.items())},
        "flops": _flops(run, training, pruner),
        "teacher_cache": None if run.cache is None else run.cache.describe(),
        "loss": last["loss"],
        "validation": [line for line in lines if "validation" in line],
        "best": run.best,
        "seconds": run.clock.seconds,
        "share_of_peak": last["share_of_peak"],
        "processes": training.world.size,
        "verified": verified,
        "pruning": None if pruner is None else _pruned(run, pruner),
    }
    recipe = {"command": KIND, "recipe": run.recipe.named(), "data": run.feeds.identity()}
    with staged_files(run.out / RECORD) as (stage,):
        return record.append(stage, KIND, recipe, figures)


def _pruned(run: Run, pruner: Pruner) -> dict[str, Any]:
    """What became of the cutting; where milliseconds were the target, the saved model's own beside what the table says of it."""
    told = pruner.told()
    if pruner.asked.part.clocked:
        told["clock_ms"] = getattr(clock_of(run.out / MODEL, run.recipe.dtype), told["measure"])
    return told
