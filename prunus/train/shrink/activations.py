"""What matrices and norms read while the model trains: running sums over sampled tokens of the forward passes that it makes anyway.

Of a matrix' input the Gram matrix X^T X, of a norm's the mean share of every channel in a token's energy. Sums of a process are
of its own sequences; they are brought together when something is cut. Shapes: N sampled tokens, C channels that are read.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...anatomy import Anatomy
from ...axes import kind_of
from ...distributed import World
from ...solve import factor
from ...statistics import reading_points
from ..learner import Learner
from ..loss import IGNORED
from .carried import Carried
from .goal import INNER
from .part import ActivationsPart, PrunePart

_NORMS = "norms"
_FORGOTTEN = 0.01  # a running mean that keeps less than this of an update need not have seen it
_COUNT = "count"


def wanted(part: PrunePart) -> frozenset[str]:
    """What a recipe needs to see: kinds of axes whose readers' inputs, and the norms' inputs; empty if nothing."""
    out: set[str] = set()
    if part.repair.kind == "least-squares":
        out |= set(part.axes) & set(INNER)
    if part.saliency.metric == "obc":
        out |= {*INNER} if part.saliency.matrices == "output" else {*INNER, "hidden"}
    if part.repair.stem != "none":
        out |= {_NORMS} | ({"hidden"} if part.repair.stem == "least-squares" else set())
    return frozenset(out)


def points(anatomy: Anatomy, kinds: Collection[str]) -> dict[str, list[str]]:
    """The first of the matrices that read one input -> all of them, of the inputs of these kinds of axes."""
    inner = {anatomy.reader(name).param for name in anatomy.axes if kind_of(name) in INNER and kind_of(name) in kinds}
    out = {}
    for layer in range(anatomy.shape.num_hidden_layers):
        for (_, segment), matrices in reading_points(anatomy, layer).items():
            if (segment == "hidden" and "hidden" in kinds) or inner & set(matrices):
                out[matrices[0]] = matrices
    return out


class Activations(Carried):
    """Running sums of what is read, of a model as it is now; a cut makes a new one of it. It looks when it is asked to."""

    prefix = "activations"

    def __init__(
        self, part: ActivationsPart, anatomy: Anatomy, wanted: Collection[str], learner: Learner, world: World
    ) -> None:
        self.part, self.anatomy, self.world = part, anatomy, world
        self.points = points(anatomy, wanted)
        self.norms = [
            name for name, tensor in anatomy.tensors.items() if tensor.param.norm and tensor.param.dims == (("hidden",),)
        ]
        self.norms = self.norms if _NORMS in wanted else []
        self.looking, self._inside, self._new, self._first = False, False, False, 0
        tensors, device = anatomy.tensors, next(learner.parameters()).device
        self.sums = {name: torch.zeros(2 * (tensors[name].shape[1],), device=device) for name in self.points}
        self.sums |= {name: torch.zeros(tensors[name].shape, device=device) for name in self.norms}
        self.sums[_COUNT] = torch.zeros(1, device=device)  # tokens; what they gave fades with what they are counted by
        learner.register_forward_pre_hook(self._enter)
        learner.register_forward_hook(self._leave)
        for name in (*self.points, *self.norms):
            see = self._see_share if name in self.norms else self._see_gram
            module = learner.model.get_submodule(name.removesuffix(".weight"))
            module.register_forward_pre_hook(self._hook(name, see, counts=name == next(iter(self.sums))))

    # -- while it trains ---------------------------------------------------------------------------------------------

    def look(self, looking: bool, step: int) -> None:
        """Whether the next update's tokens count: every so many of a sequence, others at every step."""
        self.looking, self._new, self._first = looking, looking, step % self.part.every

    @property
    def memory(self) -> int:
        """Updates that a running mean remembers."""
        return 1 if not self.part.average else math.ceil(math.log(_FORGOTTEN) / math.log(self.part.average))

    def flops(self, sequences: int, seq_len: int) -> int:
        """Of looking at one update."""
        tokens = sequences * len(range(self._first, seq_len, self.part.every))
        return tokens * sum(2 * t.numel() for name, t in self.sums.items() if t.dim() == 2)

    def _enter(self, _: nn.Module, args: Any) -> None:
        """Updates alone are looked at: neither validation nor the passes of a process that only keeps others company."""
        self._inside = self.looking and bool((args[1] != IGNORED).any())
        if self._inside and self._new:
            for total in self.sums.values():
                total.mul_(self.part.average)
            self._new = False

    def _leave(self, *_: Any) -> None:
        self._inside = False  # activations that are computed again on the way back were seen

    def _hook(self, name: str, see: Any, *, counts: bool) -> Any:
        @torch.no_grad()
        def look(_: nn.Module, args: Any) -> None:
            if not self._inside:
                return
            x_NC = args[0].detach()[..., self._first :: self.part.every, :].flatten(0, -2).float()
            with torch.autocast(x_NC.device.type, enabled=False):
                see(self.sums[name], x_NC)
            if counts:
                self.sums[_COUNT] += len(x_NC)

        return look

    @staticmethod
    def _see_gram(total_CC: Tensor, x_NC: Tensor) -> None:
        total_CC.addmm_(x_NC.T, x_NC)

    @staticmethod
    def _see_share(total_C: Tensor, x_NC: Tensor) -> None:
        square_NC = x_NC.square()
        total_C += (square_NC / square_NC.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)).sum(0)

    # -- when something goes -----------------------------------------------------------------------------------------

    def mean(self, name: str) -> Tensor:
        """Of a matrix' input E[x x^T] [C, C], of a norm's its channels' shares [C]; float64, of all processes."""
        total, count = (self.world.sum_(self.sums[key].double()) for key in (name, _COUNT))
        return total / count.clamp_min(1)

    def inverse_diagonal(self, matrix: str) -> Tensor:
        """[H^-1]_jj of what a matrix reads, H = E[x x^T] damped as SparseGPT does [C], float64; infinite where nothing is read."""
        gram_CC = self.mean(next(first for first, matrices in self.points.items() if matrix in matrices))
        read = gram_CC.diagonal().nonzero().squeeze(1)  # so that zeroed units change nothing
        out_C = torch.full_like(gram_CC.diagonal(), torch.inf)
        if len(read):
            out_C[read] = torch.cholesky_inverse(factor(gram_CC[read][:, read]).lower).diagonal()
        return out_C

    @torch.no_grad()
    def drop(self, units: Mapping[str, tuple[int, ...]]) -> None:
        """Changes the sums: nothing is read of these units from now on."""
        for name, gone in units.items():
            for span in self.anatomy.axes[name].spans if name != "layers" else ():
                rows = span.rows(gone).reshape(-1)
                if span.dim == 1 and span.param in self.points:
                    for dim in (0, 1):
                        self.sums[span.param].index_fill_(dim, rows, 0)
                elif span.param in self.norms:  # the others' shares are of what is left
                    before = self.sums[span.param].sum()
                    self.sums[span.param].index_fill_(0, rows, 0)
                    self.sums[span.param] *= before / self.sums[span.param].sum().clamp_min(torch.finfo(torch.float32).tiny)

    # -- checkpoints and cuts ----------------------------------------------------------------------------------------

    def known(self) -> Iterable[str]:
        """See `Carried`."""
        return self.sums

    def follows(self, name: str) -> Mapping[int, tuple[int, ...]]:
        """Both sides of a Gram matrix are what a matrix reads."""
        if name == _COUNT:
            return {}
        return {1: (0, 1)} if name in self.points else {0: (0,)}

    @torch.no_grad()
    def saved(self) -> dict[str, Tensor]:
        """Sums of all. The first process goes on from them, as it would from a checkpoint, and the others from nothing."""
        out = {}
        for name, total in self.sums.items():
            out[f"{self.prefix}.{name}"] = self.world.sum_(total).clone()
            if not self.world.first:
                total.zero_()
        return out

    @torch.no_grad()
    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Undo `saved`."""
        for name, total in self.sums.items():
            total.copy_(saved[f"{self.prefix}.{name}"])
            if not self.world.first:
                total.zero_()
