"""What a study will take, from its file and from configs alone: tokens, FLOPs, hours, memory, disk. Reads no weight and no data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import measure
from ..anatomy import Anatomy
from ..builders import make_plan
from ..costs import is_timed
from ..errors import UserError
from ..train.estimate import EFFICIENCY, check_rate, estimate
from ..train.opening import cutting_of
from ..train.recipe import Recipe
from ..train.shapes import Outline, config_of, enlarged, released
from ..train.shrink.forecast import Forecast
from ..train.sweep import tried
from .file import MADE, Cell, CutPart, Study
from .protocol import check
from .steps import Step, payable, steps, sunk

_SAVED = 3  # numbers a parameter in a checkpoint: itself and AdamW's two moments
_WIDTH = 4  # bytes of a number in checkpoints, and in models that are cut: float32


@dataclass(frozen=True)
class Expected:
    """A model before it is made. Where scores decide its sizes it has no config, and `anatomy` is one like it, of whose blocks
    `share` is left.
    """

    config: Any | None
    anatomy: Anatomy
    share: float = 1.0

    @property
    def params(self) -> int:
        """About so many."""
        blocks = self.anatomy.block_params
        return round(self.anatomy.num_params - blocks * (1 - self.share))

    def flops(self, seq_len: int) -> float:
        """Of one sequence forward: blocks shrink, the head does not."""
        blocks = self.anatomy.block_params
        head = self.anatomy.num_params - blocks
        return self.anatomy.flops(seq_len) * (blocks * self.share + head) / (blocks + head)


def plan(study: Study, out: Path | None = None, *, rate: float | None = None, processes: int = 1) -> dict[str, Any]:
    """The steps with what each will take, as plain data; with `out` only what is left to do there. Memory is of one device.

    Of a released model that is not here the published shape is enough for it, if there is one; `notes` say so.
    `rate`: FLOPs a second, as reached in training, of all `processes` together; else half the float32 matmul rate measured
    here now. UserError for what can be known to be wrong: cuts that no shape fits, budgets that are not met.
    """
    check_rate(rate)
    check(study)
    speed = EFFICIENCY * measure.gemm_rate() if rate is None else rate
    expected = _Expectations()
    rows = []
    for step in steps(study).values():
        row: dict[str, Any] = {"step": step.name, "kind": step.kind, "arm": step.cell.arm, "needs": list(step.needs)}
        row |= {"done": out is not None and step.is_done(out)} | _row(study, step, expected)
        row["hours"] = None if row["flops"] is None else row["flops"] / speed / 3600
        rows.append(row)
    left = [row for row in rows if not row["done"]]
    basis = "stated rate" if rate is not None else f"{EFFICIENCY:.0%} of the float32 matmul rate measured now"
    sums = {name: sum(row[name] or 0 for row in left) for name in ("tokens", "flops", "hours", "disk")}
    unknown = [row["step"] for row in left if row["flops"] is None]
    memory = max((row["memory"] or 0 for row in left), default=0)
    return {
        "study": study.name, "runs": len(study.cells), "steps": rows, "processes": processes, "basis": basis,
        "compare": [part.model_dump() for part in study.file.compare], "unknown": unknown, "memory": memory,
        "published": sorted(expected.published), "notes": sorted(expected.published.values()), **sums,
    }  # fmt: skip


def _row(study: Study, step: Step, expected: _Expectations) -> dict[str, Any]:
    cell = step.cell
    if step.kind == "train":
        assert cell.recipe is not None
        recipe, before = cell.recipe, expected.before(cell)
        if before is None:
            return _UNKNOWN | {"tokens": recipe.tokens}
        after, each = expected.after(cell) or before, expected.flops(cell, before)
        tokens = expected.tokens(cell, before)
        saved = recipe.save.keep * _SAVED if recipe.save.every else 0
        return {
            "tokens": tokens,
            "flops": round(each * (tokens + tried(recipe))),
            "params": after.params,
            "memory": _memory(recipe, before, expected.teacher(cell)),
            "disk": _WIDTH * (after.params + saved * before.params),
        }
    if step.kind == "cut":
        assert cell.cut is not None
        made, begun = expected.cut(cell), expected.begun(cell)
        if made is None or begun is None:
            return _UNKNOWN
        size = _calibration(cell, made)
        return {
            "tokens": size[0] * size[1],
            "flops": _scoring(cell, made),
            "params": begun.params,
            "memory": made.memory_bytes(*size, _WIDTH),
            "disk": _WIDTH * begun.params,
        }
    if step.kind == "measure":
        return _UNKNOWN | {"flops": 0, "disk": 0}  # seconds, mostly of starting
    model = expected.after(cell) if cell.recipe is not None else expected.begun(cell)
    asked = [part for part in study.file.evaluate if not part.tasks]
    flops = None
    if model is not None and len(asked) == len(study.file.evaluate):
        flops = round(sum(part.windows * len(part.texts) * model.flops(part.seq_len) for part in asked))
    return _UNKNOWN | {"flops": flops, "params": None if model is None else model.params, "disk": 0}


def _calibration(cell: Cell, made: Any) -> tuple[int, int]:
    """Windows of text that a cut reads, and their tokens."""
    text = None if cell.cut is None else cell.cut.calibration
    return (text.windows, text.seq_len) if text is not None and made.needs_text else (0, 0)


def _scoring(cell: Cell, made: Any) -> int:
    """FLOPs of a cut."""
    size = _calibration(cell, made)
    return round(made.scoring_flops(*size)) if size[0] else 0


_UNKNOWN: dict[str, Any] = dict.fromkeys(("tokens", "flops", "params", "memory", "disk"))


def _memory(recipe: Recipe, model: Expected, teacher: Expected | None) -> int:
    """Bytes that training takes, as if all of it shrank with the blocks where scores decide the sizes."""
    taught = None if teacher is None else teacher.anatomy
    found = estimate(recipe, model.anatomy, teacher=taught, rate=1.0)
    return round(found.memory * model.params / model.anatomy.num_params)


class _Expectations:
    """Models that the runs of a study will have, each worked out once; None where it hangs on what is not there yet."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, str], Any] = {}
        self.published: dict[str, str] = {}  # models that are not here -> what is told of that

    def _opened(self, name: str) -> Expected:
        """A released model."""
        found = Outline.of(name)
        if found.note is not None:
            self.published[name] = found.note
        return Expected(found.config, found.anatomy)

    def _once(self, what: str, cell: Cell, make: Any) -> Any:
        key = (what, cell.name)
        if key not in self.known:
            self.known[key] = make()
        return self.known[key]

    def begun(self, cell: Cell) -> Expected | None:
        """The model of a run before it trains: a released one, its parent's, and cut if it is."""
        return self._once("begun", cell, lambda: self._begun(cell))

    def _begun(self, cell: Cell) -> Expected | None:
        before = self._source(cell)
        if cell.cut is None or before is None:
            return before
        made = self.cut(cell)
        if made is None:
            return None
        if made.target is not None:
            return Expected(made.target.config, made.target.anatomy, 1.0)
        left = made.budget if made.budget is not None and made.cost == "params" else None
        share = 1 - (cell.cut.ratio or 0) if left is None else left / before.anatomy.block_params
        return Expected(None, before.anatomy, share)

    def cut(self, cell: Cell) -> Any:
        """The plan of its cut; UserError for one that no shape fits."""
        return self._once("cut", cell, lambda: self._cut(cell, cell.cut))

    def _cut(self, cell: Cell, part: CutPart | None) -> Any:
        before = self._source(cell)
        if before is None or before.config is None or part is None or is_timed(part.cost):
            return None
        try:
            made = make_plan(before.config, before.anatomy, part.request)
        except UserError as error:
            raise UserError(f"{cell.name}: {error}") from error
        if made.needs_text and part.calibration is None:
            raise UserError(f"{cell.name}: {part.method} goes by text; give cut.calibration")
        return made

    def _source(self, cell: Cell) -> Expected | None:
        if (parent := cell.others.get("from")) is not None:
            return self.after(parent)
        if cell.model is None:
            return None
        return self._opened(cell.model)

    def before(self, cell: Cell) -> Expected | None:
        """The model that a run trains, before it does."""
        return self._once("before", cell, lambda: self._before(cell))

    def _before(self, cell: Cell) -> Expected | None:
        assert cell.recipe is not None
        asked = cell.recipe.model
        if "shape_of" in cell.others:
            shape = self.shape(cell)
            if shape is None or asked.enlarge is None:
                return shape
            config = None if shape.config is None else enlarged(shape.config, asked.enlarge)
            return None if config is None else Expected(config, Anatomy.of(config))
        made = asked.source or asked.shape
        if isinstance(made, str) and made.startswith(MADE):
            return self.begun(cell)
        if isinstance(made, str) and _is_elsewhere(made):
            return None
        if asked.source is None:
            config = config_of(asked.shape or "", 0, asked.target_params, asked.enlarge)
            return Expected(config, Anatomy.of(config))
        return self._opened(asked.source)

    def shape(self, cell: Cell) -> Expected | None:
        """The model whose shape a run takes, as it is before the recipe enlarges it; None for a run that takes none."""
        other = cell.others.get("shape_of")
        if other is None:
            return None
        return self.begun(other) if other.cut is not None else self.after(other)

    def after(self, cell: Cell) -> Expected | None:
        """The model that a run leaves."""
        return self._once("after", cell, lambda: self._after(cell))

    def _after(self, cell: Cell) -> Any:
        if cell.recipe is None:
            return self.begun(cell)
        before, cuts = self.before(cell), self._cuts(cell)
        return before if cuts is None else Expected(None, cuts.end)

    def _cuts(self, cell: Cell) -> Forecast | None:
        """What a run cuts on the way, as far as it can be foreseen."""
        return self._once("cuts", cell, lambda: self._forecast(cell))

    def _forecast(self, cell: Cell) -> Forecast | None:
        before, shape = self.before(cell), self.shape(cell)
        if cell.recipe is None or before is None or before.config is None:
            return None
        cutting = cutting_of(cell.recipe, before.config, None if shape is None else shape.config)
        return None if cutting is None or cutting.part.clocked else Forecast(cutting, cell.recipe)

    def teacher(self, cell: Cell) -> Expected | None:
        """Who reads along: a snapshot is among the cuts, and what a cache holds was said before."""
        part = None if cell.recipe is None else cell.recipe.teacher
        if part is None or part.source is None or part.cache is not None:
            return None
        if part.source.startswith(MADE):
            return self._source(cell)
        return None if _is_elsewhere(part.source) else self._opened(part.source)  # if elsewhere, so is its pupil

    def flops(self, cell: Cell, model: Expected) -> float:
        """Of one token of an update, the teacher's included; what is cut on the way makes later ones cheaper."""
        assert cell.recipe is not None
        seq_len, teacher, cuts = cell.recipe.data.seq_len, self.teacher(cell), self._cuts(cell)
        each = 3 * model.flops(seq_len) / seq_len
        if cuts is not None:
            each = estimate(cell.recipe, model.anatomy, rate=1.0, cuts=cuts).flops_per_token
        return each + (0.0 if teacher is None else teacher.flops(seq_len) / seq_len)

    def tokens(self, cell: Cell, model: Expected) -> int:
        """That a run trains on: its own, or what another's FLOPs pay for. UserError if they pay for no update."""
        recipe, paid = cell.recipe, cell.others.get("flops_of")
        assert recipe is not None
        spent, begun = None if paid is None else self.spent(paid), self.sunk(cell)
        if spent is None or begun is None:
            return recipe.steps * recipe.batch_tokens
        return payable(cell, spent, begun, self.flops(cell, model) * recipe.batch_tokens) * recipe.batch_tokens

    def spent(self, cell: Cell) -> float | None:
        """FLOPs of a run, its parents' included."""
        return self._once("spent", cell, lambda: self._spent(cell))

    def _spent(self, cell: Cell) -> float | None:
        begun, recipe = self.sunk(cell), cell.recipe
        if begun is None or recipe is None:
            return begun
        before = self.before(cell)
        if before is None:
            return None
        return begun + self.flops(cell, before) * (self.tokens(cell, before) + tried(recipe))

    def sunk(self, cell: Cell) -> float | None:
        """FLOPs of what a run goes on from, its own cut among them as far as it can be foreseen."""
        parent, made = cell.others.get("from"), self.cut(cell)
        source = cell.model or (None if cell.recipe is None else cell.recipe.model.source)
        before = sunk(source) if parent is None else self.spent(parent)
        return before if before is None or made is None else before + _scoring(cell, made)


def _is_elsewhere(name: str) -> bool:
    """Whether a folder is another study's, that is not done yet."""
    return "/" in name and name not in released() and not Path(name).expanduser().exists()
