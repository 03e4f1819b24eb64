"""Tokens to experts that live on other processes, and the outputs back: two all-to-alls there, one back.

Rank r of a group of P has the experts from r E / P on. A row travels once for each of its routes that was kept, in the
tokens' dtype; routing weights stay at home, where outputs are summed in fp32.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.kernels.gradient import once_differentiable
from moesaic.kernels.permute import combine_tokens, gather_tokens
from moesaic.kernels.tracing import untraced
from moesaic.moe.dispatch import Dispatched, DispatchPlan


@dataclass(frozen=True)
class _Receipt:
    """Where rows came from. home: the plan of this rank's tokens. sent, received: rows to and from each rank.

    order (M,), place (M, 1): of the rows received, as `gather_tokens` and `combine_tokens` take them.
    """

    home: DispatchPlan
    sent: list[int]
    received: list[int]
    order: Tensor
    place: Tensor


class AllToAllDispatcher:
    """A Dispatcher (moe/dispatch.py) for experts that are spread over the ranks of a group.

    Every rank has to run the same layers in the same order, with however many tokens, none included. A group of one
    rank needs none of this.
    """

    def __init__(self, group: dist.ProcessGroup, num_experts: int) -> None:
        self.group = group
        self.num_ranks = group.size()
        assert num_experts % self.num_ranks == 0, (num_experts, self.num_ranks)

    @untraced
    def dispatch(self, x: Tensor, plan: DispatchPlan) -> Dispatched[_Receipt]:
        """Return the rows for this rank's experts, of x (T, H) here and on the others.

        Rows of an expert stand in the order of the ranks that they come from.
        """
        counts = plan.tokens_per_expert.view(self.num_ranks, -1)  # (P, E / P), to each rank
        incoming = torch.empty_like(counts)  # from each rank
        dist.all_to_all_single(incoming, counts.contiguous(), group=self.group)
        sent, received = counts.sum(1).tolist(), incoming.sum(1).tolist()
        rows = exchange_rows(gather_tokens(x, plan.token_ids, plan.slots), sent, received, self.group)
        order, place = _by_expert(incoming)
        return Dispatched(
            gather_tokens(rows, order, place), incoming.sum(0), _Receipt(plan, sent, received, order, place)
        )

    @untraced
    def combine(self, y: Tensor, routing_weights: Tensor, receipt: _Receipt) -> Tensor:
        """Return (T, H) for the outputs y (M, H) of this rank's experts and the weights (T, K) of its own tokens."""
        back = gather_tokens(y, receipt.place[:, 0], receipt.order[:, None])
        rows = exchange_rows(back, receipt.received, receipt.sent, self.group)
        return combine_tokens(rows, routing_weights, receipt.home.token_ids, receipt.home.slots)


def _by_expert(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return for counts (P, E) of rows sorted by rank and then by expert: order (M,) and place (M, 1).

    order: the rows sorted by expert and then by rank. place: where each row goes.
    """
    num_ranks, num_experts = counts.shape
    experts = torch.arange(num_experts, device=counts.device).repeat(num_ranks)
    of_rows = experts.repeat_interleave(counts.reshape(-1))
    order = torch.argsort(of_rows, stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return order, place[:, None]


def exchange_rows(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    """Return the rows (sum of received, H) that the ranks of a group have for this one, in their order.

    rows (sum of sent, H): for each rank, in their order. The gradient travels the other way.
    """
    return _Exchange.apply(rows, sent, received, group)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _all_to_all(rows, sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grad, ctx.received, ctx.sent, ctx.group), None, None, None


def _all_to_all(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    out = rows.new_empty(sum(received), rows.shape[1])
    dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
    return out
