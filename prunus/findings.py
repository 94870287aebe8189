"""What a method's passes over the dense model found, kept so that any ratio and allocator can use it again, without a pass.

A file of findings is tied to the weights, the windows and the dtype (`key`), and to what was gathered (`Findings.what`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from .allocate import Curve
from .criteria import UNIT_CRITERIA, Scores
from .errors import UserError
from .headers import safetensors_shapes
from .methods import SEARCH_OPTIONS
from .place import staged_files
from .statistics import Moments, Statistics

if TYPE_CHECKING:
    from .data.windows import Windows
    from .planning import Plan
    from .source import Source

_SEP = "|"  # no parameter's name has it


@dataclass
class Findings:
    """What was gathered. Which parts there are depends on the method; `what` names them all (see `wanted`)."""

    what: str
    scores: Scores | None = None
    statistics: Statistics = field(default_factory=dict)
    curves: Mapping[str, Curve] = field(default_factory=dict)  # axis -> error of every size
    fisher: Mapping[str, Tensor] = field(default_factory=dict)  # matrix -> E[g g^T] at its output [D, D], float64
    rounds: list[dict[str, float | None]] = field(default_factory=list)  # of a greedy search: loss without each candidate
    flops: int = 0  # of gathering it, in all processes; of a search its rounds, of which a job may need few, are left out


def wanted(plan: Plan) -> str | None:
    """What the plan's dense passes gather; None for methods that must sweep again for every target.

    Two plans that want the same can share findings, whatever their targets. Of a combination only the first part sees the
    source.
    """
    if plan.parts:
        return wanted(plan.parts[0])
    method, options = plan.method, {n: value for n, value in plan.options.items() if n not in _OF_THE_CUT}
    if method.criterion == "output-error":
        options |= {"compensate": plan.compensator}
    elif plan.sequential and plan.counts:
        return None  # every block is scored behind the cut ones, and nothing needs scores of the dense model
    elif not method.needs_text or plan.criterion not in (*UNIT_CRITERIA, *_BY_NAME) or plan.allocator == "contiguous":
        return None
    return " ".join([method.criterion, *(f"{name}={value}" for name, value in sorted(options.items()) if value)])


def serves_all(plan: Plan) -> bool:
    """Whether what the plan gathers is the same for every target, so that one cut's serves the others as it is."""
    first = plan.parts[0] if plan.parts else plan
    return wanted(plan) is not None and first.method.criterion != "loss-without"


_OF_THE_CUT = ("amplitude", "words", *SEARCH_OPTIONS)  # options that say how findings are used, not what is found
# criteria that are no rows of `UNIT_CRITERIA`, and whose scores, or rounds, serve any target
_BY_NAME = ("taylor-units", "cosine-taylor", "block-influence", "taylor", "loss-without")


def key(source: Source, windows: Windows, dtype: torch.dtype) -> str:
    """What findings belong to: the model's weights, the windows, and the precision of the passes."""
    return f"{source.sha256}-{windows.sha256}-{dtype}"


def save(found: Findings, path: Path, key: str) -> None:
    """One safetensors file, put in place when it is whole."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for name, moments in found.statistics.items():
        tensors |= {_SEP.join(("statistics", name, part)): value for part, value in moments.to_tensors().items()}
    scores = found.scores or Scores({})
    tensors |= {_SEP.join(("scores", name)): value for name, value in scores.values.items()}
    tensors |= {_SEP.join(("fisher", name)): value for name, value in found.fisher.items()}
    about = {
        "what": found.what,
        "want": sorted({want for moments in found.statistics.values() for want in moments.want}),
        "spread": scores.spread,
        "curves": {name: vars(curve) for name, curve in found.curves.items()},
        "rounds": found.rounds,
        "flops": found.flops,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with staged_files(path) as (stage,):
        save_file({n: t.contiguous() for n, t in tensors.items()}, stage, metadata={"key": key, "about": json.dumps(about)})


def keep(before: Findings | None, after: Findings | None, path: Path, key: str) -> None:
    """Save what there is more than before: a greedy search may have gone on where an earlier one stopped."""
    if after is not None and (before is None or len(after.rounds) > len(before.rounds)):
        save(after, path, key)


def load(path: Path, key: str, what: str) -> Findings:
    """Findings saved earlier; UserError if they are of something else, or of another method's making."""
    from safetensors import safe_open

    try:
        safetensors_shapes(path)
        with safe_open(path, "pt") as file:
            meta = file.metadata() or {}
            if meta.get("key") != key:
                raise UserError(
                    f"{path}: holds statistics of another model, other windows or another dtype; give another file"
                )
            about = json.loads(meta["about"])
            if about["what"] != what:
                raise UserError(f"{path}: holds what was gathered for '{about['what']}', not '{what}'; give another file")
            groups: dict[str, dict[str, Tensor]] = {}
            for name in file.keys():  # noqa: SIM118  (a safetensors handle is no mapping)
                group, _, rest = name.partition(_SEP)
                groups.setdefault(group, {})[rest] = file.get_tensor(name)
        return _assembled(about, groups)
    except UserError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: the statistics cannot be read: {error}") from error


def _assembled(about: Mapping[str, Any], groups: Mapping[str, Mapping[str, Tensor]]) -> Findings:
    moments: dict[str, dict[str, Tensor]] = {}
    for name, value in groups.get("statistics", {}).items():
        point, _, part = name.partition(_SEP)
        moments.setdefault(point, {})[part] = value
    spread = {name: (float(mean), float(std)) for name, (mean, std) in about["spread"].items()}
    curves = {name: Curve(tuple(c["sizes"]), tuple(c["error"])) for name, c in about["curves"].items()}
    values = groups.get("scores")
    return Findings(
        about["what"],
        None if values is None else Scores(dict(values), spread),
        {name: Moments.from_tensors(parts, frozenset(about["want"])) for name, parts in moments.items()},
        curves,
        dict(groups.get("fisher", {})),
        list(about["rounds"]),
        about.get("flops", 0),
    )
