"""What the records of a study say, as tables: in the terminal, and as Markdown, LaTeX or CSV."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import unknown
from ..tables import big, cell, markdown, scientific
from .claims import verdicts
from .results import COUNTS, Difference, Metric, Results, Run, Score, differences, is_loss


@dataclass(frozen=True)
class Table:
    """Cells as they are shown; `left` columns are text."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1


def tables(found: Results) -> list[Table]:
    """Arms with what they cost and scored, over seeds; what the comparisons came to; what the ledgers prove."""
    out = [_arms(found)]
    if asked := verdicts(found):
        findings = tuple((v.says, v.source, v.verdict, " ".join(v.metric or ()), v.told) for v in asked)
        out.insert(0, Table("Findings", ("finding", "found in", "here", "on", "lead"), findings, 5))
    if compared := differences(found):
        out.append(_compared(compared))
    if found.proofs:
        rows = tuple(
            (p["protocol"], p["runs"][0], p["runs"][1], "kept" if p["holds"] else "NOT kept", p["why"]) for p in found.proofs
        )
        out.append(Table("What the ledgers say", ("protocol", "run", "run", "", "why"), rows, 5))
    return out


def _arms(found: Results) -> Table:
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in found.runs:
        groups.setdefault((run.arm, run.group), []).append(run)
    metrics = found.metrics
    header = ("arm", "", "runs", "parameters", "tokens", "with parents", "FLOPs", "with parents")
    rows = []
    for (arm, group), runs in groups.items():
        released = any(run.unrecorded or run.total_tokens is None for run in runs)
        whole = [run.total_tokens for run in runs if run.total_tokens is not None]
        spent = [run.total_flops for run in runs if run.total_flops is not None]
        more = " and more" if released else ""
        rows.append((
            arm, group, str(len(runs)), _span([r.params for r in runs if r.params is not None], big),
            _span([r.tokens for r in runs], big), (_span(whole, big) + more).strip() or "?",
            _span([r.flops for r in runs], scientific), (_span(spent, scientific) + more).strip() or "?",
            *(_spread([run.scores[metric] for run in runs if metric in run.scores], metric) for metric in metrics),
        ))  # fmt: skip
    left = len(found.missing)
    title = "Arms" + (f", without {left} {'run that is' if left == 1 else 'runs that are'} not done" if left else "")
    return Table(title, (*header, *(f"{on} {what}" for on, what in metrics)), tuple(rows), 2)


def _compared(compared: Sequence[Difference]) -> Table:
    header = ("equal", "arms", "", "on", "first", "second", "difference", "seeds", "")
    rows = []
    for d in compared:
        spread = "" if d.reach is None else f" ± {_figure(d.reach, d.metric)}"
        told = (d.protocol.replace("-", " "), " - ".join(d.arms), d.group, " ".join(d.metric))
        first, second = (_figure(value, d.metric) for value in d.values)
        rows.append((*told, first, second, _figure(d.mean, d.metric, "+") + spread, str(d.seeds), d.verdict))
    return Table("Differences, seed by seed, ± half of their 95 % interval", header, tuple(rows), 4)


def _figure(value: float, metric: Metric, sign: str = "") -> str:
    return f"{value:{sign}.4f}" if is_loss(metric) else f"{100 * value:{sign}.1f}"


def _spread(scores: Sequence[Score], metric: Metric) -> str:
    """A mean with the range over seeds, or with the items' own error."""
    if not scores:
        return ""
    values = [score.value for score in scores]
    mean = _figure(statistics.fmean(values), metric)
    if len(values) > 1:
        return f"{mean} ({_figure(min(values), metric)} to {_figure(max(values), metric)})"
    error = scores[0].error
    return mean if error is None else f"{mean} ± {_figure(error, metric)}"


def _span(values: Sequence[int], show: Callable[[float], str]) -> str:
    if not values:
        return ""
    low, high = show(min(values)), show(max(values))
    return low if low == high else f"{low} to {high}"


# -- as text ----------------------------------------------------------------------------------------------------------------

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$",
}  # fmt: skip


def as_markdown(found: Results) -> str:
    """Tables under headings."""
    out = [f"# {cell(found.name)}", ""]
    for table in tables(found):
        rows = [[cell(one) for one in row] for row in table.rows]
        out += [f"## {table.title}", "", *markdown([*map(cell, table.header)], rows, left=table.left), ""]
    return "\n".join(out)


def as_latex(found: Results) -> str:
    """Tables for booktabs."""
    out = []
    for table in tables(found):
        columns = "l" * table.left + "r" * (len(table.header) - table.left)
        rows = [" & ".join(map(_latex, row)) + r" \\" for row in table.rows]
        head = " & ".join(map(_latex, table.header)) + r" \\"
        out += [
            f"% {table.title}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            head,
            r"\midrule",
            *rows,
            r"\bottomrule",
        ]
        out += [r"\end{tabular}", ""]
    return "\n".join(out)


def _latex(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in text.replace("\n", " "))


def as_csv(found: Results) -> str:
    """A line a run and metric: for pandas, not for the eye."""
    keys = list(dict.fromkeys(key for run in found.runs for key in run.place))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", "arm", *keys, *COUNTS, "on", "metric", "value", "error"])
    for run in found.runs:
        for (on, metric), score in run.scores.items():
            counts = [getattr(run, name) for name in COUNTS]
            writer.writerow(
                [run.name, run.arm, *(run.place.get(key) for key in keys), *counts, on, metric, score.value, score.error]
            )
    return out.getvalue()


FORMATS: Mapping[str, Callable[[Results], str]] = {"markdown": as_markdown, "latex": as_latex, "csv": as_csv}


def written(found: Results, form: str) -> str:
    """The tables in a format; UserError for one that is none."""
    if form not in FORMATS:
        raise unknown("format", form, ["text", *FORMATS])
    return FORMATS[form](found)
