"""Moving tokens to their experts and back by index tables: gathers both ways, never a scatter with collisions.

A table has two sides: `token_ids` (N,), the token of every sorted row, and `slots` (T, K), the row of every route, or N
where the route was dropped or the token is padding. The oracle is the one-hot einsum in kernels/reference.
"""

import torch
from torch import Tensor


def _pad_row(rows: Tensor) -> Tensor:
    """Append a row of zeros, which the slot N of dropped routes points at."""
    return torch.cat([rows, rows.new_zeros(1, rows.shape[1])])


def _sum_routes(rows: Tensor, slots: Tensor, is_complete: bool) -> Tensor:
    """(N, H), (T, K) -> (T, H): the sum over each token's routes, in fp32 when there is more than one."""
    if not is_complete:
        rows = _pad_row(rows)
    if slots.shape[1] == 1:
        return rows.index_select(0, slots[:, 0])
    total = rows.index_select(0, slots[:, 0]).float()
    for choice in range(1, slots.shape[1]):
        total += rows.index_select(0, slots[:, choice])
    return total.to(rows.dtype)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, token_ids, slots):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(slots)
        ctx.is_complete = token_ids.shape[0] == slots.numel()
        return x.index_select(0, token_ids)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (slots,) = ctx.saved_tensors
        return _sum_routes(grad, slots, ctx.is_complete), None, None


def gather_tokens(x: Tensor, token_ids: Tensor, slots: Tensor) -> Tensor:
    """Return the rows (N, H) of x (T, H) in expert order; the gradient comes back as a sum of gathers."""
    return _Gather.apply(x, token_ids, slots)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, routing_weights, token_ids, slots):  # type: ignore[no-untyped-def]
        is_complete = token_ids.shape[0] == slots.numel()
        rows = y if is_complete else _pad_row(y)
        if slots.shape[1] == 1:
            gathered = rows.index_select(0, slots[:, 0])
            out = torch.mul(gathered, routing_weights, out=torch.empty_like(gathered))  # multiplied in fp32
        else:
            total = torch.zeros(slots.shape[0], y.shape[1], dtype=torch.float32, device=y.device)
            for choice in range(slots.shape[1]):
                total.addcmul_(rows.index_select(0, slots[:, choice]).float(), routing_weights[:, choice : choice + 1])
            out = total.to(y.dtype)
        ctx.save_for_backward(y, routing_weights, token_ids, slots)
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        y, routing_weights, token_ids, slots = ctx.saved_tensors
        grad_rows = grad.index_select(0, token_ids)  # (N, H)
        grad_y = grad_weights = None
        flat_slots = slots.reshape(-1)
        num_rows = y.shape[0]
        if ctx.needs_input_grad[1]:
            per_row = (grad_rows.float() * y).sum(-1)  # (N,) fp32
            grad_weights = torch.cat([per_row, per_row.new_zeros(1)])[flat_slots].view_as(slots)
        if ctx.needs_input_grad[0]:
            row_weights = routing_weights.new_zeros(num_rows + 1)
            row_weights[flat_slots] = routing_weights.reshape(-1)
            grad_y = torch.mul(grad_rows, row_weights[:num_rows, None], out=torch.empty_like(grad_rows))
        return grad_y, grad_weights, None, None


def combine_tokens(y: Tensor, routing_weights: Tensor, token_ids: Tensor, slots: Tensor) -> Tensor:
    """Return (T, H): the sum over each token's routes of routing_weight * y[slot], summed in fp32.

    Shapes: y (N, H); routing_weights (T, K) fp32; token_ids (N,); slots (T, K), N for a dropped route.
    """
    return _Combine.apply(y, routing_weights, token_ids, slots)
