"""What repairs the rest after a cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .anatomy import Anatomy
from .axes import Axis, kind_of
from .distributed import World
from .keep import Keep
from .solve import refit
from .statistics import Moments, Statistics, Sweep, reading_points

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INPUT_OF = {"kv_heads": ("attention", "q"), "intermediate": ("mlp", "intermediate")}


def reader_moments(statistics: Statistics, axis: Axis) -> Moments:
    """What was seen of the input of the matrix that reads an axis."""
    sublayer, segment = INPUT_OF[kind_of(axis.name)]
    return statistics[f"layers.{axis.layer}.{sublayer}.{segment}"]


def output_bias(
    anatomy: Anatomy, tensors: Mapping[str, Tensor], statistics: Statistics, keep: Keep, layer: int | None = None
) -> dict[str, Tensor]:
    """FLAP's bias: what the removed channels gave on average, b_o = sum over removed c of W[o, c] * mean(x_c).

    Returns bias name -> [out] in float32 for every layer (or `layer`), zero where nothing was removed, so that all layers
    are alike; added to a bias that is there already.
    """
    out: dict[str, Tensor] = {}
    for name, axis in anatomy.axes.items():
        kind = kind_of(name)
        if kind not in INPUT_OF or axis.layer is None or layer not in (None, axis.layer):
            continue
        reader = anatomy.reader(name)
        weight = tensors[reader.param].float()
        bias_name = reader.param.removesuffix("weight") + "bias"
        bias = tensors[bias_name].float() if bias_name in tensors else torch.zeros(weight.shape[0])
        dropped = keep.dropped(name, axis.size)
        if dropped:
            gone = reader.rows(dropped).reshape(-1)
            mean_C = reader_moments(statistics, axis).mean_C
            bias = (bias.double() + weight[:, gone].double() @ mean_C[gone]).float()
        out[bias_name] = bias
    return out


def set_biases_(model: PreTrainedModel, biases: Mapping[str, Tensor]) -> None:
    """Changes the live model: the named biases are set, also where a matrix had none."""
    for name, bias in biases.items():
        module = model.get_submodule(name.removesuffix(".bias"))
        assert isinstance(module, torch.nn.Linear)
        module.bias = torch.nn.Parameter(bias.to(module.weight.dtype), requires_grad=False)


def refit_readers_(anatomy: Anatomy, tensors: Mapping[str, Tensor], statistics: Statistics, keep: Keep, layer: int) -> None:
    """Changes every matrix of one block that reads a cut axis: least squares on the inputs that stay (see `solve.refit`)."""
    for (sublayer, segment), matrices in reading_points(anatomy, layer).items():
        name = segment if segment == "hidden" else f"layers.{layer}.{_AXIS_OF.get(segment, segment)}"
        if name not in keep.units or not keep.dropped(name, anatomy.axes[name].size):
            continue
        gram = statistics[f"layers.{layer}.{sublayer}.{segment}"].gram_CC
        for span in anatomy.axes[name].spans:
            if span.param in matrices and span.dim == 1:
                weight, rows = tensors[span.param], span.rows(keep.units[name]).reshape(-1)
                weight[:, rows] = refit(weight, gram, rows).to(weight.dtype)


_AXIS_OF = {segment: kind for kind, (_, segment) in INPUT_OF.items()}


@dataclass
class _RmsRatio:
    """E over tokens of rms(x[kept]) / rms(x)."""

    kept: Tensor
    eps: float
    total: float = 0.0
    count: int = 0

    def update(self, x_BTC: Tensor) -> None:
        square = x_BTC.float().square()
        ratio = ((square[..., self.kept].mean(-1) + self.eps) / (square.mean(-1) + self.eps)).sqrt()
        self.total += float(ratio.double().sum())
        self.count += ratio.numel()

    def settle(self, world: World) -> None:
        """Bring in what the other processes saw."""
        self.total, self.count = world.total(self.total), round(world.total(self.count))


@torch.no_grad()
def measured_gains(sweep: Sweep, keep: Keep, eps: float) -> dict[str, float]:
    """R2: for every norm over the stem the factor E[rms_kept / rms_all], measured on the dense model in one sweep.

    Exact in the mean where R0 leaves the surviving stream amplified (algorithms.md 0.5).
    """
    anatomy = sweep.anatomy
    kept = torch.tensor(keep.units["hidden"])
    norms = [(name, t.layer) for name, t in anatomy.tensors.items() if t.param.norm and t.param.dims == (("hidden",),)]
    ratios: dict[str, _RmsRatio] = {name: _RmsRatio(kept, eps) for name, _ in norms}
    for layer in range(len(sweep.blocks)):
        own = {name.removesuffix(".weight"): ratios[name] for name, at in norms if at == layer}
        with sweep.collecting(own):
            sweep.run(layer)
    for name, at in norms:
        if at is None:
            for hidden in sweep.hidden:
                ratios[name].update(hidden)
            ratios[name].settle(sweep.world)
    return {name: ratio.total / ratio.count for name, ratio in ratios.items()}
