"""What rides on the loop and cuts the model: it watches gradients, decides at its pace, zeroes, and slices when enough is dead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...hf import Target, target_for
from ...keep import Keep
from ..loop import Hook, Training, accumulate_
from .activations import Activations, wanted
from .adaptive import Cosines, shares
from .carried import Carried
from .cutting import Cutting
from .groups import Chooser, Group, Standing
from .repair import repair_
from .resize import slice_, zero_units_
from .saliency import Saliency, Table
from .snapshot import Snapshot

if TYPE_CHECKING:
    from ..recipe import Recipe

Tell = Callable[[Mapping[str, Any]], None]
Arrive = Callable[["Pruner", Training, float], None]  # at a stop: the share of the source that it is named by


@dataclass
class Pruner(Hook):
    """A run's cutting on its way. `tell` hears of every event, `arrive` when a stop is reached and sliced."""

    asked: Cutting
    recipe: Recipe
    tell: Tell = lambda line: None
    arrive: Arrive = lambda pruner, run, share: None
    kept: Keep = field(default_factory=Keep)  # of the source, in the tensors as they are
    groups: int = 0  # gone so far
    passed: int = 0  # stops
    flops_scored: int = 0
    waiting: list[dict[str, Any]] = field(default_factory=list)  # events whose effect the next update shows

    def __post_init__(self) -> None:
        self.standing = Standing.of(self.asked.anatomy)
        self.chooser = Chooser(self.asked.part, self.asked.goal, self.asked.seq_len, self.asked.clocks)
        self.target = Target(self.asked.config, self.asked.anatomy)
        self.saliency: Saliency | None = None
        self.cosines: Cosines | None = None
        self.activations: Activations | None = None
        taught = self.recipe.teacher is not None and self.recipe.teacher.snapshot
        self.snapshot = Snapshot(self.recipe) if taught else None

    # -- what the loop calls -----------------------------------------------------------------------------------------

    def begin(self, run: Training) -> None:
        """Before the first update: of a fresh run saliency starts, and what goes at once goes."""
        if self.saliency is not None:  # it was remembered
            return
        self._watch(run)
        pace = self.asked.pace
        assert self.saliency is not None
        if pace.part.kind != "once":
            return
        teacher, run.teacher = run.teacher, None  # units are worth what they are to the text
        accumulate_(run, 0, pace.part.samples)
        run.teacher = teacher
        self.saliency.see(run, pace.part.samples * self.recipe.data.seq_len)
        run.optimizer.zero_grad(set_to_none=True)
        self.flops_scored += 3 * self.asked.anatomy.flops(self.recipe.data.seq_len) * pace.part.samples
        self._count_looks(pace.part.samples)
        self._cut(run)

    def after_backward(self, run: Training) -> None:
        """One of several micro-batches is in."""
        if self.saliency is not None and self._watches(run):
            self.saliency.see_part()

    def before_clip(self, run: Training) -> None:
        """An update's gradients are whole."""
        if self.saliency is not None and self._watches(run):
            self.saliency.see(run, self.recipe.batch_tokens)
        self._count_looks(self.recipe.sequences)
        if self.snapshot is not None:
            self.snapshot.count()

    def after_step(self, run: Training) -> None:
        """Weights are new: what the last cut did is known, and the next may be due."""
        self._told_(run, run.last["loss"])
        if not self.done and self.asked.pace.cuts(run.tokens - self.recipe.batch_tokens, run.tokens):
            self._cut(run)
        self._look(run)

    def end(self, run: Training) -> None:
        """Behind the last update: of a cut that came with it no effect will be known, and no zeroed unit is saved."""
        self._slice(run)  # of a target that was missed, some may still wait for more to be dead
        self._told_(run, None)

    def _told_(self, run: Training, loss: float | None) -> None:
        for event in self.waiting:  # several where a stop was passed: they share the update, and its effect
            self.tell({"step": run.step, "tokens": run.tokens, **event, "loss_after": loss})
        self.waiting = []

    def _look(self, run: Training) -> None:
        """Whether the next forward passes are looked at: those that the next cut goes by."""
        pace, update = self.asked.pace, self.recipe.batch_tokens
        once = self._before_the_only_cut(run)
        if self.cosines is not None:
            self.cosines.look(once or pace.cuts(run.tokens, run.tokens + update))
        if self.activations is not None:
            soon = pace.cuts(run.tokens, run.tokens + self.activations.memory * update)
            self.activations.look(once or (soon and not self.done), run.step)

    def _before_the_only_cut(self, run: Training) -> bool:
        return self.asked.pace.part.kind == "once" and not run.step and not self.groups

    def _count_looks(self, sequences: int) -> None:
        if self.activations is not None and self.activations.looking:
            self.flops_scored += self.activations.flops(sequences, self.recipe.data.seq_len)

    @property
    def done(self) -> bool:
        """The target is met."""
        return self.measured <= self.asked.goal.value

    @property
    def measured(self) -> int:
        """What the goal measures, of what is alive."""
        return self.asked.goal.measure(self.standing.now)

    def _watches(self, run: Training) -> bool:
        """Whether gradients that come in now will have a say: all of them in a running mean, else the last before a cut."""
        pace, update = self.asked.pace, self.recipe.batch_tokens
        if self.done:
            return False
        if pace.part.kind == "once":
            return self._before_the_only_cut(run)
        return bool(self.asked.part.saliency.average) or pace.cuts(run.tokens, run.tokens + update)

    def _watch(self, run: Training) -> None:
        """Changes self: units of the model as it is now, of which nothing is known."""
        part = self.asked.part
        self.saliency = Saliency(part.saliency, self.target.anatomy, part.axes, run.learner.trained, run.world)
        if part.allocate == "adaptive":
            known = None if self.cosines is None else self.cosines.known_L
            self.cosines = Cosines(run.learner, self.target.anatomy, known)
        if sought := wanted(part):
            self.activations = Activations(part.activations, self.target.anatomy, sought, run.learner, run.world)
        self._look(run)

    # -- a cut -------------------------------------------------------------------------------------------------------

    def _cut(self, run: Training) -> None:
        """Changes the model: groups go until the pace is kept, passing stops one by one."""
        pace, goal = self.asked.pace, self.asked.goal
        assert self.saliency is not None
        most = pace.groups(run.tokens)
        allowed = goal.allowed(pace.share(run.tokens)) if most is None else goal.value
        while self.measured > max(allowed, goal.value):
            stop = goal.stops[self.passed] if self.passed < len(goal.stops) else goal.value
            table = self.saliency.table(run, self.standing.alive, self.activations)
            if self.cosines is not None:
                gone = self._share(run, table, max(stop, allowed))
            else:
                gone = list(self._take(table, stop, allowed, most))
            if not gone:
                return
            if self.snapshot is not None:
                self.snapshot.take_(run, self.target, self.kept)
            self._apply(run, gone)
            reached = self.measured <= stop
            # a query head without weights still gives the mean of its KV head's values, and would learn: it is no fixed point
            restless = any(group.kind == "heads" for group, _ in gone)
            if reached or restless or self._dead >= self.asked.part.slice_at * self.target.anatomy.num_params:
                self._slice(run)
            while self.passed < len(goal.stops) and self.measured <= goal.stops[self.passed]:
                self.passed += 1  # one group may pass two that lie close
                self.arrive(self, run, self.asked.part.stops[self.passed - 1])
            if not reached:
                return

    def _take(self, table: Table, stop: int, allowed: int, most: int | None) -> Iterator[tuple[Group, dict[str, float]]]:
        """Groups in the order in which they go, until `stop` is met, or what the pace allows is."""
        while self.measured > max(stop, allowed) and (most is None or self.groups < most):
            found = self.chooser.next(self.standing, table, stop)
            if found is None:
                return
            self.standing.drop(found[0].units)
            table.drop(found[0].units)
            self.groups += 1
            yield found

    def _share(self, run: Training, table: Table, allowed: int) -> list[tuple[Group, dict[str, float]]]:
        """Every layer's share, so that what the pace allows is met."""
        now, part = self.standing.now, self.asked.part
        assert self.cosines is not None and part.target is not None
        others = now.num_params - now.block_params if part.target.params is not None else 0
        if self.measured <= allowed:
            return []
        importance = self.cosines.importance(run.world)
        found = shares(self.standing, self.asked.anatomy, table, importance, allowed - others, part.amplitude)
        for group in found:
            self.standing.drop(group.units)
        self.groups += len(found)
        return [(group, {}) for group in found]

    def _apply(self, run: Training, gone: list[tuple[Group, dict[str, float]]]) -> None:
        units: dict[str, list[int]] = {}
        for group, _ in gone:
            for name, some in group.units.items():
                units.setdefault(name, []).extend(some)
        leaving = {name: tuple(some) for name, some in units.items()}
        if self.activations is not None:
            repair_(run, self.target.anatomy, self.activations, self.asked.part.repair, leaving, self.standing.alive)
            self.activations.drop(leaving)
        zero_units_(run, self.target.anatomy, leaving)
        run.usual = None  # what is more than the loss from before the cut is no spike; all that follows might be
        counts: dict[str, int] = {}
        for group, _ in gone:
            counts[group.kind] = counts.get(group.kind, 0) + 1
        now = self.standing.now
        event = {
            "pruned": {
                "step": run.step,
                "tokens": run.tokens,
                "groups": counts,
                "gone": self.groups,
                "units": {
                    self.kept.original(name, self.asked.anatomy): self._original(name, some) for name, some in units.items()
                },
                "saliency": gone[0][1],
                "params": now.num_params,
                "measure": self.asked.goal.plain(self.asked.goal.measure(now)),
                "shape": now.shape.describe(),
            },
            "loss_before": run.last.get("loss"),
        }
        self.waiting.append(event)

    def _original(self, name: str, units: list[int]) -> list[int]:
        """Units of the source."""
        known = self.kept.units.get(self.kept.original(name, self.asked.anatomy))
        return sorted(units if known is None else [known[u] for u in units])

    @property
    def _dead(self) -> int:
        """Parameters that are zeroed and still there."""
        return self.target.anatomy.num_params - self.standing.now.num_params

    def _slice(self, run: Training) -> None:
        """Changes the run: dead units are no longer there."""
        keep = self.standing.keep
        if not keep.units:
            return
        kept = self.kept.then(keep, self.asked.anatomy)
        self.resize(run, keep, kept)

    def resize(self, run: Training, keep: Keep, kept: Keep) -> None:
        """Changes the run: a model of what `keep` leaves of its own, which is `kept` of the source."""
        target = target_for(self.asked.config, self.asked.anatomy, kept)
        plan = slice_(run, self.recipe, self.target.anatomy, keep, target)
        known = self._carried
        self.target, self.kept, self.standing = target, kept, Standing.of(target.anatomy)
        self._watch(run)
        for before, after in zip(known, self._carried, strict=False):
            after.cut_from(before, lambda name: plan.rows.get(name, {}), plan.names)

    @property
    def _carried(self) -> list[Carried]:
        """What lives through a cut; nothing before the first update."""
        return [known for known in (self.saliency, self.activations) if known is not None]

    def outlook(self, tokens: int) -> dict[str, Any]:
        """Parameters alive, and after how many updates the pace asks for less than that; None if it does no more."""
        pace, goal, now = self.asked.pace, self.asked.goal, self.standing.now
        left, gone, after = goal.measure(now), pace.groups(tokens), None
        if left > goal.value:
            due = lambda t: goal.allowed(pace.share(t)) < left  # noqa: E731
            if gone is not None:
                due = lambda t: (pace.groups(t) or 0) > gone  # noqa: E731
            after = pace.updates_until(tokens, due)
        return {"params": now.num_params, "next_cut": after}

    @property
    def flops(self) -> dict[str, int]:
        """Beside the updates', by kind of work."""
        scored = {"scoring": self.flops_scored} if self.flops_scored else {}
        return scored | ({} if self.snapshot is None else {"teacher": self.snapshot.spent})

    def told(self) -> dict[str, Any]:
        """What became of it, for the record."""
        goal = self.asked.goal
        return {
            "source_params": self.asked.anatomy.num_params,
            "shape": self.target.anatomy.shape.describe(),
            "model_type": self.target.config.model_type,
            "measure": goal.name,
            "measured": goal.plain(self.measured),
            "target": goal.plain(goal.value),
            "met": self.done,
            "groups": self.groups,
        }

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What a checkpoint says of the cutting; the tensors of `tensors` belong to it."""
        assert self.saliency is not None
        return {
            "kept": self.kept.to_json(),
            "alive": self.standing.keep.to_json(),
            "groups": self.groups,
            "passed": self.passed,
            "seen": self.saliency.count,
            "flops_scored": self.flops_scored,
            "waiting": self.waiting,
            "snapshot": None if self.snapshot is None else self.snapshot.state(),
        }

    def tensors(self) -> dict[str, Tensor]:
        """What is known of the units, and the snapshot that teaches, whole."""
        units = {name: t.contiguous() for known in self._carried for name, t in known.saved().items()}
        return units | ({} if self.snapshot is None else self.snapshot.tensors())

    def shape_(self, run: Training, state: Mapping[str, Any]) -> None:
        """Changes the run: its model has the sizes that it had when `state` was told; weights are read afterwards."""
        kept = Keep.from_json(state["kept"], "state.json")
        if kept.units:
            self.resize(run, kept, kept)
        else:
            self._watch(run)
        assert self.saliency is not None
        alive = Keep.from_json(state["alive"], "state.json")
        self.standing.drop({n: tuple(alive.dropped(n, self.target.anatomy.axes[n].size)) for n in alive.units})
        self.groups, self.passed, self.waiting = state["groups"], state["passed"], state["waiting"]
        self.flops_scored, self.saliency.count = state["flops_scored"], state["seen"]
        if self.snapshot is not None:
            self.snapshot.shape_(run, state["snapshot"], self.asked.config, self.asked.anatomy)
        self._look(run)

    def remember(self, tensors: Mapping[str, Tensor]) -> None:
        """Changes what is known of the units: as it was saved."""
        for known in self._carried:
            known.restore(tensors)
