"""What units are worth while the model trains: sums over their weights of what a Taylor expansion of the loss says of each.

EfficientLLM (section 3.1) counts o_proj and down_proj alone, the stem by the same matrices summed the other way. Gradients are
those of the update itself, read before they are clipped. A matrix that one axis cuts is summed to a number a unit at once;
one that two axes cut is kept weight by weight, so that what goes with one axis leaves the other's sums.

Shapes: a matrix is [out, in]; under torchrun a process holds some of its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from ...anatomy import Anatomy
from ...axes import Axis, Span, kind_of
from ...distributed import World, local
from ..loop import Training
from ..optim import slots
from .activations import Activations
from .carried import Carried
from .goal import INNER
from .part import SaliencyPart

# weight, gradient, Fisher information, room of the same shape -> saliency of every weight, in the room
Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
_AT_ONCE = 1 << 18  # weights of a matrix that are looked at together: they and all that is made of them stay in cache


def _first(w: Tensor, g: Tensor, _: Tensor, room: Tensor) -> Tensor:
    return torch.mul(w, g, out=room).abs_()


def _second(w: Tensor, g: Tensor, fisher: Tensor, room: Tensor) -> Tensor:
    """|w g - w^2 F / 2|: how the loss changes to second order if the weight were zero (LLM-Pruner eq. 5)."""
    torch.mul(w, fisher, out=room).mul_(-0.5).add_(g)
    return room.mul_(w).abs_()


def _hessian(w: Tensor, _: Tensor, fisher: Tensor, room: Tensor) -> Tensor:
    return torch.mul(w, w, out=room).mul_(fisher).mul_(0.5)


RULES: Mapping[str, tuple[Rule, bool]] = {  # and whether it needs the Fisher information
    "first": (_first, False),
    "second": (_second, True),
    "hessian": (_hessian, True),
    "adam": (_hessian, True),  # whose information is Adam's second moment
}


@dataclass
class Held:
    """What is known of one matrix: float32 [out, in] where two axes cut it, else float64 a row or column of its one axis."""

    spans: tuple[tuple[Axis, Span], ...]
    mean: Tensor

    @property
    def whole(self) -> bool:
        """Kept weight by weight."""
        return len({span.dim for _, span in self.spans}) > 1

    def along(self, rule: Tensor) -> Tensor:
        """A matrix as it is kept: itself, or its sums along what its axis does not cut."""
        return rule if self.whole else rule.sum(1 - self.spans[0][1].dim).double()


@dataclass
class Table:
    """One number a unit, infinite where it is gone. `drop` takes what goes out of the other axes' sums."""

    values: dict[str, np.ndarray]  # axis -> float64
    anatomy: Anatomy
    held: Mapping[str, Held]
    matrices: Mapping[str, Tensor]  # parameter -> this process's rows of its saliency, where two axes cut it
    world: World

    def least(self, name: str, count: int) -> tuple[int, ...]:
        """The units of an axis that are worth least, by index; ties go to the lower one."""
        return tuple(sorted(np.argsort(self.values[name], kind="stable")[:count].tolist()))

    def elements(self, units: Mapping[str, tuple[int, ...]], now: Anatomy) -> int:
        """Weights of the counted matrices that belong to so many units, as large as they are `now`, with every layer there."""
        total = 0
        for name, gone in units.items():
            for param, held in self.held.items():
                tensor = now.tensors[param]
                if name == "layers" and tensor.layer in gone:
                    total += tensor.numel
                for axis, span in held.spans:
                    if axis.name == name:
                        total += len(gone) * span.rows_per_unit * tensor.shape[1 - span.dim]
        return total

    def drop(self, units: Mapping[str, tuple[int, ...]]) -> None:
        """Changes the table: these are gone."""
        for name, gone in units.items():
            if name == "layers":
                continue
            self.values[name][list(gone)] = np.inf
            for param, matrix in self.matrices.items():
                spans = self.held[param].spans
                for axis, span in spans:
                    if axis.name == name:
                        self._take_out(param, matrix, span, span.rows(gone).reshape(-1), spans)
        for layer in units.get("layers", ()):
            self._drop_layer(layer)
        self._sum_layers()

    def _take_out(self, param: str, matrix: Tensor, gone: Span, rows: Tensor, spans: tuple[tuple[Axis, Span], ...]) -> None:
        """What these rows or columns held no longer counts for the axes that cut the other way."""
        total = self.anatomy.tensors[param].shape[0]
        first = self.world.first_row(total)
        if gone.dim == 0:
            rows = rows[(rows >= first) & (rows < first + len(matrix))] - first
        lost = matrix.index_select(gone.dim, rows).sum(gone.dim).double()
        matrix.index_fill_(gone.dim, rows, 0)
        if gone.dim == 1:
            lost = _placed(lost, first, total)
        for axis, span in spans:
            if span.dim != gone.dim:
                whole = self.world.sum_(lost.clone())
                values = self.values[axis.name]
                left = values - axis.unit_sums(span, whole).numpy()
                self.values[axis.name] = np.where(np.isinf(values), np.inf, np.maximum(left, 0.0))

    def _drop_layer(self, layer: int) -> None:
        """All that a layer's matrices held."""
        for param, matrix in self.matrices.items():
            if self.anatomy.tensors[param].layer == layer:
                spans = self.held[param].spans
                inner = next(span for axis, span in spans if axis.layer is not None)
                everything = torch.arange(self.anatomy.tensors[param].shape[inner.dim])
                self._take_out(param, matrix, inner, everything, spans)
        for name in list(self.values):
            axis = self.anatomy.axes[name]
            if axis.layer == layer:
                self.values[name][:] = np.inf
        if "layers" in self.values:
            self.values["layers"][layer] = np.inf

    def _sum_layers(self) -> None:
        """A layer is worth what its heads and channels are worth."""
        if "layers" not in self.values:
            return
        out = self.values["layers"]
        for layer in np.flatnonzero(np.isfinite(out)):
            own = [v for n, v in self.values.items() if self.anatomy.axes[n].layer == layer]
            out[layer] = sum(float(v[np.isfinite(v)].sum()) for v in own)


def _placed(rows: Tensor, first: int, total: int) -> Tensor:
    """A process's rows among those of all."""
    out = torch.zeros(total, *rows.shape[1:], dtype=rows.dtype)
    out[first : first + len(rows)] = rows
    return out


class Saliency(Carried):
    """The running mean of every unit's saliency, of a model as it is now; a cut makes a new one of it."""

    prefix = "saliency"

    def __init__(
        self, part: SaliencyPart, anatomy: Anatomy, kinds: Collection[str], named: Mapping[str, nn.Parameter], world: World
    ) -> None:
        self.part, self.anatomy, self.kinds, self.world = part, anatomy, tuple(kinds), world
        self.named = {name: p for name, p in named.items() if name in set(_matrices(anatomy, part.matrices))}
        scored = _scored(anatomy, kinds)
        self.held: dict[str, Held] = {}
        for name, p in self.named.items():
            spans = tuple(
                (axis, span)
                for axis in anatomy.axes.values()
                if kind_of(axis.name) in scored
                for span in axis.spans
                if span.param == name
            )
            if spans:
                self.held[name] = Held(spans, torch.empty(0))
                rows = local(p.detach())
                self.held[name].mean = self.held[name].along(torch.zeros(rows.shape, dtype=torch.float32))
        self.count = 0
        self._fisher: dict[str, Tensor] = {}
        self._total: dict[str, Tensor] = {}  # gradients of the update so far, while micro-batches are seen one by one

    @property
    def by_itself(self) -> bool:
        """Nothing is gathered: Adam's moments say it all, or what matrices read."""
        return self.part.metric in ("adam", "obc")

    # -- while it trains ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def see_part(self) -> None:
        """After each of several micro-batches: its own squared gradient, where the rule wants the Fisher information.

        The gradient is taken off the parameter, so that the next micro-batch's comes alone; `see` gives the sum back. What is
        held meanwhile is what autograd would hold, and the Fisher information.
        """
        if self.by_itself or not RULES[self.part.metric][1]:
            return
        for name in self.held:
            p = self.named[name]
            if p.grad is None:
                continue
            own = local(p.grad)
            if name not in self._total:
                self._total[name], self._fisher[name] = p.grad, own.square()
            else:
                local(self._total[name]).add_(own)
                self._fisher[name].addcmul_(own, own)
            p.grad = None

    @torch.no_grad()
    def see(self, run: Training, tokens: int) -> None:
        """Once an update, before gradients are clipped. `tokens`: of the update, whose mean loss the gradients are of."""
        if self.by_itself:
            return
        for name, total in self._total.items():
            self.named[name].grad = total
        self._total.clear()
        sums: dict[str, Tensor] = {}  # of what is not kept weight by weight
        for name, held in self.held.items():
            found = sums.setdefault(name, torch.zeros_like(held.mean)) if not held.whole else held.mean
            for part, saliency in self._by_gradient(name, tokens):
                if held.whole:
                    self._average_(found[part], saliency)
                elif held.spans[0][1].dim == 0:
                    found[part] = held.along(saliency)
                else:
                    found += held.along(saliency)
        self._totalled_(sums)
        for name, found in sums.items():
            self._average_(self.held[name].mean, found)
        self.count += 1

    def _by_gradient(self, name: str, tokens: int) -> Iterator[tuple[slice, Tensor]]:
        """Rows of a matrix and the saliency of their weights, a few at a time; its Fisher information is used up."""
        rule, curved = RULES[self.part.metric]
        w, g, fisher = local(self.named[name].detach()), self._gradient(name), self._fisher.pop(name, None)
        rows = max(1, _AT_ONCE // w.shape[1] if self.held[name].whole else len(w))  # sums are made faster of a whole matrix
        for first in range(0, len(w), rows):
            part = slice(first, first + rows)
            own = g[part].float()
            room = torch.empty_like(own)
            information = room
            if curved:  # a micro-batch's gradient, as part of the update's mean, squares to F / tokens, times its share
                information = (g[part].square() if fisher is None else fisher[part]).mul_(tokens).float()
            yield part, rule(w[part].float(), own, information, room)

    def _average_(self, mean: Tensor, found: Tensor) -> None:
        """Changes a mean of what was seen before; `count` tells whether anything was."""
        if self.part.average and self.count:
            mean.lerp_(found, 1 - self.part.average)
        else:
            mean.copy_(found)

    def _totalled_(self, found: dict[str, Tensor]) -> None:
        """Changes sums over rows, of which every process has some: from here on all have the same."""
        partial = [name for name in found if not _row_sliced(self.held[name])]
        if partial and not self.world.alone:
            flat = self.world.sum_(torch.cat([found[name] for name in partial]))
            found |= dict(zip(partial, flat.split([len(found[name]) for name in partial]), strict=True))

    def _gradient(self, name: str) -> Tensor:
        p = self.named[name]
        return local(p.grad) if p.grad is not None else torch.zeros_like(local(p.detach()))

    # -- when something goes -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def table(self, run: Training, alive: Mapping[str, np.ndarray], activations: Activations | None = None) -> Table:
        """Every unit's number; the same in all processes."""
        if activations is not None and self.part.metric == "obc":
            means = self._by_inputs(activations)
        else:
            means = self._by_moments(run) if self.by_itself else {name: held.mean for name, held in self.held.items()}
        sums: dict[str, Tensor] = {}
        for name, held in self.held.items():
            known = not _row_sliced(held)  # by all: the first process counts it
            for axis, span in held.spans:
                vector = means[name].sum(1 - span.dim).double() if held.whole else means[name]
                if span.dim == 0:
                    vector = self._placed(vector, name)
                found = axis.unit_sums(span, vector if self.world.first or not known else torch.zeros_like(vector))
                sums[axis.name] = sums[axis.name] + found if axis.name in sums else found
        if sums:
            flat = self.world.sum_(torch.cat(list(sums.values())))
            parts = flat.split([len(v) for v in sums.values()])
            sums = dict(zip(sums, parts, strict=True))
        values = {name: np.where(alive[name], found.numpy(), np.inf) for name, found in sums.items()}
        for name in values:
            layer = self.anatomy.axes[name].layer
            if layer is not None and not alive["layers"][layer]:
                values[name] = np.full_like(values[name], np.inf)
        if "layers" in self.kinds:
            values["layers"] = np.where(alive["layers"], 0.0, np.inf)
        whole = {name: means[name] for name, held in self.held.items() if held.whole}
        table = Table(values, self.anatomy, self.held, whole, self.world)
        table.drop({})
        return table

    def _by_moments(self, run: Training) -> dict[str, Tensor]:
        """w^2 v / 2 with v AdamW's second moment as it stands; its bias is one factor for all, which ranks nothing otherwise."""
        rule = RULES["adam"][0]
        moments = slots(run.optimizer, self.named)["exp_avg_sq"]
        out = {}
        for name, held in self.held.items():
            w, v = local(self.named[name].detach()).float(), local(moments[name]).float()
            out[name] = held.along(rule(w, w, v, torch.empty_like(w)))
        self._totalled_(out)
        return out

    def _by_inputs(self, activations: Activations) -> dict[str, Tensor]:
        """w^2 / [H^-1]_jj: what a layer errs more without the weight, the others fitted anew (Optimal Brain Compression)."""
        out = {}
        for name, held in self.held.items():
            w = local(self.named[name].detach()).double()
            out[name] = held.along((w.square() / activations.inverse_diagonal(name)).float())
        self._totalled_(out)
        return out

    def _placed(self, rows: Tensor, name: str) -> Tensor:
        """This process's rows of a parameter among those of all."""
        total = self.anatomy.tensors[name].shape[0]
        return _placed(rows, self.world.first_row(total), total)

    # -- checkpoints and cuts ----------------------------------------------------------------------------------------

    def saved(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, whole in every process: matrices by rows, sums of all processes."""
        out = {}
        for name, held in self.held.items() if not self.by_itself else ():
            mean = held.mean
            if not self.world.alone and _row_sliced(held):
                mean = self.world.sum_(self._placed(mean, name))
            out[f"saliency.{name}"] = mean
        return out

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Undo `saved`: each process takes its rows."""
        for name, held in self.held.items() if not self.by_itself else ():
            mean = saved[f"saliency.{name}"]
            if not self.world.alone and _row_sliced(held):
                first = self.world.first_row(len(mean))
                mean = mean[first : first + len(held.mean)]
            held.mean.copy_(mean)

    def known(self) -> Iterable[str]:
        """See `Carried`."""
        return () if self.by_itself else self.held

    def follows(self, name: str) -> Mapping[int, tuple[int, ...]]:
        """A matrix, or sums along what its one axis does not cut."""
        held = self.held[name]
        return {0: (0,), 1: (1,)} if held.whole else {held.spans[0][1].dim: (0,)}

    def cut_from(self, before: Self, rows: Callable[[str], Mapping[int, Tensor]], renamed: Mapping[str, str]) -> None:
        """Changes self, see `Carried`; as many updates were seen."""
        super().cut_from(before, rows, renamed)
        self.count = before.count


def _scored(anatomy: Anatomy, kinds: Collection[str]) -> list[str]:
    """Kinds of axes that are summed up: a layer is worth what its heads and channels are, each counted once."""
    if "layers" not in kinds:
        return list(kinds)
    heads = "heads" if "heads" in kinds or "kv_heads" in anatomy.refused else "kv_heads"
    return [heads, "intermediate", *(k for k in kinds if k == "hidden")]


def _row_sliced(held: Held) -> bool:
    """Whether a process holds its rows of it; else its part of a sum."""
    return held.whole or held.spans[0][1].dim == 0


def _matrices(anatomy: Anatomy, which: str) -> list[str]:
    """The matrices whose weights count: those that read heads and channels, the embedding too, or every matrix of the blocks."""
    if which == "all":
        return [name for name, tensor in anatomy.tensors.items() if tensor.is_matrix]
    inner = [name for name in anatomy.axes if kind_of(name) in INNER]
    embedding = [f"{anatomy.family.embedding}.weight"] if which == "output+embedding" else []
    return [*dict.fromkeys(anatomy.reader(name).param for name in inner), *embedding]
