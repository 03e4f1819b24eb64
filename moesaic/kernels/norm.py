"""RMSNorm and LayerNorm over the last dimension, with fp32 weights and statistics whatever the input's dtype.

PyTorch's LayerNorm is fast on the CPU; its RMSNorm backward is a chain of element-wise operations that takes three
times as long. The two gradients differ by one rank-one term, so RMSNorm's backward here is LayerNorm's kernel with a
mean of zero, plus that term.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """Return LayerNorm of x (..., H) in x's dtype; weight and bias (H,) are fp32."""
    if x.device.type == "cpu" or x.dtype == weight.dtype:
        return F.layer_norm(x, weight.shape, weight, bias, epsilon)
    return F.layer_norm(x.float(), weight.shape, weight, bias, epsilon).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + epsilon) * weight for x (..., H), in x's dtype; weight (H,) is fp32."""
    if x.device.type != "cpu":
        return F.rms_norm(x.float(), weight.shape, weight, epsilon).to(x.dtype)
    return _RmsNorm.apply(x, weight, epsilon)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, epsilon):  # type: ignore[no-untyped-def]
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = torch.rsqrt(norm.square().div_(x.shape[-1]).add_(epsilon))  # (..., 1) fp32
        normed = torch.mul(x, inverse, out=torch.empty_like(x, dtype=torch.float32))
        ctx.save_for_backward(x, inverse, weight)
        return torch.mul(normed, weight, out=torch.empty_like(x))

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, inverse, weight = ctx.saved_tensors
        size = x.shape[-1]
        grad = grad.contiguous()
        grad_x, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, [size], torch.zeros_like(inverse), inverse, weight, torch.zeros_like(weight), [True, True, False]
        )
        # LayerNorm's kernel subtracted inverse * mean(grad * weight) from every element of a row.
        mean = (grad.view(-1, size) @ weight.to(grad.dtype)).view(inverse.shape).float().div_(size)
        return grad_x.add_((mean * inverse).to(grad_x.dtype)), grad_weight, None
