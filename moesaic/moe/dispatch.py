"""From routes to rows sorted by expert and back: a counting sort, capacity, and index tables.

A dispatcher has two methods: `dispatch` returns the rows, their counts and a frozen receipt; `combine` takes the
receipt back. The local one is here; that for experts on other processes is parallel/dispatch.py's.
"""

import math
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from moesaic.config.model import CapacityConfig
from moesaic.kernels import routing
from moesaic.kernels.permute import combine_tokens, gather_tokens
from moesaic.moe.tensor_tree import tensor_tree


@tensor_tree
@dataclass(frozen=True)
class DispatchPlan:
    """Where every route goes; integers only, so that it can be recorded and replayed.

    Shapes: token_ids (N,) int64, the token of each row in expert order; slots (T, K) int64, the row of each route, N
    for a dropped or padding one; tokens_per_expert (E,) int64, the rows of each expert.
    """

    token_ids: Tensor
    slots: Tensor
    tokens_per_expert: Tensor

    @property
    def is_complete(self) -> bool:
        """Whether every route was kept."""
        return self.token_ids.shape[0] == self.slots.numel()

    @property
    def kept(self) -> Tensor | None:
        """(T, K) bool, or None when every route was kept."""
        return None if self.is_complete else self.slots < self.token_ids.shape[0]

    def of_experts(self, first: int, last: int) -> "DispatchPlan":
        """Return the plan of the experts from first to last alone, for which all other routes are dropped."""
        before = torch.stack([self.tokens_per_expert[:each].sum() for each in (first, last)])
        start, end = before.tolist()
        is_own = (self.slots >= start) & (self.slots < end)
        slots = (self.slots - start).masked_fill(~is_own, end - start)
        return DispatchPlan(self.token_ids[start:end], slots, self.tokens_per_expert[first:last])


def expert_capacity(num_tokens: int, num_experts: int, *, top_k: int, config: CapacityConfig) -> int | None:
    """Return the tokens an expert takes at most, None when dropless; num_tokens counts unpadded tokens."""
    if config.factor is None:
        return None
    # Rounded before ceil: 0.1 * 30 is 3.0000000000000004, and no user means 4 by it.
    wanted = math.ceil(round(num_tokens * top_k * config.factor / num_experts, 9))
    return min(max(wanted, config.min_capacity), num_tokens)


def plan_dispatch(
    expert_ids: Tensor,
    num_experts: int,
    *,
    valid: Tensor | None = None,
    capacity: int | None = None,
    priority: Tensor | None = None,
) -> DispatchPlan:
    """Sort routes by expert and keep at most capacity of each.

    Within an expert, routes stand in order of falling priority (T, K), and where that ties (always, without one) first
    choices come before second ones, then tokens in order of arrival.

    Shapes: expert_ids (T, K) int64; valid (T,) bool, False for padding, which goes nowhere.
    """
    if (priority is None or capacity is None) and routing.can_plan(expert_ids):
        return DispatchPlan(*routing.plan_dispatch(expert_ids, num_experts, valid=valid, capacity=capacity))
    num_tokens, top_k = expert_ids.shape
    device = expert_ids.device
    flat = expert_ids.t().reshape(-1)  # (K*T,), choice-major
    if valid is not None:
        flat = flat.masked_fill(~valid.repeat(top_k), num_experts)
    if priority is None or capacity is None:
        order = torch.argsort(flat, stable=True)
    else:
        by_priority = torch.argsort(priority.t().reshape(-1), descending=True, stable=True)
        order = by_priority[torch.argsort(flat[by_priority], stable=True)]
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=device)
    counts.scatter_add_(0, flat, torch.ones_like(flat))
    tokens_per_expert = counts[:num_experts]
    if capacity is not None or valid is not None:
        sorted_experts = flat[order]
        keep = sorted_experts < num_experts
        if capacity is not None:
            starts = counts.cumsum(0) - counts
            keep &= torch.arange(order.shape[0], device=device) - starts[sorted_experts] < capacity
            tokens_per_expert = tokens_per_expert.clamp_max(capacity)
        order = order[keep]
    slots = torch.full_like(flat, order.shape[0])
    slots[order] = torch.arange(order.shape[0], device=device)
    return DispatchPlan(
        token_ids=order % max(num_tokens, 1),
        slots=slots.view(top_k, num_tokens).t().contiguous(),
        tokens_per_expert=tokens_per_expert,
    )


# What a dispatcher remembers of its own, in a type of its own.
Receipt = TypeVar("Receipt")


@dataclass(frozen=True)
class Dispatched(Generic[Receipt]):
    """Rows for the experts of this rank.

    Shapes: tokens (N, H), sorted by expert; tokens_per_expert (E_local,) int64. receipt: for combine.
    """

    tokens: Tensor
    tokens_per_expert: Tensor
    receipt: Receipt


class Dispatcher(Protocol[Receipt]):
    """Brings tokens to their experts and the experts' outputs back."""

    def dispatch(self, x: Tensor, plan: DispatchPlan) -> Dispatched[Receipt]: ...

    def combine(self, y: Tensor, routing_weights: Tensor, receipt: Receipt) -> Tensor: ...


class LocalDispatcher:
    """All experts on this device: a gather there, a weighted sum of gathers back."""

    def dispatch(self, x: Tensor, plan: DispatchPlan) -> Dispatched[DispatchPlan]:
        """Shapes: x (T, H)."""
        return Dispatched(gather_tokens(x, plan.token_ids, plan.slots), plan.tokens_per_expert, plan)

    def combine(self, y: Tensor, routing_weights: Tensor, receipt: DispatchPlan) -> Tensor:
        """Shapes: y (N, H), routing_weights (T, K) fp32; result (T, H)."""
        return combine_tokens(y, routing_weights, receipt.token_ids, receipt.slots)
