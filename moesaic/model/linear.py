"""A linear layer whose fp32 master weight is cast to the dtype of what flows through it, or packed for inference."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.kernels.packed import PackedWeight, pack_weight, packed_linear
from moesaic.kernels.quantized import QuantizedWeight


class Linear(nn.Module):
    """y = x W^T + b with weight (out, in) and bias (out,), in x's dtype; once packed it has no `weight` any more."""

    def __init__(self, in_size: int, out_size: int, *, has_bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_size, in_size))
        self.bias = nn.Parameter(torch.zeros(out_size)) if has_bias else None
        self.packed: PackedWeight | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is not None:
            return packed_linear(x.flatten(0, -2), self.packed, self.bias).unflatten(0, x.shape[:-1])
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def pack(self, weight: Tensor | QuantizedWeight) -> None:
        """Put weight (out, in), packed, in the place of the layer's own."""
        self.packed = pack_weight(weight)
        del self.weight
