"""Products of matrices by oneDNN: the same to rounding, taken where they are asked for, and nowhere else."""

import pytest
import torch
from torch import nn

from prunus import cli, products
from prunus.errors import UserError
from prunus.spent import Flops
from prunus.train.loss import head_loss

ROUNDING = (
    2.0**-23
)  # of a float32, relative; a sum of n terms in any order errs by less than n of them times the sum of sizes

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    """oneDNN's, on any processor."""
    monkeypatch.setenv(products.CHOICE, products.ONEDNN)


@pytest.fixture
def made(monkeypatch):
    """Sizes of the products that oneDNN made."""
    out, own = [], products.product

    def product(a, b, *more):
        out.append((*a.shape, b.shape[1]))
        return own(a, b, *more)

    monkeypatch.setattr(products, "product", product)
    return out


def matrices(rows=256, depth=192, columns=128, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, depth, generator=generator), torch.randn(depth, columns, generator=generator)


def turned(matrix):
    return matrix.T.contiguous().T


def apart(found, a, b, bias=0.0):
    """The largest error, in roundings of each sum's terms."""
    exact = a.double() @ b.double() + bias
    return float(((found.double() - exact).abs() / (a.double().abs() @ b.double().abs() + abs(bias))).max() / ROUNDING)


LAYOUTS = {
    "rows": (lambda a: a, lambda b: b),
    "a turned": (turned, lambda b: b),
    "b turned": (lambda a: a, turned),
    "both turned": (turned, turned),
    "a part of wider rows": (lambda a: torch.cat([a, a], 1)[:, : a.shape[1]], lambda b: b),
    "b part of wider rows": (lambda a: a, lambda b: torch.cat([b, b], 1)[:, : b.shape[1]]),
    "b of one row": (lambda a: a, lambda b: b[:1].expand(b.shape)),
}


@pytest.mark.parametrize("sizes", [(256, 192, 128), (2048, 32, 96), (96, 2048, 64), (33, 1100, 129), (8, 1024, 1024)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_products_are_exact_to_rounding(layout, sizes):
    of_a, of_b = LAYOUTS[layout]
    a, b = matrices(*sizes)
    a, b = of_a(a), of_b(b)
    with products.fast():
        found = a @ b
    assert found.is_contiguous()
    assert apart(found, a, b) < sizes[1]


def test_sums_with_a_product_are_exact_to_rounding(made):
    a, b = matrices()
    for bias in (
        torch.randn(128),
        torch.randn(1),
        torch.randn(256, 128),
        turned(torch.randn(256, 128)),
        torch.randn(1, 128),
    ):
        with products.fast():
            found = torch.addmm(bias, a, b)
            assert apart(found, a, b, bias.double()) < 192
            assert apart(bias.expand(256, 128).clone().addmm_(a, b, alpha=0.5), a / 2, b, bias.double()) < 192
    assert len(made) == 10
    with products.fast():
        scaled = torch.addmm(torch.ones(128), a, b, beta=2, alpha=3)
    assert apart(scaled, 3 * a, b, torch.tensor(2.0).double()) < 193
    assert len(made) == 10, "a scaled sum is PyTorch's"


def test_what_is_small_or_of_another_kind_is_left_to_pytorch(made):
    a, b = matrices()
    with products.fast():
        for left in (
            (a[:16], b[:, :16]),
            (a.double(), b.double()),
            (a.bfloat16(), b.bfloat16()),
            (a, b[:, :1].expand(b.shape)),
        ):
            assert torch.equal(left[0] @ left[1], torch.matmul(*left))
        assert made == []
        a @ b
    assert made == [(256, 192, 128)]


@pytest.mark.parametrize(("rows", "depth", "columns"), [(700, 40, 1000), (300, 255, 5000), (300, 256, 5000)])
def test_shallow_products_are_added_part_by_part(made, rows, depth, columns):
    a, b = matrices(rows, depth, columns)
    begun = torch.randn(rows, columns)
    with products.fast():
        found = begun.clone().addmm_(turned(a), b, alpha=-1)
    assert apart(found, -a, b, begun.double()) < depth + 1
    assert sum(size[0] for size in made) == rows and (len(made) > 1) == (depth < 256)


def test_pytorchs_own_within(made):
    a, b = matrices()
    own = a @ b
    with products.fast():
        with products.plain():
            assert torch.equal(a @ b, own)
            with products.fast():
                a @ b
        assert len(made) == 1
        a @ b
    assert len(made) == 2 and torch.equal(a @ b, own) and len(made) == 2
    with products.plain():
        assert torch.equal(a @ b, own)


def test_what_pytorch_refuses_is_refused_in_its_words(made):
    a, b = matrices(512, 512, 512)
    with products.fast():
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            a @ b[:300]
        with pytest.raises(RuntimeError, match=r"must be a matrix|2D|2-D"):
            torch.mm(a, b[0])
        with pytest.raises(RuntimeError):
            torch.ones(1, 512, 512).addmm_(a, b)
        nothing = torch.zeros(512, 512).addmm_(a / 0, b, alpha=0)
    assert torch.equal(nothing, torch.zeros(512, 512)), "no part of a product is none, whatever it is"
    assert made == []


def test_one_that_could_not_begin_does_not_stand_in_the_way(made, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(products, "_overrides", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError), products.fast():
            pass
    a, b = matrices()
    with products.fast():
        a @ b
    assert len(made) == 1


def test_they_end_where_they_are_asked_for(made):
    a, b = matrices()
    own = a @ b

    @products.fast()
    def within():
        return a @ b

    with products.fast():
        within()
        a @ b
    with pytest.raises(KeyError), products.fast():
        raise KeyError
    assert len(made) == 2
    assert torch.equal(a @ b, own)
    assert len(made) == 2, "outside they are PyTorch's again"


def test_pytorchs_own_can_be_asked_for(monkeypatch, made):
    a, b = matrices()
    monkeypatch.setenv(products.CHOICE, products.TORCH)
    with products.fast():
        a @ b
    assert made == []
    assert products.compiler_options() is None
    monkeypatch.setenv(products.CHOICE, "blis")
    with (
        pytest.raises(UserError, match="PRUNUS_PRODUCTS: 'blis' makes no matrix products; give onednn or torch"),
        products.fast(),
    ):
        pass


def test_the_same_bits_each_time():
    a, b = matrices(300, 500, 70)
    with products.fast():
        first = a @ b
        for shift in range(1, 5):  # memory that begins elsewhere
            room = torch.empty(a.numel() + shift)[shift:].view_as(a).copy_(a)
            assert torch.equal(room @ b, first)


def test_gradients_are_exact_to_rounding(made):
    x, w = matrices(512, 96, 160)
    wanted = [t.double().requires_grad_() for t in (x, w)]
    (wanted[0] @ wanted[1]).square().sum().backward()
    given = [t.clone().requires_grad_() for t in (x, w)]
    with products.fast():
        (given[0] @ given[1]).square().sum().backward()
    assert len(made) == 3
    for one, other in zip(given, wanted, strict=True):
        assert torch.allclose(one.grad.double(), other.grad, rtol=0, atol=512 * ROUNDING * float(other.grad.abs().max()))


def test_flops_are_counted_once():
    a, b = matrices()
    with products.fast(), Flops() as counted:
        a @ b
        torch.addmm(torch.zeros(128), a, b)
    assert counted.total == 2 * 2 * 256 * 192 * 128


def test_the_heads_loss_is_that_of_pytorchs_products(made, monkeypatch):
    hidden, weight = torch.randn(700, 64), torch.randn(500, 64)
    targets = torch.randint(0, 500, (700,))

    def told():
        given = [t.clone().requires_grad_() for t in (hidden, weight)]
        loss = head_loss(*given, targets)
        loss.backward()
        return [loss.detach(), *(t.grad for t in given)]

    with products.fast():
        found = told()
    assert len(made) == 6
    for one, other in zip(found, told(), strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


class _Decoder(nn.Module):
    """A block's products, with what stands between them."""

    def __init__(self, bias):
        super().__init__()
        self.up, self.down = nn.Linear(64, 160, bias=bias), nn.Linear(160, 64, bias=bias)

    def forward(self, x):
        return x + self.down(torch.nn.functional.silu(self.up(x)))


@pytest.mark.parametrize("sizes", [(4, 128, 64), (512, 64)])
@pytest.mark.parametrize("bias", [False, True])
def test_compiled_graphs_call_them(made, bias, sizes):
    torch.manual_seed(0)
    torch.compiler.reset()
    decoder, x = _Decoder(bias), torch.randn(sizes)
    torch.compile(decoder, dynamic=False, options=products.compiler_options())(x).square().sum().backward()
    assert len(made) == 5, "two forward, three back: the input has no gradient"
    found = [p.grad.clone() for p in decoder.parameters()]
    decoder.zero_grad()
    decoder(x).square().sum().backward()
    for one, p in zip(found, decoder.parameters(), strict=True):
        assert torch.allclose(one, p.grad, rtol=0, atol=512 * ROUNDING * float(p.grad.abs().max()))


def test_the_command_line_refuses_another_library_at_once(monkeypatch, capsys):
    monkeypatch.setenv(products.CHOICE, "blis")
    assert cli.run(["methods"]) == 2
    assert "PRUNUS_PRODUCTS: 'blis' makes no matrix products; give onednn or torch" in capsys.readouterr().err
