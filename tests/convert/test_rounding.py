"""Rounding with feedback and searched scales: never worse on the inputs it knows than rounding to nearest."""

import pytest
import torch
from torch import Tensor

from moesaic.convert.rounding import feedback_factor, round_with_feedback, searched_scales
from moesaic.kernels.quantized import (
    QuantizedWeight,
    dequantize,
    quantize_to_mxfp4,
    quantize_weight,
    rotate_weight,
    round_to_scales,
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
    scales = searched_scales(rotated.unflatten(-1, (-1, group_size))).squeeze(-1)
    return round_to_scales(rotated, scales, bits=4, group_size=group_size)


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


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_a_searched_scale_is_the_best_of_those_tried(group_size: int) -> None:
    weight = draw(64, 256) * torch.rand(64, 256, generator=torch.Generator().manual_seed(5)) ** 3
    searched = round_with_search(weight, group_size=group_size)
    nearest = quantize_weight(weight, bits=4, group_size=group_size)

    def errors(quantized: QuantizedWeight) -> Tensor:
        error = rotate_weight(dequantize(quantized)) - rotate_weight(weight)
        return error.square().unflatten(-1, (-1, group_size)).sum(-1)

    assert (errors(searched) <= errors(nearest) * 1.0001).all()
    assert errors(searched).sum() < 0.97 * errors(nearest).sum()


def test_columns_that_matter_decide_the_scale() -> None:
    group = torch.tensor([[4.0] + [0.4] * 31])
    importance = torch.tensor([1e-6] + [1.0] * 31)
    alike, weighted = searched_scales(group), searched_scales(group, importance)
    assert weighted.abs() < alike.abs()


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
