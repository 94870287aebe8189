"""The picture of one checkpoint: what every unit was worth, and what stayed in every layer.

U units of an axis, L layers of the source.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import checkpoint, plots, saliency
from .axes import kind_of, layer_of
from .errors import UserError
from .headers import safetensors_entries
from .keep import Keep, WeightMask
from .methods import METHODS
from .place import staged_files
from .plots import BLUE, INK, ORANGE, PALE, legend_above, log_if_wide, tidy, whole_numbers
from .source import Source
from .tables import big, flags
from .tensorfiles import read

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURE = "plot.png"
_SIZES = {"kv_heads": "num_key_value_heads", "intermediate": "intermediate_size"}
_WORDS = {
    "kv_heads": "KV groups",
    "q_heads": "query heads a group",
    "intermediate": "FFN channels",
    "hidden": "stem channels",
}
_WHOLE = ("layers", "attention", "mlp")
_LAYER = "layer of the source"
_ROW_INCHES, _SHIFT = 3.1, 0.18


@dataclass(frozen=True)
class Drawn:
    """What a checkpoint folder says about its cut."""

    manifest: checkpoint.Manifest
    keep: Keep | None
    scores: Mapping[str, Tensor]
    losses: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Drawn:
        """Read it; UserError if prunus did not write the folder."""
        manifest, extra = checkpoint.read_manifest(folder), folder / checkpoint.EXTRA
        keep = checkpoint.read_keep(folder)
        return cls(manifest, keep, saliency.load_scores(extra), saliency.load_measured(extra, "losses"))

    @property
    def num_layers(self) -> int:
        """L."""
        return int(self.manifest.before["shape"]["num_hidden_layers"])

    def kept(self, axis: str, size: int) -> list[bool]:
        """For every unit whether it stayed; none of a removed layer did."""
        assert self.keep is not None
        layer = layer_of(axis)
        gone = layer is not None and "layers" in self.keep.units and layer not in self.keep.units["layers"]
        units = set() if gone else set(self.keep.units.get(axis, range(size)))
        return [u in units for u in range(size)]

    def size(self, kind: str, layer: int) -> int:
        """Units of an axis in a layer of the source."""
        shape = self.manifest.before["shape"]
        if kind == "q_heads":
            groups = self.size("kv_heads", layer)
            return _at(shape["num_attention_heads"], layer) // groups if groups else 0
        return _at(shape[_SIZES[kind]], layer)

    @property
    def inner_kinds(self) -> list[str]:
        """Kinds of axes inside layers that were cut or scored."""
        assert self.keep is not None
        names = [*self.keep.units, *self.scores]
        return [
            k
            for k in ("kv_heads", "q_heads", "intermediate")
            if any(kind_of(n) == k and layer_of(n) is not None for n in names)
        ]


def _at(sizes: Any, layer: int) -> int:
    return int(sizes[layer] if isinstance(sizes, list) else sizes)


def run(folder: Path, out: Path | None, *, overwrite: bool) -> dict[str, Any]:
    """Draw the folder's picture, by default into the folder; UserError if the place is taken or no place."""
    plots.check_library()
    found = Drawn.read(folder)
    path = (folder / checkpoint.EXTRA / PICTURE) if out is None else out.expanduser()
    plots.check_place(path, overwrite=overwrite)
    with staged_files(path) as (stage,):
        return draw(folder, found, stage) | {"picture": str(path)}


def draw(folder: Path, found: Drawn, path: Path) -> dict[str, Any]:
    """Draw what was found in the folder into `path`; returns what is in the picture."""
    panels = [] if found.keep is None else _panels(found)
    if "sparsity" in found.manifest.ratios:
        panels += _sparse_panels(folder)
    figure = plots.figure(10.0, 0.8 + _ROW_INCHES * len(panels))
    grid = figure.add_gridspec(len(panels), 2)
    for r, row in enumerate(panels):
        for c, panel in enumerate(row):
            place = grid[r, c] if len(row) == 2 else grid[r, :]
            panel(figure.add_subplot(place))
    m = found.manifest
    counts = f"{big(m.before['params'])} to {big(m.after['params'])} parameters ({big(m.before['block_params'])} to "
    counts += f"{big(m.after['block_params'])} in blocks)"
    if "sparsity" in m.ratios:
        zeros = f"{m.ratios['sparsity']:.2%} zeros in the matrices of the blocks"
        counts = f"{zeros}; " + (f"{big(m.after['params'])} parameters as before" if found.keep is None else counts)
    asked = flags(m.method["request"])
    figure.suptitle(f"{m.source['name']} cut by {m.method['name']} {asked}\n{counts}", x=0.01, ha="left", color=INK)
    plots.save(figure, path)
    notes = [] if found.keep is None or found.scores or found.losses else [_NO_SCORES]
    return {"folder": str(folder), "panels": sum(map(len, panels)), "notes": notes}


_NO_SCORES = "no scores are saved in this folder, so only what stayed is drawn"


def _panels(found: Drawn) -> list[list[Any]]:
    rows: list[list[Any]] = []
    for kind in found.inner_kinds:
        kept = lambda axes, kind=kind: _kept_per_layer(axes, found, kind)  # noqa: E731
        scored = any(kind_of(name) == kind for name in found.scores)
        rows.append([lambda axes, kind=kind: _bands(axes, found, kind), kept] if scored else [kept])
    if "hidden" in found.scores:
        rows.append([lambda axes: _stem(axes, found)])
    rows += _whole_panels(found)
    return rows or [[lambda axes: _layers_left(axes, found)]]


def _whole_panels(found: Drawn) -> list[list[Any]]:
    """Layers and sub-layers: their scores or losses, and how the loss grew where they went one after another."""
    measured = [k for k in ("loss_without_layer", "loss_without_run_at") if k in found.losses]
    if "layers" in found.scores:
        return [[lambda axes: _layer_scores(axes, found)]]
    if measured:
        return [[lambda axes: _layer_losses(axes, found, measured[0])]]
    if "rounds" in found.losses:
        return [[lambda axes: _first_round(axes, found), lambda axes: _rounds(axes, found)]]
    return []


# -- units inside layers --------------------------------------------------------------------------------------------------


def _criterion(found: Drawn) -> str:
    row = METHODS.get(found.manifest.method["name"])
    return f"score ({row.criterion.replace('-', ' ')})" if row else "score"


def _bands(axes: Axes, found: Drawn, kind: str) -> None:
    """For every layer the kept units beside the removed ones: all of them, the middle 80 %, the median."""
    ordinary: list[float] = []
    for stays, colour, shift, label in ((True, BLUE, -_SHIFT, "kept"), (False, ORANGE, _SHIFT, "removed")):
        columns: list[tuple[float, list[float]]] = []
        for name, score_U in found.scores.items():
            layer = layer_of(name)
            if layer is None or kind_of(name) != kind:
                continue
            mask = torch.tensor(found.kept(name, len(score_U))) == stays
            chosen = score_U[mask & score_U.isfinite()].double()
            if len(chosen):
                at = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
                columns.append((layer + shift, chosen.quantile(at).tolist()))
        if columns:
            x, q = [c[0] for c in columns], list(zip(*(c[1] for c in columns), strict=True))
            axes.vlines(x, q[0], q[4], color=colour, linewidth=0.8, alpha=0.7)
            axes.vlines(x, q[1], q[3], color=colour, linewidth=3)
            axes.plot(x, q[2], "o", color=colour, markersize=4, markeredgecolor="white", markeredgewidth=0.5, label=label)
            ordinary += [*q[0], *q[4]]
    scale = log_if_wide(axes, ordinary) if ordinary else ""
    what = f"{_LAYER} (line: all, bar: middle 80 %, dot: median)"
    tidy(axes, x=what, y=_criterion(found) + scale, title=f"{_WORDS[kind]}: what each was worth")
    whole_numbers(axes.xaxis)
    legend_above(axes)


def _kept_per_layer(axes: Axes, found: Drawn, kind: str) -> None:
    layers = range(found.num_layers)
    before = [found.size(kind, i) for i in layers]
    after = [sum(found.kept(f"layers.{i}.{kind}", before[i])) for i in layers]
    axes.bar(layers, before, width=0.85, color=PALE, label="before")
    axes.bar(layers, after, width=0.55, color=BLUE, label="after")
    tidy(axes, x=_LAYER, y=_WORDS[kind], title=f"{sum(before):,} {_WORDS[kind]} before, {sum(after):,} after")
    axes.grid(axis="x", visible=False)
    whole_numbers(axes.xaxis)
    whole_numbers(axes.yaxis)
    legend_above(axes)


def _stem(axes: Axes, found: Drawn) -> None:
    """Channels of the stem, best first."""
    score_U = found.scores["hidden"]
    kept = torch.tensor(found.kept("hidden", len(score_U)))
    order = score_U.argsort(descending=True)
    rank = torch.arange(len(order))
    for stays, colour, label in ((True, BLUE, "kept"), (False, ORANGE, "removed")):
        mask = kept[order] == stays
        axes.plot(rank[mask], score_U[order][mask], ".", color=colour, markersize=4, label=f"{int(mask.sum()):,} {label}")
    scale = log_if_wide(axes, score_U.tolist())
    tidy(
        axes,
        x="channel of the stem, best first",
        y=_criterion(found) + scale,
        title=f"{_WORDS['hidden']}: what each was worth",
    )
    legend_above(axes)


# -- layers and sub-layers ------------------------------------------------------------------------------------------------


def _stays(found: Drawn, layer: int, sublayer: str | None = None) -> bool:
    assert found.keep is not None
    if layer not in found.keep.units.get("layers", range(found.num_layers)):
        return False
    return sublayer is None or found.keep.units.get(f"layers.{layer}.{sublayer}", (0,)) != ()


def _points(
    axes: Axes, x: Sequence[float], y: Sequence[float | None], stays: Sequence[bool], marker: str, what: str
) -> None:
    for kept, colour, label in ((True, BLUE, "kept"), (False, ORANGE, "removed")):
        chosen = [(a, b) for a, b, s in zip(x, y, stays, strict=True) if s == kept and b is not None]
        if chosen:
            axes.plot(
                *zip(*chosen, strict=True), marker, color=colour, markersize=7, label=f"{what}{label}", linestyle="none"
            )


def _layer_scores(axes: Axes, found: Drawn) -> None:
    values = [float(v) for v in found.scores["layers"]]
    layers = range(len(values))
    _points(axes, list(layers), values, [_stays(found, i) for i in layers], "o", "")
    finite = [v for v in values if v == v]
    scale = log_if_wide(axes, finite) if finite else ""
    tidy(axes, x=_LAYER, y=_criterion(found) + scale, title="layers: what each was worth")
    whole_numbers(axes.xaxis)
    legend_above(axes)


def _layer_losses(axes: Axes, found: Drawn, name: str) -> None:
    data = found.losses[name]
    if isinstance(data, dict):
        x, y = [int(key.split(".")[1]) for key in data], list(data.values())
        stays, label = [_stays(found, i) for i in x], "layer that is left out"
        _points(axes, x, y, stays, "o", "")
    else:
        x, y, run = list(range(len(data))), data, found.num_layers - len(data) + 1
        stays = [_stays(found, i) or _stays(found, i + run - 1) for i in x]
        label = f"first of the {run} layers that are left out" if run > 1 else "layer that is left out"
        _points(axes, x, y, stays, "o", "run ")
    tidy(axes, x=label, y="loss without it, nats a token", title="layers: the loss without each")
    whole_numbers(axes.xaxis)
    legend_above(axes)


def _first_round(axes: Axes, found: Drawn) -> None:
    """The loss of the whole model without each candidate alone."""
    losses = found.losses["rounds"][0]["losses"]
    for sublayer, marker in ((None, "o"), ("attention", "o"), ("mlp", "s")):
        names = [n for n in losses if (n.split(".")[2:] or [None])[0] == sublayer]
        x = [int(n.split(".")[1]) for n in names]
        stays = [_stays(found, i, sublayer) for i in x]
        _points(axes, x, [losses[n] for n in names], stays, marker, f"{sublayer} " if sublayer else "")
    finite = [v for v in losses.values() if v is not None]
    scale = log_if_wide(axes, finite) if finite else ""
    tidy(axes, x=_LAYER, y=f"loss without it, nats a token{scale}", title="the loss without each one alone")
    whole_numbers(axes.xaxis)
    legend_above(axes)


def _rounds(axes: Axes, found: Drawn) -> None:
    """The loss as one after another goes."""
    rounds = found.losses["rounds"]
    x = range(1, len(rounds) + 1)
    axes.plot(x, [float("nan") if r["loss"] is None else r["loss"] for r in rounds], "o-", color=ORANGE, markersize=5)
    names = [r["removed"].removeprefix("layers.").replace(".", " ") for r in rounds]
    tidy(axes, x="removed, in this order (layer of the source)", y="loss, nats a token", title="the loss as they went")
    axes.set_xticks(list(x), names, rotation=90 if len(names) > 8 or max(map(len, names)) > 3 else 0)
    axes.grid(axis="x", visible=False)


def _layers_left(axes: Axes, found: Drawn) -> None:
    """Nothing was scored and nothing inside layers was cut: which layers stayed."""
    layers = list(range(found.num_layers))
    _points(axes, layers, [1.0] * len(layers), [_stays(found, i) for i in layers], "s", "")
    tidy(axes, x=_LAYER, y="", title="layers")
    axes.set_yticks([])
    whole_numbers(axes.xaxis)
    legend_above(axes)


# -- single weights -------------------------------------------------------------------------------------------------------


def _sparse_panels(folder: Path) -> list[list[Any]]:
    return [[lambda axes: _kept_shares(axes, folder)]]


def kept_shares(folder: Path) -> tuple[list[str], list[list[float]]]:
    """Names of a block's matrices, and for each its share of weights that stay in every layer."""
    anatomy, path = Source.open(str(folder)).anatomy, folder / checkpoint.EXTRA / "mask.safetensors"
    if not path.is_file():
        raise UserError(f"{path}: no such file, though {checkpoint.MANIFEST} speaks of a mask; cut the model again")
    mask = WeightMask.from_packed({name: read(entry) for name, entry in safetensors_entries(path).items()}, anatomy)
    shares: dict[str, list[float]] = {}
    for i in range(anatomy.shape.num_hidden_layers):
        prefix = anatomy.block_name(i)
        for name, kept in mask.kept.items():
            if name.startswith(prefix):
                matrix = name.removeprefix(prefix).removesuffix(".weight")
                shares.setdefault(matrix, [float("nan")] * anatomy.shape.num_hidden_layers)[i] = float(kept.float().mean())
    return list(shares), list(shares.values())


def _kept_shares(axes: Axes, folder: Path) -> None:
    names, shares = kept_shares(folder)
    values = [v for row in shares for v in row if v == v]
    middle, reach = (min(values) + max(values)) / 2, max(0.01, (max(values) - min(values)) / 2)
    image = axes.imshow(shares, aspect="auto", cmap="cividis", vmin=middle - reach, vmax=middle + reach)
    tidy(axes, x="layer", y="", title="share of weights that stay")
    axes.grid(visible=False)
    axes.set_yticks(range(len(names)), names)
    whole_numbers(axes.xaxis)
    axes.figure.colorbar(image, ax=axes, label="share that stays", format="%.2f")
