"""Pictures, drawn by matplotlib (the extra `plot`) without its global state, in colours that colour-blind readers tell apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import record
from .errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
# Okabe and Ito's palette without its yellow, which is lost on white
BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
INK, GREY, PALE = "#222222", "#8a8a8a", "#d9d9d9"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY)
_MARKERS = "os^DvP<X>"
_DOTS_PER_INCH = 150
_LOG_FROM = 3.0  # an axis whose largest value is this many times its smallest is drawn logarithmically


def check_library() -> None:
    """UserError, before any work, if the extra is not there."""
    if find_spec("matplotlib") is None:
        raise UserError("plot: pictures need matplotlib; pip install 'prunus[plot]'")


def check_place(path: Path, *, overwrite: bool) -> None:
    """UserError if a picture cannot go there."""
    if path.suffix not in FORMATS:
        raise UserError(f"{path}: a picture ends in {', '.join(FORMATS)}")
    if path.exists() and (path.is_dir() or not overwrite):
        raise UserError(f"{path}: already exists; give another --out, or --overwrite to replace it")
    record.check_place(path, "out")


def figure(width: float, height: float) -> Figure:
    """An empty figure, in inches; its layout makes room for labels."""
    check_library()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(drawn: Figure, path: Path) -> None:
    """Write a figure; the suffix says how. The same figure gives the same bytes."""
    from matplotlib import rc_context

    _as_written_(drawn)
    stamp: dict[str, Any] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix, {})
    with rc_context({"svg.hashsalt": "prunus"}):
        drawn.savefig(path, dpi=_DOTS_PER_INCH, metadata=stamp, facecolor="white")


def _as_written_(drawn: Figure) -> None:
    """Changes a figure: names with dollars in them are no formulas. Ticks are; their texts are matplotlib's own."""
    from matplotlib.text import Text

    every = [axis for axes in drawn.axes for axis in (axes.xaxis, axes.yaxis)]
    of_axes = {text for axis in every for text in axis.findobj(Text)} - {axis.label for axis in every}
    for text in drawn.findobj(Text):
        if text not in of_axes:
            text.set_parse_math(False)


def tidy(axes: Axes, *, x: str, y: str, title: str = "") -> None:
    """The house style of one panel: labels, a light grid behind, no box."""
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    if title:
        axes.set_title(title, loc="left", fontsize="medium", color=INK)
    axes.grid(color="#ececec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=INK, labelsize="small")


def legend_above(axes: Axes) -> None:
    """A legend between the panel and its title, where it hides nothing."""
    axes.set_title(axes.get_title("left"), loc="left", fontsize="medium", color=INK, pad=20)
    style: dict[str, Any] = {"frameon": False, "fontsize": "small", "columnspacing": 1.2, "handletextpad": 0.4}
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=4, borderaxespad=0.0, borderpad=0.2, **style)


def whole_numbers(axis: Axis) -> None:
    """Ticks at whole numbers only."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axis.set_major_locator(MaxNLocator(integer=True))
    axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def log_if_wide(axes: Axes, values: Sequence[float]) -> str:
    """Make the y axis logarithmic if the values span much; returns what the label must say."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if min(values) <= 0 or max(values) < _LOG_FROM * min(values):
        return ""
    axes.set_yscale("log")
    if max(values) < 1e3 * min(values):
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}" if 1 <= v < 1e9 else f"{v:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    return " (log scale)"


# -- methods compared -----------------------------------------------------------------------------------------------------


def comparison(result: Mapping[str, Any], path: Path) -> None:
    """Perplexity against parameters, FLOPs and, where they were measured, milliseconds; a line a method, a point a ratio."""
    rows = [row for row in result["rows"] if row["perplexity"] is not None]
    lost = [f"{row['method']} {row['flags']}".rstrip() for row in result["rows"] if row["perplexity"] is None]
    sizes: list[tuple[str, list[float | None]]] = [
        ("parameters, millions", [row["params"] / 1e6 for row in rows]),
        (
            f"forward FLOPs of {result['about']['evaluation']['seq_len']:,} tokens, GFLOP",
            [row["flops"] / 1e9 for row in rows],
        ),
        (f"prefill{_tokens(result)}, ms", [_mean(row["prefill_ms"]) for row in rows]),
        ("decode, ms a token", [_mean(row["decode_ms"]) for row in rows]),
    ]
    panels = sizes[:2] + [(label, values) for label, values in sizes[2:] if any(v is not None for v in values)]
    drawn = figure(10.0, 4.6 * -(-len(panels) // 2))
    grid = drawn.subplots(-(-len(panels) // 2), 2, sharey=True, squeeze=False).flat
    for i, (axes, (label, values)) in enumerate(zip(grid, panels, strict=True)):
        _compared(axes, rows, values, label)
        if i % 2:
            axes.set_ylabel("")
    handles, labels = next(iter(drawn.axes)).get_legend_handles_labels()
    if labels:
        drawn.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False, fontsize="small")
    title = (
        f"{result['about']['source']} cut in one shot, not trained: perplexity on {result['about']['evaluation']['source']}"
    )
    if lost:
        title += f"\nnot drawn, perplexity not finite: {', '.join(lost)}"
    drawn.suptitle(title, x=0.01, ha="left", fontsize="large", color=INK)
    save(drawn, path)


def _tokens(result: Mapping[str, Any]) -> str:
    prompts = {row["prompt_tokens"] for row in result["rows"]} - {None}
    return f" of {prompts.pop()} tokens" if len(prompts) == 1 else ""


def _mean(spread: Mapping[str, float] | None) -> float | None:
    return None if spread is None else spread["mean"]


def _compared(axes: Axes, rows: Sequence[Mapping[str, Any]], values: Sequence[float | None], label: str) -> None:
    everything = [row["perplexity"]["mean"] for row in rows]
    scale = log_if_wide(axes, everything) if everything else ""
    tidy(axes, x=label, y=f"perplexity{scale}")
    several = len({row["calibration"] for row in rows} - {""}) > 1
    series: dict[str, list[tuple[float, Mapping[str, Any]]]] = {}
    for row, value in zip(rows, values, strict=True):
        found = series.setdefault(_series(row, several), [])
        if value is not None:
            found.append((value, row))
    for points in (points for name, points in series.items() if name == "dense"):
        for value, row in points:
            axes.axhline(row["perplexity"]["mean"], color=PALE, linewidth=1, zorder=0)
            axes.plot(value, row["perplexity"]["mean"], "*", color=INK, markersize=13, label="dense", linestyle="none")
    for i, (name, points) in enumerate((n, p) for n, p in series.items() if n != "dense"):
        colour, marker = COLOURS[i % len(COLOURS)], _MARKERS[i % len(_MARKERS)]
        zeros = any(row["sparsity"] is not None for _, row in points)
        x, y = [value for value, _ in points], [row["perplexity"]["mean"] for _, row in points]
        reach = [[m - row["perplexity"]["min"] for m, (_, row) in zip(y, points, strict=True)]]
        reach.append([row["perplexity"]["max"] - m for m, (_, row) in zip(y, points, strict=True)])
        axes.errorbar(
            x,
            y,
            yerr=reach if any(map(any, reach)) else None,
            color=colour,
            marker=marker,
            markersize=7,
            markerfacecolor="white" if zeros else colour,
            linewidth=1.2,
            linestyle=":" if zeros else "-",
            capsize=3,
            label=name + (" (zeros)" if zeros else ""),
        )


def _series(row: Mapping[str, Any], several: bool) -> str:
    """A method with its options, and of `several` calibration texts its own: what one line joins."""
    words = row["flags"].replace(f"--ratio {row['ratio']}", "").split()
    return " ".join([row["method"], *words]) + (f", {row['calibration']}" if several and row["calibration"] else "")
