"""Rotary positions equal complex rotation; scores depend on distances alone; the gradient is autograd's."""

import pytest
import torch
from torch import Tensor

from moesaic.model.rotary import rotary_table, rotate

CPU = torch.device("cpu")


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain_rotate(x: Tensor, theta: float, start: int = 0) -> Tensor:
    """(B, S, A, D) as D/2 complex numbers, the i-th turned by position * theta^(-2i/D)."""
    length, dim = x.shape[1], x.shape[3]
    turns = torch.arange(start, start + length)[:, None] * theta ** (-torch.arange(0, dim, 2).double() / dim)
    first, second = x.double().chunk(2, -1)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(turns), turns)[:, None]
    return torch.cat([turned.real, turned.imag], -1)


@pytest.mark.parametrize(("dim", "theta"), [(2, 10_000.0), (8, 10_000.0), (64, 500_000.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_complex_rotation_and_so_does_its_gradient(dim: int, theta: float, dtype: torch.dtype) -> None:
    x = normal(2, 37, 3, dim, seed=0).to(dtype).requires_grad_()
    out = rotate(x, *rotary_table(37, dim, theta, CPU))
    wanted = plain_rotate(x, theta)
    grad = normal(*x.shape, seed=1).to(dtype)
    (got,) = torch.autograd.grad(out, x, grad)
    (expected,) = torch.autograd.grad(wanted, x, grad.double())
    assert out.dtype == dtype
    # bf16: cosines, sines and two products are rounded to 2^-9 of numbers up to 4.
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=tolerance)
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


def test_views_and_rows_of_a_longer_table() -> None:
    table = rotary_table(50, 8, 10_000.0, CPU)
    x = normal(2, 3, 5, 8, seed=0).transpose(1, 2)
    out = rotate(x, table[0][45:], table[1][45:])
    torch.testing.assert_close(out.double(), plain_rotate(x, 10_000.0, start=45), rtol=0, atol=1e-5)


def test_scores_depend_on_distances_alone() -> None:
    cosines, sines = rotary_table(1000, 8, 10_000.0, CPU)
    query, key = normal(1, 1, 1, 8, seed=0), normal(1, 1, 1, 8, seed=1)

    def score(at_query: int, at_key: int) -> Tensor:
        turned = [rotate(x, cosines[at : at + 1], sines[at : at + 1]) for x, at in ((query, at_query), (key, at_key))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(7, 3), score(999, 995), rtol=1e-4, atol=1e-4)
    assert not torch.isclose(score(7, 3), score(7, 4), atol=1e-3)


def test_position_zero_is_not_turned_and_lengths_stay() -> None:
    x = normal(1, 9, 2, 8, seed=0)
    out = rotate(x, *rotary_table(9, 8, 10_000.0, CPU))
    assert torch.equal(out[:, 0], x[:, 0])
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))
