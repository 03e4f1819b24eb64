"""The rotation in C++ equals its definition in double precision, whatever the strides."""

import pytest
import torch
from torch import Tensor

from moesaic.model.rotary import rotary_table, rotate

pytestmark = pytest.mark.usefixtures("compiled_kernels")


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def turned(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    first, second = x.double().chunk(2, -1)
    c, s = cosines.double()[:, None], sines.double()[:, None]
    return torch.cat([first * c - second * s, second * c + first * s], -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "length", "heads", "dim"), [(0, 5, 2, 8), (1, 1, 1, 2), (2, 37, 3, 14), (3, 9, 2, 80)]
)
@pytest.mark.parametrize("layout", ["contiguous", "slice", "heads first", "strided channels"])
def test_equals_the_definition_rounded_once(
    batch: int, length: int, heads: int, dim: int, layout: str, dtype: torch.dtype
) -> None:
    if layout == "contiguous":
        x = normal(batch, length, heads, dim, seed=0)
    elif layout == "slice":  # of a joint projection of queries and keys
        x = normal(batch, length, 2 * heads, dim, seed=0)[:, :, heads:]
    elif layout == "heads first":
        x = normal(batch, heads, length, dim, seed=0).transpose(1, 2)
    else:
        x = normal(batch, length, heads, 2 * dim, seed=0)[..., ::2]
    x = x.to(dtype).requires_grad_()
    tables = rotary_table(length + 4, dim, 10_000.0, torch.device("cpu"))
    cosines, sines = tables[0][4:], tables[1][4:]
    out = rotate(x, cosines, sines)
    grad = normal(*x.shape, seed=1).to(dtype).transpose(0, 1).contiguous().transpose(0, 1)
    (got,) = torch.autograd.grad(out, x, grad)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-6}
    assert out.dtype == got.dtype == dtype
    torch.testing.assert_close(out.double(), turned(x.detach(), cosines, sines), **tolerance)
    torch.testing.assert_close(got.double(), turned(grad, cosines, -sines), **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_reaches_its_own_pair_alone(bad: float, dtype: torch.dtype) -> None:
    """Position 0 has sines of 0, which make NaN of an infinity; elsewhere both channels have one, with its sign."""
    tables = rotary_table(5, 38, 10_000.0, torch.device("cpu"))
    x = normal(2, 5, 3, 38, seed=0)
    for place in ((0, 0, 1, 2), (1, 3, 0, 17), (1, 4, 2, 37)):  # in whole vectors and in what is left of a head
        x[place] = bad
    x = x.to(dtype).requires_grad_()
    out = rotate(x, *tables)
    (got,) = torch.autograd.grad(out, x, x.detach())
    cosines, sines = tables
    for mine, signed in ((out, sines), (got, -sines)):
        wanted = turned(x.detach(), cosines, signed)
        rtol = 1e-5 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(mine.double(), wanted, rtol=rtol, atol=1e-6, equal_nan=True)
        assert int((~mine.isfinite()).sum()) == 6


def test_the_operator_is_an_ordinary_one() -> None:
    x = normal(2, 5, 3, 8, seed=0).requires_grad_()
    tables = rotary_table(5, 8, 10_000.0, torch.device("cpu"))
    torch.library.opcheck(torch.ops.moesaic.rotate.default, (x, *tables, False))


def test_rounded_tables_are_taken_as_they_are() -> None:
    """Mixed precision of fully sharded training rounds every input of a block."""
    x, angles = torch.randn(2, 5, 3, 8), torch.rand(5, 4)
    cosines, sines = angles.cos().bfloat16(), angles.sin().bfloat16()
    assert torch.equal(rotate(x, cosines, sines), rotate(x, cosines.float(), sines.float()))
