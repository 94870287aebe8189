"""Cells and tables of text: numbers and requests as pages and the command line say them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from typing import Any

_UNITS = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))


def big(value: float, unit: str = "") -> str:
    """Four significant digits with a prefix: ``134.5 M``, ``19.2 GFLOP``."""
    for prefix, size in _UNITS:
        if abs(value) >= size:
            return f"{value / size:.4g} {prefix}{unit}"
    return f"{value:.4g} {unit}".rstrip()


def scientific(value: float) -> str:
    """Three significant digits of what is too large for a prefix: ``4.2e22``."""
    return re.sub(r"e\+0?", "e", f"{value:.3g}")


def number(value: float) -> str:
    """Four significant digits, no exponent below a million."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def flags(request: Mapping[str, Any]) -> str:
    """A request as the command line says it, without its method."""
    words: list[str] = []
    for name, value in request.items():
        option = "--option" if name == "options" else "--" + name.replace("_", "-")
        if name == "method":
            continue
        if isinstance(value, Mapping):
            words += [f"{option} {k}={v}" for k, v in value.items()]
        else:
            said = ",".join(map(str, value)) if isinstance(value, list) else value
            words.append(option if value is True else f"{option} {said}")
    return " ".join(words)


def told_apart(labels: Sequence[str]) -> list[str]:
    """Labels made different, in order: of two folders called `model` the second is `model (2)`."""
    out: list[str] = []
    for label in labels:
        tried = (label if i == 1 else f"{label} ({i})" for i in count(1))
        out.append(next(name for name in tried if name not in out))
    return out


def cell(text: str) -> str:
    """Text that stays in its cell of a Markdown table, or on its line, and begins no tag, link or picture."""
    text = " ".join(text.replace("\\", "\\\\").splitlines())
    return text.replace("|", "\\|").replace("<", "&lt;").replace("](", "]\\(")


def fenced(text: str, kind: str = "text") -> list[str]:
    """Lines of a code block that nothing in the text can close."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}{kind}", text, fence]


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> list[str]:
    """A table: the first `left` columns left, the others right."""
    align = ["---"] * left + ["---:"] * (len(header) - left)
    return ["| " + " | ".join(cells) + " |" for cells in (header, align, *rows)]


def win_rate(said: Mapping[str, Any]) -> str:
    """A judge's verdict of all prompts in a sentence."""
    low, high = said["interval"]
    swayed = f" ({said['swayed']} by their order)" if said["swayed"] else ""
    return (
        f"wins {100 * said['win_rate']:.1f} % (95 %: {100 * low:.1f} to {100 * high:.1f}) of {said['prompts']} prompts, "
        f"{said['wins']} won, {said['losses']} lost, {said['ties']} tied{swayed}, sign test p {said['p']:.2g}, by {said['judge']}"
    )
