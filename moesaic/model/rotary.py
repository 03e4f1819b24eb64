"""Rotary positions: pairs (i, i + D/2) of a head's channels turned by position * theta^(-2i/D).

The half-split pairing is the one of Hugging Face's Llama. Source: RoFormer (arXiv 2104.09864).
"""

import torch
from torch import Tensor

from moesaic.kernels import rotary


def rotary_table(num_positions: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (num_positions, D/2), fp32."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float64) / head_dim)
    angles = torch.arange(num_positions, device=device, dtype=torch.float64)[:, None] * frequencies
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn x (B, S, A, D) by the tables' rows (S, D/2), in x's dtype."""
    if rotary.can_rotate(x):
        return rotary.rotate(x, cosines, sines)
    return _Rotate.apply(x, cosines.to(x.dtype)[:, None], sines.to(x.dtype)[:, None])


def _turn(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(first, cosines, out=out_first)
    out_first.addcmul_(second, sines, value=-1)
    torch.mul(second, cosines, out=out_second)
    out_second.addcmul_(first, sines)
    return out


class _Rotate(torch.autograd.Function):
    """A rotation's gradient is the rotation back."""

    @staticmethod
    def forward(ctx, x, cosines, sines):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(cosines, sines)
        return _turn(x, cosines, sines)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        cosines, sines = ctx.saved_tensors
        return _turn(grad, cosines, -sines), None, None
