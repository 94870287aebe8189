"""Several processes as one: who takes which sequences, sums over all, and a model whose weights are shared out (FSDP2).

The only file that knows of process groups. Alone, a process imports none of it: every method is then what it says for one.
"""

from __future__ import annotations

import atexit
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from .errors import UserError

if TYPE_CHECKING:
    from .train.learner import Learner

T = TypeVar("T")
_BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}  # what is agreed on is small and lies in main memory
_LOOK_S, _PATIENCE_S = 0.5, 4.0  # how often a process looks for others' failures; what it gives them to fail, or to go
_LOST = ("gloo", "NCCL", "Connection closed", "Connection reset")  # torch raises bare RuntimeErrors for lost processes


@dataclass(frozen=True)
class World:
    """This process among all that work on one run."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @classmethod
    @contextmanager
    def joined(cls, device: str = "cpu") -> Iterator[World]:
        """All processes that torchrun started; UserError in the others when one is lost. None goes on before all are done.

        The group stands until the process ends: what torchrun gave to find each other by is good for one group.
        """
        if processes() == 1:
            yield cls(device=device)
            return
        import torch.distributed as dist

        if not dist.is_initialized():
            if device == "cuda":
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            board = _Board.found()
            store = dist.PrefixStore("group", board.store)
            dist.init_process_group(_BACKENDS[device], store=store, rank=board.rank, world_size=board.size)
            atexit.register(dist.destroy_process_group)
        world = cls(dist.get_rank(), dist.get_world_size(), device)
        try:
            world.barrier()
            yield world
            world.barrier()
        except RuntimeError as error:
            if not any(word in str(error) for word in _LOST):
                raise
            raise UserError(
                f"one of {world.size} processes was lost, and its own message says why, or torchrun's if it was killed (signal 9: "
                "perhaps by a system without memory); the same command goes on from the last checkpoint"
            ) from error

    @property
    def alone(self) -> bool:
        """One process does it all."""
        return self.size == 1

    @property
    def first(self) -> bool:
        """The one that logs and writes."""
        return self.rank == 0

    # -- who does what ------------------------------------------------------------------------------------------------

    def share(self, count: int) -> slice:
        """This process's of `count` things in order; shares lie side by side and differ by one at most."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def own(self, rows: Tensor) -> Tensor:
        """This process's share of dimension 0."""
        return rows[self.share(len(rows))]

    def largest_share(self, count: int) -> int:
        """Of all processes. Weights come by asking all at once, so those with less go as many rounds as this one."""
        return -(-count // self.size)

    # -- what all know ------------------------------------------------------------------------------------------------

    def total(self, value: float) -> float:
        """Sum over processes; the same number in each."""
        return self._reduced(value, "SUM")

    def most(self, value: float) -> float:
        """Largest over processes."""
        return self._reduced(value, "MAX")

    def sum_(self, tensor: Tensor) -> Tensor:
        """Changes `tensor`: the sum over processes, in each of them bit for bit the same."""
        if not self.alone:
            import torch.distributed as dist

            dist.all_reduce(tensor)
        return tensor

    def _reduced(self, value: float, how: str) -> float:
        if self.alone:
            return value
        import torch.distributed as dist

        out = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(out, getattr(dist.ReduceOp, how))
        return float(out)

    def agree(self, value: T) -> T:
        """The first process's value, for all; every process waits here for every other."""
        if self.alone:
            return value
        import torch.distributed as dist

        held: list[Any] = [value]
        dist.broadcast_object_list(held, src=0)
        dist.barrier()  # a broadcast lets the first go on before the others came
        return held[0]

    def barrier(self) -> None:
        """Wait for every other process."""
        self.agree(None)

    def together(self, items: Sequence[T]) -> list[T]:
        """What the processes have, in their order, for all."""
        if self.alone:
            return list(items)
        import torch.distributed as dist

        held: list[Any] = [None] * self.size
        dist.all_gather_object(held, list(items))
        return [item for part in held for item in part]

    # -- a model in parts ---------------------------------------------------------------------------------------------

    def shard_(self, learner: Learner, blocks: Iterable[nn.Module]) -> None:
        """Changes `learner`: every parameter becomes a DTensor of which this process holds its part of dimension 0.

        Blocks are gathered one at a time. What is outside of them (embedding, last norm, head) belongs to the learner itself, so
        that a tied matrix is whole wherever the learner's loss reads it. Gradients are summed, not averaged: a loss is divided
        by the tokens of the whole update.
        """
        if self.alone:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        mesh = init_device_mesh(self.device, (self.size,))
        narrow = learner.model.dtype.itemsize < 4
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32) if narrow else MixedPrecisionPolicy()
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(learner, mesh=mesh, mp_policy=policy)
        for module in learner.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
                module.set_gradient_divide_factor(1.0)
        for method in ("nll", "read"):
            register_fsdp_forward_method(learner, method)

    def part(self, tensor: Tensor) -> Tensor:
        """What this process would hold of a whole tensor, after `shard_`."""
        return self._parts(tensor)[self.rank]

    def rows(self, count: int) -> slice:
        """The rows that this process would hold of a tensor of `count`, after `shard_`."""
        each = -(-count // self.size)
        return slice(min(self.rank * each, count), min((self.rank + 1) * each, count))

    def first_row(self, count: int) -> int:
        """The first of them."""
        return self.rows(count).start

    def _parts(self, tensor: Tensor) -> list[Tensor]:
        """FSDP2 cuts dimension 0 as `torch.chunk` does; where there are too few rows, the last processes hold none."""
        found = list(tensor.chunk(self.size))
        return found + [tensor[:0]] * (self.size - len(found))

    def to_first(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors, one at a time, in the first process alone; the others send their parts and see nothing.

        All must walk through it.
        """
        for name, tensor in tensors.items():
            own = local(tensor.detach())
            if self.alone:
                yield name, own
                continue
            import torch.distributed as dist

            if not self.first:
                if own.numel():
                    dist.send(own.cpu().contiguous(), 0)
                continue
            out = torch.empty(tensor.shape, dtype=tensor.dtype)
            for rank, piece in enumerate(self._parts(out)):
                if rank == 0:
                    piece.copy_(own)
                elif piece.numel():
                    dist.recv(piece, rank)
            yield name, out


ALONE = World()


def processes() -> int:
    """How many torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def leads() -> bool:
    """Whether this is the process that speaks to the user."""
    return os.environ.get("RANK", "0") == "0"


# -- one failure for all ----------------------------------------------------------------------------------------------------


def fail_with_others() -> None:
    """From here on this process ends when another one's `fail_once` says so, also while it waits for that one in a collective."""
    if "MASTER_ADDR" in os.environ:  # which torchrun sets
        _Board.found().watch_()


def fail_once(code: int, say: Callable[[str], None]) -> int:
    """One process says what went wrong, and all end with its exit code, which is returned.

    That is the first one if it fails too, else the first to fail; `say` is called in it alone, with a word on who speaks.
    """
    if "MASTER_ADDR" not in os.environ:
        say("")
        return code
    board = _Board.found()
    board.ending.set()
    try:
        mine, code = board.claim(code)
    except RuntimeError:  # whoever kept the store is gone, and with it what the others know
        say("")
        return code
    if mine:
        say("" if board.rank == 0 else f"process {board.rank} of {board.size}: ")
        sys.stdout.flush()
    with suppress(RuntimeError):
        if mine:
            board.store.set("said", "1")
        board.leave(board.store)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which torchrun sends to the rest when the first has ended
    return code


class _Board:
    """Who failed, written where the processes meet before there is a group: it answers while others wait in a collective."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.store, self.rank, self.size = store, rank, size
        self.ending = threading.Event()  # the main thread is on its way out

    @classmethod
    @functools.cache
    def found(cls) -> _Board:
        """By what torchrun put into the environment; the same one whenever it is asked for."""
        import torch.distributed as dist

        return cls(*next(dist.rendezvous("env://")))

    def claim(self, code: int) -> tuple[bool, int]:
        """(whether this process is the one that speaks, the exit code of the one that does).

        A mistake of the user is found by all, sooner or later; so the others give the first process a moment to be first.
        """
        if self.rank:
            _until(lambda: self.store.check(["failed"]))
        who, agreed = self.store.compare_set("failed", "", f"{self.rank} {code}").decode().split()
        return int(who) == self.rank, int(agreed)

    def leave(self, store: Any) -> None:
        """Wait until it was said and all know, or until those that do not come must be lost."""
        _until(lambda: store.check(["said"]))
        store.add("gone", 1)
        _until(lambda: store.add("gone", 0) >= self.size, 2 * _PATIENCE_S)

    def watch_(self) -> None:
        """Starts a thread that ends this process when another one failed and this one neither fails nor comes back."""
        store = self.store.clone()  # a client serves one request at a time, and the main thread's may wait

        def look() -> None:
            try:
                while not store.check(["failed"]):
                    if self.ending.wait(_LOOK_S):
                        return
                if self.ending.wait(_PATIENCE_S):
                    return
                code = int(store.get("failed").decode().split()[1])
                self.leave(store)
            except RuntimeError:  # the store is gone: so are the others, and the group says so to the main thread
                return
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

        thread = threading.Thread(target=look, daemon=True)
        thread.start()

        def end() -> None:
            self.ending.set()
            thread.join(_PATIENCE_S)  # an interpreter that ends while a thread is in the store's C++ aborts

        atexit.register(end)


def _until(holds: Callable[[], bool], seconds: float = _PATIENCE_S) -> bool:
    """Whether it came to hold within that time."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(_LOOK_S / 10)
    return True


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies here, in the same memory; a tensor that is not shared out is its own."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """The full value of a tensor that is shared out; all processes must ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
