"""RMSNorm and LayerNorm over the last dimension, with fp32 weights and statistics whatever the input's dtype.

In C++ where there is a CPU library: one pass over the data each way, where PyTorch's RMSNorm is a chain of element-wise
operations. On CUDA one kernel in Triton, for inference. Without either RMSNorm's backward is PyTorch's LayerNorm kernel
with a mean of zero, plus the rank-one term in which the two gradients differ.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.kernels import products, select
from moesaic.kernels.addresses import address_of
from moesaic.kernels.gradient import once_differentiable

_LAYER_NORM_SIZE = 1 << 18  # below it PyTorch's LayerNorm is done before an operator of ours has begun


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """Return LayerNorm of x (..., H) in x's dtype; weight and bias (H,) are fp32."""
    if x.dtype is torch.float64:
        return F.layer_norm(x, weight.shape, weight.double(), bias.double(), epsilon)
    if _infers_on_cuda(x, weight):
        return _norm_on_cuda(x, weight, bias, epsilon)
    # In fp32 PyTorch's is as fast as ours, but its gradients depend on the number of threads.
    if x.numel() >= _LAYER_NORM_SIZE and _has_kernel(x, weight):
        return torch.ops.moesaic.norm(x, weight, bias, epsilon)[0]
    if x.device.type == "cpu" or x.dtype == weight.dtype:
        return F.layer_norm(x, weight.shape, weight, bias, epsilon)
    return F.layer_norm(x.float(), weight.shape, weight, bias, epsilon).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + epsilon) * weight for x (..., H), in x's dtype; weight (H,) is fp32."""
    if x.dtype is torch.float64:
        return F.rms_norm(x, weight.shape, weight.double(), epsilon)
    if _infers_on_cuda(x, weight):
        return _norm_on_cuda(x, weight, None, epsilon)
    if x.device.type != "cpu":
        return F.rms_norm(x.float(), weight.shape, weight, epsilon).to(x.dtype)
    if _has_kernel(x, weight):
        return torch.ops.moesaic.norm(x, weight, None, epsilon)[0]
    return _RmsNorm.apply(x, weight, epsilon)


def _infers_on_cuda(x: Tensor, weight: Tensor) -> bool:
    return not torch.is_grad_enabled() and weight.dtype == torch.float32 and select.uses_triton(x.device)


def _norm_on_cuda(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    from moesaic.kernels.triton import rows

    return rows.norm(x, weight, bias, epsilon)


def _has_kernel(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.bfloat16, torch.float32)
        and weight.dtype == torch.float32
        and select.cpu_library() is not None
    )


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, epsilon):  # type: ignore[no-untyped-def]
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = torch.rsqrt(norm.square().div_(x.shape[-1]).add_(epsilon))  # (..., 1) fp32
        normed = torch.mul(x, inverse, out=torch.empty_like(x, dtype=torch.float32))
        ctx.save_for_backward(x, inverse, weight)
        return torch.mul(normed, weight, out=torch.empty_like(x))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, inverse, weight = ctx.saved_tensors
        size = x.shape[-1]
        grad = grad.contiguous()
        grad_x, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, [size], torch.zeros_like(inverse), inverse, weight, torch.zeros_like(weight), [True, True, False]
        )
        # LayerNorm's kernel subtracted inverse * mean(grad * weight) from every element of a row.
        mean = products.mm(grad.view(-1, size), weight.to(grad.dtype)[:, None]).view(inverse.shape).float().div_(size)
        return grad_x.add_((mean * inverse).to(grad_x.dtype)), grad_weight, None


@torch.library.custom_op("moesaic::norm", mutates_args=(), device_types="cpu")
def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm, or RMSNorm without a bias: the result, and each row's mean (RMSNorm: none) and inverse deviation."""
    size = x.shape[-1]
    assert weight.shape == (size,) and (bias is None or bias.shape == (size,)), (x.shape, weight.shape, bias)
    assert bias is None or bias.dtype == torch.float32, bias.dtype
    x, weight = x.contiguous(), weight.contiguous()
    num_rows = x.numel() // max(size, 1)
    y = torch.empty_like(x)
    inverse = torch.empty(num_rows, dtype=torch.float32, device="cpu")
    mean = torch.empty(0 if bias is None else num_rows, dtype=torch.float32, device="cpu")
    bias = None if bias is None else bias.contiguous()
    select.required_cpu_library().function("moesaic_norm", "piiippfppp")(
        x.data_ptr(),
        x.dtype == torch.bfloat16,
        num_rows,
        size,
        weight.data_ptr(),
        address_of(bias),
        epsilon,
        y.data_ptr(),
        None if bias is None else mean.data_ptr(),
        inverse.data_ptr(),
    )
    return y, mean, inverse


@_norm.register_fake
def _(x, weight, bias, epsilon):  # type: ignore[no-untyped-def]
    num_rows = x.numel() // max(x.shape[-1], 1)
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        weight.new_empty(0 if bias is None else num_rows),
        weight.new_empty(num_rows),
    )


@torch.library.custom_op("moesaic::norm_backward", mutates_args=(), device_types="cpu")
def _norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias (none for RMSNorm)."""
    size = x.shape[-1]
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    mean, inverse = mean.contiguous(), inverse.contiguous()
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
    grad_bias = torch.empty(size if has_bias else 0, dtype=torch.float32, device="cpu")
    select.required_cpu_library().function("moesaic_norm_backward", "ppiiipppppp")(
        grad.data_ptr(),
        x.data_ptr(),
        x.dtype == torch.bfloat16,
        inverse.numel(),
        size,
        weight.data_ptr(),
        mean.data_ptr() if has_bias else None,
        inverse.data_ptr(),
        grad_x.data_ptr(),
        grad_weight.data_ptr(),
        grad_bias.data_ptr() if has_bias else None,
    )
    return grad_x, grad_weight, grad_bias


@_norm_backward.register_fake
def _(grad, x, weight, mean, inverse, has_bias):  # type: ignore[no-untyped-def]
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(weight, memory_format=torch.contiguous_format),
        weight.new_empty(x.shape[-1] if has_bias else 0),
    )


def _keep_for_norm_backward(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weight, bias, _ = inputs
    ctx.save_for_backward(x, weight, output[1], output[2])
    ctx.has_bias = bias is not None


def _backward_of_norm(ctx, grad, *_):  # type: ignore[no-untyped-def]
    x, weight, mean, inverse = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = torch.ops.moesaic.norm_backward(grad, x, weight, mean, inverse, ctx.has_bias)
    return grad_x, grad_weight, grad_bias if ctx.has_bias else None, None


_norm.register_autograd(_backward_of_norm, setup_context=_keep_for_norm_backward)
