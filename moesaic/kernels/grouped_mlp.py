"""Every expert's MLP on its own run of rows: the contract, and its implementation with PyTorch's operations.

The C++ kernels take it over on the CPU where they apply (kernels/cpu/moe_training). Without them: `F.grouped_mm` is
there itself a loop of one product per expert, and its backward writes each expert's gradient into a fresh tensor;
looping here lets every product write into its place of one buffer. On CUDA `F.grouped_mm` is one kernel. The oracle is
kernels/reference/moe.grouped_mlp.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.kernels import products
from moesaic.kernels.activation import activate, activate_and_backward, activate_gated, is_gated
from moesaic.kernels.cpu import moe_training
from moesaic.kernels.gradient import once_differentiable
from moesaic.kernels.tracing import untraced

_PANEL_ROWS = 512
_ROW_MULTIPLE = 8


@dataclass(frozen=True)
class ExpertWeights:
    """Stacked weights of E experts, all of one dtype.

    Shapes: up (E, F, H), or (E, 2F, H) as [gate, up] if gated; down (E, H, F); up_bias (E, F or 2F); down_bias
    (E, H).
    """

    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None
    activation: str

    def to(self, dtype: torch.dtype) -> "ExpertWeights":
        def cast(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(dtype)

        return ExpertWeights(
            self.up.to(dtype), self.down.to(dtype), cast(self.up_bias), cast(self.down_bias), self.activation
        )


def grouped_mlp(x: Tensor, tokens_per_expert: Tensor, weights: ExpertWeights) -> Tensor:
    """Return (N, H): row n is its expert's MLP of x[n].

    Shapes: x (N, H), rows sorted by expert; tokens_per_expert (E,) int64, its sum N. x and weights are of one dtype.
    """
    assert x.dim() == 2 and x.shape[1] == weights.up.shape[2], (x.shape, weights.up.shape)
    assert tokens_per_expert.shape[0] == weights.up.shape[0], (tokens_per_expert.shape, weights.up.shape)
    assert x.dtype == weights.up.dtype == weights.down.dtype, (x.dtype, weights.up.dtype, weights.down.dtype)
    # F.grouped_mm wants bf16 and rows of whole 16 bytes; everything else takes the loop, which runs anywhere.
    is_aligned = weights.up.shape[1] % 8 == weights.down.shape[2] % 8 == x.shape[1] % 8 == 0
    if x.device.type == "cuda" and x.dtype == torch.bfloat16 and is_aligned and x.shape[0]:
        return _grouped_mlp_cuda(x, tokens_per_expert, weights)
    if moe_training.applies(x, weights.up, weights.down):
        out, _ = moe_training.routed_mlp(
            x, tokens_per_expert, None, None, None, weights.up, weights.up_bias, weights.down, weights.down_bias,
            weights.activation,
        )  # fmt: skip
        return out
    return _grouped_mlp_by_runs(x, tokens_per_expert, weights)


@untraced
def _grouped_mlp_by_runs(x: Tensor, tokens_per_expert: Tensor, weights: ExpertWeights) -> Tensor:
    """A loop over the experts that have rows: traced, it would be compiled anew for every list of their counts."""
    rows, up, up_bias, down, down_bias = (
        None if each is None else products.autocast(each)
        for each in (x, weights.up, weights.up_bias, weights.down, weights.down_bias)
    )
    with torch.autocast("cpu", enabled=False):
        return _GroupedMlp.apply(rows, tokens_per_expert.tolist(), up, up_bias, down, down_bias, weights.activation)


@dataclass(frozen=True)
class _Run:
    """An expert's rows, start to end, and `rounded`: an end that makes their number a multiple of 8, where rows follow.

    oneDNN cuts a product's rows into equal blocks and takes up to 1.6 times as long where their number has only large
    prime factors (451, 481, ...). The extra rows are the next experts'; what is written there is written again when
    their turn comes, since runs are worked on in rising order.
    """

    expert: int
    start: int
    end: int
    rounded: int


def _runs(tokens_per_expert: list[int]) -> list[_Run]:
    """The runs of all experts that have rows, in rising order."""
    runs, start, num_rows = [], 0, sum(tokens_per_expert)
    for expert, count in enumerate(tokens_per_expert):
        end = start + count
        if count:
            rounded = min(start + -(-count // _ROW_MULTIPLE) * _ROW_MULTIPLE, num_rows)
            runs.append(_Run(expert, start, end, rounded))
        start = end
    return runs


def _linear_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    products.mm(x, weight.t(), bias=bias, out=out)


def _panels(runs: list[_Run]) -> list[list[_Run]]:
    """Consecutive runs, together as many rows as make an element-wise operation worth starting and few enough to still
    be in the cache when it comes."""
    panels: list[list[_Run]] = []
    rows = _PANEL_ROWS
    for run in runs:
        if rows >= _PANEL_ROWS:
            panels.append([])
            rows = 0
        panels[-1].append(run)
        rows += run.end - run.start
    return panels


class _GroupedMlp(torch.autograd.Function):
    """Saves x and the pre-activation; the activation is recomputed, gradients of weights are written once.

    Panel by panel: what one product wrote is read by the next operation while it is in the cache, and of all that is
    F wide only the pre-activation exists for more than a panel's rows.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx, x, tokens_per_expert, up, up_bias, down, down_bias, activation):  # type: ignore[no-untyped-def]
        x = x.contiguous()
        assert sum(tokens_per_expert) == x.shape[0], (sum(tokens_per_expert), x.shape)
        runs = _runs(tokens_per_expert)
        pre = x.new_empty(x.shape[0], up.shape[1])
        y = x.new_empty(x.shape[0], down.shape[1])
        for panel in _panels(runs):
            first, last = panel[0].start, panel[-1].rounded
            for run in panel:
                expert, start, end = run.expert, run.start, run.rounded
                _linear_into(pre[start:end], x[start:end], up[expert], None if up_bias is None else up_bias[expert])
            hidden = activate(pre[first:last], activation)
            for run in panel:
                expert, start, end = run.expert, run.start, run.rounded
                bias = None if down_bias is None else down_bias[expert]
                _linear_into(y[start:end], hidden[start - first : end - first], down[expert], bias)
        ctx.save_for_backward(x, pre, up, down)
        ctx.runs, ctx.activation = runs, activation
        return y

    @staticmethod
    @once_differentiable
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, pre, up, down = ctx.saved_tensors
        grad = grad.contiguous()
        of_x, _, of_up, of_up_bias, of_down, of_down_bias, _ = ctx.needs_input_grad
        grad_up = torch.empty_like(up, memory_format=torch.contiguous_format) if of_up else None
        grad_down = torch.empty_like(down, memory_format=torch.contiguous_format) if of_down else None
        grad_up_bias = up.new_zeros(up.shape[:2]) if of_up_bias else None
        grad_down_bias = down.new_zeros(down.shape[:2]) if of_down_bias else None
        grad_x = torch.empty_like(x) if of_x else None
        for panel in _panels(ctx.runs):
            first, last = panel[0].start, panel[-1].rounded
            grad_hidden = grad.new_empty(last - first, down.shape[2])
            for run in panel:
                expert, start, end = run.expert, run.start, run.rounded
                products.mm(grad[start:end], down[expert], out=grad_hidden[start - first : end - first])
            hidden, grad_pre = activate_and_backward(grad_hidden, pre[first:last], ctx.activation)
            for run in panel:
                expert, start, end = run.expert, run.start, run.end
                rows = slice(start - first, end - first)
                if grad_down is not None:
                    products.mm(grad[start:end].t(), hidden[rows], out=grad_down[expert])
                if grad_up is not None:
                    products.mm(grad_pre[rows].t(), x[start:end], out=grad_up[expert])
                if grad_x is not None:
                    products.mm(
                        grad_pre[start - first : run.rounded - first], up[expert], out=grad_x[start : run.rounded]
                    )
                if grad_up_bias is not None:
                    torch.sum(grad_pre[rows], 0, out=grad_up_bias[expert])
                if grad_down_bias is not None:
                    torch.sum(grad[start:end], 0, out=grad_down_bias[expert])
        for expert in set(range(up.shape[0])) - {run.expert for run in ctx.runs}:
            for gradient in (grad_up, grad_down):
                if gradient is not None:
                    gradient[expert].zero_()
        return grad_x, None, grad_up, grad_up_bias, grad_down, grad_down_bias, None


def _grouped_mlp_cuda(x: Tensor, tokens_per_expert: Tensor, weights: ExpertWeights) -> Tensor:
    """F.grouped_mm takes bf16, int32 ends of the runs and no bias; no rows stand past the last end."""
    ends = tokens_per_expert.cumsum(0).to(torch.int32)

    def linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)
        if bias is None:
            return out
        return out + bias.repeat_interleave(tokens_per_expert, dim=0, output_size=rows.shape[0])

    hidden = linear(x, weights.up, weights.up_bias)
    if is_gated(weights.activation):
        gate, up = hidden.chunk(2, dim=-1)
        hidden = activate_gated(gate, up, weights.activation)
    else:
        hidden = F.gelu(hidden, approximate="tanh" if weights.activation == "gelu_tanh" else "none")
    return linear(hidden, weights.down, weights.down_bias)
