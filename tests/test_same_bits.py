"""What bit-for-bit resumption rests on: a product of the same numbers is the same wherever they lie in memory."""

import os

import pytest
import torch

import prunus  # noqa: F401  (says it to MKL before the first product)


def moved(x: torch.Tensor, by: int) -> torch.Tensor:
    """The same numbers, `by` places further from where an allocation begins."""
    out = torch.empty(x.numel() + by, dtype=x.dtype)[by:].view(x.shape)
    return out.copy_(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(22, 32, 61), (64, 24, 32), (7, 576, 192), (1, 32, 61), (2, 32, 8)])
def test_products_do_not_depend_on_the_place(shape, dtype):
    rows, inner, columns = shape
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, inner, generator=generator).to(dtype) for n in (rows, columns))
    wanted = torch.nn.functional.linear(moved(x, 0), moved(w, 0))
    for by in range(1, 9):
        assert torch.equal(torch.nn.functional.linear(moved(x, by), moved(w, 0)), wanted)
        assert torch.equal(torch.nn.functional.linear(moved(x, 0), moved(w, by)), wanted)


def test_the_setting_is_there():
    assert os.environ["MKL_CBWR"].endswith(",STRICT")
