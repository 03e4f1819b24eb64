"""A linear layer whose fp32 master weight is cast to the dtype of what flows through it, or packed for inference."""

from torch import Tensor, nn

from moesaic.kernels import products
from moesaic.kernels.packed import PackedWeight, pack_weight, packed_linear
from moesaic.kernels.quantized import QuantizedWeight


class Linear(nn.Linear):
    """y = x W^T + b with weight (out, in) and bias (out,), in x's dtype; once packed it has no `weight` any more.

    Adapters (PEFT) and quantisers put a layer of their own in the place of any nn.Linear, hence the base class: call
    the layer, and read its `weight` only where `is_plain` allows it.
    """

    bias: nn.Parameter | None  # type: ignore[assignment]  # nn.Linear promises one

    def __init__(self, in_size: int, out_size: int, *, has_bias: bool) -> None:
        super().__init__(in_size, out_size, bias=has_bias)
        self.packed: PackedWeight | None = None

    def reset_parameters(self) -> None:
        """Draw the weight as nn.Linear does, from torch's global generator; the bias is 0."""
        bound = max(self.in_features, 1) ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.packed is None else f", packed={self.packed.format}")

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is not None:
            return packed_linear(x.flatten(0, -2), self.packed, self.bias).unflatten(0, x.shape[:-1])
        return products.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def pack(self, weight: Tensor | QuantizedWeight) -> None:
        """Put weight (out, in), packed, in the place of the layer's own."""
        self.packed = pack_weight(weight)
        self.out_features, self.in_features = self.packed.shape
        del self.weight


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer is its weight and bias, which may be read instead of calling it: our own class without hooks."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return type(layer) is Linear and not hooks and "forward" not in layer.__dict__
