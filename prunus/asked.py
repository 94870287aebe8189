"""Fields of a request, read and refused: each mistake is one sentence with the field, its value and the mend."""

from __future__ import annotations

import re

from .errors import UserError, unknown
from .planning import Plan


def refuse(plan: Plan, *fields: str, why: str | None = None) -> None:
    """UserError if one of the fields was said: the method does not take it, or cannot for the reason `why`."""
    for name in fields:
        if getattr(plan.request, name):
            raise UserError(f"{name}: {why or f'{plan.method.name} does not take it'}; drop the option")


def ratio_of(plan: Plan, allow_target: bool = False) -> float:
    """The ratio asked for, inside (0, 1)."""
    ratio = plan.request.ratio
    if ratio is None:
        mend = "give --ratio or --target" if allow_target else "give --ratio"
        raise UserError(f"ratio: {plan.method.name} needs to know how much to cut; {mend}")
    return checked_share("ratio", ratio)


def checked_share(name: str, value: float) -> float:
    """The value of a field, or UserError if it is outside (0, 1)."""
    if not (isinstance(value, (int, float)) and 0.0 < value < 1.0):
        raise UserError(f"{name}: {value} is not between 0 and 1 (0.2 removes a fifth)")
    return value


def parse_pattern(text: str) -> tuple[int, int]:
    """``2:4`` -> (2, 4): keep 2 of every 4 consecutive weights."""
    match = re.fullmatch(r"(\d{1,3}):(\d{1,3})", text)
    if not match or not 0 < int(match[1]) < int(match[2]):
        raise UserError(f"pattern: '{text}' is no n:m; write for example 2:4 (keep 2 of every 4)")
    return int(match[1]), int(match[2])


def target_sizes(plan: Plan, allowed: tuple[str, ...]) -> dict[str, int]:
    """The sizes of a target; UserError beside a ratio, or for a size that the method does not set."""
    sizes = dict(plan.request.target)
    if plan.request.ratio is not None:
        raise UserError("target: sizes and --ratio contradict each other; give one of them")
    for name in sizes:
        if name not in allowed:
            raise unknown(f"size for {plan.method.name}'s target", name, allowed)
    return sizes


def check_size(name: str, size: int, most: int) -> None:
    """UserError unless a size is within the source's."""
    if not 0 < size <= most:
        raise UserError(f"target: {name}={size} is outside 1 to {most} (the source's size)")
