"""Rotary positions: pairs (i, i + D/2) of a head's channels turned by position * theta^(-2i/D).

The half-split pairing is the one of Hugging Face's Llama. Of a head with only P channels turned, the first P/2 pairs
are, by position * theta^(-2i/P), and the others stay. Frequencies may be scaled for longer sequences than a model was
trained on, as Hugging Face's models do it. Source: RoFormer (arXiv 2104.09864); RopeScalingConfig names the others.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from moesaic.config.model import ModelConfig, RopeScalingConfig
from moesaic.kernels import rotary


def model_rotary(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (S, D/2), fp32, of positions (S,) for the channels that the model's attention turns."""
    latent = config.latent_attention
    dim = config.head_dim if latent is None else latent.rope_head_dim
    turned = config.rope_head_dim or dim
    cosines, sines = _turns(positions, turned, theta=config.rope_theta, scaling=config.rope_scaling)
    rest = (0, (dim - turned) // 2)
    return pad(cosines, rest, value=1.0), pad(sines, rest)


def rotary_table(
    num_positions: int, head_dim: int, theta: float, device: torch.device, *, scaling: RopeScalingConfig | None = None
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (num_positions, D/2), fp32."""
    return _turns(torch.arange(num_positions, device=device), head_dim, theta=theta, scaling=scaling)


def _turns(positions: Tensor, dim: int, *, theta: float, scaling: RopeScalingConfig | None) -> tuple[Tensor, Tensor]:
    frequencies, factor = rotary_frequencies(dim, theta, scaling=scaling)
    angles = positions.double()[:, None] * frequencies.to(positions.device)
    return (angles.cos() * factor).float(), (angles.sin() * factor).float()


def rotary_frequencies(dim: int, theta: float, *, scaling: RopeScalingConfig | None = None) -> tuple[Tensor, float]:
    """Return the angles per position of each pair (D/2,), fp64, and the factor on their cosines and sines."""
    frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)
    if scaling is None:
        return frequencies, 1.0
    if scaling.kind == "linear":
        return frequencies / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _blend(frequencies, scaling.factor, _llama3_share(frequencies, scaling)), 1.0
    factor = scaling.attention_factor
    factor = 0.1 * math.log(scaling.factor) + 1.0 if factor is None else factor
    return _blend(frequencies, scaling.factor, _yarn_share(dim, theta, scaling)), factor


def _blend(frequencies: Tensor, factor: float, kept: Tensor) -> Tensor:
    """The share `kept` (D/2,) of each frequency as it is, the rest divided by factor."""
    return frequencies * kept + frequencies / factor * (1.0 - kept)


def _llama3_share(frequencies: Tensor, scaling: RopeScalingConfig) -> Tensor:
    """1 for pairs that turn often in the original positions, 0 for those that turn seldom, in proportion between."""
    assert scaling.original_max_positions is not None
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    rotations = scaling.original_max_positions * frequencies / (2 * math.pi)
    return ((rotations - low) / (high - low)).clamp(0.0, 1.0)


def _yarn_share(dim: int, theta: float, scaling: RopeScalingConfig) -> Tensor:
    """1 up to the pair that turns beta_fast times in the original positions, 0 from beta_slow on, a ramp between."""

    def pair_with(num_rotations: float) -> float:
        assert scaling.original_max_positions is not None
        return dim * math.log(scaling.original_max_positions / (num_rotations * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_with(scaling.beta_fast), pair_with(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    # The upper bound counts channels and not pairs, as the original code does and every model was trained with.
    first, last = max(first, 0), min(last, dim - 1)
    if first == last:
        last += 0.001
    ramp = (torch.arange(dim // 2, dtype=torch.float64, device="cpu") - first) / (last - first)
    return 1.0 - ramp.clamp(0.0, 1.0)


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn x (B, S, A, D) by the tables' rows (S, D/2), in x's dtype."""
    if rotary.can_rotate(x):
        return rotary.rotate(x, cosines, sines)
    return _Rotate.apply(x, cosines.to(x.dtype)[:, None], sines.to(x.dtype)[:, None])


def _turn(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    # Nothing is written in place: torch.compile confused views of two such results in one graph.
    turned = torch.addcmul(first * cosines, second, sines, value=-1), torch.addcmul(second * cosines, first, sines)
    return torch.cat(turned, dim=-1)


class _Rotate(torch.autograd.Function):
    """A rotation's gradient is the rotation back."""

    @staticmethod
    def forward(ctx, x, cosines, sines):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(cosines, sines)
        return _turn(x, cosines, sines)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        cosines, sines = ctx.saved_tensors
        return _turn(grad, cosines, -sines), None, None
