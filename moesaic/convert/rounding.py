"""Rounding weights so that their products with real inputs change least: error feedback, and steps searched for it.

Where the inputs come from is calibrate.py's business; the formats are kernels/quantized.py's.

Source: Frantar et al., GPTQ (arXiv 2210.17323): columns are rounded one after another, and each one's error is taken
back in the columns that are not rounded yet, in the way that the second moments of the inputs say.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from moesaic.kernels import mxfp4
from moesaic.kernels.quantized import (
    MAX_STEP,
    QuantizedWeight,
    pack_nibbles,
    rotate,
    rotate_weight,
    row_scales,
    squared_errors,
    steps_of_least_error,
)

# Columns whose errors are taken back in the rest of the matrix by one product.
_BLOCK = 128
# Added to the diagonal, as a share of its mean: inputs seen in calibration are a sample.
_DAMPING = 0.01
# Steps tried, from the one that reaches the group's largest magnitude downwards. Clipping it pays off for few of them.
_STEPS_TRIED = 7
# Numbers of a matrix that are worked on at a time: some six times their size in fp32 is needed.
_NUMBERS = 1 << 25


def searched_steps(grouped: Tensor, scales: Tensor, importance: Tensor | None = None) -> Tensor:
    """Return the int8 steps (...) of groups (..., G) whose rounding errors, squared, have the least weighted sum.

    scales broadcast to the groups' steps, importance to the groups; None: all columns alike. Both signs are tried,
    since there is one level more below zero than above.
    """
    extreme = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True)).squeeze(-1)
    unit = torch.where(scales == 0, 1.0, scales)

    def tried() -> Iterator[Tensor]:
        for levels in (-8.0, 7.0):
            reach = extreme / levels / unit
            sign = torch.where(reach < 0, -1.0, 1.0)
            for below in range(_STEPS_TRIED):
                yield (reach.abs().ceil() - below).clamp_(1.0, MAX_STEP) * sign

    def error_of(steps: Tensor) -> Tensor:
        error = squared_errors(grouped, steps * scales)
        return (error if importance is None else error.mul_(importance)).sum(-1)

    return steps_of_least_error(tried(), error_of)


def feedback_factor(second_moments: Tensor, *, is_mxfp4: bool = False) -> Tensor:
    """Return the upper triangular (K, K) fp32 factor that round_with_feedback needs of X^T X (K, K), in fp64.

    It is that of the inputs as they meet the weight: rotated, but for MXFP4. A column of those that is always 0 has no
    say.
    """
    moments = second_moments.double()
    moments = moments.clone() if is_mxfp4 else rotate(rotate(moments).t()).clone()
    diagonal = moments.diagonal()
    diagonal[diagonal == 0] = 1.0
    mean = diagonal.mean()
    for damping in (_DAMPING, 10 * _DAMPING, 100 * _DAMPING):
        damped = moments + torch.eye(moments.shape[0], dtype=torch.float64, device=moments.device) * (damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper.float()
    # The moments are finite and damped by as much as they are: this cannot be.
    raise AssertionError(f"no Cholesky factor of {tuple(moments.shape)} moments with mean diagonal {float(mean)}")


def round_with_feedback(
    weight: Tensor, factor: Tensor, *, bits: int, group_size: int | None, is_mxfp4: bool = False
) -> QuantizedWeight:
    """Rotate a weight (N, K) and round it column by column, each one's error taken back in the later ones.

    factor: of the second moments of the inputs, from feedback_factor. A row's scale is that of the weight as given. 4
    bits: a group's steps are searched when its turn comes, with the errors before it already in its weights; where
    these have grown beyond what its scale reaches they are clamped. MXFP4 is not rotated, its scales are the nearest,
    and what it holds stays as it is. Rows have nothing to do with one another, and go in pieces.
    """
    pieces = [
        _round_rows(rows, factor, bits=bits, group_size=group_size, is_mxfp4=is_mxfp4)
        for rows in weight.split(max(1, _NUMBERS // weight.shape[1]))
    ]
    steps = [each.steps for each in pieces if each.steps is not None]
    return QuantizedWeight(
        torch.cat([each.values for each in pieces]),
        torch.cat([each.scales for each in pieces]),
        bits,
        group_size,
        torch.cat(steps) if steps else None,
    )


def _round_rows(
    weight: Tensor, factor: Tensor, *, bits: int, group_size: int | None, is_mxfp4: bool
) -> QuantizedWeight:
    weight = weight.float()
    turned = (weight if is_mxfp4 else rotate_weight(weight)).t()
    columns = turned.clone(memory_format=torch.contiguous_format)  # (K, N), changed as we go
    num_columns = columns.shape[0]
    values = torch.empty_like(columns)
    scales = columns.abs().amax(0) / 127.0 if bits == 8 else row_scales(columns.t())
    levels, of_groups = scales, []  # of MXFP4 the scales of groups, of int4 their steps
    for start in range(0, num_columns, _BLOCK):
        end = min(start + _BLOCK, num_columns)
        errors = columns.new_empty(end - start, columns.shape[1])
        for column in range(start, end):
            if group_size is not None and column % group_size == 0:
                group = columns[column : column + group_size]
                if is_mxfp4:
                    of_groups.append(mxfp4.nearest_scales(group.abs().amax(0)))
                    levels = mxfp4.powers(of_groups[-1])
                else:
                    # What an error costs in the end is its square over the square of the factor's diagonal.
                    importance = factor.diagonal()[column : column + group_size].reciprocal().square()
                    of_groups.append(searched_steps(group.t(), scales, importance))
                    levels = of_groups[-1] * scales
            weights = columns[column]
            rounded = weights / torch.where(levels == 0, 1.0, levels)
            if is_mxfp4:
                rounded = mxfp4.round_numbers(rounded)
            else:
                rounded.round_().clamp_(*((-127, 127) if bits == 8 else (-8, 7)))
            values[column] = rounded
            error = (weights - rounded * levels) / factor[column, column]
            errors[column - start] = error
            columns[column + 1 : end].addr_(factor[column, column + 1 : end], error, alpha=-1.0)
        columns[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1.0)
    values = values.t().contiguous()
    if bits == 8:
        return QuantizedWeight(values.to(torch.int8), scales, 8, None)
    if is_mxfp4:
        return QuantizedWeight(mxfp4.encode(values), torch.stack(of_groups, -1), 4, group_size)
    return QuantizedWeight(pack_nibbles(values), scales, 4, group_size, torch.stack(of_groups, -1))
