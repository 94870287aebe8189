"""prunus: cut a pretrained language model down, train what is left, and measure whether that beat training from scratch.

Nothing heavy is imported until a name is used, so that `prunus --help` answers at once.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .anatomy import Anatomy
    from .api import Result, TextOptions, evaluate, plan, prune
    from .checkpoint import verify
    from .errors import UserError, VerificationError
    from .keep import Keep, WeightMask
    from .kv_copies import unshared
    from .methods import METHODS
    from .planning import Request
    from .shape import LayerShape, Shape
    from .source import Source

# On some processors MKL multiplies the same numbers to other last bits when they lie elsewhere in memory; then no run could be
# resumed bit for bit. No loss of speed could be measured; it must be said before MKL's first product.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

_HOMES = {
    "Anatomy": "anatomy",
    "Keep": "keep",
    "LayerShape": "shape",
    "METHODS": "methods",
    "Request": "planning",
    "Result": "api",
    "Shape": "shape",
    "Source": "source",
    "TextOptions": "api",
    "UserError": "errors",
    "VerificationError": "errors",
    "WeightMask": "keep",
    "evaluate": "api",
    "plan": "api",
    "prune": "api",
    "unshared": "kv_copies",
    "verify": "checkpoint",
}

__all__ = [
    "METHODS",
    "Anatomy",
    "Keep",
    "LayerShape",
    "Request",
    "Result",
    "Shape",
    "Source",
    "TextOptions",
    "UserError",
    "VerificationError",
    "WeightMask",
    "evaluate",
    "plan",
    "prune",
    "unshared",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'prunus' has no attribute '{name}'")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
