"""Matrices of 8-bit and 4-bit integers: their format, and what a product with one gives, to the bit.

Weights are quantised once, by row or by group of columns; activations at every product, by token and block of 128
columns. Each dot product inside a block is an exact integer, and blocks are added in rising order with one fp32
rounding a step, so a result depends neither on the batch nor on the path that computed it. These functions are that
definition; the packed C++ kernels must give the same bits. How scales are chosen better than by round-to-nearest is
convert/'s business.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Columns of an activation that share a scale. Integer dot products over so many stay below 2**24, exact in fp32 too.
ACTIVATION_BLOCK = 128
GROUP_SIZES = (32, 64, 128)
# A block whose largest magnitude is below this counts as zero: 127 divided by it would leave fp32.
SMALLEST_AMAX = 2.0**-120


@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix (N, K), or a stack (..., N, K), of integers and their scales.

    bits 8: values (..., N, K) int8 in -127..127; scales (..., N) fp32, one per output channel; group_size None.
    bits 4: values (..., N, K/2) uint8, column 2j in the low nibble and 2j+1 in the high one, each stored as its value
    (-8..7) plus 8; scales (..., N, K/group_size) bf16 of either sign; group_size 32, 64 or 128, which divides K.
    """

    values: Tensor
    scales: Tensor
    bits: int
    group_size: int | None

    def __post_init__(self) -> None:
        values, scales = self.values, self.scales
        assert self.bits in (4, 8), self.bits
        if self.bits == 8:
            assert self.group_size is None, self.group_size
            assert values.dtype == torch.int8 and scales.dtype == torch.float32, (values.dtype, scales.dtype)
            assert values.dim() >= 2 and scales.shape == values.shape[:-1], (values.shape, scales.shape)
        else:
            assert self.group_size in GROUP_SIZES, self.group_size
            assert values.dtype == torch.uint8 and scales.dtype == torch.bfloat16, (values.dtype, scales.dtype)
            columns = 2 * values.shape[-1]
            assert columns % self.group_size == 0, (values.shape, self.group_size)
            expected = (*values.shape[:-1], columns // self.group_size)
            assert values.dim() >= 2 and scales.shape == expected, (values.shape, scales.shape, self.group_size)

    @property
    def shape(self) -> torch.Size:
        """(..., N, K), as of the matrix that was quantised."""
        shape = self.values.shape
        return shape if self.bits == 8 else torch.Size((*shape[:-1], 2 * shape[-1]))

    @property
    def num_bytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes


def quantize_weight(weight: Tensor, *, bits: int, group_size: int | None = None) -> QuantizedWeight:
    """Round a finite weight (..., N, K) to the nearest values of evenly spaced levels.

    8 bits: the row's largest magnitude becomes 127. 4 bits: the number of largest magnitude of each group becomes -8,
    which makes the scale negative where that number is positive; so the group uses all 16 levels.
    """
    weight = weight.float()
    if bits == 8:
        return round_to_scales(weight, weight.abs().amax(-1) / 127.0, bits=8)
    assert group_size is not None, "4-bit weights need a group_size"
    grouped = weight.unflatten(-1, (-1, group_size))  # (..., N, K/G, G)
    extreme = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True)).squeeze(-1)
    return round_to_scales(weight, (extreme / -8.0).to(torch.bfloat16), bits=4, group_size=group_size)


def round_to_scales(weight: Tensor, scales: Tensor, *, bits: int, group_size: int | None = None) -> QuantizedWeight:
    """Return the weight (..., N, K) in whole multiples of given scales, clamped to what the bits hold.

    A scale of 0 gives values of 0.
    """
    divisor = torch.where(scales == 0, 1.0, scales.float())[..., None]
    if bits == 8:
        values = (weight.float() / divisor).round_().clamp_(-127, 127)
        return QuantizedWeight(values.to(torch.int8), scales.float(), 8, None)
    assert group_size is not None, "4-bit weights need a group_size"
    grouped = weight.float().unflatten(-1, (-1, group_size))
    values = (grouped / divisor).round_().clamp_(-8, 7).flatten(-2)
    return QuantizedWeight(pack_nibbles(values), scales.to(torch.bfloat16), 4, group_size)


def dequantize(weight: QuantizedWeight) -> Tensor:
    """Return the matrix (..., N, K) in fp32."""
    if weight.values.is_meta:  # its products are Python that loads torch's compiler first: a second
        return torch.empty(weight.shape, device="meta")
    if weight.bits == 8:
        return weight.values.float() * weight.scales[..., None]
    assert weight.group_size is not None
    grouped = unpack_nibbles(weight.values).float().unflatten(-1, (-1, weight.group_size))
    return (grouped * weight.scales.float()[..., None]).flatten(-2)


def pack_nibbles(values: Tensor) -> Tensor:
    """Return (..., K/2) uint8 for (..., K) whole numbers in -8..7 of any dtype."""
    nibbles = (values + 8).to(torch.uint8)
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Return (..., K) int8 in -8..7 for (..., K/2) uint8; the inverse of pack_nibbles."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).to(torch.int8) - 8


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return values (M, K) int8 and scales (M, ceil(K/128)) fp32 of x (M, K) fp32 or bf16.

    Per token and block of 128 columns: amax = max |x|, scale = amax / 127, value = x * (127 / amax) rounded half to
    even, all in fp32. A block with an amax below 2**-120 becomes zeros with scale 0; one that holds an infinity or a
    NaN becomes zeros with scale NaN, which reaches the product.
    """
    assert x.dim() == 2 and x.dtype in (torch.float32, torch.bfloat16), (x.shape, x.dtype)
    rows, columns = x.shape
    blocks = -(-columns // ACTIVATION_BLOCK)
    padded = torch.nn.functional.pad(x.float(), (0, blocks * ACTIVATION_BLOCK - columns))
    blocked = padded.view(rows, blocks, ACTIVATION_BLOCK)
    amax = blocked.abs().amax(-1)  # (M, blocks); a NaN among the numbers is the maximum
    is_finite, is_zero = amax.isfinite(), amax < SMALLEST_AMAX
    scales = torch.where(is_zero, 0.0, torch.where(is_finite, amax / 127.0, torch.nan))
    # One division: `127.0 / tensor` would be the rounded reciprocal times 127.
    factor = torch.full_like(amax, 127.0) / torch.where(is_finite & ~is_zero, amax, 1.0)
    values = (blocked * factor[..., None]).round_()
    values = torch.where((is_finite & ~is_zero)[..., None], values, 0.0)
    return values.to(torch.int8).flatten(1)[:, :columns].contiguous(), scales


def quantized_linear(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """Return (M, N) fp32, x (M, K) times a weight (N, K) transposed: the definition that kernels must meet to the bit.

    8 bits: y = (sum over blocks b, rising, of dot_b * activation_scale[m, b]) * weight_scale[n].
    4 bits: y = sum over groups g, rising, of dot_g * (activation_scale[m, block of g] * weight_scale[n, g]).
    Dot products are exact int32; every product and sum written here is one fp32 rounding, none are fused.
    """
    assert weight.values.dim() == 2 and x.shape[1] == weight.shape[1], (x.shape, weight.shape)
    values, scales = quantize_activations(x)
    numbers = values.float()
    matrix = (weight.values if weight.bits == 8 else unpack_nibbles(weight.values)).float()
    group = ACTIVATION_BLOCK if weight.group_size is None else weight.group_size
    total = numbers.new_zeros(x.shape[0], matrix.shape[0])
    for index, start in enumerate(range(0, matrix.shape[1], group)):
        columns = slice(start, start + group)
        dot = numbers[:, columns] @ matrix[:, columns].t()  # exact in fp32: below 2**24 in any order
        scale = scales[:, start // ACTIVATION_BLOCK, None]
        if weight.bits == 4:
            scale = scale * weight.scales[:, index].float()
        total += dot * scale
    return total * weight.scales if weight.bits == 8 else total
