"""MLP activations as in-place-friendly forward and backward pairs, so that only the pre-activation need be saved."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from moesaic.kernels import products, select
from moesaic.kernels.addresses import address_of
from moesaic.kernels.gradient import once_differentiable

# In this order in source/activation_math.h.
ACTIVATIONS = ("swiglu", "gelu", "gelu_tanh", "swiglu_oai")

# swiglu_oai, of gpt-oss (its reference implementation, and its model card, arXiv 2508.10925).
OAI_LIMIT, OAI_SLOPE = 7.0, 1.702


def is_gated(activation: str) -> bool:
    """Whether it multiplies two halves of the pre-activation, [gate, up]."""
    return activation in ("swiglu", "swiglu_oai")


def activate(pre: Tensor, activation: str) -> Tensor:
    """Return the activation of pre: (N, F) for gelu and gelu_tanh, (N, 2F) as [gate, up] -> (N, F) for gated ones."""
    assert pre.dim() == 2 and (not is_gated(activation) or pre.shape[1] % 2 == 0), (pre.shape, activation)
    if _has_kernel(pre, activation):
        return torch.ops.moesaic.activate(pre, activation)
    if activation == "swiglu":
        gate, up = pre.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)
    if is_gated(activation):
        gate, up = pre.chunk(2, dim=-1)
        return activate_gated(gate, up, activation)
    return F.gelu(pre, approximate="tanh" if activation == "gelu_tanh" else "none")


def activate_gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Return the activation of gate and up (N, F), which autograd can follow."""
    if activation == "swiglu":
        return F.silu(gate) * up
    dtype = gate.dtype
    gate, up = _widened(gate).clamp(max=OAI_LIMIT), _widened(up).clamp(-OAI_LIMIT, OAI_LIMIT) + 1
    return (gate * torch.sigmoid(OAI_SLOPE * gate) * up).to(dtype)


def _widened(x: Tensor) -> Tensor:
    """In fp32 at least: steps in bf16 are off by 3 %, and most of a gradient is lost where its terms cancel."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def activate_and_backward(grad: Tensor, pre: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Return the activation of pre once more, and the gradient of pre, given the gradient (N, F) of the activation."""
    assert grad.dtype == pre.dtype, (grad.dtype, pre.dtype)
    if _has_kernel(pre, activation):
        return torch.ops.moesaic.activate_backward(grad, pre, activation)
    if activation == "swiglu":
        gate, up = pre.chunk(2, dim=-1)
        if is_dynamo_compiling():  # a result that is written into a part of a tensor breaks its graph
            silu = F.silu(gate)
            grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
            return silu * up, torch.cat([grad_gate, silu * grad], -1)
        grad_pre = torch.empty_like(pre)
        grad_gate, grad_up = grad_pre.chunk(2, dim=-1)
        activated = F.silu(gate)
        torch.mul(activated, grad, out=grad_up)
        activated *= up
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return activated, grad_pre
    if activation == "swiglu_oai":
        gate, up = _widened(pre).chunk(2, dim=-1)
        bounded, shifted = gate.clamp(max=OAI_LIMIT), up.clamp(-OAI_LIMIT, OAI_LIMIT) + 1
        share = torch.sigmoid(OAI_SLOPE * bounded)
        activated = bounded * share
        slope = share + OAI_SLOPE * activated * (1 - share)
        grad_gate = (grad * shifted * slope).masked_fill_(gate > OAI_LIMIT, 0.0)
        grad_up = (grad * activated).masked_fill_(up.abs() > OAI_LIMIT, 0.0)
        return (activated * shifted).to(pre.dtype), torch.cat([grad_gate, grad_up], -1).to(pre.dtype)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return activate(pre, activation), torch.ops.aten.gelu_backward(grad, pre, approximate=approximate)


def _has_kernel(pre: Tensor, activation: str) -> bool:
    """Whether it is computed in C++. PyTorch's GELU with erf is as fast as ours, and so is all of it in fp32."""
    return (
        pre.device.type == "cpu"
        and pre.dtype == torch.bfloat16
        and activation != "gelu"
        and select.cpu_library() is not None
    )


def _call(pre: Tensor, activation: str, activated: Tensor, grad: Tensor | None, grad_pre: Tensor | None) -> None:
    library = select.required_cpu_library()
    library.function("moesaic_activate", "piiippp")(
        pre.data_ptr(),
        activated.shape[0],
        activated.shape[1],
        ACTIVATIONS.index(activation),
        activated.data_ptr(),
        address_of(grad),
        address_of(grad_pre),
    )


def _empty_activated(pre: Tensor, activation: str) -> Tensor:
    return pre.new_empty(pre.shape[0], pre.shape[1] // 2 if is_gated(activation) else pre.shape[1])


@torch.library.custom_op("moesaic::activate", mutates_args=(), device_types="cpu")
def _activate(pre: Tensor, activation: str) -> Tensor:
    pre = pre.contiguous()
    activated = _empty_activated(pre, activation)
    _call(pre, activation, activated, None, None)
    return activated


@_activate.register_fake
def _(pre, activation):  # type: ignore[no-untyped-def]
    return _empty_activated(pre, activation)


@torch.library.custom_op("moesaic::activate_backward", mutates_args=(), device_types="cpu")
def _activate_backward(grad: Tensor, pre: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    grad, pre = grad.contiguous(), pre.contiguous()
    activated, grad_pre = _empty_activated(pre, activation), torch.empty_like(pre)
    assert grad.shape == activated.shape, (grad.shape, activated.shape)
    _call(pre, activation, activated, grad, grad_pre)
    return activated, grad_pre


@_activate_backward.register_fake
def _(grad, pre, activation):  # type: ignore[no-untyped-def]
    return _empty_activated(pre, activation), torch.empty_like(pre, memory_format=torch.contiguous_format)


class _Mlp(torch.autograd.Function):
    """activation(x W_up^T + b_up) W_down^T + b_down, saving x and the pre-activation only."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx, x, up, up_bias, down, down_bias, activation):  # type: ignore[no-untyped-def]
        pre = products.linear(x, up, up_bias)
        ctx.save_for_backward(x, pre, up, down)
        ctx.activation = activation
        return products.linear(activate(pre, activation), down, down_bias)

    @staticmethod
    @once_differentiable
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, pre, up, down = ctx.saved_tensors
        grad = grad.contiguous()
        hidden, grad_pre = activate_and_backward(products.mm(grad, down), pre, ctx.activation)
        of_x, of_up, of_up_bias, of_down, of_down_bias, _ = ctx.needs_input_grad
        return (
            products.mm(grad_pre, up) if of_x else None,
            products.mm(grad_pre.t(), x) if of_up else None,
            grad_pre.sum(0) if of_up_bias else None,
            products.mm(grad.t(), hidden) if of_down else None,
            grad.sum(0) if of_down_bias else None,
            None,
        )


def mlp(
    x: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None, activation: str
) -> Tensor:
    """Return the MLP of x (T, H); up is (F, H), or (2F, H) as [gate, up] if gated, down (H, F); all of one dtype.

    The activation's output is recomputed in the backward pass: F numbers a token less to keep, for one cheap pass.
    """
    operands = [None if each is None else products.autocast(each) for each in (x, up, up_bias, down, down_bias)]
    with torch.autocast("cpu", enabled=False):
        return _Mlp.apply(*operands, activation)
