"""The plan keeps exactly the routes that each policy's definition keeps; dispatch and combine move what it says."""

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from moesaic.config.model import CapacityConfig
from moesaic.kernels.reference import moe as reference
from moesaic.moe.dispatch import DispatchPlan, LocalDispatcher, expert_capacity, plan_dispatch

NUM_EXPERTS = 5


def random_choice(num_tokens: int, top_k: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(NUM_EXPERTS, generator=generator)[:top_k] for _ in range(num_tokens)]
    return torch.stack(rows) if rows else torch.zeros(0, top_k, dtype=torch.int64)


def kept_by_definition(
    expert_ids: Tensor, valid: Tensor | None, capacity: int | None, priority: Tensor | None
) -> list[list[tuple[int, int]]]:
    """Per expert, its routes (token, choice) in order: falling priority, then first choices, then arrival."""
    num_tokens, top_k = expert_ids.shape
    routes: list[list[tuple[float, int, int]]] = [[] for _ in range(NUM_EXPERTS)]
    for choice in range(top_k):
        for token in range(num_tokens):
            if valid is None or valid[token]:
                rank = 0.0 if priority is None or capacity is None else -priority[token, choice].item()
                routes[int(expert_ids[token, choice])].append((rank, choice, token))
    return [[(token, choice) for _, choice, token in sorted(each)[:capacity]] for each in routes]


def check_plan(plan: DispatchPlan, kept: list[list[tuple[int, int]]], shape: tuple[int, int]) -> None:
    in_order = [route for each in kept for route in each]
    assert plan.tokens_per_expert.tolist() == [len(each) for each in kept]
    assert plan.token_ids.tolist() == [token for token, _ in in_order]
    slots = torch.full(shape, len(in_order))
    for row, (token, choice) in enumerate(in_order):
        slots[token, choice] = row
    assert torch.equal(plan.slots, slots)
    assert plan.is_complete == (len(in_order) == shape[0] * shape[1])
    if plan.kept is None:
        assert plan.is_complete
    else:
        assert torch.equal(plan.kept, slots < len(in_order))


def masks(num_tokens: int) -> dict[str, Tensor | None]:
    holes = torch.rand(num_tokens, generator=torch.Generator().manual_seed(1)) < 0.7
    none = torch.zeros(num_tokens, dtype=torch.bool)
    return {"no mask": None, "holes": holes, "all": ~none, "none": none}


@pytest.mark.parametrize("capacity", [None, 0, 1, 4, 9, 37, 1000])
@pytest.mark.parametrize("has_priority", [False, True])
@pytest.mark.parametrize(("num_tokens", "top_k"), [(0, 2), (1, 1), (1, 3), (37, 1), (37, 2), (37, 5)])
def test_the_kept_routes_are_those_of_the_definition(
    num_tokens: int, top_k: int, has_priority: bool, capacity: int | None
) -> None:
    expert_ids = random_choice(num_tokens, top_k)
    priority = None
    if has_priority:  # one decimal: many ties
        priority = torch.rand(num_tokens, top_k, generator=torch.Generator().manual_seed(2)).mul(10).round() / 10
    for valid in masks(num_tokens).values():
        plan = plan_dispatch(expert_ids, NUM_EXPERTS, valid=valid, capacity=capacity, priority=priority)
        check_plan(plan, kept_by_definition(expert_ids, valid, capacity, priority), (num_tokens, top_k))


def test_first_choices_come_before_second_ones() -> None:
    """Token 0's second choice is expert 1; it loses its place to token 2's first choice, though it came earlier."""
    expert_ids = torch.tensor([[0, 1], [1, 0], [1, 2]])
    plan = plan_dispatch(expert_ids, 3, capacity=2)
    assert plan.kept is not None
    assert plan.kept.tolist() == [[True, False], [True, True], [True, True]]


def test_all_tokens_to_one_expert() -> None:
    expert_ids = torch.full((37, 1), 3)
    plan = plan_dispatch(expert_ids, NUM_EXPERTS, capacity=8)
    assert plan.tokens_per_expert.tolist() == [0, 0, 0, 8, 0]
    assert plan.token_ids.tolist() == list(range(8))


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k", "factor", "min_capacity", "capacity"),
    [
        (100, 10, 1, 1.0, 4, 10),
        (101, 10, 1, 1.0, 4, 11),
        (100, 10, 2, 1.25, 4, 25),
        (30, 10, 1, 0.1, 1, 1),
        (300, 10, 1, 0.1, 1, 3),  # 0.1 * 30 is more than 3 in floating point; ceil must not make 4 of it
        (100, 128, 1, 1.0, 4, 4),
        (2, 128, 1, 1.0, 4, 2),
        (10, 2, 2, 5.0, 4, 10),
        (0, 8, 1, 1.0, 4, 0),
    ],
)
def test_capacity(
    num_tokens: int, num_experts: int, top_k: int, factor: float, min_capacity: int, capacity: int
) -> None:
    config = CapacityConfig(factor=factor, min_capacity=min_capacity)
    assert expert_capacity(num_tokens, num_experts, top_k=top_k, config=config) == capacity


def test_capacity_is_exact_for_decimal_factors() -> None:
    for num_tokens in range(1, 400, 7):
        for factor in ("0.1", "0.7", "1.05", "1.1", "1.25", "2.3"):
            for num_experts in (3, 7, 10, 64):
                config = CapacityConfig(factor=float(factor), min_capacity=1)
                exact = math.ceil(Fraction(factor) * num_tokens * 2 / num_experts)
                got = expert_capacity(num_tokens, num_experts, top_k=2, config=config)
                assert got == min(max(exact, 1), num_tokens), (num_tokens, factor, num_experts)


def test_dropless_has_no_capacity() -> None:
    assert expert_capacity(100, 4, top_k=1, config=CapacityConfig()) is None


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("capacity", [1, 4, 9, 37])
def test_equals_the_one_hot_einsum(top_k: int, capacity: int) -> None:
    expert_ids = random_choice(37, top_k)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(37, 24, generator=generator).requires_grad_()
    weights = torch.rand(37, top_k, generator=generator).requires_grad_()
    scale = torch.randn(NUM_EXPERTS, 24, generator=generator)

    mask, combine = reference.one_hot_masks(expert_ids, weights, NUM_EXPERTS, capacity)
    expert_inputs = reference.one_hot_dispatch(x, mask)  # (E, C, H)
    wanted = reference.one_hot_combine(expert_inputs * scale[:, None], combine)

    dispatcher = LocalDispatcher()
    dispatched = dispatcher.dispatch(x, plan_dispatch(expert_ids, NUM_EXPERTS, capacity=capacity))
    filled = [expert_inputs[expert, :count] for expert, count in enumerate(dispatched.tokens_per_expert.tolist())]
    torch.testing.assert_close(dispatched.tokens, torch.cat(filled))
    rows = dispatched.tokens * scale.repeat_interleave(dispatched.tokens_per_expert, 0)
    out = dispatcher.combine(rows, weights, dispatched.receipt)
    torch.testing.assert_close(out, wanted)

    grad = torch.randn(37, 24, generator=generator)
    got = torch.autograd.grad(out, (x, weights), grad)
    for mine, theirs in zip(got, torch.autograd.grad(wanted, (x, weights), grad), strict=True):
        torch.testing.assert_close(mine, theirs)
