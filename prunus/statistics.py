"""Streaming statistics of activations, and the sweep that collects them block by block.

Shapes: N windows, T tokens, C channels, B windows in a batch, D hidden size. Sums within one window are float32 (of Gram
matrices within eight), sums over them float64; both are the same whatever the batch, so only float64 rounding differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from .anatomy import Anatomy
from .distributed import ALONE, World

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_TOGETHER = 8  # windows whose Gram matrix is summed in float32: a float64 sum a window would cost a third of the product
_PANEL = 384  # rows of a Gram matrix that one product makes; what stands above the diagonal is copied from below it


class Collector(Protocol):
    """Anything that takes activations [B, T, C]."""

    def update(self, x_BTC: Tensor, /) -> None:
        """Add a batch."""

    def settle(self, world: World, /) -> None:
        """Nothing more is to come: bring in what the other processes saw."""


@dataclass
class Moments:
    """Per-channel statistics of one tensor x [tokens, C] over all tokens seen.

    `want` names what is kept: ``mean``, ``var`` (unbiased), ``sumsq``, ``abs`` (mean |x|), ``window_abs`` (sum over
    windows of (mean over tokens of |x|)^2, Minitron's), ``gram`` (X^T X, [C, C]).
    """

    want: frozenset[str]
    count: int = 0
    shift_C: Tensor | None = None  # the first window's mean: sums of x - shift do not cancel
    sums: dict[str, Tensor] = field(default_factory=dict)
    pending_CC: Tensor | None = field(default=None, repr=False, compare=False)  # float32 products not yet in the sums
    pending_windows: int = 0
    # by shape, one batch's room, used again and shared: fresh memory for every batch took longer than the sums
    room: dict[torch.Size, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @torch.no_grad()
    def update(self, x_BTC: Tensor) -> None:
        """Add a batch of windows without padding. Changes self only."""
        x_BTC = x_BTC.float().reshape(-1, *x_BTC.shape[-2:])
        tokens = x_BTC.shape[1]
        self.count += len(x_BTC) * tokens
        if self.want & {"mean", "var"}:
            if self.shift_C is None:
                self.shift_C = x_BTC[0].mean(0)
            if x_BTC.shape not in self.room:
                self.room[x_BTC.shape] = torch.empty_like(x_BTC)
            centred = torch.sub(x_BTC, self.shift_C, out=self.room[x_BTC.shape])
            self._add("centred", centred.sum(1))
            if "var" in self.want:
                self._add("centred_sq", centred.square_().sum(1))
        if "sumsq" in self.want:
            self._add("sumsq", (x_BTC * x_BTC).sum(1))
        if self.want & {"abs", "window_abs"}:
            absolute_BC = x_BTC.abs().sum(1)
            self._add("abs", absolute_BC)
            self._add("window_abs", (absolute_BC.double() / tokens).square())
        if "gram" in self.want:
            for x_TC in x_BTC:
                self._add_product(x_TC)

    def begin(self, x_TC: Tensor) -> None:
        """Of ``mean`` and ``gram`` as if no token of a window had been seen: what other processes see can be brought in."""
        self.shift_C = x_TC.float().mean(0)
        channels = x_TC.shape[1]
        self.sums = {
            "centred": torch.zeros(channels, dtype=torch.float64),
            "gram": torch.zeros(channels, channels, dtype=torch.float64),
        }

    def _add(self, name: str, value_B: Tensor) -> None:
        """Add what every window of a batch gave."""
        value = value_B.double().sum(0)
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def _add_product(self, x_TC: Tensor) -> None:
        """One window's X^T X. The product adds to what is there, and every `_TOGETHER` windows that goes to the sum."""
        size = x_TC.shape[1]
        if self.pending_CC is None:
            self.pending_CC = x_TC.new_zeros(size, size)
        for start in range(0, size, _PANEL):
            end = min(start + _PANEL, size)
            self.pending_CC[start:end, :end].addmm_(x_TC[:, start:end].T, x_TC[:, :end])
        self.pending_windows += 1
        if self.pending_windows == _TOGETHER:
            self._add_pending()
            self.pending_CC.zero_()

    def _add_pending(self) -> None:
        """Bring the float64 sum up to date below the diagonal."""
        assert self.pending_CC is not None
        if self.pending_windows and "gram" in self.sums:
            self.sums["gram"] += self.pending_CC
        elif self.pending_windows:
            self.sums["gram"] = self.pending_CC.double()
        self.pending_windows = 0

    def settle(self, world: World = ALONE) -> None:
        """Nothing more is to come: let go of what only adding needs, and bring in what the other processes saw."""
        self._finish()
        if not world.alone:
            self._share(world)

    def _share(self, world: World) -> None:
        """Sums of all processes, around the first one's shift: of x - s they become those of x - s' = (x - s) + (s - s')."""
        if self.shift_C is not None:
            shift_C = world.agree(self.shift_C)
            moved_C = self.shift_C.double() - shift_C.double()
            self.shift_C, centred_C = shift_C, self.sums["centred"]
            if "centred_sq" in self.sums:
                self.sums["centred_sq"] += 2 * moved_C * centred_C + self.count * moved_C.square()
            self.sums["centred"] = centred_C + self.count * moved_C
        for name in sorted(self.sums):
            world.sum_(self.sums[name])
        self.count = round(world.total(self.count))

    def _finish(self) -> None:
        """Products that are not yet in the sums are brought in, and what stands above the diagonal."""
        if self.pending_CC is None:
            return
        self._add_pending()
        self.pending_CC = None
        gram_CC = self.sums["gram"]
        for start in range(_PANEL, len(gram_CC), _PANEL):
            gram_CC[:start, start : start + _PANEL] = gram_CC[start : start + _PANEL, :start].T

    @property
    def gram_CC(self) -> Tensor:
        """X^T X over all tokens, float64."""
        self._finish()
        return self.sums["gram"]

    @property
    def covariance_CC(self) -> Tensor:
        """Sum over tokens of (x - mean)(x - mean)^T, float64."""
        return self.gram_CC - self.count * torch.outer(self.mean_C, self.mean_C)

    @property
    def mean_C(self) -> Tensor:
        """Mean over tokens, float64."""
        assert self.shift_C is not None
        return self.shift_C.double() + self.sums["centred"] / self.count

    @property
    def var_C(self) -> Tensor:
        """Unbiased variance over tokens, float64."""
        centred = self.sums["centred_sq"] - self.sums["centred"].square() / self.count
        return centred.clamp_min(0) / max(self.count - 1, 1)

    def norm_C(self) -> Tensor:
        """Euclidean norm over all tokens, float64: sqrt(sum x^2)."""
        return self.sums["sumsq"].sqrt()

    def to_tensors(self) -> dict[str, Tensor]:
        """Everything as named tensors, for saving."""
        self._finish()
        out = dict(self.sums)
        if self.shift_C is not None:
            out["shift"] = self.shift_C
        return out | {"count": torch.tensor(self.count)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], want: frozenset[str]) -> Moments:
        """Undo `to_tensors`."""
        sums = {k: v for k, v in tensors.items() if k not in ("shift", "count")}
        return cls(want, int(tensors["count"]), tensors.get("shift"), sums)


class _Recorder(nn.Module):
    """Stands in for a block: keeps what it was called with and passes the stream on unchanged."""

    def __init__(self) -> None:
        super().__init__()
        self.kwargs: dict[str, Any] = {}
        self.hidden: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert not args, "decoder blocks are called with keywords after the stream"
        self.kwargs, self.hidden = kwargs, hidden_states
        return hidden_states


class _Inject(nn.Module):
    """Stands in for all blocks: puts a given stream in place of whatever came before."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.hidden


class _Silent(nn.Module):
    """Stands in for a matrix whose output nobody reads."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.size)


@contextmanager
def _layers_replaced(model: PreTrainedModel, anatomy: Anatomy, layers: Iterable[nn.Module]) -> Iterator[None]:
    parent_name, _, name = anatomy.family.blocks.rpartition(".")
    parent = model.get_submodule(parent_name)
    original = getattr(parent, name)
    setattr(parent, name, nn.ModuleList(layers))
    try:
        yield
    finally:
        setattr(parent, name, original)


def logits_from(model: PreTrainedModel, anatomy: Anatomy, hidden_BTD: Tensor, ids_BT: Tensor) -> Tensor:
    """Logits [B, T, vocab] of a stream that leaves the last block: the model's own final norm, head and softcap."""
    with _layers_replaced(model, anatomy, [_Inject(hidden_BTD)]):
        return model(input_ids=ids_BT, use_cache=False).logits


class Sweep:
    """Windows on their way through the decoder, one block at a time: memory is the model plus the windows.

    `ids_NT` are those of this process; what is collected is of the whole `world`.
    """

    @torch.no_grad()
    def __init__(
        self, model: PreTrainedModel, anatomy: Anatomy, ids_NT: Tensor, batch_size: int = 4, world: World = ALONE
    ) -> None:
        self.model, self.anatomy, self.world = model, anatomy, world
        blocks = model.get_submodule(anatomy.family.blocks)
        assert isinstance(blocks, nn.ModuleList)
        self.blocks = blocks
        self.ids = list(ids_NT.split(batch_size))
        self.hidden: list[Tensor] = []
        self.room: dict[torch.Size, Tensor] = {}  # for the sums of a batch, see `Moments`
        self._kwargs: dict[int, list[dict[str, Any]]] = {}  # batch size -> keywords of every block
        recorders = [_Recorder() for _ in blocks]
        with _layers_replaced(model, anatomy, recorders):
            for ids_BT in self.ids:
                model.get_decoder()(input_ids=ids_BT, use_cache=False)
                assert recorders[0].hidden is not None
                self.hidden.append(recorders[0].hidden)
                if len(ids_BT) not in self._kwargs:
                    self._kwargs[len(ids_BT)] = [r.kwargs for r in recorders]
                for recorder in recorders:
                    recorder.hidden = None

    def keywords(self, layer: int, batch_size: int) -> dict[str, Any]:
        """What the model calls a block with, besides the stream: mask, positions, rotary angles."""
        return self._kwargs[batch_size][layer]

    @torch.no_grad()
    def forward(self, layer: int, hidden_BTD: Tensor, position: int | None = None) -> Tensor:
        """One batch through one block; `position` is the block whose keywords are used, if not its own."""
        keywords = self.keywords(layer if position is None else position, len(hidden_BTD))
        out = self.blocks[layer](hidden_BTD, **keywords)
        return out[0] if isinstance(out, tuple) else out

    def run(self, layer: int, *, each: Callable[[Tensor, Tensor], None] | None = None) -> None:
        """All windows through one block; its output becomes the next block's input. `each` sees (in, out)."""
        for i, hidden in enumerate(self.hidden):
            out = self.forward(layer, hidden)
            if each is not None:
                each(hidden, out)
            self.hidden[i] = out

    def gather(self, layer: int, collectors: Mapping[str, Collector], *, onwards: bool) -> None:
        """Collect what the modules of one block read; `onwards` also takes the windows through it, unless it is the last."""
        if onwards and layer + 1 < len(self.blocks):
            with self.collecting(collectors):
                self.run(layer)
        else:
            self.observe(layer, collectors)

    def observe(self, layer: int, collectors: Mapping[str, Collector]) -> None:
        """Collect what the modules of one block read and leave the windows where they are.

        Nobody reads this pass's output, so the block's last matrices are not multiplied: a quarter of the work saved. Where
        nobody asks for what the MLP reads, none of its matrices are.
        """
        points = reading_points(self.anatomy, layer)
        silent = points.get(("mlp", "intermediate"), [])
        if not any(
            f"{module}.weight" in names for (where, _), names in points.items() if where == "mlp" for module in collectors
        ):
            silent = [name for (where, _), names in points.items() if where == "mlp" for name in names]
        with self._silenced(silent), self.collecting(collectors):
            for hidden in self.hidden:
                self.forward(layer, hidden)

    @contextmanager
    def _silenced(self, matrices: list[str]) -> Iterator[None]:
        originals = []
        for name in matrices:
            parent, _, leaf = name.removesuffix(".weight").rpartition(".")
            module = self.model.get_submodule(parent)
            originals.append((module, leaf, getattr(module, leaf)))
            setattr(module, leaf, _Silent(self.anatomy.tensors[name].shape[0]))
        try:
            yield
        finally:
            for module, leaf, original in originals:
                setattr(module, leaf, original)

    @contextmanager
    def collecting(self, collectors: Mapping[str, Collector]) -> Iterator[None]:
        """Feed the inputs of the named modules to their collectors while a block runs."""
        handles = []
        for name, collector in collectors.items():
            module = self.model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(lambda _, args, c=collector: c.update(args[0])))
        try:
            yield
            for collector in collectors.values():
                collector.settle(self.world)
        finally:
            for handle in handles:
                handle.remove()


def reading_points(anatomy: Anatomy, layer: int) -> dict[tuple[str, str], list[str]]:
    """(sub-layer, segment) -> the matrices of a block that read that input: q, k and v read one and the same tensor."""
    points: dict[tuple[str, str], list[str]] = {}
    for name, tensor in anatomy.tensors.items():
        if tensor.is_matrix and tensor.layer == layer and tensor.sublayer is not None:
            points.setdefault((tensor.sublayer, tensor.param.dims[1][0]), []).append(name)
    return points


Statistics = dict[str, Moments]  # "layers.3.mlp.intermediate" -> what was seen there


def layer_moments(sweep: Sweep, layer: int, wants: Mapping[str, frozenset[str]]) -> tuple[Statistics, Statistics]:
    """Fresh `Moments` for the inputs of one block: by statistics name, and by the module whose input feeds them."""
    named: Statistics = {}
    modules: Statistics = {}
    for (sublayer, segment), matrices in reading_points(sweep.anatomy, layer).items():
        if segment in wants:
            moments = Moments(wants[segment], room=sweep.room)
            named[f"layers.{layer}.{sublayer}.{segment}"] = moments
            modules[matrices[0].removesuffix(".weight")] = moments
    return named, modules


def collect(
    sweep: Sweep, wants: Mapping[str, frozenset[str]], progress: Callable[[int, int], None] = lambda done, total: None
) -> Statistics:
    """One dense pass: the wanted moments of every block's inputs, by segment (``hidden``, ``q``, ``intermediate``)."""
    out: Statistics = {}
    count = len(sweep.blocks)
    for layer in range(count):
        named, modules = layer_moments(sweep, layer, wants)
        sweep.gather(layer, modules, onwards=True)
        out |= named
        progress(layer + 1, count)
    return out


@dataclass
class BlockCosine:
    """Mean over tokens of the cosine between a block's input and output (float32; bf16 rounds small distances away)."""

    total: float = 0.0
    count: int = 0

    def __call__(self, before_BTD: Tensor, after_BTD: Tensor) -> None:
        """Add a batch."""
        cosine = torch.nn.functional.cosine_similarity(before_BTD.float(), after_BTD.float(), dim=-1)
        self.total += float(cosine.double().sum())
        self.count += cosine.numel()

    def settle(self, world: World) -> None:
        """Bring in what the other processes saw."""
        self.total, self.count = world.total(self.total), round(world.total(self.count))

    @property
    def mean(self) -> float:
        """The mean so far."""
        return self.total / self.count
