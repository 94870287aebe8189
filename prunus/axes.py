"""Axes are data: a unit is a set of rows in named tensors, and cutting is index selection.

Everything that removes, counts or scores units is a loop over spans and knows no module names.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """The rows that one unit of an axis owns in one parameter along one dimension.

    Unit ``u`` owns ``{offset + r * stride + u * block + j : r < repeat, j < block}``. A span with ``only`` belongs to
    that single unit, which owns the rows of ``u = 0``: so the ``layers`` axis names a different tensor for each unit.
    In a `shared` span unit ``u`` has a part in block ``shared[u]``, which goes with the last unit that has: so a KV head
    goes with its last query head.
    """

    param: str
    dim: int
    block: int = 1
    offset: int = 0
    repeat: int = 1
    stride: int = 0
    only: int | None = None
    shared: tuple[int, ...] | None = None

    def rows(self, units: Iterable[int]) -> Tensor:
        """Row indices of `units`, int64, shape (units present, repeat * block), in the order of `units`."""
        wanted = list(units)
        if self.only is not None:
            wanted = [0] if self.only in wanted else []
        if self.shared is not None:
            wanted = [self.shared[u] for u in wanted]
        unit_U = torch.tensor(wanted, dtype=torch.int64)
        inner = torch.arange(self.repeat)[:, None] * self.stride + torch.arange(self.block)[None, :]
        return self.offset + unit_U[:, None] * self.block + inner.reshape(1, -1)

    def gone(self, units: Collection[int]) -> Tensor:
        """Row indices that go when these are all the units that go, int64 [rows]."""
        if self.shared is None:
            return self.rows(units).reshape(-1)
        left = {block for u, block in enumerate(self.shared) if u not in units}
        return replace(self, shared=None).rows(sorted({self.shared[u] for u in units} - left)).reshape(-1)

    @property
    def rows_per_unit(self) -> int:
        """Rows of one unit."""
        return self.repeat * self.block


@dataclass(frozen=True)
class Axis:
    """Coupled units: removing unit ``u`` removes its rows from every span at once."""

    name: str
    size: int
    spans: tuple[Span, ...]

    def unit_sums(self, span: Span, per_row: Tensor) -> Tensor:
        """Sum a vector over one parameter's rows (R,) into units (size,), in float32 or wider."""
        values = per_row if per_row.dtype in (torch.float32, torch.float64) else per_row.float()
        return values[span.rows(range(self.size))].sum(dim=1)

    @property
    def layer(self) -> int | None:
        """The layer this axis lives in, or None for an axis of the whole model."""
        return layer_of(self.name)


def layer_of(axis_name: str) -> int | None:
    """The layer index in ``layers.<i>.<axis>``; None for ``hidden``, ``layers`` and ``vocab``."""
    parts = axis_name.split(".")
    return int(parts[1]) if len(parts) == 3 else None


def kind_of(axis_name: str) -> str:
    """The axis without its layer: ``layers.3.intermediate`` -> ``intermediate``."""
    return axis_name.rsplit(".", 1)[-1]
