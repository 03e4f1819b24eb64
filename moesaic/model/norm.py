"""LayerNorm and RMSNorm with fp32 weights, whatever the dtype of what flows through."""

import torch
from torch import Tensor, nn

from moesaic.kernels.norm import layer_norm, rms_norm


class RmsNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * weight, weight (H,)."""

    def __init__(self, size: int, *, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.float(), self.epsilon)


class LayerNorm(nn.Module):
    """(x - mean(x)) / sqrt(variance(x) + epsilon) * weight + bias, both (H,)."""

    def __init__(self, size: int, *, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight.float(), self.bias.float(), self.epsilon)


def make_norm(kind: str, size: int, epsilon: float) -> RmsNorm | LayerNorm:
    """Return the norm that ModelConfig.norm names, "rmsnorm" or "layernorm", over the last dimension."""
    return RmsNorm(size, epsilon=epsilon) if kind == "rmsnorm" else LayerNorm(size, epsilon=epsilon)
