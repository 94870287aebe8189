"""Pictures of training runs: loss and rate against tokens, and loss against FLOPs, from their logs alone.

Of one run that cuts its model there is more: `shrink_plots`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import plots, shrink_plots
from .errors import UserError
from .place import staged_files
from .train.listing import finished, logged
from .train.opening import RECIPE

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

_SMOOTH = 0.9  # what the drawn training loss keeps of the one before


def is_run(folder: Path) -> bool:
    """Whether a folder is a training run."""
    return (folder / RECIPE).is_file()


@dataclass(frozen=True)
class Curve:
    """One run: tokens, training loss, rate and FLOPs of every logged update; tokens, loss and FLOPs of every validation.

    FLOPs are those of the updates, each of the model as it was then; a teacher's come besides, evenly.
    """

    name: str
    updates: list[tuple[int, float, float, int]]
    validation: list[tuple[int, float, int]]
    besides: float  # FLOPs of a token that are not the updates'
    cuts: shrink_plots.Shrinking | None  # what it cut on its way

    @classmethod
    def read(cls, folder: Path) -> Curve:
        """UserError if nothing was logged yet."""
        lines = logged(folder)
        updates = [(line["tokens"], line["loss"], line["lr"], line["flops"]) for line in lines if "loss" in line]
        if not updates:
            raise UserError(f"{folder}: this run has logged nothing yet")
        validation = [(line["tokens"], line["validation"]["loss"], line["flops"]) for line in lines if "validation" in line]
        besides = 0.0  # until the record says it
        if (done := finished(folder)) is not None:
            besides = done.figures.flops.get("teacher", 0) / done.figures.tokens
        return cls(folder.name, updates, validation, besides, shrink_plots.Shrinking.of(lines))

    def cost(self, tokens: int, flops: int) -> float:
        """FLOPs up to there."""
        return flops + self.besides * tokens

    def smoothed(self) -> list[float]:
        """Training loss, each point mixed with those before."""
        out: list[float] = []
        for _, loss, *_ in self.updates:
            out.append(loss if not out else _SMOOTH * out[-1] + (1 - _SMOOTH) * loss)
        return out


def run(folders: Sequence[Path], out: Path | None, *, overwrite: bool) -> dict[str, Any]:
    """Draw the runs into one picture; default: plot.png in the first. UserError if the place is taken or no place."""
    plots.check_library()
    odd = next((folder for folder in folders if not is_run(folder)), None)
    if odd is not None:
        raise UserError(
            f"{odd}: not a checkpoint that prunus wrote, or no training run; several folders are drawn together only if all "
            "are runs"
        )
    curves = [Curve.read(folder) for folder in folders]
    path = folders[0] / "plot.png" if out is None else out.expanduser()
    plots.check_place(path, overwrite=overwrite)
    with staged_files(path) as (stage,):
        draw(curves, stage)
    alone = len(curves) > 1 and any(curve.cuts for curve in curves)
    return {"picture": str(path), "runs": [curve.name for curve in curves], "notes": [_ALONE] if alone else []}


_ALONE = "cuts are drawn of one run at a time"
_HEIGHT = 4.2  # inches of the curves


def draw(curves: Sequence[Curve], path: Path) -> None:
    """The curves of all; below them the cuts of one."""
    cuts = curves[0].cuts if len(curves) == 1 else None
    if cuts is None:
        figure = plots.figure(12.0, _HEIGHT)
        _curves(figure, curves)
    else:
        below = sum(shrink_plots.HEIGHTS)
        figure = plots.figure(12.0, _HEIGHT + below)
        top, bottom = figure.subfigures(2, 1, height_ratios=(_HEIGHT, below), squeeze=False)[:, 0]
        _curves(top, curves)
        tokens = [t for t, *_ in curves[0].updates]
        losses = {"as logged": [loss for _, loss, *_ in curves[0].updates], "smoothed": curves[0].smoothed()}
        shrink_plots.draw(bottom, cuts, {label: (tokens, values) for label, values in losses.items()})
    plots.save(figure, path)


def _curves(figure: Figure | SubFigure, curves: Sequence[Curve]) -> None:
    """Three panels: loss against tokens (dots: validation), loss against FLOPs, and the rate."""
    loss, cost, rate = (figure.add_subplot(1, 3, i) for i in (1, 2, 3))
    for i, curve in enumerate(curves):
        colour = plots.COLOURS[i % len(plots.COLOURS)]
        tokens, smooth = [t for t, *_ in curve.updates], curve.smoothed()
        loss.plot(tokens, smooth, color=colour, linewidth=1.4, label=curve.name)
        cost.plot([curve.cost(t, f) for t, _, _, f in curve.updates], smooth, color=colour, linewidth=1.4)
        rate.plot(tokens, [lr for _, _, lr, _ in curve.updates], color=colour, linewidth=1.4)
        if curve.validation:
            at, values, _ = zip(*curve.validation, strict=True)
            loss.plot(at, values, "o", color=colour, markersize=4)
            cost.plot([curve.cost(t, f) for t, _, f in curve.validation], values, "o", color=colour, markersize=4)
    plots.tidy(loss, x="tokens", y="loss, nats a token", title="training loss (smoothed); dots: validation")
    plots.tidy(cost, x="FLOPs", y="loss, nats a token", title="the same against what it cost")
    plots.tidy(rate, x="tokens", y="learning rate", title="rate")
    if len(curves) > 1:
        plots.legend_above(loss)
