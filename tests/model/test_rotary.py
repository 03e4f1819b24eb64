"""Rotary positions equal complex rotation; scores depend on distances alone; the gradient is autograd's."""

import math

import pytest
import torch
from torch import Tensor

from moesaic.config.model import ModelConfig, RopeScalingConfig
from moesaic.model.rotary import model_rotary, rotary_frequencies, rotary_table, rotate

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


SCALINGS: dict[str, RopeScalingConfig] = {
    "linear": RopeScalingConfig(kind="linear", factor=3.0),
    "llama3": RopeScalingConfig(kind="llama3", factor=8.0, original_max_positions=512),
    "yarn": RopeScalingConfig(kind="yarn", factor=4.0, original_max_positions=512),
}


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("dim", [8, 12, 128])
def test_scaled_frequencies_lie_between_the_model_s_and_its_stretched_ones(kind: str, dim: int) -> None:
    """Fast pairs stay as they were trained, slow ones are stretched, and no pair overtakes a faster one."""
    scaling = SCALINGS[kind]
    plain, _ = rotary_frequencies(dim, 500_000.0)
    scaled, factor = rotary_frequencies(dim, 500_000.0, scaling=scaling)
    stretched = plain / scaling.factor
    assert bool((scaled <= plain).all()) and bool((scaled >= stretched * (1 - 1e-12)).all())
    assert bool((scaled.diff() < 0).all())
    torch.testing.assert_close(scaled[-1], stretched[-1])
    if kind == "linear":
        torch.testing.assert_close(scaled, stretched)
    else:
        assert scaled[0] == plain[0]
    assert factor == pytest.approx(0.1 * math.log(4.0) + 1.0 if kind == "yarn" else 1.0)


@pytest.mark.parametrize("kind", SCALINGS)
def test_a_scaled_table_has_the_frequencies_and_the_factor(kind: str) -> None:
    frequencies, factor = rotary_frequencies(8, 10_000.0, scaling=SCALINGS[kind])
    cosines, sines = rotary_table(100, 8, 10_000.0, CPU, scaling=SCALINGS[kind])
    angles = torch.arange(100).double()[:, None] * frequencies
    torch.testing.assert_close(cosines, (factor * angles.cos()).float())
    torch.testing.assert_close(sines, (factor * angles.sin()).float())


def test_a_model_s_tables_are_those_of_the_channels_that_turn() -> None:
    values = {"vocab_size": 5, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "rope_theta": 300.0}
    latent = {"kv_rank": 5, "nope_head_dim": 6, "rope_head_dim": 4, "value_head_dim": 3}
    positions = torch.tensor([7, 3, 3, 40])
    for changes, dim in (({}, 8), ({"head_dim": 12}, 12), ({"latent_attention": latent}, 4)):
        config = ModelConfig.from_dict({**values, **changes, "rope_scaling": {"kind": "linear", "factor": 2.0}})
        whole = rotary_table(41, dim, 300.0, CPU, scaling=config.rope_scaling)
        for mine, theirs in zip(model_rotary(config, positions), whole, strict=True):
            torch.testing.assert_close(mine, theirs[positions], rtol=0, atol=1e-7)


def test_the_rest_of_a_head_that_is_turned_in_part_stays_as_it_is() -> None:
    """Pairs (i, i + 6) of 12 channels, of which the first two are turned as a head of 4 is, scaled or not."""
    values = {"vocab_size": 5, "hidden_size": 24, "num_layers": 1, "num_heads": 2, "rope_theta": 300.0}
    x, positions = normal(2, 17, 3, 12, seed=0), torch.arange(17)
    for scaling in (None, *SCALINGS.values()):
        scaled = None if scaling is None else scaling.to_dict()
        config = ModelConfig.from_dict({**values, "rope_head_dim": 4, "rope_scaling": scaled})
        out = rotate(x, *model_rotary(config, positions))
        turned = rotate(x[..., [0, 1, 6, 7]].contiguous(), *rotary_table(17, 4, 300.0, CPU, scaling=scaling))
        assert torch.equal(out[..., [0, 1, 6, 7]], turned)
        rest = [2, 3, 4, 5, 8, 9, 10, 11]
        assert torch.equal(out[..., rest], x[..., rest])


def test_position_zero_is_not_turned_and_lengths_stay() -> None:
    x = normal(1, 9, 2, 8, seed=0)
    out = rotate(x, *rotary_table(9, 8, 10_000.0, CPU))
    assert torch.equal(out[:, 0], x[:, 0])
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))
