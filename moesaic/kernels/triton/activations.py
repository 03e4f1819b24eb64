"""Rows rotated and rounded to bytes, as quantized.quantize_activations defines them, to the bit."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels.mxfp4 import GROUP_SIZE
from moesaic.kernels.quantized import SMALLEST_AMAX, rotation_size
from moesaic.kernels.triton.launch import on_device_of, power_of_two

_SMALLEST: tl.constexpr = tl.constexpr(SMALLEST_AMAX)


@triton.jit
def round_half_even(x):
    """The nearest whole number, the even of two, of |x| below 2**22: where fp32 has no digits behind the point."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def bytes_of(numbers, axis: tl.constexpr):
    """Rows of fp32 in -127..127 and their scales; an infinity or a NaN makes a row zeros with scale NaN."""
    magnitudes = tl.abs(numbers)
    amax = tl.max(magnitudes, axis)
    # A maximum passes over NaN, so it is looked for itself.
    is_finite = tl.min((magnitudes < float("inf")).to(tl.int32), axis) > 0
    is_used = is_finite & (amax >= _SMALLEST)
    scales = tl.where(is_used, tl.div_rn(amax, tl.full(amax.shape, 127.0, tl.float32)), 0.0)
    scales = tl.where(is_finite, scales, float("nan"))
    factor = tl.div_rn(tl.full(amax.shape, 127.0, tl.float32), tl.where(is_used, amax, 1.0))
    used = tl.expand_dims(is_used, axis)
    values = tl.where(used, round_half_even(tl.where(used, numbers, 0.0) * tl.expand_dims(factor, axis)), 0.0)
    return values, scales


@triton.jit
def _rotate_and_round_kernel(
    x_ptr,
    values_ptr,
    scales_ptr,
    columns,
    PADDED: tl.constexpr,
    STEPS: tl.constexpr,
    ROUNDS: tl.constexpr,
    EVEN_FIRST: tl.constexpr,
):
    """A row each. ROUNDS: to bytes, EVEN_FIRST of every eight columns the even ones first; else the rotated row is
    written in fp32."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, PADDED)
    x = tl.load(x_ptr + row * columns + at, mask=at < columns, other=0.0).to(tl.float32)
    # Blocks of 2**STEPS columns begin at its multiples, so that all of the row takes each step at once.
    for step in tl.static_range(STEPS):
        x = tl.permute(tl.reshape(x, (PADDED // (2 << step), 2, 1 << step)), (0, 2, 1))
        first, second = tl.split(x)
        x = tl.reshape(tl.permute(tl.join(first + second, first - second), (0, 2, 1)), (PADDED,))
    if ROUNDS:
        values, scale = bytes_of(x[None, :], 1)
        tl.store(scales_ptr + row + tl.arange(0, 1), scale)
        values = values.to(tl.int8)
        if EVEN_FIRST:
            values = tl.permute(tl.reshape(values, (PADDED // 8, 4, 2)), (0, 2, 1))
        values = tl.reshape(values, (PADDED,))
        tl.store(values_ptr + row * columns + at, values, mask=at < columns)
    else:
        tl.store(values_ptr + row * columns + at, x, mask=at < columns)


@triton.jit
def _round_groups_kernel(x_ptr, values_ptr, scales_ptr, num_groups, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK groups of GROUP columns each."""
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    mask = group < num_groups
    x = tl.load(x_ptr + at, mask=mask[:, None], other=0.0).to(tl.float32)
    values, scales = bytes_of(x, 1)
    tl.store(values_ptr + at, values.to(tl.int8), mask=mask[:, None])
    tl.store(scales_ptr + group, scales, mask=mask)


def quantize_activations(x: Tensor, *, even_first: bool = False) -> tuple[Tensor, Tensor]:
    """Return values (M, K) int8 and scales (M,) fp32 of x (M, K), fp32 or bf16, rotated.

    even_first: of every eight columns the even ones stand before the odd ones, as products.py takes words of 4 bits
    apart.
    """
    assert not even_first or x.shape[1] % 8 == 0, x.shape
    rows, columns = x.shape
    x = x.contiguous()
    values = torch.empty(rows, columns, dtype=torch.int8, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    if x.numel():
        _launch_rows(x, values, scales, even_first)
    return values, scales


def rotate(x: Tensor) -> Tensor:
    """Return x (..., K), fp32 or bf16, in fp32 and rotated, as quantized.rotate."""
    x = x.contiguous()
    rotated = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    if x.numel():
        _launch_rows(x, rotated, None, even_first=False)
    return rotated


def _launch_rows(x: Tensor, values: Tensor, scales: Tensor | None, even_first: bool) -> None:
    rows, columns = x.shape[:-1].numel(), x.shape[-1]
    padded, steps = power_of_two(columns), rotation_size(columns).bit_length() - 1
    warps = max(1, min(16, padded // 512))
    with on_device_of(x):
        _rotate_and_round_kernel[(rows,)](
            x, values, scales, columns, padded, steps, scales is not None, even_first,
            num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip


def quantize_activations_by_group(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return values (M, K) int8 and scales (M, K/32) fp32 of x (M, K): every 32 columns as a row, not rotated."""
    rows, columns = x.shape
    x = x.contiguous()
    values = torch.empty(rows, columns, dtype=torch.int8, device=x.device)
    scales = torch.empty(rows, columns // GROUP_SIZE, dtype=torch.float32, device=x.device)
    block = 64
    if x.numel():
        with on_device_of(x):
            _round_groups_kernel[(triton.cdiv(scales.numel(), block),)](
                x, values, scales, scales.numel(), GROUP_SIZE, block, num_warps=4, enable_fp_fusion=False
            )
    return values, scales
