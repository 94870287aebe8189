"""What a study does, step by step: cuts, training runs, evaluations. Runs that need the same cut share it.

A step's key says all that its outcome hangs on, its needs' keys included, so what another study made is never taken for its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .. import api, bench, record
from ..appraisal import appraise
from ..checkpoint import EXTRA, MANIFEST
from ..errors import UserError, unknown
from ..job import Progress, no_progress
from ..ledger import Ledger
from ..place import in_turn, staged_files
from ..reading import json_of, table_of
from ..source import Source
from ..train import recipe as recipes
from ..train.opening import MODEL, RECORD, prepare
from ..train.recipe import Recipe
from ..train.run import Say, execute
from .file import MADE, Cell, MeasurePart, Study

STEPS, CUTS, EVALUATIONS, MEASURES = "steps", "cuts", "evaluations", "measures"  # folders beside those of the training runs
STATISTICS = "statistics"  # that several cuts share, until all are done
# What statistics that serve any target know nothing of.
OF_THE_TARGET = {"ratio", "pattern", "target", "multiple_of", "sparsity"}
Kind = Literal["cut", "train", "evaluate", "measure"]


@dataclass(frozen=True)
class Step:
    """One thing to be done. `place` is what it writes, below the study's folder."""

    kind: Kind
    cell: Cell
    name: str
    place: Path
    needs: tuple[str, ...]  # names of steps
    key: str

    def is_done(self, out: Path) -> bool:
        """Whether all that it writes is there."""
        written = {"cut": self.place / MANIFEST, "train": self.place / RECORD}.get(self.kind, self.place)
        return (out / written).is_file()

    def claim(self, out: Path) -> None:
        """Say that what is here is this step's; UserError if it is another's."""
        path = out / STEPS / f"{self.name}.json"
        told = {"kind": self.kind, "key": self.key, "needs": list(self.needs)}
        if path.is_file():
            if json_of(path) != told:
                raise UserError(
                    f"{out / self.place}: is of this study as it was before it was changed; give another --out, or delete it and "
                    f"{path}"
                )
            return
        if (out / self.place).exists():
            raise UserError(f"{out / self.place}: is there already and is no step of this study; give another --out")
        path.parent.mkdir(parents=True, exist_ok=True)
        with staged_files(path) as (stage,):
            stage.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def steps(study: Study) -> dict[str, Step]:
    """All of a study, by name, each behind what it needs."""
    return _Steps().all(study)


def named(study: Study, name: str, key: str | None = None) -> Step:
    """A step by its name; UserError with the nearest one, and for one whose key is not the one that was asked for."""
    known = steps(study)
    if name not in known:
        raise unknown("step", name, known)
    if key is not None and known[name].key != key:
        raise UserError(
            f"{study.path}: {name}: key {known[name].key} is not the {key} that was begun with, so the study was changed "
            "since; put back what it said, or give the changed one another --out"
        )
    return known[name]


class _Steps:
    def __init__(self) -> None:
        self.made: dict[str, Step] = {}

    def all(self, study: Study) -> dict[str, Step]:
        for cell in study.cells:
            end = self.end(cell)
            if parts := [part.model_dump() for part in study.file.evaluate]:
                what = {"model": cell.model, "parts": parts}
                self._add("evaluate", cell, f"evaluate-{cell.name}", Path(EVALUATIONS, f"{cell.name}.jsonl"), end, what)
            if study.file.measure is not None:
                self.measure(cell.shaped, study.file.measure)
        return self.made

    def measure(self, cell: Cell, part: MeasurePart) -> str:
        """The step that times a shape: once, however many runs have it."""
        needs = self.end(cell)
        name = f"measure-{needs[0] if needs else cell.name}"
        what = {"model": cell.model if not needs else None, "part": part.model_dump()}
        if name in self.made:
            return name
        return self._add("measure", cell, name, Path(MEASURES, f"{name.removeprefix('measure-')}.json"), needs, what)

    def end(self, cell: Cell) -> tuple[str, ...]:
        """The steps that leave a run's model; none for a released one."""
        needs = self.begin(cell)
        if cell.recipe is None:
            return needs
        others = [need for name, other in cell.others.items() if name != "from" for need in self.needed(name, other)]
        others += [need for one in cell.rated for need in self.end(one)]
        what = {"recipe": cell.recipe.plain(), "others": sorted([*cell.others, *(["lr_of"] if cell.rated else [])])}
        return (self._add("train", cell, cell.name, Path(cell.name), (*needs, *others), what),)

    def needed(self, name: str, other: Cell) -> tuple[str, ...]:
        """What must be there of another run: of one whose shape is taken, its cut."""
        return self.begin(other) if name == "shape_of" and other.cut is not None else self.end(other)

    def begin(self, cell: Cell) -> tuple[str, ...]:
        """The steps before a run trains."""
        parent = cell.others.get("from")
        needs = () if parent is None else self.end(parent)
        if cell.cut is None:
            return needs
        what = {"model": cell.model, "cut": cell.cut.model_dump()}
        key = self._key("cut", needs, what)
        return (self._add("cut", cell, f"cut-{key}", Path(CUTS, key), needs, what),)

    def _key(self, kind: Kind, needs: tuple[str, ...], what: Mapping[str, Any]) -> str:
        return record.digest([kind, [self.made[name].key for name in needs], what])[:12]

    def _add(self, kind: Kind, cell: Cell, name: str, place: Path, needs: tuple[str, ...], what: Mapping[str, Any]) -> str:
        needs = tuple(dict.fromkeys(needs))
        step = Step(kind, cell, name, place, needs, self._key(kind, needs, what))
        if self.made.setdefault(name, step).key != step.key:
            raise UserError(f"two steps are called '{name}'; give the arm '{cell.arm}' another name")
        return name


# -- doing one ------------------------------------------------------------------------------------------------------------


def do(study: Study, step: Step, out: Path, *, progress: Progress = no_progress, say: Say = lambda line: None) -> None:
    """Do one step, or go on with it; what it needs must be done. Errors are those of the work itself."""
    known = steps(study)
    for need in step.needs:
        if not known[need].is_done(out):
            raise UserError(f"{step.name}: needs {need}, which is not done yet; do it first")
    step.claim(out)
    if step.is_done(out):
        return
    if step.kind == "cut":
        _cut(step, known, out, progress)
    elif step.kind == "train":
        execute(prepare(resolved(step.cell, out), out / step.place), say=say)
    elif step.kind == "evaluate":
        _evaluate(study, step, out, progress)
    else:
        _measure(study, step, out, progress)


def _cut(step: Step, known: Mapping[str, Step], out: Path, progress: Progress) -> None:
    cell, place = step.cell, out / step.place
    assert cell.cut is not None
    request, text = cell.cut.request, cell.cut.calibration
    source = cell.model or str(model_of(cell.others["from"], out))
    if text is not None and not api.needs_text(source, request, progress=progress):
        text = None  # a study may name one for all of its cuts
    read: dict[str, Any] = {} if text is None else {"calibration": text.text, "text": text.options}
    place.parent.mkdir(parents=True, exist_ok=True)
    kin, told = sharing(step, known), None
    if len(kin) > 1 and text is not None and api.serves_all(source, request, progress=progress):
        told = out / STATISTICS / f"{_of_all_targets(step)}.safetensors"
    with nullcontext() if told is None or told.exists() else in_turn(told):
        api.prune(source, **vars(request), **read, statistics=told, progress=progress).save(place)
    if told is not None and all(one.is_done(out) for one in kin):
        told.unlink(missing_ok=True)


def sharing(step: Step, known: Mapping[str, Step]) -> list[Step]:
    """The cuts that differ from a cut by their targets alone, itself among them: what it gathers may serve them all."""
    return [one for one in known.values() if one.kind == "cut" and _of_all_targets(one) == _of_all_targets(step)]


def _of_all_targets(step: Step) -> str:
    assert step.cell.cut is not None
    return record.digest([step.needs, step.cell.model, step.cell.cut.model_dump(exclude=OF_THE_TARGET)])[:12]


def _evaluate(study: Study, step: Step, out: Path, progress: Progress) -> None:
    """One record for each part of what is asked."""
    model = step.cell.model if not step.needs else str(model_of(step.cell, out))
    (out / step.place).parent.mkdir(parents=True, exist_ok=True)
    with staged_files(out / step.place) as (stage,):
        for part in study.file.evaluate:
            found = appraise([str(model)], part.question, progress=progress)
            record.append(stage, "evaluate", {"run": step.cell.name, **part.model_dump()}, found["models"][0])


def _measure(study: Study, step: Step, out: Path, progress: Progress) -> None:
    assert study.file.measure is not None
    model = step.cell.model if not step.needs else str(model_of(step.cell, out))
    place = out / step.place
    place.parent.mkdir(parents=True, exist_ok=True)
    found = bench.run([str(model)], study.file.measure.asked, progress=progress)
    with staged_files(place) as (stage,):
        stage.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def measured_of(cell: Cell, study: Study, out: Path) -> dict[str, Any] | None:
    """What the shape of a run costs to run, if that was asked and is known."""
    if study.file.measure is None:
        return None
    made = _Steps()
    path = out / made.made[made.measure(cell.shaped, study.file.measure)].place
    return table_of(path) if path.is_file() else None


def model_of(cell: Cell, out: Path) -> Path:
    """The folder of a run's model, once it is done."""
    if cell.recipe is not None:
        return out / cell.name / MODEL
    return cut_of(cell, out) if cell.cut is not None else Path(str(cell.model))


def cut_of(cell: Cell, out: Path) -> Path:
    """The folder of a run's cut."""
    made = _Steps()
    (name,) = made.begin(cell)
    return out / made.made[name].place


def ledger_of(cell: Cell, out: Path) -> Path | None:
    """The folder with a run's ledger; None for a released model, of which there is none."""
    if cell.recipe is not None:
        return out / cell.name
    return None if cell.cut is None else cut_of(cell, out)


def resolved(cell: Cell, out: Path) -> Recipe:
    """The recipe with folders where other runs of the study stood, and what is known once those are done."""
    assert cell.recipe is not None
    data = cell.recipe.plain()
    if str(data["model"]["source"]).startswith(MADE):
        source = cut_of(cell, out) if cell.cut is not None else model_of(cell.others["from"], out)
        data["model"]["source"] = str(source)
        data["model"]["mask"] = _mask(source)
        teacher = data["teacher"]
        if teacher and str(teacher["source"]).startswith(MADE):
            teacher["source"] = cell.model or str(model_of(cell.others["from"], out))
    if (shaped := cell.others.get("shape_of")) is not None:
        folder = cut_of(shaped, out) if shaped.cut is not None else model_of(shaped, out)
        data["model"] |= {"shape": str(folder), "mask": _mask(folder)}
    if tried := [record.read(out / one.name / RECORD)[-1]["figures"] for one in cell.rated]:
        best = (
            tried[0] if len(tried) == 1 else min(tried, key=lambda figures: figures["validation"][-1]["validation"]["loss"])
        )
        data["optimizer"]["lr"] = best["lr"]
    if (paid := cell.others.get("flops_of")) is not None:
        ledger, anatomy = Ledger.read(ledger_of(paid, out) or out), _anatomy(data["model"])
        seq_len, batch = data["data"]["seq_len"], data["batch_tokens"]
        each = 3 * anatomy.flops(seq_len) * batch // seq_len
        data["tokens"] = payable(cell, ledger.total_flops, sunk(data["model"]["source"]), each) * batch
    return recipes.parse(data, cell.name)


def payable(cell: Cell, flops: float, sunk: float, each: float) -> int:
    """Updates of `each` FLOPs that `flops` pay for, less the `sunk` ones of the run's source; UserError for none."""
    if flops - sunk < each:
        raise UserError(
            f"{cell.name}: flops_of: {cell.others['flops_of'].name} costs {flops:.4g} FLOPs, and this run's source "
            f"{sunk:.4g}, which leaves less than the {each:.4g} of one update; name an arm that costs more"
        )
    return int((flops - sunk) // each)


def sunk(source: str | None) -> int:
    """FLOPs of a source, its parents' included; none of fresh weights, and of what nobody recorded."""
    return 0 if source is None else Ledger.after(Path(source).expanduser(), "", []).total_flops


def _anatomy(model: Mapping[str, Any]) -> Any:
    from ..anatomy import Anatomy
    from ..train.shapes import config_of

    if model["source"] is not None:
        return Source.open(model["source"]).anatomy
    return Anatomy.of(config_of(model["shape"], 0, model["target_params"], model["enlarge"]))


def _mask(folder: Path) -> str | None:
    """The folder, if its single weights are cut."""
    return str(folder) if (folder / EXTRA / "mask.safetensors").is_file() else None
