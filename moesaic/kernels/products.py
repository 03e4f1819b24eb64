"""Products of matrices as torch does them, but of bf16 through fp32 on processors where torch has no bf16 products.

Those are processors for which oneDNN has none (x86 with AVX2 alone), or makes do without bf16 instructions (AVX-512
before them): torch multiplies bf16 at 2 to 30 % of the rate of fp32 on two Zen 3 cores, at 18 to 36 % on two cores with
AVX-512 of that kind. Operands are widened, which is exact, sums are fp32 as elsewhere, and results are rounded.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def _has_bf16_products() -> bool:
    """Whether oneDNN, which multiplies bf16 matrices for torch on CPUs, does so here, and with instructions for it."""
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    return torch.cpu._is_avx512_bf16_supported() or not torch.cpu._is_avx512_supported()


_HAS_BF16_PRODUCTS = _has_bf16_products()


def mm(a: Tensor, b: Tensor, *, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Return a (M, K) times b (K, N), plus bias (N,), all of one dtype, as torch.addmm does; no gradient."""
    if not is_widened(a.device, a.dtype):
        return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)
    _check_dtypes(a, b, bias)
    with torch.autocast("cpu", enabled=False):  # which would cast the operands back
        wide_a, wide_b = a.float(), b.float()
        product = torch.mm(wide_a, wide_b) if bias is None else torch.addmm(bias.float(), wide_a, wide_b)
    return product.to(a.dtype) if out is None else out.copy_(product)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x (..., K) times weight (N, K) transposed, plus bias (N,), as F.linear does."""
    if not is_widened(x.device, autocast_dtype(x)):
        return F.linear(x, weight, bias)
    x, weight, bias = autocast(x), autocast(weight), None if bias is None else autocast(bias)
    y: Tensor = _WidenedLinear.apply(x.reshape(x.shape[:-1].numel(), x.shape[-1]), weight, bias)
    return y.view(*x.shape[:-1], weight.shape[0])


def autocast(x: Tensor) -> Tensor:
    """Return x as autocast, where it is on, gives it to an operation of ours on the CPU.

    Called outside of a torch.autograd.Function the cast is in the graph, so that a gradient's gradient goes through it.
    """
    return x.to(autocast_dtype(x))


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of autocast(x): what autocast asks for on the CPU, x's own where it is off and of fp64."""
    is_cast = torch.is_autocast_enabled("cpu") and x.device.type == "cpu" and x.dtype != torch.float64
    return torch.get_autocast_dtype("cpu") if is_cast else x.dtype


def is_widened(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of this dtype go through fp32 there."""
    return not _HAS_BF16_PRODUCTS and dtype == torch.bfloat16 and device.type == "cpu"


def _check_dtypes(first: Tensor, *others: Tensor | None) -> None:
    """What torch refuses is refused here too."""
    dtypes = {each.dtype for each in (first, *others) if each is not None}
    assert dtypes == {torch.bfloat16}, dtypes


class _WidenedLinear(torch.autograd.Function):
    """x (M, K), weight (N, K), bias (N,) or None, all bf16 and kept as such where a gradient needs it."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)
    def forward(ctx, x, weight, bias):  # type: ignore[no-untyped-def]
        _check_dtypes(x, weight, bias)
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        wide, needs_bias = grad.float(), ctx.needs_input_grad[2]
        return (
            None if weight is None else torch.mm(wide, weight.float()).to(grad.dtype),
            None if x is None else torch.mm(wide.t(), x.float()).to(grad.dtype),
            wide.sum(0).to(grad.dtype) if needs_bias else None,
        )
