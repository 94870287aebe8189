"""One pruning job on its way: what every kind of method is given, and how a decision becomes a model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from . import hf
from .criteria import Scores
from .cut import SlicePlan, slice_plan, slice_tensors, slice_tensors_
from .data.windows import Windows
from .distributed import ALONE, World
from .findings import Findings
from .hf import Target, target_for
from .keep import Keep, WeightMask
from .ledger import Ledger
from .planning import Plan
from .spent import Flops
from .statistics import Sweep

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Progress = Callable[[str, int, int], None]  # stage, done, total


def no_progress(stage: str, done: int, total: int) -> None:
    """Says nothing."""


class Store(Protocol):
    """Where weights are while a job runs: all in memory (`InMemory`), or in files, a block at a time (`streaming`)."""

    streams: bool

    def room(self) -> MutableMapping[str, Tensor]:
        """Where a method puts what it makes for every matrix."""

    def slice_(self, tensors: MutableMapping[str, Tensor], recipe: SlicePlan) -> MutableMapping[str, Tensor]:
        """The cut tensors under their new names; `tensors` are used up."""

    def build(self, config: PreTrainedConfig, tensors: MutableMapping[str, Tensor], generation: Any) -> PreTrainedModel:
        """The model that holds them."""

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """Config, generation config and weights as files."""


class InMemory:
    """All weights are in memory."""

    streams = False

    def room(self) -> MutableMapping[str, Tensor]:
        """A table."""
        return {}

    def slice_(self, tensors: MutableMapping[str, Tensor], recipe: SlicePlan) -> MutableMapping[str, Tensor]:
        """Each tensor is let go as it is cut."""
        return slice_tensors_(tensors, recipe)

    def build(self, config: PreTrainedConfig, tensors: MutableMapping[str, Tensor], generation: Any) -> PreTrainedModel:
        """By transformers."""
        return hf.build(config, dict(tensors), generation)

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """By transformers."""
        model.save_pretrained(folder)


@dataclass
class Outcome:
    """A cut model and how it came about."""

    plan: Plan
    model: PreTrainedModel
    target: Target
    keep: Keep | None = None
    mask: WeightMask | None = None
    scores: Scores | None = None
    findings: Findings | None = None  # of the dense model, where they serve any target
    losses: list[float] | None = None  # of depth methods, nats a token: without each candidate, or after each removal
    measured: Mapping[str, Any] = field(default_factory=dict)  # what depth methods save: name of a file -> plain data
    seconds: dict[str, float] = field(default_factory=dict)
    flops: int = 0  # of the matrix products that scoring and cutting took, in all processes
    notes: tuple[str, ...] = ()
    store: Store = field(default_factory=InMemory)
    ledger: Ledger | None = None  # of a cut that was trained: all that it consumed

    @property
    def ratios(self) -> dict[str, float]:
        """What was really removed, of all and of block parameters; for sparse results the share of zeros."""
        before, after = self.plan.anatomy, self.target.anatomy
        out = {
            "removed_of_all": 1 - after.num_params / before.num_params,
            "removed_of_block": 1 - after.block_params / before.block_params,
        }
        return out if self.mask is None else out | {"sparsity": self.mask.sparsity}


@dataclass
class Job:
    """A plan with the model and windows it is carried out on. `tensors` are the model's live weights by name."""

    plan: Plan
    model: PreTrainedModel
    tensors: MutableMapping[str, Tensor]
    windows: Windows | None
    batch_size: int = 4
    progress: Progress = no_progress
    findings: Findings | None = None  # of an earlier run on the same model and windows
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    store: Store = field(default_factory=InMemory)
    world: World = ALONE  # processes that share the windows out; each comes to the same cut
    shared: int = 0  # FLOPs that an earlier run spent for this one, too

    def gathered(self, gather: Callable[[], Findings]) -> Findings:
        """What an earlier run found, or is found now. Its FLOPs count as this job's either way: its outcome hangs on them."""
        if self.findings is not None:
            self.shared = self.findings.flops
            return self.findings
        with Flops() as spent:
            found = gather()
        found.flops = round(self.world.total(spent.total))
        return found

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds of a block to a stage."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def sweep(self, more_MT: Tensor | None = None) -> Sweep:
        """This process's calibration windows before the first block; its share of `more_MT` behind them."""
        ids_NT = self.ids_NT if more_MT is None else torch.cat([self.ids_NT, self.world.own(more_MT)])
        return Sweep(self.model, self.plan.anatomy, ids_NT, self.batch_size, self.world)

    @property
    def ids_NT(self) -> Tensor:
        """This process's calibration windows."""
        assert self.windows is not None
        return self.world.own(self.windows.ids_NT)


@torch.no_grad()
def finish_(
    job: Job, keep: Keep, extra: Mapping[str, Tensor] | None = None, gains: Mapping[str, float] | None = None
) -> Outcome:
    """Slice the job's model by `keep` and build the small one; the big one's weights are let go as they are cut.

    `extra` holds output biases by their names in the source; `gains` factors for norm gains (see `cut.slice_plan`).
    """
    plan, model = job.plan, job.model
    with job.timed("cut"):
        keep = keep.validated(plan.anatomy)
        target, recipe = _cut(job, keep, gains)
        generation, dtype = model.generation_config, model.dtype
        torch.nn.Module.to(model, device="meta")  # lets go of the weights: the job now holds the only references
        sliced = job.store.slice_(job.tensors, recipe)
        _complete_(sliced, target, recipe, extra or {}, dtype)
        cut = job.store.build(target.config, sliced, generation)
    return Outcome(plan, cut, target, keep=keep, seconds=job.seconds, notes=tuple(job.notes), store=job.store)


@torch.no_grad()
def trial(job: Job, keep: Keep, extra: Mapping[str, Tensor] | None = None) -> PreTrainedModel:
    """The model that `finish_` would give; the job's own stays as it is, so memory holds both."""
    target, recipe = _cut(job, keep.validated(job.plan.anatomy), None)
    sliced: MutableMapping[str, Tensor] = slice_tensors(job.tensors, recipe)
    _complete_(sliced, target, recipe, extra or {}, job.model.dtype)
    return hf.build(target.config, dict(sliced))


def _cut(job: Job, keep: Keep, gains: Mapping[str, float] | None) -> tuple[Target, SlicePlan]:
    plan, fold = job.plan, "hidden" not in keep.units
    stock = plan.request.uniform or not plan.out_bias  # else the plan said, and counted, a type of ours
    target = target_for(job.model.config, plan.anatomy, keep, fold=fold, out_bias=plan.out_bias, stock=stock)
    return target, slice_plan(plan.anatomy, keep, fold=fold, gains=gains)


def _complete_(
    sliced: MutableMapping[str, Tensor], target: Target, recipe: SlicePlan, extra: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    """Add to the cut tensors what the source did not have: output biases."""
    for name, bias in extra.items():
        new_name = recipe.names.get(name.removesuffix("bias") + "weight", "").removesuffix("weight") + "bias"
        sliced[new_name] = bias.to(dtype)
    sliced.update(hf.empty_weights(target, frozenset(sliced), dtype))
