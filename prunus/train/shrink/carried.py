"""Statistics that live through cuts and checkpoints: what was known of the units that stay is known of the smaller model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Self

import torch
from torch import Tensor


class Carried(ABC):
    """Tensors by the parameter that they tell of. A cut makes a new one, of the sliced model, and carries them over."""

    prefix: str  # of their names in checkpoints

    @abstractmethod
    def known(self) -> Iterable[str]:
        """The parameters that something is kept of, and what is of none."""

    @abstractmethod
    def follows(self, name: str) -> Mapping[int, tuple[int, ...]]:
        """Dimension of a parameter -> the dimensions of what is kept of it that are cut with it; empty for what is of none."""

    @abstractmethod
    def saved(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, whole in every process."""

    @abstractmethod
    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Undo `saved`: each process takes its part."""

    @torch.no_grad()
    def cut_from(self, before: Self, rows: Callable[[str], Mapping[int, Tensor]], renamed: Mapping[str, str]) -> None:
        """Changes self, of the sliced model: what was known of the units that stay. `rows`: old name -> rows kept by dimension."""
        was, out = before.saved(), {}
        for name in before.known():
            follows = before.follows(name)
            if follows and name not in renamed:
                continue
            tensor = was[f"{self.prefix}.{name}"]
            for dim, kept in rows(name).items():
                for at in follows.get(dim, ()):
                    tensor = tensor.index_select(at, kept)
            out[f"{self.prefix}.{renamed.get(name, name)}"] = tensor
        self.restore(out)
