"""Where gates act: as factors on what modules read and write, by hooks while they are learned, folded into weights at the end.

A gate of an inner axis scales what o_proj or down_proj reads. A gate of the stem scales everything that writes into it (the
embedding and each sub-layer's last matrix), and every RMSNorm over it takes its mean over what is open. A layer's gate scales
both of its additions to the stem. So each weight has a factor from each axis once, and a model with gates of 0 and 1 is the
model that is cut. Shapes: R rows of the scaled dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .anatomy import Anatomy
from .axes import Axis, Span, kind_of
from .distributed import World, local
from .gates import Z

T = TypeVar("T")
Factor = Callable[[Z], Tensor]  # gates -> factors of the rows [R], or one for all []


@dataclass(frozen=True)
class Place:
    """A module whose input or output is scaled, and the parameters that the same factor can be folded into."""

    module: str
    factor: Factor
    params: tuple[tuple[str, int], ...] = ()  # name, dimension
    reads: bool = False  # the input is scaled


def places(anatomy: Anatomy, kinds: Collection[str]) -> list[Place]:
    """Everywhere that gates of these kinds of axes act."""
    out: list[Place] = []
    for axis in anatomy.axes.values():
        kind = kind_of(axis.name)
        if kind not in kinds:
            continue
        if kind == "layers":
            out += _of_layers(anatomy)
            continue
        norms = [span for span in axis.spans if anatomy.tensors[span.param].param.norm]
        if not norms:
            reader = anatomy.reader(axis.name)
            out.append(Place(_module(reader.param), _by_rows(axis, reader, anatomy), ((reader.param, 1),), reads=True))
            continue
        writers = _by_module(_writers(anatomy, axis), lambda span: span.param)
        for module, spans in writers.items():
            out.append(Place(module, _by_rows(axis, spans[0], anatomy), tuple((s.param, s.dim) for s in spans)))
        for span in norms:
            out.append(Place(_module(span.param), _statistic(axis, span, anatomy), ((span.param, 0),)))
        if kind == "hidden" and anatomy.shape.tie_word_embeddings:  # the head is the embedding, gates and all
            out.append(Place(anatomy.family.final_norm, _by_rows(axis, norms[0], anatomy)))
    return out


def _writers(anatomy: Anatomy, axis: Axis) -> list[Span]:
    """Spans of what writes the activations that a norm over the axis reads."""
    embedding = f"{anatomy.family.embedding}.weight"
    return [s for s in axis.spans if not anatomy.tensors[s.param].param.norm and (s.dim == 0 or s.param == embedding)]


def _of_layers(anatomy: Anatomy) -> list[Place]:
    """What a layer adds to the stem: behind its last norms where it has such, else behind its last matrices."""
    out: list[Place] = []
    for layer in range(anatomy.shape.num_hidden_layers):
        own = {name: t for name, t in anatomy.tensors.items() if t.layer == layer and t.param.dims[0] == ("hidden",)}
        behind = [n for n in own if _module(n).removeprefix(anatomy.block_name(layer)) in anatomy.family.norms_behind]
        last = behind or [name for name, t in own.items() if not t.param.norm and not _of_norm(anatomy, name)]
        for module, names in _by_module(last, str).items():
            out.append(Place(module, partial(_of_layer, layer), tuple((name, 0) for name in names)))
    return out


def _of_layer(layer: int, z: Z) -> Tensor:
    return z["layers"][0, layer]


def _of_norm(anatomy: Anatomy, name: str) -> bool:
    """Whether a parameter is a LayerNorm's bias."""
    gain = anatomy.tensors.get(f"{_module(name)}.weight")
    return gain is not None and gain.param.norm


def _by_module(items: Iterable[T], name: Callable[[T], str]) -> dict[str, list[T]]:
    """A weight and its bias are of one."""
    out: dict[str, list[T]] = {}
    for item in items:
        out.setdefault(_module(name(item)), []).append(item)
    return out


def _module(param: str) -> str:
    return param.rpartition(".")[0]


def _units(axis: Axis, span: Span, anatomy: Anatomy) -> Tensor:
    """The unit of every row of a span that covers its whole dimension, int64 [R]."""
    rows_UB = span.rows(range(axis.size))
    unit_R = torch.full((anatomy.tensors[span.param].shape[span.dim],), -1)
    unit_R[rows_UB] = torch.arange(axis.size)[:, None].expand_as(rows_UB)
    assert bool((unit_R >= 0).all()), "a scaled dimension has rows of one axis alone"
    return unit_R


def _by_rows(axis: Axis, span: Span, anatomy: Anatomy) -> Factor:
    kind, row, unit_R = kind_of(axis.name), axis.layer or 0, _units(axis, span, anatomy)
    return lambda z: z[kind][row].index_select(0, unit_R)


def _statistic(axis: Axis, span: Span, anatomy: Anatomy) -> Factor:
    """A norm that divides by the mean square over all of its rows is taken to the mean over what is open."""
    by_rows = _by_rows(axis, span, anatomy)

    def factor(z: Z) -> Tensor:
        open_R = by_rows(z)
        return (open_R.sum().clamp(min=1) / len(open_R)).sqrt()

    return factor


# -- hooks ----------------------------------------------------------------------------------------------------------------


def attach_(model: nn.Module, where: Iterable[Place], gates: Callable[[bool], Z]) -> list[Any]:
    """Changes `model`: gates act, asked for with whether it trains; returns handles whose `remove` undoes it."""
    out: list[Any] = []
    for place in where:
        module = model.get_submodule(place.module)
        if place.reads:
            out.append(module.register_forward_pre_hook(_reading(place.factor, gates)))
        else:
            out.append(module.register_forward_hook(_writing(place.factor, gates)))
    return out


def _reading(factor: Factor, gates: Callable[[bool], Z]) -> Any:
    def scale(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *rest = args
        return (x * factor(gates(module.training)).to(x), *rest)

    return scale


def _writing(factor: Factor, gates: Callable[[bool], Z]) -> Any:
    def scale(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return out * factor(gates(module.training)).to(out)

    return scale


# -- the end --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def fold_(
    tensors: Mapping[str, Tensor], anatomy: Anatomy, where: Iterable[Place], z: Z, world: World, power: int = 1
) -> None:
    """Changes weights (power 1) or AdamW's moments (exp_avg -1, exp_avg_sq -2): gates are in them, as `cut.SlicePlan` has it.

    What a gate of 0 scales becomes 0. Tensors may be shared out by rows.
    """
    for place in where:
        factor = place.factor(z)
        factor = torch.where(factor > 0, factor.double() ** power, 0.0)
        for name, dim in place.params:
            own = local(tensors[name])
            part = factor
            if dim == 0 and part.dim() and own.shape != tensors[name].shape:
                part = world.part(factor)
            if dim == 0 and part.dim():
                part = part.reshape(-1, *[1] * (own.dim() - 1))
            shift = anatomy.tensors[name].param.norm and anatomy.family.gain == "one_plus_weight" and power == 1
            part = part.to(own)
            own.copy_((own + 1) * part - 1 if shift else own * part)
