"""Gathers by index tables equal plain indexing and the one-hot einsum, values and every gradient."""

import pytest
import torch
from torch import Tensor

from moesaic.kernels.permute import combine_tokens, gather_tokens
from moesaic.kernels.reference import moe as reference

NUM_TOKENS, HIDDEN = 37, 24


def leaf(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def tables(num_tokens: int, top_k: int, *, share_kept: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A random table: the kept routes in a random order of rows."""
    generator = torch.Generator().manual_seed(seed)
    routes = torch.randperm(num_tokens * top_k, generator=generator)
    routes = routes[: round(share_kept * num_tokens * top_k)]
    slots = torch.full((num_tokens * top_k,), len(routes))
    slots[routes] = torch.arange(len(routes))
    return routes // top_k, slots.view(num_tokens, top_k)


def plain_gather(x: Tensor, token_ids: Tensor) -> Tensor:
    return x[token_ids]


def plain_combine(y: Tensor, weights: Tensor, slots: Tensor) -> Tensor:
    rows = torch.cat([y.double(), y.new_zeros(1, y.shape[1]).double()])
    return (rows[slots] * weights.double()[..., None]).sum(1)


CASES = [(37, 1, 1.0), (37, 2, 1.0), (37, 3, 0.6), (37, 1, 0.5), (1, 1, 1.0), (1, 2, 0.5), (5, 2, 0.0), (0, 2, 1.0)]


@pytest.mark.parametrize(("num_tokens", "top_k", "share_kept"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gather_and_its_gradient(num_tokens: int, top_k: int, share_kept: float, dtype: torch.dtype) -> None:
    token_ids, slots = tables(num_tokens, top_k, share_kept=share_kept)
    x = leaf(num_tokens, HIDDEN, seed=1).detach().to(dtype).requires_grad_()
    rows = gather_tokens(x, token_ids, slots)
    assert torch.equal(rows, plain_gather(x, token_ids))
    grad = leaf(*rows.shape, seed=2).detach().to(dtype)
    (got,) = torch.autograd.grad(rows, x, grad)
    wide = x.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(plain_gather(wide, token_ids), wide, grad.double())
    # Summed in fp32 and rounded once, in either dtype.
    torch.testing.assert_close(got, wanted.to(dtype))


@pytest.mark.parametrize(("num_tokens", "top_k", "share_kept"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_combine_and_its_gradients(num_tokens: int, top_k: int, share_kept: float, dtype: torch.dtype) -> None:
    token_ids, slots = tables(num_tokens, top_k, share_kept=share_kept)
    y = leaf(len(token_ids), HIDDEN, seed=1).detach().to(dtype).requires_grad_()
    weights = leaf(num_tokens, top_k, seed=2)
    out = combine_tokens(y, weights, token_ids, slots)
    wanted = plain_combine(y, weights, slots)
    assert out.dtype == dtype
    torch.testing.assert_close(out, wanted.to(dtype))
    grad = leaf(*out.shape, seed=3).detach().to(dtype)
    got = torch.autograd.grad(out, (y, weights), grad)
    expected = torch.autograd.grad(wanted, (y, weights), grad.double())
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_dropped_token_is_exactly_zero_whatever_its_weight() -> None:
    token_ids, slots = torch.tensor([0]), torch.tensor([[0], [1]])
    out = combine_tokens(torch.ones(1, 3), torch.tensor([[2.0], [7.0]]), token_ids, slots)
    assert torch.equal(out, torch.tensor([[2.0, 2.0, 2.0], [0.0, 0.0, 0.0]]))


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("capacity", [1, 4, 9, 37])
def test_equals_the_one_hot_einsum(top_k: int, capacity: int) -> None:
    num_experts = 5
    generator = torch.Generator().manual_seed(0)
    expert_ids = torch.stack([torch.randperm(num_experts, generator=generator)[:top_k] for _ in range(NUM_TOKENS)])
    x, weights = leaf(NUM_TOKENS, HIDDEN, seed=1), leaf(NUM_TOKENS, top_k, seed=2)
    expert_scale = torch.arange(1.0, num_experts + 1)

    mask, combine = reference.one_hot_masks(expert_ids, weights, num_experts, capacity)
    wanted = reference.one_hot_combine(reference.one_hot_dispatch(x, mask) * expert_scale[:, None, None], combine)

    seen = [0] * num_experts
    rows: list[tuple[int, int, int]] = []
    for choice in range(top_k):
        for token in range(NUM_TOKENS):
            expert = int(expert_ids[token, choice])
            if seen[expert] < capacity:
                rows.append((expert, token, choice))
            seen[expert] += 1
    rows.sort(key=lambda row: row[0])
    slots = torch.full((NUM_TOKENS, top_k), len(rows))
    for row, (_, token, choice) in enumerate(rows):
        slots[token, choice] = row
    token_ids = torch.tensor([token for _, token, _ in rows])
    scales = expert_scale[[expert for expert, _, _ in rows]][:, None]
    out = combine_tokens(gather_tokens(x, token_ids, slots) * scales, weights, token_ids, slots)

    torch.testing.assert_close(out, wanted)
    grad = leaf(NUM_TOKENS, HIDDEN, seed=3).detach()
    got = torch.autograd.grad(out, (x, weights), grad)
    for mine, theirs in zip(got, torch.autograd.grad(wanted, (x, weights), grad), strict=True):
        torch.testing.assert_close(mine, theirs)
