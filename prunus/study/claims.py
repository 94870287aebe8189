"""Findings that a study is asked about, each with its verdict there: holds, does not, within noise. Reads records alone.

A lead is what the first of two arms is ahead of the second on a metric, so that more is better whatever is measured. It is taken
seed by seed; noise is half of its mean's 95 % interval. Of one seed nothing is known of that, which the verdict says.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .results import LOSS, Metric, Results, Run, agree, half_interval, is_loss, is_seed, standard_error

_LEVEL = 0.05  # of ranks that agree by chance
Place = tuple[tuple[str, str], ...]  # values as text: some are lists or tables


@dataclass(frozen=True)
class Lead:
    """Of one arm over another at a place of the grid, in nats a token or as a share of items."""

    mean: float
    error: float | None  # standard error over seeds
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Lead:
        """Of leads seed by seed."""
        return cls(statistics.fmean(values), standard_error(values), len(values))

    @property
    def reach(self) -> float | None:
        """Half of its interval; None of one seed."""
        return None if self.error is None else half_interval(self.error, self.seeds)

    @property
    def verdict(self) -> str:
        """Whether there is one."""
        if self.reach is not None and abs(self.mean) <= self.reach:
            return NOISE
        return HOLDS if self.mean > 0 else FAILS


HOLDS, FAILS, NOISE, OPEN = "holds", "does not hold", "within noise", "not run yet"


@dataclass(frozen=True)
class Verdict:
    """What became of one finding. `leads` are the figures that it goes by, under their places."""

    says: str
    source: str
    verdict: str
    metric: Metric | None
    leads: tuple[tuple[str, Lead], ...] = ()
    more: str = ""

    @property
    def told(self) -> str:
        """The figures in words."""
        scale, digits = (1.0, 4) if self.metric is None or is_loss(self.metric) else (100.0, 1)
        parts = []
        for name, lead in self.leads:
            spread = "" if lead.reach is None else f" ± {scale * lead.reach:.{digits}f}"
            parts.append(f"{name} {scale * lead.mean:+.{digits}f}{spread}".strip())
        seeds = sorted({lead.seeds for _, lead in self.leads})
        counted = [f"{' or '.join(map(str, seeds))} seed{'s' if seeds != [1] else ''}"] if seeds else []
        return "; ".join([", ".join(parts), *counted] if parts else [self.more] if self.more else [])


def verdicts(found: Results) -> list[Verdict]:
    """Every finding of the study's file, as far as its runs are done."""
    return [_so_far(found, claim, _KINDS[_kind(claim)](found, claim)) for claim in found.written.get("claims", [])]


def _so_far(found: Results, claim: Mapping[str, Any], verdict: Verdict) -> Verdict:
    """Says so where runs of its arms are missing that could change it."""
    kind = _kind(claim)
    arms = claim[kind]["arms"] if kind == "shrinks" else claim[kind]
    open_ = any(name == arm or name.startswith(f"{arm}_") for name in found.missing for arm in arms)
    return replace(verdict, verdict=f"{verdict.verdict}, so far") if open_ and verdict.verdict != OPEN else verdict


def _kind(claim: Mapping[str, Any]) -> str:
    return next(kind for kind in _KINDS if claim.get(kind))


# -- runs that belong to a claim --------------------------------------------------------------------------------------------


def _runs(found: Results, arm: str, where: Mapping[str, Sequence[Any]]) -> list[Run]:
    """The runs of an arm at the places that are asked for; a key that an arm does not have asks nothing of it."""
    return [run for run in found.of(arm) if all(run.place[k] in values for k, values in where.items() if k in run.place)]


def _metric(found: Results, claim: Mapping[str, Any], runs: Iterable[Run]) -> Metric | None:
    """The one that is asked for, else the first that all of them have; None if none."""
    runs = list(runs)
    for metric in found.metrics:
        if (not claim.get("on") or claim["on"] == " ".join(metric)) and all(metric in run.scores for run in runs):
            return metric
    return None


def _pairs(found: Results, claim: Mapping[str, Any], arms: Sequence[str]) -> list[tuple[Run, Run]]:
    where = claim.get("where") or {}
    return [(one, two) for one in _runs(found, arms[0], where) for two in _runs(found, arms[1], where) if agree(one, two)]


def _ahead(one: Run, two: Run, metric: Metric) -> float:
    apart = one.scores[metric].value - two.scores[metric].value
    return -apart if is_loss(metric) else apart


def _name(place: Place) -> str:
    return ", ".join(value for _, value in place)


def _place(one: Run, two: Run, without: str = "") -> Place:
    """Where a pair stands in the grid, whatever the seed."""
    both = {**two.place, **one.place}
    return tuple((key, str(value)) for key, value in both.items() if not is_seed(key) and key != without)


def _values(found: Results, arm: str, key: str, runs: Iterable[Run]) -> list[Any]:
    """Those of a grid's key that runs have, in the grid's order."""
    own = found.written.get("arms", {}).get(arm, {}).get("grid")
    grid = found.written.get("grid", {}) if own is None else own
    there = [run.place[key] for run in runs]
    return [value for value in grid.get(key, []) if value in there]


def _seed(one: Run, two: Run) -> str:
    both = {**two.place, **one.place}
    return str([value for key, value in both.items() if is_seed(key)])


# -- kinds of claims --------------------------------------------------------------------------------------------------------


def _better(found: Results, claim: Mapping[str, Any]) -> Verdict:
    """At every place that both arms have, the first is better."""
    pairs = _pairs(found, claim, claim["better"])
    metric = _metric(found, claim, (run for pair in pairs for run in pair))
    places: dict[Place, list[float]] = {}
    for one, two in pairs if metric else ():
        places.setdefault(_place(one, two), []).append(_ahead(one, two, metric or LOSS))
    leads = [(_name(place), Lead.of(values)) for place, values in places.items()]
    return _judged(claim, metric, leads)


def _shrinks(found: Results, claim: Mapping[str, Any]) -> Verdict:
    """The lead of the first arm is less at the last value of a key than at its first; everything else being the same."""
    part = claim["shrinks"]
    along = part["along"]
    pairs = [pair for pair in _pairs(found, claim, part["arms"]) if along in pair[0].place]
    metric = _metric(found, claim, (run for pair in pairs for run in pair))
    values = part.get("values") or _values(found, part["arms"][0], along, (one for one, _ in pairs))
    by: dict[Place, dict[int, dict[str, float]]] = {}  # by where the key's value stands, then by seed
    for one, two in pairs if metric else ():
        if one.place[along] in values:
            seeds = by.setdefault(_place(one, two, along), {}).setdefault(values.index(one.place[along]), {})
            seeds[_seed(one, two)] = _ahead(one, two, metric or LOSS)
    falls, leads = [], []
    for place, at in by.items():
        before = f"{_name(place)} " if place else ""
        leads += [(f"{before}{value}", Lead.of([*at[i].values()])) for i, value in enumerate(values) if i in at]
        if len(at) > 1 and 0 in at and len(values) - 1 in at:
            first, last = at[0], at[len(values) - 1]
            both = [first[seed] - last[seed] for seed in first if seed in last]
            falls += [Lead.of(both)] if both else []
    return _judged(claim, metric, leads, falls)


def _ranks(found: Results, claim: Mapping[str, Any]) -> Verdict:
    """Places rank alike in both arms, by Kendall's tau with its exact probability if ranks were drawn at random."""
    pairs = _pairs(found, claim, claim["ranks"])
    metric = _metric(found, claim, (run for pair in pairs for run in pair))
    means: dict[Place, tuple[list[float], list[float]]] = {}
    for one, two in pairs if metric else ():
        both = means.setdefault(_place(one, two), ([], []))
        both[0].append(one.scores[metric or LOSS].value)
        both[1].append(two.scores[metric or LOSS].value)
    if len(means) < 3:
        return Verdict(claim["says"], claim.get("source", ""), OPEN, metric)
    values = [(statistics.fmean(a), statistics.fmean(b)) for a, b in means.values()]
    tau, chance = kendall(values)
    verdict = NOISE if chance > _LEVEL else HOLDS if tau > 0 else FAILS
    more = f"Kendall's tau {tau:+.2f} over {len(values)} places, p = {chance:.2g}"
    return Verdict(claim["says"], claim.get("source", ""), verdict, metric, more=more)


_KINDS = {"better": _better, "shrinks": _shrinks, "ranks": _ranks}


def _judged(
    claim: Mapping[str, Any], metric: Metric | None, leads: Sequence[tuple[str, Lead]], judged: Sequence[Lead] = ()
) -> Verdict:
    """One word for all places where they agree, else how many there are of each."""
    those = list(judged) or ([] if claim.get("shrinks") else [lead for _, lead in leads])
    said = [lead.verdict for lead in those]
    if not said:
        return Verdict(claim["says"], claim.get("source", ""), OPEN, metric, tuple(leads))
    verdict = said[0]
    if len(set(said)) > 1:
        verdict = ", ".join(f"{text} in {said.count(text)}" for text in (HOLDS, FAILS, NOISE) if text in said)
        verdict += f" of {len(said)}"
    if all(lead.error is None for lead in those):
        verdict += " (one seed)"
    return Verdict(claim["says"], claim.get("source", ""), verdict, metric, tuple(leads))


def kendall(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Kendall's tau of two rankings, ties counting as neither, and how likely one as far from 0 is by chance (both sides).

    The chance is exact: of all orders of n things, those with so many pairs out of order are counted by Mahonian numbers.
    """
    n = len(pairs)
    signs = [
        math.copysign(1, (a - c) * (b - d)) if (a - c) * (b - d) else 0.0
        for i, (a, b) in enumerate(pairs)
        for c, d in pairs[i + 1 :]
    ]
    counts = [1]  # orders of k things by pairs out of order
    for k in range(2, n + 1):
        counts = [sum(counts[max(0, j - k + 1) : j + 1]) for j in range(k * (k - 1) // 2 + 1)]
    most, total = len(counts) - 1, sum(counts)
    far = abs(sum(signs))
    chance = sum(count for j, count in enumerate(counts) if abs(most - 2 * j) >= far - 1e-9) / total
    return sum(signs) / len(signs) if signs else 0.0, chance
