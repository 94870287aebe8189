"""Evolutionary search over the sizes of every axis. It sees sizes and losses, and no model (EvoPress, arXiv 2410.14649).

A child is its parent with a few level switches: one axis gives units up and another of its kind, whose units cost as much,
takes as many, so every child costs what the start did; where prices bend (milliseconds), those above the budget are dropped.
Children are compared on few windows first, the best of them and their parent on all; the best of those is the next parent, so
the loss on all windows never rises.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

Sizes = dict[str, int]  # axis -> units kept
Loss = Callable[[Sizes, bool], float]  # sizes; whether on all windows, or on a few
_SWITCHES = 3  # of a child: the lesser of two draws from 1 to this
SURVIVORS = 4  # one in so many children is scored on all windows


@dataclass(frozen=True)
class Gene:
    """What one axis may have: `least` to `most` units; `step` of them move at a time; only equal `kind` exchange them."""

    least: int
    most: int
    step: int
    kind: object


@dataclass
class Found:
    """The best sizes, their loss on all windows, and the best loss after every generation (the start's first)."""

    sizes: Sizes
    loss: float
    history: list[float] = field(default_factory=list)


def evolve(
    start: Sizes,
    genes: Mapping[str, Gene],
    loss: Loss,
    *,
    generations: int,
    offspring: int,
    seed: int,
    go_on: Callable[[int], bool] = lambda generation: True,
    fits: Callable[[Sizes], bool] = lambda sizes: True,
) -> Found:
    """The best that was found after `generations`, or when `go_on` said stop before one. Same seed, same result."""
    rng = random.Random(seed)
    first = loss(start, True)
    best = Found(dict(start), first if math.isfinite(first) else math.inf, [first])
    seen = {_key(start)}
    for generation in range(generations):
        if not go_on(generation):
            break
        children = []
        for _ in range(offspring):
            child = mutated(best.sizes, genes, rng)
            if _key(child) not in seen:
                seen.add(_key(child))
                if fits(child):
                    children.append(child)
        ranked = sorted(children, key=lambda child: _finite(loss(child, False)))
        for child in ranked[: -(-offspring // SURVIVORS)]:
            whole = _finite(loss(child, True))
            if whole < best.loss:
                best.sizes, best.loss = child, whole
        best.history.append(best.loss)
    return best


def _key(sizes: Sizes) -> tuple[int, ...]:
    return tuple(sizes[name] for name in sorted(sizes))


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def mutated(sizes: Sizes, genes: Mapping[str, Gene], rng: random.Random) -> Sizes:
    """A child. Where no two axes can exchange anything it is its parent's twin."""
    child = dict(sizes)
    names = sorted(genes)
    for _ in range(min(rng.randint(1, _SWITCHES), rng.randint(1, _SWITCHES))):
        giver = rng.choice(names)
        gene = genes[giver]
        takers = [n for n in names if n != giver and genes[n].kind == gene.kind and child[n] < genes[n].most]
        if not takers:
            continue
        taker = rng.choice(takers)
        room = min(child[giver] - gene.least, genes[taker].most - child[taker])
        moved = min(gene.step * rng.randint(1, _SWITCHES), room)
        moved -= moved % gene.step if moved >= gene.step else 0
        child[giver] -= moved
        child[taker] += moved
    return child
