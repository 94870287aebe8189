"""What a step keeps between its way forward and its way back, counted as it is put aside."""

from __future__ import annotations

from collections.abc import Callable

import torch


class Kept:
    """What is kept for the way back: bytes of storages, each counted once, now and at most. Parameters are left out."""

    def __init__(self) -> None:
        self.users: dict[int, int] = {}
        self.now = self.most = 0

    def hold(self, tensor: torch.Tensor) -> Holder | torch.Tensor:
        """Called when a tensor is put aside."""
        if isinstance(tensor, torch.nn.Parameter) or isinstance(tensor._base, torch.nn.Parameter):
            return tensor
        return Holder(self, tensor)

    def count(self, tensor: torch.Tensor, users: int) -> None:
        """One user more, or less, of a tensor's storage."""
        storage = tensor.untyped_storage()
        before = self.users.get(storage.data_ptr(), 0)
        self.users[storage.data_ptr()] = before + users
        if not before or not before + users:
            self.now += users * storage.nbytes()
            self.most = max(self.most, self.now)


class Holder:
    """A tensor while it is put aside."""

    def __init__(self, kept: Kept, tensor: torch.Tensor) -> None:
        self.kept, self.tensor = kept, tensor
        kept.count(tensor, 1)

    def __del__(self) -> None:
        self.kept.count(self.tensor, -1)


def kept_bytes(step: Callable[[], None]) -> int:
    """The most that one step keeps for its way back."""
    kept = Kept()
    with torch.autograd.graph.saved_tensors_hooks(kept.hold, lambda held: held.tensor if isinstance(held, Holder) else held):
        step()
    return kept.most
