"""Rounding with feedback and searched steps: never worse on the inputs it knows than rounding to nearest."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.convert import rounding
from moesaic.convert.rounding import feedback_factor, round_with_feedback, searched_steps
from moesaic.kernels.quantized import (
    QuantizedWeight,
    dequantize,
    quantize_to_mxfp4,
    quantize_weight,
    rotate,
    rotate_weight,
    round_to_levels,
    round_to_scales,
    row_scales,
    squared_errors,
)

FORMATS = [(8, None), (4, 32), (4, 64), (4, 128)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(rows: int, columns: int) -> Tensor:
    """Inputs as a network has them: a few directions carry most, and some columns are large."""
    mixing = draw(columns, columns, seed=1) / columns**0.5 + 0.3 * torch.eye(columns)
    return draw(rows, columns, seed=2) @ mixing * torch.linspace(0.1, 3, columns)


def round_with_search(weight: Tensor, *, group_size: int) -> QuantizedWeight:
    rotated = rotate_weight(weight)
    scales = row_scales(rotated)
    steps = searched_steps(rotated.unflatten(-1, (-1, group_size)), scales[:, None])
    return round_to_scales(rotated, scales, steps)


def output_error(weight: Tensor, quantized: QuantizedWeight, inputs: Tensor) -> float:
    return float((inputs @ (dequantize(quantized) - weight).t()).norm())


@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
@pytest.mark.parametrize("columns", [128, 256, 384])
def test_feedback_loses_less_of_the_product_than_rounding_to_nearest(
    bits: int, group_size: int | None, columns: int
) -> None:
    weight, inputs = draw(48, columns), correlated(2000, columns)
    factor = feedback_factor((inputs.t() @ inputs).double())
    with_feedback = round_with_feedback(weight, factor, bits=bits, group_size=group_size)
    nearest = quantize_weight(weight, bits=bits, group_size=group_size)
    assert with_feedback.shape == nearest.shape and torch.equal(weight, draw(48, columns))
    ratio = output_error(weight, with_feedback, inputs) / output_error(weight, nearest, inputs)
    assert ratio < 0.95
    unseen = correlated(500, columns).flip(1)  # inputs of another kind gain nothing, and lose some
    assert output_error(weight, with_feedback, unseen) < 2.2 * output_error(weight, nearest, unseen)


def test_inputs_that_have_nothing_to_do_with_one_another_leave_nothing_to_take_back() -> None:
    weight = draw(8, 192)
    factor = feedback_factor(torch.eye(192, dtype=torch.float64) * 50)
    assert torch.equal(factor, factor.diagonal().diag())
    quantized, nearest = round_with_feedback(weight, factor, bits=8, group_size=None), quantize_weight(weight, bits=8)
    assert torch.equal(quantized.values, nearest.values) and torch.equal(quantized.scales, nearest.scales)
    searched = round_with_search(weight, group_size=64)
    quantized = round_with_feedback(weight, factor, bits=4, group_size=64)
    assert torch.equal(quantized.values, searched.values) and torch.equal(quantized.scales, searched.scales)
    assert quantized.steps is not None and searched.steps is not None and torch.equal(quantized.steps, searched.steps)


def test_an_error_is_taken_back_by_the_columns_that_carry_the_same() -> None:
    """Columns that are always equal: only their sum matters, so all but the last error comes back. And the weight
    itself is not touched, though a single row is as it lies in memory."""
    inputs = draw(1000, 1).expand(1000, 65).contiguous()  # an odd number, which is not rotated
    weight = torch.full((1, 65), 0.4)
    weight[0, 0] = -127.0  # the scale is 1
    given = weight.clone()
    factor = feedback_factor((inputs.t() @ inputs).double())
    quantized = round_with_feedback(weight, factor, bits=8, group_size=None)
    assert torch.equal(weight, given)
    assert abs(float(dequantize(quantized).sum() - weight.sum())) < 1
    assert abs(float(dequantize(quantize_weight(weight, bits=8)).sum() - weight.sum())) > 20


def free_levels(grouped: Tensor, importance: Tensor) -> Tensor:
    """The levels (...) of groups (..., G), any number of fp32, with which they lose least: what steps are short of."""
    extreme = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True)).squeeze(-1)
    tried = [extreme * (share / levels) for levels in (-8.0, 7.0) for share in (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)]
    losses = torch.stack([(squared_errors(grouped, levels) * importance).sum(-1) for levels in tried])
    return torch.stack(tried).gather(0, losses.argmin(0, keepdim=True)).squeeze(0)


def with_free_levels(weight: Tensor, factor: Tensor, group_size: int) -> Tensor:
    """Return the matrix that feedback would give if every group had a scale of its own, column by column."""
    left, rounded = rotate_weight(weight), torch.empty_like(weight)
    for column in range(weight.shape[1]):
        if column % group_size == 0:
            group = slice(column, column + group_size)
            levels = free_levels(left[:, group], factor.diagonal()[group].reciprocal().square())
        rounded[:, column] = round_to_levels(left[:, column, None], levels).squeeze(-1) * levels
        error = (left[:, column] - rounded[:, column]) / factor[column, column]
        left[:, column + 1 :] -= error[:, None] * factor[column, column + 1 :]
    return rotate(rounded)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("columns", [128, 256, 384])
def test_steps_lose_hardly_more_than_scales_of_every_groups_own(group_size: int, columns: int) -> None:
    weight, inputs = draw(48, columns), correlated(2000, columns)
    factor = feedback_factor((inputs.t() @ inputs).double())
    quantized = round_with_feedback(weight, factor, bits=4, group_size=group_size)
    free = inputs @ (with_free_levels(weight, factor, group_size) - weight).t()
    # Measured 0.99 to 1.025: a step is off by up to a tenth of what a group would take.
    assert output_error(weight, quantized, inputs) < 1.03 * free.norm()


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_searched_steps_lose_no_more_than_the_nearest(group_size: int) -> None:
    weight = draw(64, 256) * torch.rand(64, 256, generator=torch.Generator().manual_seed(5)) ** 3
    searched = round_with_search(weight, group_size=group_size)
    nearest = quantize_weight(weight, bits=4, group_size=group_size)

    def error(quantized: QuantizedWeight) -> float:
        return float((dequantize(quantized) - weight).square().sum())

    assert error(searched) < error(nearest)


def test_columns_that_matter_decide_the_step() -> None:
    group, scale = torch.tensor([[4.0] + [0.4] * 31]), torch.tensor([4.0 / 120])
    importance = torch.tensor([1e-6] + [1.0] * 31)
    alike, weighted = searched_steps(group, scale), searched_steps(group, scale, importance)
    assert alike.dtype == torch.int8 and weighted.abs() < alike.abs()


def test_a_step_is_at_least_one_and_at_most_15() -> None:
    """A group of far smaller numbers than its row's, one that has grown beyond its row's, and one of zeros."""
    groups = draw(3, 32) * torch.tensor([[1e-3], [10.0], [0.0]])
    steps = searched_steps(groups, torch.tensor([3.0 / 120]))
    assert steps.abs().tolist() == [1, 15, 1]
    assert searched_steps(groups, torch.zeros(1)).abs().ge(1).all()


def test_zeros_stay_zeros_and_inputs_that_never_come_do_not_matter() -> None:
    inputs = correlated(300, 64)
    inputs[:, 10:20] = 0
    factor = feedback_factor((inputs.t() @ inputs).double())
    assert factor.isfinite().all()
    weight = draw(4, 64)
    weight[2] = 0
    for bits, group_size in ((8, None), (4, 32)):
        quantized = round_with_feedback(weight, factor, bits=bits, group_size=group_size)
        assert dequantize(quantized)[2].eq(0).all() and quantized.scales[2].eq(0).all()
        assert dequantize(quantized).isfinite().all()


def test_fewer_inputs_than_columns_are_damped() -> None:
    for rows in (0, 1, 5):
        inputs = draw(rows, 96)
        factor = feedback_factor((inputs.t() @ inputs).double())
        quantized = round_with_feedback(draw(3, 96), factor, bits=4, group_size=32)
        assert dequantize(quantized).isfinite().all()


def test_mxfp4_is_rounded_as_it_lies_and_what_it_holds_stays() -> None:
    weight, inputs = draw(24, 96), correlated(300, 96)
    factor = feedback_factor((inputs.t() @ inputs).double(), is_mxfp4=True)
    nearest = quantize_to_mxfp4(weight)
    with_feedback = round_with_feedback(weight, factor, bits=4, group_size=32, is_mxfp4=True)
    assert with_feedback.is_mxfp4 and with_feedback.shape == weight.shape
    assert output_error(weight, with_feedback, inputs) < 0.9 * output_error(weight, nearest, inputs)
    held = dequantize(nearest)
    again = round_with_feedback(held, factor, bits=4, group_size=32, is_mxfp4=True)
    assert torch.equal(dequantize(again), held)


@pytest.mark.parametrize(("bits", "group_size", "is_mxfp4"), [(8, None, False), (4, 64, False), (4, 32, True)])
def test_rows_of_a_large_matrix_are_rounded_in_pieces_to_the_same_numbers(
    bits: int, group_size: int | None, is_mxfp4: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An output matrix has rows by the hundred thousand, and several times its size in fp32 is needed at a time."""
    weight, inputs = draw(700, 128), correlated(2000, 128)
    factor = feedback_factor((inputs.t() @ inputs).double(), is_mxfp4=is_mxfp4)
    whole = round_with_feedback(weight, factor, bits=bits, group_size=group_size, is_mxfp4=is_mxfp4)
    seen: list[int] = []
    of_rows = rounding._round_rows

    def watched(rows: Tensor, *rest: Any, **options: Any) -> QuantizedWeight:
        seen.append(len(rows))
        return of_rows(rows, *rest, **options)

    monkeypatch.setattr(rounding, "_NUMBERS", 32 * 128)
    monkeypatch.setattr(rounding, "_round_rows", watched)
    pieces = round_with_feedback(weight, factor, bits=bits, group_size=group_size, is_mxfp4=is_mxfp4)
    assert seen == [32] * 21 + [28]
    assert pieces.shape == whole.shape
    # A product's sums may be in another order, by which a number at the middle of two levels may go to either.
    assert (dequantize(pieces) == dequantize(whole)).float().mean() > 0.999
