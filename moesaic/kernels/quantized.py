"""Matrices of 8-bit and 4-bit integers and of MXFP4: their format, and what a product with one gives, to the bit.

Weights are quantised once, by row; activations at every product, by token. Integers are rotated before, on both sides:
their columns are multiplied by a Hadamard matrix, which leaves a product as it is and spreads what single columns have
of large numbers over many, so that one scale for a whole token costs less than one for every 128 columns without it.
Of 4 bits every group of columns has its own scale, and that is a whole multiple of its row's: its step. A value times
its step fits 8 bits, so a dot product is one exact sum of integers over all columns for 4 bits as for 8. What follows
is a fixed order of fp32 roundings, so a result depends neither on the batch nor on the path that computed it. These
functions are that definition; the packed C++ kernels must give the same bits, and so must those that rotate and round
weights. How steps are chosen better for what reaches a matrix is convert/'s business.

MXFP4 (mxfp4.py) is for models that are published in it, whose numbers are kept as they are, so nothing is rotated.
There activations have a scale for every group too. Twice a number of 4 bits is an integer, so that dot products inside
a group are exact as well. Tiles (AMX) take bf16 numbers instead: activations of 9 bits times powers of two, which bf16
holds as it holds the weights.

Source of the rotation: Ashkboos et al., QuaRot (arXiv 2404.00456); its online form, here at every product.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.kernels import mxfp4, select
from moesaic.kernels.addresses import address_of

GROUP_SIZES = (32, 64, 128)
# A row whose largest magnitude is below this counts as zero: 127 divided by it would leave fp32.
SMALLEST_AMAX = 2.0**-120
# Of 32 columns that tiles multiply with MXFP4: lifts the bits of 255.5 = 1.99609375 * 2**7, and of none below, to the
# next exponent.
_TO_NEXT_POWER = 0x80_0000 - 0x7F_8000
# No scale is below 2**-60, of them or of MXFP4 as tiles multiply it, so that no product of two is subnormal.
_SMALLEST_POWER = 127 - 60
# A value of 4 bits times this, -8 * 15, fits 8 bits.
MAX_STEP = 15
# Columns whose dot product of 8 bits stays in int32.
MAX_COLUMNS = 1 << 17
# Columns whose dot product of 8 bits stays below 2**24, exact in fp32 in any order.
_EXACT_COLUMNS = 1024
# Numbers that stay in a cache from step to step of a rotation.
_ROTATED_AT_ONCE = 1 << 18


@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix (N, K), or a stack (..., N, K), of numbers of few bits and their scales: integers of the matrix rotated,
    and divided by the size of the rotation, which is exact; MXFP4 of the matrix itself.

    bits 8: values (..., N, K) int8 in -127..127; scales (..., N) fp32, one per output channel; group_size None.
    bits 4: values (..., N, K/2) uint8, column 2j in the low nibble and 2j+1 in the high one, each stored as its value
    (-8..7) plus 8; steps (..., N, K/group_size) int8 in -15..15; scales (..., N) fp32; group_size 32, 64 or 128, which
    divides K. A number is value * step * scale.
    MXFP4 (bits 4, group_size 32) is told by its scales: values likewise, of the format's own 4 bits; scales
    (..., N, K/32) uint8; no steps.
    """

    values: Tensor
    scales: Tensor
    bits: int
    group_size: int | None
    steps: Tensor | None = None

    def __post_init__(self) -> None:
        values, scales, steps = self.values, self.scales, self.steps
        assert self.bits in (4, 8), self.bits
        assert values.dtype == (torch.int8 if self.bits == 8 else torch.uint8), (values.dtype, self.bits)
        assert values.dim() >= 2, values.shape
        if self.bits == 8 or not self.is_mxfp4:
            assert scales.dtype == torch.float32 and scales.shape == values.shape[:-1], (scales.dtype, scales.shape)
            assert self.shape[-1] <= MAX_COLUMNS, self.shape
        if self.bits == 8:
            assert self.group_size is None and steps is None, (self.group_size, steps)
            return
        sizes = (mxfp4.GROUP_SIZE,) if self.is_mxfp4 else GROUP_SIZES
        assert self.group_size is not None and self.group_size in sizes, self.group_size
        assert (steps is None) == self.is_mxfp4, (scales.dtype, steps is None)
        of_groups = self.of_groups
        assert of_groups is not None
        assert self.is_mxfp4 or of_groups.dtype == torch.int8, of_groups.dtype
        assert self.shape[-1] % self.group_size == 0, (self.shape, self.group_size)
        expected = (*self.shape[:-1], self.shape[-1] // self.group_size)
        assert of_groups.shape == expected, (of_groups.shape, self.shape, self.group_size)

    @property
    def shape(self) -> torch.Size:
        """(..., N, K), as of the matrix that was quantised."""
        shape = self.values.shape
        return shape if self.bits == 8 else torch.Size((*shape[:-1], 2 * shape[-1]))

    @property
    def is_mxfp4(self) -> bool:
        return self.scales.dtype == torch.uint8

    @property
    def of_groups(self) -> Tensor | None:
        """The byte that every group has, (..., N, K/group_size): its step, or its scale in MXFP4."""
        return self.scales if self.is_mxfp4 else self.steps

    @property
    def num_bytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes + (0 if self.steps is None else self.steps.nbytes)

    def map(self, change: Callable[[Tensor], Tensor]) -> "QuantizedWeight":
        """Return the weight with each of its tensors changed, in the dimensions before K alone."""
        return combine([self], lambda tensors: change(tensors[0]))


def combine(weights: Sequence[QuantizedWeight], join: Callable[[list[Tensor]], Tensor]) -> QuantizedWeight:
    """Return one weight of several of one format, whose tensors of each kind are joined, in the dimensions before K
    alone."""
    first = weights[0]
    formats = {(each.bits, each.group_size, each.is_mxfp4) for each in weights}
    assert len(formats) == 1, formats
    steps = [each.steps for each in weights if each.steps is not None]
    return QuantizedWeight(
        join([each.values for each in weights]),
        join([each.scales for each in weights]),
        first.bits,
        first.group_size,
        join(steps) if steps else None,
    )


def rotation_size(columns: int) -> int:
    """Return how many columns are rotated together: the largest power of two that divides their number."""
    return columns & -columns


def rotate(x: Tensor) -> Tensor:
    """Return x (..., K) in fp32 (fp64 for fp64), every block of rotation_size(K) columns times the Hadamard matrix H
    of that size, of elements 1 and -1.

    H = [[1]], then [[H, H], [H, -H]], so H^2 = size * I. The definition's order of roundings: sums and differences of
    columns 1 apart, then 2, 4 and so on.
    """
    x = x if x.dtype == torch.float64 else x.float()
    size = rotation_size(x.shape[-1])
    if size == 1 or x.is_meta:
        return x
    rows = x.reshape(-1, size)
    rotated = torch.empty_like(rows)
    rows_at_once = max(1, _ROTATED_AT_ONCE // size)
    for part, result in zip(rows.split(rows_at_once), rotated.split(rows_at_once), strict=True):
        # A copy, with a row for each column: every step reads long rows.
        current = part.t().clone(memory_format=torch.contiguous_format)
        following = torch.empty_like(current)
        apart = 1
        while apart < size:
            shape = (size // (2 * apart), 2, apart, part.shape[0])
            pairs, results = current.view(shape), following.view(shape)
            torch.add(pairs[:, 0], pairs[:, 1], out=results[:, 0])
            torch.sub(pairs[:, 0], pairs[:, 1], out=results[:, 1])
            current, following = following, current
            apart *= 2
        result.copy_(current.t())
    return rotated.view(x.shape)


def rotate_weight(weight: Tensor) -> Tensor:
    """Return weight (..., N, K) as it is rounded: rotated, and divided by the size of the rotation."""
    return _rotated(weight, 1.0 / rotation_size(weight.shape[-1]))


def _rotated(x: Tensor, scale: float) -> Tensor:
    """Return rotate(x) times a power of two, by our kernels where they are in use."""
    if select.uses_triton(x.device) and x.dtype in (torch.float32, torch.bfloat16):
        from moesaic.kernels.triton import activations

        return activations.rotate(x) * scale
    library = _library_for(x)
    if library is None:
        return rotate(x) * scale
    x = x.contiguous()
    rotated = torch.empty(x.shape, dtype=torch.float32, device="cpu")
    library.function("moesaic_rotate_rows", "piiifp")(
        x.data_ptr(), x.dtype == torch.bfloat16, math.prod(x.shape[:-1]), x.shape[-1], scale, rotated.data_ptr()
    )
    return rotated


def _library_for(x: Tensor) -> select.Library | None:
    has_kernel = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and x.numel() > 0
    return select.cpu_library() if has_kernel else None


def quantize_weight(weight: Tensor, *, bits: int, group_size: int | None = None) -> QuantizedWeight:
    """Rotate a finite weight (..., N, K) and round it to the nearest values of evenly spaced levels.

    8 bits: the row's largest magnitude becomes 127. 4 bits: it becomes -8 times a step of 15 or -15. Of every group
    the number of largest magnitude decides: its step is of the sign that makes that number negative, and of the
    one above that makes it -8 and the two below the one that loses least.
    """
    assert (bits, group_size) == (8, None) or (bits == 4 and group_size in GROUP_SIZES), (bits, group_size)
    assert weight.shape[-1] > 0, weight.shape
    library = _library_for(weight)
    if library is not None:
        return _quantize_natively(library, weight.detach().contiguous(), bits=bits, group_size=group_size)
    rotated = rotate_weight(weight)
    if group_size is None:
        return round_to_scales(rotated, rotated.abs().amax(-1) / 127.0)
    scales = row_scales(rotated)
    return round_to_scales(rotated, scales, _nearest_steps(rotated.unflatten(-1, (-1, group_size)), scales))


def row_scales(rotated: Tensor) -> Tensor:
    """Return the scales (..., N) of 4 bits: the largest magnitude of every row of (..., N, K) becomes 120."""
    return rotated.abs().amax(-1) / (8.0 * MAX_STEP)


def _nearest_steps(grouped: Tensor, scales: Tensor) -> Tensor:
    """Return the steps (..., N, K/G) int8 of groups (..., N, K/G, G) with which their rounding loses least."""
    extreme = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True)).squeeze(-1)
    scales = scales[..., None]
    reach = torch.where(scales == 0, 0.0, extreme / (-8.0 * scales))
    sign = torch.where(reach < 0, -1.0, 1.0)
    below = reach.abs().floor()
    tried = (magnitude.clamp(1.0, MAX_STEP) * sign for magnitude in (reach.abs().ceil(), below, below - 1.0))
    return steps_of_least_error(tried, lambda steps: _tree_sum(squared_errors(grouped, steps * scales)))


def steps_of_least_error(tried: Iterable[Tensor], error_of: Callable[[Tensor], Tensor]) -> Tensor:
    """Return of several steps (...) those of least error (...), as int8; of equal ones the earlier."""
    candidates = iter(tried)
    best = next(candidates)
    least = error_of(best)
    for steps in candidates:
        error = error_of(steps)
        is_better = error < least  # never, where the first's is NaN
        best, least = torch.where(is_better, steps, best), torch.where(is_better, error, least)
    return best.to(torch.int8)


def _tree_sum(numbers: Tensor) -> Tensor:
    """Return the sums (...) of (..., a power of two), the first half added to the second until one is left."""
    while numbers.shape[-1] > 1:
        first, second = numbers.chunk(2, -1)
        numbers = first + second
    return numbers.squeeze(-1)


def round_to_levels(grouped: Tensor, levels: Tensor) -> Tensor:
    """Return the whole numbers (..., G) in -8..7, in fp32, whose multiples of levels (...) are nearest to (..., G)."""
    return (grouped / torch.where(levels == 0, 1.0, levels)[..., None]).round_().clamp_(-8, 7)


def squared_errors(grouped: Tensor, levels: Tensor) -> Tensor:
    """Return the squared errors (..., G) of numbers (..., G) rounded to multiples of levels (...)."""
    return round_to_levels(grouped, levels).mul_(levels[..., None]).sub_(grouped).square_()


def _quantize_natively(
    library: select.Library, weight: Tensor, *, bits: int, group_size: int | None
) -> QuantizedWeight:
    *rows, columns = weight.shape
    scales, steps = torch.empty(rows, dtype=torch.float32, device="cpu"), None
    if group_size is None:
        values = torch.empty(weight.shape, dtype=torch.int8, device="cpu")
    else:
        assert columns % group_size == 0, (weight.shape, group_size)
        values = torch.empty(*rows, columns // 2, dtype=torch.uint8, device="cpu")
        steps = torch.empty(*rows, columns // group_size, dtype=torch.int8, device="cpu")
    library.function("moesaic_quantize_weight", "piiiippp")(
        weight.data_ptr(), weight.dtype == torch.bfloat16, math.prod(rows), columns, group_size or 0,
        values.data_ptr(), address_of(steps), scales.data_ptr(),
    )  # fmt: skip
    return QuantizedWeight(values, scales, bits, group_size, steps)


def quantize_to_mxfp4(weight: Tensor) -> QuantizedWeight:
    """Return a finite weight (..., N, K), K a multiple of 32, in MXFP4; one that the format holds stays as it is."""
    *rows, columns = weight.shape
    assert columns % mxfp4.GROUP_SIZE == 0, weight.shape
    library = _library_for(weight)
    if library is None:
        return QuantizedWeight(*mxfp4.quantize(weight.detach()), 4, mxfp4.GROUP_SIZE)
    weight = weight.detach().contiguous()
    values = torch.empty(*rows, columns // 2, dtype=torch.uint8, device="cpu")
    scales = torch.empty(*rows, columns // mxfp4.GROUP_SIZE, dtype=torch.uint8, device="cpu")
    library.function("moesaic_quantize_to_mxfp4", "piiipp")(
        weight.data_ptr(),
        weight.dtype == torch.bfloat16,
        math.prod(rows),
        columns,
        values.data_ptr(),
        scales.data_ptr(),
    )
    return QuantizedWeight(values, scales, 4, mxfp4.GROUP_SIZE)


def round_to_scales(rotated: Tensor, scales: Tensor, steps: Tensor | None = None) -> QuantizedWeight:
    """Return a rotated weight (..., N, K) in whole multiples of given scales (..., N), clamped to what 8 bits hold; or
    of these times the steps of its groups (..., N, K/G), clamped to 4 bits.

    A scale of 0 is for a row of zeros and gives values of 0.
    """
    rotated, scales = rotated.float(), scales.float()
    if steps is None:
        divisor = torch.where(scales == 0, 1.0, scales)[..., None]
        return QuantizedWeight((rotated / divisor).round_().clamp_(-127, 127).to(torch.int8), scales, 8, None)
    grouped = rotated.unflatten(-1, (steps.shape[-1], -1))
    values = round_to_levels(grouped, steps.float() * scales[..., None]).flatten(-2)
    return QuantizedWeight(pack_nibbles(values), scales, 4, grouped.shape[-1], steps)


def as_int8(weight: QuantizedWeight) -> QuantizedWeight:
    """Return 4 bits with steps as 8 bits: every value times its step; 8 bits as they are."""
    if weight.bits == 8:
        return weight
    assert weight.steps is not None and weight.group_size is not None
    grouped = unpack_nibbles(weight.values).unflatten(-1, (-1, weight.group_size))
    return QuantizedWeight((grouped * weight.steps[..., None]).flatten(-2), weight.scales, 8, None)


def dequantize(weight: QuantizedWeight) -> Tensor:
    """Return the matrix (..., N, K) in fp32, integers rotated back."""
    if weight.values.is_meta:  # its products are Python that loads torch's compiler first: a second
        return torch.empty(weight.shape, dtype=torch.float32, device="meta")
    if weight.is_mxfp4:
        return mxfp4.dequantize(weight.values, weight.scales).float()
    return _rotated(as_int8(weight).values.float() * weight.scales[..., None], 1.0)


def pack_nibbles(values: Tensor) -> Tensor:
    """Return (..., K/2) uint8 for (..., K) whole numbers in -8..7 of any dtype."""
    nibbles = (values + 8).to(torch.uint8)
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Return (..., K) int8 in -8..7 for (..., K/2) uint8; the inverse of pack_nibbles."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).to(torch.int8) - 8


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return values (M, K) int8 and scales (M,) fp32 of x (M, K) fp32 or bf16, rotated.

    Per token: amax = max |rotated x|, scale = amax / 127, value = rotated x * (127 / amax) rounded half to even, all in
    fp32. A row with an amax below 2**-120 becomes zeros with scale 0; one with an infinity or a NaN becomes zeros with
    scale NaN, which reaches the product.
    """
    assert x.dim() == 2 and x.dtype in (torch.float32, torch.bfloat16), (x.shape, x.dtype)
    return quantize_rows(rotate(x))


def quantize_activations_by_group(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return values (M, K) int8 and scales (M, K/32) fp32 of x (M, K): every 32 columns as quantize_activations a row,
    but not rotated."""
    assert x.dim() == 2 and x.dtype in (torch.float32, torch.bfloat16), (x.shape, x.dtype)
    values, scales = quantize_rows(x.unflatten(-1, (-1, mxfp4.GROUP_SIZE)))
    return values.flatten(-2), scales


def round_to_powers(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return values (M, K) int16 in -255..255 and scales (M, K/32) fp32 of x (M, K), not rotated: as tiles multiply
    MXFP4.

    Every 32 columns have the smallest power of two as their scale of which their largest magnitude is less than 255.5,
    and no less than 2**-60; value = x / scale rounded half to even. With an infinity or a NaN they become zeros with
    scale NaN, which reaches the product. bf16 holds every value times its scale.
    """
    assert x.dim() == 2 and x.dtype in (torch.float32, torch.bfloat16), (x.shape, x.dtype)
    grouped = x.float().unflatten(-1, (-1, mxfp4.GROUP_SIZE))
    amax = grouped.abs().amax(-1)  # a NaN among the numbers is the maximum
    is_finite = amax.isfinite()
    exponents = ((amax.view(torch.int32) + _TO_NEXT_POWER) >> 23) - 7
    scales = (torch.where(is_finite, exponents, 127).clamp_min_(_SMALLEST_POWER) << 23).view(torch.float32)
    values = torch.where(is_finite[..., None], (grouped / scales[..., None]).round_(), 0.0)
    return values.to(torch.int16).flatten(-2), torch.where(is_finite, scales, torch.nan)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return values (..., n) int8 from -127 to 127 and scales (...) fp32, max|x| / 127, of x (..., n).

    A row that is not finite has zeros and a scale of NaN.
    """
    numbers = x.float()
    amax = numbers.abs().amax(-1)  # a NaN among the numbers is the maximum
    is_finite, is_zero = amax.isfinite(), amax < SMALLEST_AMAX
    scales = torch.where(is_zero, 0.0, torch.where(is_finite, amax / 127.0, torch.nan))
    # One division: `127.0 / tensor` would be the rounded reciprocal times 127.
    factor = torch.full_like(amax, 127.0) / torch.where(is_finite & ~is_zero, amax, 1.0)
    values = (numbers * factor[..., None]).round_()
    values = torch.where((is_finite & ~is_zero)[..., None], values, 0.0)
    return values.to(torch.int8), scales


def quantized_linear(x: Tensor, weight: QuantizedWeight, *, by_tiles: bool = False) -> Tensor:
    """Return (M, N) fp32, x (M, K) times a weight (N, K) transposed: the definition that kernels must meet to the bit.

    8 bits: y = (dot * activation_scale[m]) * weight_scale[n], dot over all columns and rounded to fp32 once.
    4 bits: the same, of the weight's values times their steps.
    MXFP4: y = sum over groups g, rising, of (dot_g * (activation_scale[m, g] / 2)) * 2^(weight_scale[n, g] - 127), with
    dot_g of twice the weights' numbers. by_tiles: activations are those of round_to_powers, and weight scales below
    2**-60 are taken for that, as the CPU's kernels for AMX do; then products with scales are exact (while they stay
    below 2**127), and only the sum is rounded.
    Dot products are exact int32; every product and sum written here is one fp32 rounding, none are fused, but for the
    product with a power of two, which is not rounded.
    """
    assert weight.values.dim() == 2 and x.shape[1] == weight.shape[1], (x.shape, weight.shape)
    if weight.is_mxfp4:
        return _mxfp4_linear(x, weight, by_tiles)
    values, scales = quantize_activations(x)
    numbers, matrix = values.float(), as_int8(weight).values.float()
    dot = torch.zeros(x.shape[0], matrix.shape[0], dtype=torch.int32, device=x.device)
    for part, own in zip(numbers.split(_EXACT_COLUMNS, 1), matrix.split(_EXACT_COLUMNS, 1), strict=True):
        dot += (part @ own.t()).to(torch.int32)
    return dot.float() * scales[:, None] * weight.scales


def _mxfp4_linear(x: Tensor, weight: QuantizedWeight, by_tiles: bool) -> Tensor:
    values, scales = (round_to_powers if by_tiles else quantize_activations_by_group)(x)
    numbers, matrix = values.float(), mxfp4.halves(weight.values).float()
    scales = (scales.double() if by_tiles else scales) / 2.0
    powers = mxfp4.powers(weight.scales.clamp_min(_SMALLEST_POWER if by_tiles else 0))
    total = numbers.new_zeros(x.shape[0], matrix.shape[0])
    for group in range(scales.shape[1]):
        columns = slice(group * mxfp4.GROUP_SIZE, (group + 1) * mxfp4.GROUP_SIZE)
        term = (numbers[:, columns] @ matrix[:, columns].t()) * scales[:, group, None]
        # In fp64, which holds the product where fp32 overflows or is subnormal; a sum rounded twice is the same.
        total = (total.double() + term.double() * powers[:, group].double()).float()
    return total
