"""MXFP4: groups of 32 numbers of 4 bits with a power of two for each, what they stand for, and rounding to them.

A number is e2m1: a sign (the fourth bit), 2 bits of exponent and 1 of fraction. A scale is e8m0: the power of two
2^(scale - 127). Products are quantized.py's business.

Source: OCP Microscaling Formats (MX) Specification 1.0, sections 5.3 and 6.3.
"""

from functools import cache

import torch
from torch import Tensor

GROUP_SIZE = 32
# 6 * 2^(253 - 127) is more than bf16 and fp32 hold, and 255 stands for no number.
LARGEST_SCALE = 252
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# The specification's scale is the power of two with which a group's largest magnitude lies in 4..8; what is beyond 6
# becomes 6. From 7.25 on the next one is taken, with which that magnitude loses less and the others more: normally
# distributed numbers then lose 3 % less in all, as much as if both were tried for every group.
_TO_NEXT_POWER = (1 << 23) - 0x68_0000  # lifts the bits of 7.25 = 1.8125 * 4, and of none below, to the next exponent


def dequantize(values: Tensor, scales: Tensor) -> Tensor:
    """Return the bf16 numbers (..., K) of values (..., K/2) uint8 and scales (..., K/32) uint8; nothing is rounded.

    Two numbers a byte, that of the low bits first, times 2^(scale - 127).
    """
    grouped = decode(values).view(*scales.shape, GROUP_SIZE)
    return grouped.mul_(powers(scales).to(torch.bfloat16)[..., None]).flatten(-2)


def decode(values: Tensor) -> Tensor:
    """Return the numbers of values (..., K/2) without their scales: (..., K) bf16."""
    pairs = _pairs(values.device).index_select(0, values.flatten().int())
    return pairs.view(torch.bfloat16).view(*values.shape[:-1], 2 * values.shape[-1])


def halves(values: Tensor) -> Tensor:
    """Return twice the numbers of values (..., K/2) without their scales: (..., K) int8, from -12 to 12."""
    return decode(values).mul_(2.0).to(torch.int8)


def powers(scales: Tensor) -> Tensor:
    """Return 2^(scale - 127) in fp32."""
    # A power of two is its exponent's bits, but for the smallest, 2^-127, which has none.
    return (scales.to(torch.int32) << 23).clamp_min_(1 << 22).view(torch.float32)


@cache
def _pairs(device: torch.device) -> Tensor:
    """The two bf16 numbers of each byte, as one int32: (256,)."""
    positive = torch.tensor(_MAGNITUDES, dtype=torch.bfloat16, device=device)
    values = torch.cat([positive, -positive])
    return torch.stack([values.repeat(16), values.repeat_interleave(16)], -1).view(torch.int32).flatten()


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return values (..., K/2) and scales (..., K/32), uint8, of a finite weight (..., K), rounded to nearest.

    Numbers that the format holds, as those of dequantize, stay what they are, though other scales may say them.
    """
    grouped = weight.float().unflatten(-1, (-1, GROUP_SIZE))
    scales = nearest_scales(grouped.abs().amax(-1))
    return encode(round_numbers(grouped / powers(scales)[..., None]).flatten(-2)), scales


def nearest_scales(largest: Tensor) -> Tensor:
    """Return the uint8 scales of groups whose largest magnitudes, in fp32, are given."""
    exponents = (largest.contiguous().view(torch.int32) + _TO_NEXT_POWER) >> 23
    return (exponents - 2).clamp_(0, LARGEST_SCALE).to(torch.uint8)


def round_numbers(x: Tensor) -> Tensor:
    """Return the nearest numbers of 4 bits to x in fp32, the even of two, at most 6; a zero keeps its sign."""
    magnitudes = x.abs()
    steps = torch.where(magnitudes < 2.0, 0.5, torch.where(magnitudes < 4.0, 1.0, 2.0))
    return ((magnitudes / steps).round_() * steps).clamp_max_(6.0).copysign(x)


def encode(numbers: Tensor) -> Tensor:
    """Return values (..., K/2) uint8 of numbers (..., K) as round_numbers gives them."""
    doubled = numbers.abs() * 2.0
    codes = torch.where(doubled <= 4.0, doubled, torch.where(doubled <= 8.0, 2.0 + doubled / 2.0, 4.0 + doubled / 4.0))
    nibbles = codes.to(torch.uint8) | (numbers.signbit().to(torch.uint8) << 3)
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)
