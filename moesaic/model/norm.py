"""LayerNorm and RMSNorm with fp32 weights, whatever the dtype of what flows through."""

import torch
from torch import Tensor, nn

from moesaic.kernels.norm import layer_norm, rms_norm


class RmsNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * weight * scale, weight (H,)."""

    def __init__(self, size: int, *, epsilon: float, scale: float = 1.0) -> None:
        super().__init__()
        self.epsilon, self.scale = epsilon, scale
        self.weight = nn.Parameter(torch.ones(size))

    def scaled(self) -> tuple[Tensor, None]:
        """Return the weight as it is multiplied by, fp32."""
        return _scaled(self.weight, self.scale), None

    def extra_repr(self) -> str:
        return _described(self)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.scaled()[0], self.epsilon)


class LayerNorm(nn.Module):
    """((x - mean(x)) / sqrt(variance(x) + epsilon) * weight + bias) * scale, both (H,)."""

    def __init__(self, size: int, *, epsilon: float, scale: float = 1.0) -> None:
        super().__init__()
        self.epsilon, self.scale = epsilon, scale
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))

    def scaled(self) -> tuple[Tensor, Tensor]:
        """Return the weight and the bias as they are computed with, fp32."""
        return _scaled(self.weight, self.scale), _scaled(self.bias, self.scale)

    def extra_repr(self) -> str:
        return _described(self)

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, *self.scaled(), self.epsilon)


def _scaled(weight: Tensor, scale: float) -> Tensor:
    return weight.float() if scale == 1.0 else weight.float() * scale


def _described(norm: RmsNorm | LayerNorm) -> str:
    scale = "" if norm.scale == 1.0 else f", scale={norm.scale}"
    return f"{tuple(norm.weight.shape)}, epsilon={norm.epsilon}{scale}"


def make_norm(kind: str, size: int, epsilon: float, *, scale: float = 1.0) -> RmsNorm | LayerNorm:
    """Return the norm that ModelConfig.norm names, "rmsnorm" or "layernorm", over the last dimension."""
    return (RmsNorm if kind == "rmsnorm" else LayerNorm)(size, epsilon=epsilon, scale=scale)
