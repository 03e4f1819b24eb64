"""The rotation of rotary positions in C++, forward and backward, and on CUDA in Triton for inference.

The definition is model/rotary.rotate.
"""

import torch
from torch import Tensor

from moesaic.kernels import select


def can_rotate(x: Tensor) -> bool:
    """Whether rotate takes x (B, S, A, D)."""
    if x.dtype not in (torch.float32, torch.bfloat16):
        return False
    if x.device.type == "cpu":
        return select.cpu_library() is not None
    return not torch.is_grad_enabled() and select.uses_triton(x.device)


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn x (B, S, A, D) by the rows of tables (S, D/2): channels i and i + D/2 of a head are a pair.

    Computed in fp32 and rounded once to x's dtype. Mixed precision of fully sharded training hands over rounded tables.
    """
    assert x.dim() == 4 and x.shape[3] % 2 == 0, x.shape
    assert cosines.shape == sines.shape == (x.shape[1], x.shape[3] // 2), (x.shape, cosines.shape, sines.shape)
    if x.device.type != "cpu":
        from moesaic.kernels.triton import rows

        return rows.rotate(x, cosines.float(), sines.float())
    return torch.ops.moesaic.rotate(x, cosines.float(), sines.float(), False)


@torch.library.custom_op("moesaic::rotate", mutates_args=(), device_types="cpu")
def _rotate(x: Tensor, cosines: Tensor, sines: Tensor, backwards: bool) -> Tensor:
    library = select.required_cpu_library()
    batch, length, num_heads, head_dim = x.shape
    if x.stride()[2:] != (head_dim, 1):
        x = x.contiguous()
    cosines, sines = cosines.contiguous(), sines.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device="cpu")
    library.function("moesaic_rotate", "p" + "i" * 7 + "ppip")(
        x.data_ptr(),
        x.dtype == torch.bfloat16,
        batch,
        length,
        num_heads,
        head_dim,
        x.stride(0),
        x.stride(1),
        cosines.data_ptr(),
        sines.data_ptr(),
        backwards,
        out.data_ptr(),
    )
    return out


@_rotate.register_fake
def _(x, cosines, sines, backwards):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


def _keep_tables(ctx, inputs, output):  # type: ignore[no-untyped-def]
    _, cosines, sines, ctx.backwards = inputs
    ctx.save_for_backward(cosines, sines)


def _turn_back(ctx, grad):  # type: ignore[no-untyped-def]
    cosines, sines = ctx.saved_tensors
    return torch.ops.moesaic.rotate(grad, cosines, sines, not ctx.backwards), None, None, None


_rotate.register_autograd(_turn_back, setup_context=_keep_tables)
