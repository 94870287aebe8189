"""Scratch, prune, or enlarge and prune? Answered from published rows and from the user's own studies, each named; or not at all.

A row says how much lower the loss of a pruned and retrained model is than that of fresh weights, in nats a token. Rows count
that are near in size, in tokens a parameter and in how much of the parent is left. Without any, nothing is recommended.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from .. import measure
from ..combination import SEPARATOR
from ..errors import UserError, unknown
from ..methods import METHODS
from ..tables import big
from ..train.estimate import EFFICIENCY, check_rate
from .results import LOSS, Difference, Results, Run, agree, differences, load

PUBLISHED, SOURCES = "published.csv", "published.yaml"
EQUAL = 0.02  # nats: no more is called nothing; published losses have two decimals, so that their differences are off by up to 0.01
NEAR = {"params": 4.0, "tokens": 4.0, "kept": 1.6}  # factors within which a row speaks of another setting
GRANULARITY = {
    "minitron-depth": "depth", "minitron-width": "width", "flap": "width", "sheared-llama": "depth and width",
    "wanda": "sparse", "sparsegpt": "sparse",
}  # fmt: skip
Protocol = Literal["training", "total"]
PROTOCOLS: dict[str, Protocol] = {"training-tokens": "training", "total-tokens": "total"}


@dataclass(frozen=True)
class Row:
    """Pruned against fresh weights in one setting. `advantage` in nats, above 0 where pruning is better."""

    id: str
    protocol: Protocol  # equal training tokens: the parent is there; equal total tokens: its tokens count
    method: str
    params: float  # of the small model
    kept: float  # share of the parent's parameters
    tokens: float  # trained on by the small model; in `total` all tokens
    advantage: float
    best_shape: float | None = None  # in `total`: against the best shape of that size instead of its own

    @property
    def granularity(self) -> str:
        """What the method cuts."""
        return granularity_of(self.method)


def granularity_of(method: str) -> str:
    """Depth, width, both, or single weights; of several methods in a row what they cut together, sparse if any is."""
    parts = {_granularity(re.sub(r"-\d+:\d+$", "", name)) for name in method.split(SEPARATOR)}
    return "sparse" if "sparse" in parts else parts.pop() if len(parts) == 1 else "depth and width"


def _granularity(name: str) -> str:
    if name in GRANULARITY:
        return GRANULARITY[name]
    axes = METHODS[name].axes if name in METHODS else ()
    return "sparse" if "weights" in axes else "depth" if set(axes) <= {"layers"} and axes else "width"


def sources() -> dict[str, Any]:
    """What is said of published rows, and by whom."""
    return dict(yaml.safe_load(_file(SOURCES)))


def _file(name: str) -> str:
    return (resources.files("prunus.study") / name).read_text(encoding="utf-8")


def published() -> list[Row]:
    """Rows of the comparison study: S against P200-R and Meta-R at equal training tokens, and S250 against P200-R50."""
    found, before = list(csv.DictReader(_file(PUBLISHED).splitlines())), sources()["comparison"]["parent_tokens_b"]
    out, fresh = [], {}
    for row in found:
        if row["arm"] == "S":
            fresh[row["table"], row["method"], row["child_params_b"], row["tokens_b"]] = float(row["loss"])
    best = min(float(r["loss"]) for r in found if r["table"] == "T16" and r["arm"] == "S" and r["tokens_b"] == "250")
    for row in found:
        if row["arm"] == "S":
            continue
        params, loss, tokens = float(row["child_params_b"]), float(row["loss"]), float(row["tokens_b"])
        kept = params / float(row["parent_params_b"])
        other = fresh.get((row["table"], row["method"], row["child_params_b"], row["tokens_b"]))
        if row["table"] != "T16" and other is not None:
            out.append(Row(row["id"], "training", row["method"], params * 1e9, kept, tokens * 1e9, other - loss))
        whole = fresh.get((row["table"], row["method"], row["child_params_b"], "250"))
        if row["table"] == "T16" and whole is not None:
            total = (before + tokens) * 1e9
            out.append(Row(row["id"], "total", row["method"], params * 1e9, kept, total, whole - loss, best - loss))
    return out


def own(folders: Iterable[Path]) -> tuple[list[Row], dict[str, str]]:
    """Rows of the user's own studies, whose arms they compare at equal training or total tokens; of folders without one, why."""
    rows, silent = [], {}
    for folder in folders:
        found = load(folder)
        made = [_own_row(one, found) for one in differences(found) if one.protocol in PROTOCOLS and one.metric == LOSS]
        speak = [row for row in made if isinstance(row, Row)]
        if not speak:
            reasons = dict.fromkeys(why for why in made if isinstance(why, str))
            silent[str(folder)] = "; ".join(reasons) or (
                "no two arms that have a validation loss are compared on training-tokens or total-tokens"
            )
        rows += speak
    return rows, silent


def _own_row(one: Difference, found: Results) -> Row | str:
    """What a comparison says, whichever arm is named first; or why it says nothing."""
    names, file = " - ".join(one.arms), found.written
    fresh = [_is_fresh(arm, file) for arm in one.arms]
    if fresh[0] == fresh[1]:
        return f"{names}: {'both begin' if fresh[0] else 'neither begins'} with fresh weights"
    pruned, other = reversed(one.arms) if fresh[0] else one.arms
    pairs = [(a, b) for a in found.of(pruned) for b in found.of(other) if agree(a, b)]
    run = next(a for a, b in pairs if one.group in (a.group, b.group))
    arm = _cutting(pruned, file)
    method = None if arm is None else _method_of(run, file)
    if arm is None or method is None:
        return f"{names}: {pruned} goes on from no cut"
    before = _uncut(run, arm, found)
    if before is None or run.params is None:
        return f"{names}: the records do not say what size {pruned} {'is' if before else 'was cut from; gather the study again'}"
    if run.params >= before:
        return f"{names}: {pruned} has no fewer parameters than what it was cut from, since zeros are counted"
    protocol, advantage = PROTOCOLS[one.protocol], one.mean if fresh[0] else -one.mean
    tokens = run.tokens if protocol == "training" else run.total_tokens or run.tokens
    return Row(f"{found.name}: {names}, {one.group}", protocol, method, run.params, run.params / before, tokens, advantage)


def _arm(name: str | None, file: Mapping[str, Any]) -> Mapping[str, Any]:
    return dict((file.get("arms") or {}).get(name, {}))


def _is_fresh(arm: str, file: Mapping[str, Any]) -> bool:
    """Whether an arm begins with fresh weights; pruned models may be compared with one another, too."""
    asked = _arm(arm, file)
    return asked.get("from") is None and asked.get("model") is None


def _cutting(arm: str, file: Mapping[str, Any]) -> str | None:
    """The arm that made the cut that an arm goes on from: itself, or the nearest of those before it."""
    seen: list[str | None] = [arm]
    while _arm(seen[-1], file).get("cut") is None:
        parent = _arm(seen[-1], file).get("from")
        if parent is None or parent in seen:
            return None
        seen.append(parent)
    return seen[-1]


def _uncut(run: Run, cutting: str, found: Results) -> int | None:
    """Parameters of what the cut of an arm took: its parent's run has them, or of a released model the record of the cut."""
    parent = _arm(cutting, found.written).get("from")
    one = next((one for one in found.of(parent or cutting) if agree(one, run)), None)
    return None if one is None else one.uncut if parent is None else one.params


def _method_of(run: Run, file: Mapping[str, Any]) -> str | None:
    """What cut a run's model: its place in the grid says it, by itself or as the name of a cut, or its arm, or the whole study."""
    arm, named = _arm(_cutting(run.arm, file), file), (file.get("cuts") or {}).get(run.place.get("cut"), {})
    asked = {**(file.get("cut") or {}), **(arm.get("cut") or {}), **named} if arm.get("cut") is not None else {}
    asked |= {name.partition(".")[2]: value for name, value in run.place.items() if name.startswith("cut.")}
    method, pattern = asked.get("method"), asked.get("pattern")
    return method if method is None or pattern is None else f"{method}-{pattern}"


# -- the answer -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """A parent's parameters, the small model's, the tokens that there are, and whether the parent must be trained from them."""

    parent_params: float
    params: float
    tokens: float
    own_parent: bool
    granularity: str | None = None  # None: all but sparse, whose zeros bring no speed
    device: str = "cpu"
    rate: float | None = None  # FLOPs a second that training reaches

    def checked(self) -> Asked:
        """Self; UserError for sizes and rates that cannot be."""
        check_rate(self.rate)
        if self.tokens <= 0:
            raise UserError(f"tokens: {self.tokens:g} are none; give how many there are to train on")
        if not 0 < self.params < self.parent_params:
            sizes = f"{big(self.params)} is not below the parent's {big(self.parent_params)}"
            raise UserError(f"target_params: {sizes}; give fewer, or a larger parent")
        if self.granularity is not None and self.granularity not in {*GRANULARITY.values()}:
            raise unknown("granularity", self.granularity, {*GRANULARITY.values()})
        if self.device not in ("cpu", "gpu"):
            raise unknown("device", self.device, ("cpu", "gpu"))
        return self

    @property
    def protocol(self) -> Protocol:
        """What is equal."""
        return "total" if self.own_parent else "training"


def advise(asked: Asked, rows: Sequence[Row], silent: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The recommendation with the expected range, its cost, three reasons, and the rows that it rests on.

    `silent`: studies that gave no row -> why, to be told with it.
    """
    asked = asked.checked()
    of = [
        row for row in rows
        if row.protocol == asked.protocol
        and (row.granularity == asked.granularity if asked.granularity else row.granularity != "sparse")
    ]  # fmt: skip
    near = [row for row in of if max(_far(row, asked).values()) <= 1]
    by: dict[str, list[Row]] = {}
    for row in near:
        by.setdefault(row.method, []).append(row)
    expected = {method: _mean(found, asked) for method, found in by.items()}
    out: dict[str, Any] = {
        "asked": {"parent_params": asked.parent_params, "target_params": asked.params, "tokens": asked.tokens,
                  "parent": "own" if asked.own_parent else "released", "granularity": asked.granularity},
        "expected": expected, "rows": [row.id for row in near], "equal": EQUAL, "silent": dict(silent or {}),
    }  # fmt: skip
    out |= _unknown(of, asked) if not near else _answer(expected, near, asked)
    return out | {"cost": _cost(out["answer"], asked)}


def _far(row: Row, asked: Asked) -> dict[str, float]:
    """How far a row is in each respect, in units of `NEAR`."""
    theirs, mine = row.tokens / row.params, asked.tokens / asked.params
    ratios = {
        "params": row.params / asked.params,
        "tokens": theirs / mine,
        "kept": row.kept / (asked.params / asked.parent_params),
    }
    return {name: abs(math.log(ratio)) / math.log(NEAR[name]) for name, ratio in ratios.items()}


def _mean(rows: Sequence[Row], asked: Asked) -> float:
    """Rows by nearness: a row in the very setting counts ten times as much as one at the edge."""
    weights = [1 / (0.1 + sum(value**2 for value in _far(row, asked).values())) for row in rows]
    values = [row.advantage if row.best_shape is None else row.best_shape for row in rows]
    return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)


def _unknown(rows: Sequence[Row], asked: Asked) -> dict[str, Any]:
    nearest = min(rows, key=lambda row: max(_far(row, asked).values()), default=None)
    setting = f"{big(asked.params)} parameters of {big(asked.parent_params)}"
    reasons = [
        f"No row is near {setting} on {asked.tokens / asked.params:.3g} tokens a parameter.",
        "The nearest is none at all."
        if nearest is None
        else f"The nearest is {nearest.id}: {big(nearest.params)} parameters, {nearest.kept:.0%} of its parent, "
        f"{nearest.tokens / nearest.params:.3g} tokens a parameter, {nearest.advantage:+.2f} nats for pruning.",
        "A study at a size that you can pay for (prunus study) would tell more than a guess; give it as --study.",
    ]
    return {"answer": "unknown", "method": None, "range": None, "reasons": reasons}


def _answer(expected: dict[str, float], near: Sequence[Row], asked: Asked) -> dict[str, Any]:
    method = max(expected, key=lambda name: expected[name])
    low, high = min(expected.values()), max(expected.values())
    one = len(near) == 1
    count = (
        "one row is near"
        if one
        else f"{len(near)} rows are near, of {len(expected)} method{'s' if len(expected) > 1 else ''}"
    )
    told = f"{expected[method]:+.2f} nats a token ({low:+.2f} to {high:+.2f} over methods)"
    if not asked.own_parent:
        prune = expected[method] > EQUAL
        reasons = [
            f"The parent is there and costs nothing, so the question is one of equal training tokens, on which {count}.",
            f"There {method}, retrained, is ahead of fresh weights of its own shape by {told}.",
            "The advantage shrinks as tokens a parameter grow, and for depth as more is removed."
            if prune
            else f"That is no more than {EQUAL:g} nats, so the parent brings nothing that tokens would not.",
        ]
        how = f"Cut by {method} and retrain on all of the tokens, under one schedule."
        return {"answer": "prune" if prune else "scratch", "method": method if prune else None, "range": [low, high],
                "reasons": reasons, "how": how if prune else "Train fresh weights of the best shape of that size."}  # fmt: skip
    whole = (
        f"The parent's tokens must come out of the same {big(asked.tokens)}, so the question is one of equal total tokens"
    )
    reasons = [
        f"{whole}, on which {count}.",
        f"There the best, {method}, stands at {told} against fresh weights of the best shape of that size.",
    ]
    if expected[method] > EQUAL:
        reasons.append("So pruning pays even for a parent that is trained for it.")
        how = "Train the parent on four fifths of the tokens, cut it, retrain on the rest."
        return {"answer": "prune", "method": method, "range": [low, high], "reasons": reasons, "how": how}
    idea = sources()["idea-prune"]
    reasons.append("So a parent that is made for being cut does not pay, and fresh weights are simpler.")
    return {
        "answer": "scratch",
        "method": None,
        "range": [low, high],
        "reasons": reasons,
        "how": "Train fresh weights of the best shape of that size.",
        "alternative": f"enlarge-and-prune; {idea['source']}: {idea['says']}.",
    }


def _cost(answer: str, asked: Asked) -> dict[str, Any]:
    """Tokens, FLOPs (six a parameter and token) and hours of what is recommended; else of training from scratch."""
    flops = 6 * asked.params * asked.tokens
    if answer == "prune" and asked.own_parent:
        flops = 6 * (0.8 * asked.parent_params + 0.2 * asked.params) * asked.tokens
    rate, basis = asked.rate, "stated rate"
    if rate is None and asked.device == "cpu":
        rate, basis = EFFICIENCY * measure.gemm_rate(), f"{EFFICIENCY:.0%} of the float32 matmul rate measured now"
    hours = None if rate is None else flops / rate / 3600
    return {
        "tokens": asked.tokens,
        "flops": flops,
        "hours": hours,
        "basis": basis if rate is not None else "no rate of a GPU is known; give --rate",
    }
