"""Pictures of a model that is cut while it trains: its loss with every cut, what cuts were chosen by, what went, what is left.

L layers of the source, S stretches between cuts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from . import plots
from .axes import kind_of, layer_of
from .plots import BLUE, GREEN, GREY, INK, ORANGE, PALE, PURPLE, tidy
from .tables import big

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

COLOURS = {"kv_heads": BLUE, "heads": BLUE, "intermediate": ORANGE, "hidden": GREEN, "layers": PURPLE}
WORDS = {
    "kv_heads": "KV groups",
    "heads": "query heads",
    "intermediate": "FFN channels",
    "hidden": "stem channels",
    "layers": "layers",
}
_SIZES = {  # axes that every layer has its own of
    "kv_heads": "num_key_value_heads",
    "heads": "num_attention_heads",
    "intermediate": "intermediate_size",
}
_FEW = 40  # cuts whose lines do not hide the curve
HEIGHTS = (2.9, 3.1, 3.1, 1.9)  # inches of the rows


@dataclass(frozen=True)
class Sizes:
    """Of a model at one time, by layers of the source; a layer that went has nothing."""

    hidden: int
    alive: tuple[bool, ...]  # [L]
    inner: Mapping[str, tuple[int, ...]]  # kind -> [L]

    @classmethod
    def of(cls, shape: Mapping[str, Any], alive: Sequence[bool], heads: str = "kv_heads") -> Sizes:
        """From a shape as the log tells it, which lists the layers that are alive. `heads`: the axis that tells of attention."""
        inner = {}
        for kind in (heads, "intermediate"):
            name = _SIZES[kind]
            left = iter(shape[name] if isinstance(shape[name], list) else [shape[name]] * sum(alive))
            inner[kind] = tuple(next(left) if stays else 0 for stays in alive)
        return cls(shape["hidden_size"], tuple(alive), inner)

    def before(self, gone: Mapping[str, Sequence[int]]) -> Sizes:
        """What it was before these units went: of a layer that went whole, as large as the largest."""
        back = set(gone.get("layers", ()))
        inner = {}
        for kind, sizes in self.inner.items():
            lost = {layer_of(name): len(units) for name, units in gone.items() if kind_of(name) == kind}
            grown = [size + lost.get(i, 0) for i, size in enumerate(sizes)]
            inner[kind] = tuple(max(grown) if i in back else size for i, size in enumerate(grown))
        alive = tuple(stays or i in back for i, stays in enumerate(self.alive))
        return replace(self, hidden=self.hidden + len(gone.get("hidden", ())), alive=alive, inner=inner)

    def count(self, kind: str) -> int:
        """Units of an axis, of all layers together."""
        whole = {"hidden": self.hidden, "layers": sum(self.alive)}
        return whole[kind] if kind in whole else sum(self.inner[kind])


@dataclass(frozen=True)
class Event:
    """One cut."""

    tokens: int
    groups: Mapping[str, int]  # kind -> how many went
    saliency: Mapping[str, float]  # kind -> what its next group was worth when the cut was chosen
    params: int
    loss: tuple[float | None, float | None]  # before, after
    sizes: Sizes  # afterwards


@dataclass(frozen=True)
class Shrinking:
    """What a run's log tells of its cuts, up to so many tokens."""

    source: Sizes
    events: tuple[Event, ...]
    tokens: int
    params: int | None  # before the first cut, if an update was logged by then

    @classmethod
    def of(cls, lines: Iterable[Mapping[str, Any]]) -> Shrinking | None:
        """None for a run that has cut nothing."""
        lines = list(lines)
        told = [line for line in lines if "pruned" in line]
        if not told:
            return None
        gone = {layer for line in told for layer in line["pruned"]["units"].get("layers", ())}
        one_by_one = any("heads" in {**line["pruned"]["groups"], **line["pruned"]["saliency"]} for line in told)
        heads = "heads" if one_by_one else "kv_heads"
        alive = [True] * (told[-1]["pruned"]["shape"]["num_hidden_layers"] + len(gone))
        events = []
        for line in told:
            cut = line["pruned"]
            for layer in cut["units"].get("layers", ()):
                alive[layer] = False
            loss = (line["loss_before"], line["loss_after"])
            sizes = Sizes.of(cut["shape"], alive, heads)
            events.append(Event(cut["tokens"], cut["groups"], cut["saliency"], cut["params"], loss, sizes))
        source = events[0].sizes.before(told[0]["pruned"]["units"])
        first = events[0].tokens
        params = next((line["params"] for line in lines if "params" in line and line["tokens"] < first), None)
        return cls(source, tuple(events), max(line["tokens"] for line in lines), params)

    @property
    def kinds(self) -> list[str]:
        """Axes that were cut, in one order for all panels."""
        return [kind for kind in COLOURS if any(kind in event.groups for event in self.events)]

    @property
    def candidates(self) -> list[str]:
        """Axes that were cut or could have been."""
        return [kind for kind in COLOURS if any(kind in event.groups or kind in event.saliency for event in self.events)]

    @property
    def stages(self) -> list[Sizes]:
        """[S] what there was between cuts."""
        return [self.source, *(event.sizes for event in self.events)]

    @property
    def edges(self) -> list[int]:
        """[S + 1] tokens at which stretches begin, and the end."""
        return [0, *(event.tokens for event in self.events), max(self.tokens, self.events[-1].tokens)]

    def gone(self, kind: str) -> list[float]:
        """[S] the share of an axis that went."""
        whole = self.source.count(kind)
        return [1 - sizes.count(kind) / whole for sizes in self.stages]

    def left(self, kind: str) -> np.ndarray:
        """[L, S] units in every layer, nan where the layer went."""
        rows = [np.where(sizes.alive, sizes.inner[kind], np.nan) for sizes in self.stages]
        return np.array(rows, dtype=float).T


def draw(figure: SubFigure, found: Shrinking, loss: Mapping[str, tuple[Sequence[int], Sequence[float]]]) -> None:
    """Rows: the loss with cuts; what was chosen by, and what went; heat maps of layers; stem and parameters.

    `loss`: label -> tokens and values.
    """
    grid = figure.add_gridspec(4, 2, height_ratios=HEIGHTS)
    _losses(figure.add_subplot(grid[0, :]), found, loss)
    saliency = any(event.saliency for event in found.events)
    if saliency:
        _saliency(figure.add_subplot(grid[1, 0]), found)
    _shares(figure.add_subplot(grid[1, 1] if saliency else grid[1, :]), found)
    for column, kind in enumerate(found.source.inner):
        _map(figure.add_subplot(grid[2, column]), found, kind)
    _stem(figure.add_subplot(grid[3, 0]), found)
    _params(figure.add_subplot(grid[3, 1]), found)
    for axes in figure.axes:
        if axes.get_xlabel() == "tokens":
            _tokens(axes, found)


def _tokens(axes: Axes, found: Shrinking) -> None:
    """All panels tell the same stretch of tokens."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlim(0, found.edges[-1])
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: big(round(v)) if v else "0"))


def _losses(axes: Axes, found: Shrinking, loss: Mapping[str, tuple[Sequence[int], Sequence[float]]]) -> None:
    """The loss over the run; every cut is a tick below, a row a kind, and a line where they are few."""
    for (label, (tokens, values)), colour, width in zip(loss.items(), (PALE, INK), (1.0, 1.6), strict=False):
        axes.plot(tokens, values, color=colour, linewidth=width, label=label)
    tidy(axes, x="tokens", y="loss, nats a token", title=f"loss, and its {len(found.events)} cuts")
    if len(found.events) <= _FEW:
        for event in found.events:
            axes.axvline(event.tokens, color=GREY, linewidth=0.8, linestyle=":", zorder=0)
    # ticks have an axis of their own below the curve, so that none lies on it
    kinds = found.kinds
    strip = axes.inset_axes((0.0, -0.13 * len(kinds) - 0.02, 1.0, 0.13 * len(kinds)))
    at = [[event.tokens for event in found.events if kind in event.groups] for kind in kinds]
    colours = [COLOURS[kind] for kind in kinds]
    strip.eventplot(at, colors=colours, lineoffsets=[-i for i in range(len(kinds))], linelengths=0.7, linewidths=1.2)
    strip.set_yticks([-i for i in range(len(kinds))], [WORDS[kind] for kind in kinds])
    strip.set_ylim(-len(kinds) + 0.5, 0.5)
    tidy(strip, x="tokens", y="")
    strip.tick_params(axis="y", length=0)
    strip.grid(visible=False)
    strip.spines["left"].set_visible(False)
    _tokens(strip, found)
    axes.set_xlabel("")
    axes.set_xlim(0, found.edges[-1])
    axes.tick_params(axis="x", labelbottom=False, length=0)
    plots.legend_above(axes)


def _saliency(axes: Axes, found: Shrinking) -> None:
    """What the next group of every kind was worth, over its price, at every cut: the lowest went."""
    values: list[float] = []
    for kind in found.candidates:
        told = [(event.tokens, event.saliency[kind]) for event in found.events if kind in event.saliency]
        if told:
            x, y = zip(*told, strict=True)
            axes.plot(x, y, ".-", color=COLOURS[kind], linewidth=1.0, markersize=4, label=WORDS[kind])
            values += y
    scale = plots.log_if_wide(axes, values)
    tidy(axes, x="tokens", y=f"saliency over price{scale}", title="what the next group of each kind was worth")
    plots.legend_above(axes)


def _shares(axes: Axes, found: Shrinking) -> None:
    for kind in found.candidates:
        gone = found.gone(kind)
        axes.step(found.edges, [*gone, gone[-1]], where="post", color=COLOURS[kind], linewidth=1.6, label=WORDS[kind])
    from matplotlib.ticker import PercentFormatter

    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    tidy(axes, x="tokens", y="share that went", title="how much of each axis was cut")
    plots.legend_above(axes)


def _map(axes: Axes, found: Shrinking, kind: str) -> None:
    """Layers against tokens: how wide each is, pale where it went."""
    left = found.left(kind)
    axes.set_facecolor(PALE)
    drawn = axes.pcolormesh(
        found.edges, np.arange(len(left) + 1) - 0.5, left, cmap="viridis", vmin=0, vmax=np.nanmax(left), shading="flat",
        rasterized=True,
    )  # fmt: skip
    tidy(axes, x="tokens", y="layer of the source", title=f"{WORDS[kind]} of every layer")
    axes.grid(visible=False)
    axes.invert_yaxis()
    plots.whole_numbers(axes.yaxis)
    bar = axes.figure.colorbar(drawn, ax=axes, pad=0.02)
    plots.whole_numbers(bar.ax.yaxis)
    bar.outline.set_visible(False)


def _stem(axes: Axes, found: Shrinking) -> None:
    """A band as wide as the stem."""
    half = [sizes.hidden / 2 for sizes in found.stages]
    half.append(half[-1])
    axes.fill_between(found.edges, [-h for h in half], half, step="post", color=COLOURS["hidden"], alpha=0.75, linewidth=0)
    first, last = found.source.hidden, found.stages[-1].hidden
    axes.set_ylim(-0.6 * first, 0.6 * first)
    axes.set_yticks([])
    title = f"stem: {first:,} channels" + (f", {last:,} at the end" if last != first else " throughout")
    tidy(axes, x="tokens", y="", title=title)
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False)


def _params(axes: Axes, found: Shrinking) -> None:
    params = [event.params for event in found.events]
    if found.params is not None:
        params.insert(0, found.params)
    axes.step(found.edges[-len(params) - 1 :], [*params, params[-1]], where="post", color=INK, linewidth=1.6)
    from matplotlib.ticker import FuncFormatter

    axes.set_ylim(0, 1.1 * max(params))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: big(round(v)) if v else "0"))
    tidy(axes, x="tokens", y="parameters", title=f"parameters alive: {big(params[-1])} at the end")
    axes.spines["left"].set_color(GREY)
