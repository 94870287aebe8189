"""Float32 matrix products by the library that is fast on this processor.

PyTorch gives them to Intel's MKL, which leaves half of an AMD processor with AVX-512 idle: its kernels there are those for AVX2.
oneDNN, which PyTorch ships as well and uses for 16 bits, does not. Sums of products are rounded otherwise, and that is all.

What is measured for others, who run models in plain PyTorch, is not done in here.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

ONEDNN, TORCH = "onednn", "torch"
CHOICE = "PRUNUS_PRODUCTS"
_LEAST = 1 << 22  # multiplications that are worth a call into oneDNN: below, calling costs what its kernels gain
_SHALLOW, _PART = 256, 1 << 18  # depth of a product; numbers of a part of one that are still near when they are added


@cache
def _has_onednn() -> bool:
    import torch

    return bool(torch.backends.mkldnn.is_available())


@cache
def _half_idle() -> bool:
    """Whether MKL leaves half of this processor idle."""
    import torch

    if not (torch.backends.mkl.is_available() and _has_onednn()):
        return False
    try:
        amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return amd and torch.backends.cpu.get_cpu_capability() == "AVX512"


def chosen() -> str | None:
    """What PRUNUS_PRODUCTS says, if it says anything; UserError if it names no library. Imports nothing heavy."""
    asked = os.environ.get(CHOICE) or None
    if asked not in (None, ONEDNN, TORCH):
        raise UserError(f"{CHOICE}: {asked!r} makes no matrix products; give {ONEDNN} or {TORCH}, or unset it")
    return asked


def library() -> str:
    """Whose products are taken: `onednn` or `torch` (its own choice). UserError if those that are asked for are not to be had."""
    asked = chosen() or (ONEDNN if _half_idle() else TORCH)
    if asked == ONEDNN and not _has_onednn():
        raise UserError(f"{CHOICE}: this PyTorch was built without oneDNN; give {TORCH}, or unset it")
    return asked


_lock, _depth = threading.Lock(), 0
_held: Any = None  # the kernels that stand before PyTorch's


@contextmanager
def fast() -> Iterator[None]:
    """Large products of float32 matrices on the CPU go to `library`, in this process, compiled ones too."""
    global _depth, _held
    if library() == TORCH:
        yield
        return
    with _lock:
        if _depth == 0:
            _held = _overrides()
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                _held._destroy()
                _held = None


@contextmanager
def plain() -> Iterator[None]:
    """Within `fast`: PyTorch's own again, for what is compared with a process that has no others."""
    global _depth, _held
    with _lock:
        depth, _depth = _depth, 0
        if _held is not None:
            _held._destroy()
            _held = None
    try:
        yield
    finally:
        with _lock:
            if depth:
                _depth, _held = depth, _overrides()


def compiler_options() -> dict[str, Any] | None:
    """What `torch.compile` is to be told, so that compiled products are `library`'s as well."""
    return {"post_grad_custom_post_pass": _op()[1]} if library() == ONEDNN else None


def fits(a_MK: Tensor, b_KN: Tensor) -> bool:
    """Whether a product is one that oneDNN makes, and large enough to gain."""
    import torch

    if not (a_MK.dim() == b_KN.dim() == 2 and a_MK.shape[1] == b_KN.shape[0] and a_MK.dtype is b_KN.dtype is torch.float32):
        return False  # PyTorch says what is wrong with them
    rows, depth, columns = *a_MK.shape, b_KN.shape[1]
    turned = b_KN.T.is_contiguous()
    if rows * depth * columns < _LEAST or not (
        turned or b_KN.is_contiguous()
    ):  # of other strides it makes a copy, or nothing
        return False
    return columns > 1 and (rows > 1 or turned)  # a vector's product reads the matrix once, and MKL does that faster


def product(a_MK: Tensor, b_KN: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """a b + bias [M, N] float32, by oneDNN."""
    import torch

    (rows, depth), columns = a_MK.shape, b_KN.shape[1]
    multiply = torch.ops.mkldnn._linear_pointwise.default
    # What comes first is copied, unless its rows lie one behind another. A gradient's do not, and it can be the larger part.
    if bias_N is None and not a_MK.is_contiguous() and a_MK.T.is_contiguous() and columns * (rows + depth) < rows * depth:
        return multiply(b_KN.T, a_MK, None, "none", [], "").T.contiguous()
    return multiply(a_MK, b_KN.T, bias_N, "none", [], "")


def _sum(c: Tensor, a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """c + a b [M, N] float32; c as torch.addmm takes it."""
    whole = c.shape == b_KN.shape[1:] and c.is_contiguous()
    return product(a_MK, b_KN, c) if whole else product(a_MK, b_KN).add_(c)


def _overrides() -> Any:
    """A library of kernels that stand before PyTorch's own until it is destroyed."""
    import torch

    own = {name: torch.library.get_kernel(f"aten::{name}", "CPU") for name in ("mm", "addmm", "addmm_")}

    def mm(keys: Any, a: Tensor, b: Tensor) -> Tensor:
        return product(a, b) if fits(a, b) else own["mm"].call_boxed(keys, a, b)

    def addmm(keys: Any, c: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
        if beta == alpha == 1 and c.dtype is a.dtype and fits(a, b):
            return _sum(c, a, b)
        return own["addmm"].call_boxed(keys, c, a, b, beta=beta, alpha=alpha)

    def addmm_(keys: Any, c: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
        if beta == 1 and alpha != 0 and c.dtype is a.dtype and fits(a, b) and c.shape == (a.shape[0], b.shape[1]):
            # What is added is memory of its own. Of shallow products it would be the larger part of the work: a part at a time.
            rows = len(c) if a.shape[1] >= _SHALLOW else max(1, _PART // b.shape[1])
            for first in range(0, len(c), rows):
                c[first : first + rows].add_(product(a[first : first + rows], b), alpha=alpha)
            return c
        return own["addmm_"].call_boxed(keys, c, a, b, beta=beta, alpha=alpha)

    out = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel of PyTorch's is overridden: it is meant to be
        for name, kernel in (("mm", mm), ("addmm", addmm), ("addmm_", addmm_)):
            out.impl(name, kernel, "CPU", with_keyset=True, allow_override=True)
    return out


@cache
def _op() -> tuple[Any, Any]:
    """(our operators, the pass that puts them into compiled graphs): PyTorch's own write into memory of theirs, oneDNN's do not."""
    import torch
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    out = torch.library.Library("prunus", "DEF")
    tags = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)
    out.define("mm(Tensor a, Tensor b) -> Tensor", tags=tags)
    out.define("addmm(Tensor c, Tensor a, Tensor b) -> Tensor", tags=tags)
    out.impl("mm", lambda a, b: product(a, b), "CPU")
    out.impl("addmm", lambda c, a, b: _sum(c, a, b), "CPU")
    torch.library.register_fake("prunus::mm", lambda a, b: a.new_empty(a.shape[0], b.shape[1]), lib=out)
    torch.library.register_fake("prunus::addmm", lambda c, a, b: a.new_empty(a.shape[0], b.shape[1]), lib=out)
    ours = {
        torch.ops.aten.mm.default: torch.ops.prunus.mm.default,
        torch.ops.aten.addmm.default: torch.ops.prunus.addmm.default,
    }

    class Replaced(CustomGraphPass):
        def __call__(self, graph: torch.fx.graph.Graph) -> None:
            for theirs, own in ours.items():
                for node in graph.find_nodes(op="call_function", target=theirs):
                    *more, a, b = (each.meta["val"] for each in node.args)
                    if a.device.type == "cpu" and not node.kwargs and all(c.dtype is a.dtype for c in more) and fits(a, b):
                        node.target = own

        def uuid(self) -> Any:
            return get_hash_for_files((__file__,))

    return out, Replaced()
