"""The quantised formats: round trips, bounds on the error, and the product against a loop over exact integers."""

import numpy as np
import pytest
import torch

from moesaic.kernels import select
from moesaic.kernels.quantized import (
    MAX_COLUMNS,
    QuantizedWeight,
    as_int8,
    combine,
    dequantize,
    pack_nibbles,
    quantize_activations,
    quantize_weight,
    quantized_linear,
    rotate,
    rotate_weight,
    rotation_size,
    round_to_scales,
    squared_errors,
    unpack_nibbles,
)

FORMATS = [(8, None), (4, 32), (4, 64), (4, 128)]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_nibbles_are_packed_low_first_with_an_offset_of_eight() -> None:
    values = torch.tensor([[-8, 7, 0, -1]])
    assert pack_nibbles(values).tolist() == [[0xF0, 0x78]]
    every = torch.arange(-8, 8).repeat(3, 2)
    assert torch.equal(unpack_nibbles(pack_nibbles(every)), every.to(torch.int8))


@pytest.mark.parametrize("columns", [1, 2, 3, 12, 96, 256, 300])
def test_a_rotation_is_a_hadamard_matrix_for_every_block_of_columns(columns: int) -> None:
    size = rotation_size(columns)
    assert size == {1: 1, 2: 2, 3: 1, 12: 4, 96: 32, 256: 256, 300: 4}[columns]
    matrix = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)])
    x = draw(3, 5, columns)
    before = x.clone()
    expected = (x.unflatten(-1, (-1, size)) @ matrix).flatten(-2)
    assert torch.allclose(rotate(x), expected, atol=1e-4) and torch.equal(x, before)
    assert torch.equal(rotate(x.bfloat16()), rotate(x.bfloat16().float()))
    assert torch.allclose(rotate(rotate_weight(x)), x, atol=1e-6) and rotate(x.double()).dtype == torch.float64
    assert torch.equal(rotate(x)[1, 2], rotate(x[1, 2:3])[0])  # a row does not depend on the others
    assert rotate(x[:0]).shape == (0, 5, columns)
    many = draw(2**19 // columns + 3, columns)  # more than are rotated at a time
    assert torch.equal(rotate(many)[-5:], rotate(many[-5:]))


def test_a_rotation_adds_neighbours_first() -> None:
    """The order of roundings is part of the definition: 1e8 swallows a 3 that comes alone and not the sum of two."""
    assert rotate(torch.tensor([[1e8, 0.0, 3.0, 3.0]]))[0, 0] == 1e8 + 8
    assert rotate(torch.tensor([[1e8, 3.0, 0.0, 3.0]]))[0, 0] == 1e8


def test_a_rotation_leaves_a_product_as_it_is_and_spreads_large_columns() -> None:
    x, weight = draw(6, 192, seed=1), draw(5, 192, seed=2)
    x[:, 17] *= 300
    assert torch.allclose(rotate(x) @ rotate_weight(weight).t(), x @ weight.t(), rtol=1e-4, atol=1e-3)
    exact = x.double() @ weight.double().t()
    with_rotation = quantized_linear(x, quantize_weight(weight, bits=8)).double() - exact
    scale = x.abs().amax(-1, keepdim=True) / 127
    without_rotation = ((x / scale).round() * scale).double() @ weight.double().t() - exact
    assert with_rotation.norm() < 0.5 * without_rotation.norm()


def test_eight_bits_are_one_scale_a_row_and_off_by_at_most_half_a_step() -> None:
    weight = draw(3, 7, 33)
    quantized = quantize_weight(weight, bits=8)
    assert quantized.values.shape == (3, 7, 33) and quantized.scales.shape == (3, 7)
    assert quantized.shape == weight.shape
    assert quantized.values.abs().amax(-1).eq(127).all()
    assert ((dequantize(quantized) - weight).abs() <= quantized.scales[..., None] * 0.5001).all()
    weight = draw(4, 256)
    quantized = quantize_weight(weight, bits=8)
    error = quantized.values * quantized.scales[..., None] - rotate_weight(weight)
    assert (error.abs() <= quantized.scales[..., None] * 0.5001).all()
    assert torch.equal(dequantize(quantized), rotate(quantized.values * quantized.scales[..., None]))


def grouped(x: torch.Tensor, group_size: int) -> torch.Tensor:
    return x.unflatten(-1, (-1, group_size))


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_four_bits_are_values_times_whole_steps_of_one_scale_a_row(group_size: int) -> None:
    weight = draw(5, 2 * 128)
    quantized = quantize_weight(weight, bits=4, group_size=group_size)
    assert quantized.values.dtype == torch.uint8 and quantized.values.shape == (5, 128)
    assert quantized.scales.dtype == torch.float32 and quantized.scales.shape == (5,)
    assert quantized.steps is not None and quantized.steps.dtype == torch.int8
    assert quantized.steps.shape == (5, 256 // group_size)
    assert quantized.shape == weight.shape
    assert quantized.num_bytes == 5 * 128 + 5 * 256 // group_size + 4 * 5
    values, rotated = grouped(unpack_nibbles(quantized.values), group_size), grouped(rotate_weight(weight), group_size)
    assert quantized.scales.equal(rotated.abs().amax((-1, -2)) / 120)
    # The number of largest magnitude is on the longer side, and a step at most clips two of the levels that reach it.
    extreme = rotated.abs().argmax(-1, keepdim=True)
    assert values.gather(-1, extreme).lt(-5).all()
    level = quantized.steps * quantized.scales[:, None]
    assert rotated.gather(-1, extreme).sign().mul(level[..., None]).lt(0).all()
    assert quantized.steps.abs().amin() >= 1 and quantized.steps.abs().amax(-1).ge(13).all()
    is_inside = (values > -8) & (values < 7)
    error = (values * level[..., None] - rotated).abs()
    assert (error <= level.abs()[..., None] * 0.5001)[is_inside].all()
    numbers = (values * quantized.steps[..., None]).flatten(-2)
    assert torch.equal(dequantize(quantized), rotate(numbers * quantized.scales[:, None]))


def by_hand_4_bits(rotated: torch.Tensor, group_size: int) -> tuple[list[list[int]], list[list[int]], list[float]]:
    """Values, steps and scales, one group at a time, in NumPy's fp32, which never fuses."""
    one = np.float32
    all_values, all_steps, scales = [], [], []
    for row in rotated.numpy():
        scale = one(np.abs(row).max() / one(120))
        row_values, row_steps = [], []
        for group in row.reshape(-1, group_size):
            extreme = group[np.abs(group).argmax()]
            reach = one(0) if scale == 0 else one(extreme / one(one(-8) * scale))
            sign, size = (-1 if reach < 0 else 1), abs(float(reach))
            candidates = []
            for magnitude in (np.ceil(size), np.floor(size), np.floor(size) - 1):
                step = sign * int(min(max(magnitude, 1), 15))
                level = one(one(step) * scale)
                values = np.clip(np.rint(group / (level if level != 0 else one(1))), -8, 7).astype(np.float32)
                errors = (values * level - group) ** 2
                while len(errors) > 1:
                    errors = errors[: len(errors) // 2] + errors[len(errors) // 2 :]
                candidates.append((errors[0], step, values))
            _, step, values = min(candidates, key=lambda each: each[0])  # the first of equals
            row_values += [int(value) for value in values]
            row_steps.append(step)
        all_values.append(row_values)
        all_steps.append(row_steps)
        scales.append(float(scale))
    return all_values, all_steps, scales


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("columns", [128, 384])
def test_a_group_takes_the_step_that_loses_least(group_size: int, columns: int) -> None:
    weight = draw(9, columns, seed=3)
    weight[2] = 0
    weight[3] = rotate(torch.nn.functional.pad(draw(1, 32), (0, columns - 32)))[0]  # rotated back, groups of zeros
    weight[4] = rotate(draw(1, columns).sign())[0]  # ties in every group
    weight[5] *= torch.linspace(0, 1, columns)
    weight[6] = rotate(draw(columns) ** 5)  # steps from 1 to 15
    quantized = quantize_weight(weight, bits=4, group_size=group_size)
    with select.forced("reference"):
        values, steps, scales = by_hand_4_bits(rotate_weight(weight), group_size)
    assert quantized.steps is not None
    assert unpack_nibbles(quantized.values).tolist() == values
    assert quantized.steps.tolist() == steps and quantized.scales.tolist() == scales
    if columns > group_size:
        assert quantized.steps[6].abs().amin() < 5 and quantized.steps[6].abs().amax() >= 13
    assert quantized.steps[2].eq(1).all()


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_steps_lose_less_than_scales_that_reach_the_extremes_to_the_bit(group_size: int) -> None:
    """Each group's own scale, its extreme over -8, however fine, loses 5 to 10 % more of ordinary numbers."""
    rotated = grouped(rotate_weight(draw(64, 1024)), group_size)
    extreme = rotated.gather(-1, rotated.abs().argmax(-1, keepdim=True)).squeeze(-1)
    quantized = quantize_weight(draw(64, 1024), bits=4, group_size=group_size)
    assert quantized.steps is not None
    ours = squared_errors(rotated, quantized.steps * quantized.scales[:, None])
    assert ours.sum() < 0.96 * squared_errors(rotated, extreme / -8).sum()


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_four_bits_are_eight_bits_of_every_value_times_its_step(group_size: int) -> None:
    weight, x = draw(40, 384, seed=1) * torch.rand(40, 1), draw(5, 384, seed=2)
    quantized = quantize_weight(weight, bits=4, group_size=group_size)
    assert quantized.steps is not None
    expanded = as_int8(quantized)
    expected = grouped(unpack_nibbles(quantized.values).int(), group_size) * quantized.steps.int()[..., None]
    assert expanded.values.equal(expected.flatten(-2).to(torch.int8)) and expected.abs().amax() <= 120
    assert expanded.scales.equal(quantized.scales) and as_int8(expanded) is expanded
    assert quantized_linear(x, quantized).equal(quantized_linear(x, expanded))
    assert dequantize(quantized).equal(dequantize(expanded))


def test_weights_of_one_format_are_taken_apart_and_put_together() -> None:
    for bits, group_size in FORMATS:
        whole = quantize_weight(draw(3, 4, 128), bits=bits, group_size=group_size)
        parts = [whole.map(lambda tensor, index=index: tensor[index]) for index in range(3)]  # type: ignore[misc]
        again = combine(parts, torch.stack)
        assert again.values.equal(whole.values) and again.scales.equal(whole.scales) and again.shape == whole.shape
        assert (again.steps is None) == (bits == 8) and dequantize(again).equal(dequantize(whole))
    with pytest.raises(AssertionError, match="64"):
        combine([quantize_weight(draw(4, 128), bits=4, group_size=size) for size in (32, 64)], torch.cat)


def test_rows_of_zeros_stay_zeros() -> None:
    for bits, group_size in FORMATS:
        quantized = quantize_weight(torch.zeros(2, 128), bits=bits, group_size=group_size)
        assert dequantize(quantized).eq(0).all() and quantized.scales.eq(0).all()


def test_given_scales_clamp_what_they_do_not_reach() -> None:
    weight = torch.tensor([[10.0, -10.0, 1.4, 0.0] * 16])
    quantized = round_to_scales(weight, torch.ones(1), torch.tensor([[1, -2]], dtype=torch.int8))
    assert unpack_nibbles(quantized.values)[0, :4].tolist() == [7, -8, 1, 0]
    assert unpack_nibbles(quantized.values)[0, 32:36].tolist() == [-5, 5, -1, 0] and quantized.group_size == 32
    assert round_to_scales(weight, torch.tensor([0.05])).values[0, :4].tolist() == [127, -127, 28, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 127, 128, 129, 300])
def test_activations_are_off_by_at_most_half_a_step(columns: int, dtype: torch.dtype) -> None:
    x = (draw(4, columns) * torch.logspace(-3, 3, columns)).to(dtype)
    values, scales = quantize_activations(x)
    assert values.dtype == torch.int8 and values.shape == x.shape and values.is_contiguous()
    assert scales.dtype == torch.float32 and scales.shape == (4,)
    assert values.abs().amax(-1).eq(127).all()
    assert ((values.float() * scales[:, None] - rotate(x)).abs() <= 0.5001 * scales[:, None]).all()


def test_activations_round_half_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 0.0]])  # of an odd number of columns, which are not rotated
    assert quantize_activations(x)[0].tolist() == [[127, 0, 2, 2, 0, -2, 0]]


def test_activations_that_are_tiny_zero_or_not_finite() -> None:
    x = torch.ones(6, 131)
    x[0] = 0
    x[1, 3] = float("inf")
    x[2, 3] = float("nan")
    x[3, 3] = float("-inf")
    x[4] = 1e-38
    x[5] = 2.0**-120
    values, scales = quantize_activations(x)
    assert values[:5].eq(0).all() and values[5].eq(127).all()
    assert scales[[0, 4]].eq(0).all() and scales[1:4].isnan().all() and scales[5] > 0


def weights() -> dict[str, torch.Tensor]:
    """Rotations of every size, more rows than a task has, and numbers whose rounding is not ordinary."""
    shapes = [(1, 1), (3, 33), (37, 96), (5, 384), (2, 3, 300), (2, 17, 2048), (1, 4480), (0, 64), (2, 0, 64)]
    found = {str(shape): draw(*shape, seed=len(shape)) for shape in shapes}
    found["in bf16"] = draw(21, 640, seed=5).bfloat16()
    found["turned"] = draw(128, 40, seed=6).t()
    found["zeros"] = torch.zeros(3, 128)
    alike = draw(6, 256, seed=7).sign()
    found["of one magnitude"] = rotate(alike) * 0.5  # rotated, a group's extremes are all alike
    found["tiny"] = draw(4, 128, seed=8) * 1e-40
    found["huge"] = draw(4, 128, seed=9) * 1e35
    found["of squares beyond fp32"] = draw(4, 256, seed=11) * 1e25
    found["steps from 1 to 15"] = rotate(draw(9, 512, seed=10) ** 5)
    found["groups of zeros"] = rotate(torch.nn.functional.pad(draw(3, 32), (96, 128)))
    found["a row of zeros"] = draw(3, 128) * torch.tensor([[1.0], [0.0], [2.0]])
    found["one group"] = draw(5, 32, seed=12)
    found["halves"] = rotate((draw(4, 256, seed=13) * 8).round() / 2)  # ties in rounding
    return found


@pytest.mark.parametrize("name", weights())
def test_kernels_round_weights_to_the_same_bits(compiled_kernels: str, name: str) -> None:
    weight = weights()[name]
    with select.forced("reference"):
        expected = rotate_weight(weight)
    assert torch.equal(rotate_weight(weight), expected)
    for bits, group_size in FORMATS:
        if bits == 4 and weight.shape[-1] % group_size:
            continue
        with select.forced("reference"):
            plain = quantize_weight(weight, bits=bits, group_size=group_size)
            dense = dequantize(plain)
        quantized = quantize_weight(weight, bits=bits, group_size=group_size)
        assert torch.equal(quantized.values, plain.values), (bits, group_size)
        assert torch.equal(quantized.scales, plain.scales), (bits, group_size)
        if quantized.steps is not None and plain.steps is not None:
            assert torch.equal(quantized.steps, plain.steps), (bits, group_size)
        assert torch.equal(dequantize(quantized), dense), (bits, group_size)


def by_hand(x: torch.Tensor, weight: QuantizedWeight) -> np.ndarray:
    """One output at a time, integers in Python, fp32 steps in NumPy, which never fuses."""
    values, scales = (each.numpy() for each in quantize_activations(x))
    matrix = weight.values.tolist()
    if weight.steps is not None:
        numbers, steps, size = unpack_nibbles(weight.values).tolist(), weight.steps.tolist(), weight.group_size or 1
        matrix = [[v * own[k // size] for k, v in enumerate(row)] for row, own in zip(numbers, steps, strict=True)]
    weight_scales = weight.scales.numpy()
    out = np.zeros((x.shape[0], len(matrix)), np.float32)
    for m in range(out.shape[0]):
        for n in range(out.shape[1]):
            dot = np.float32(sum(int(a) * b for a, b in zip(values[m], matrix[n], strict=True)))
            out[m, n] = np.float32(dot * scales[m]) * weight_scales[n]
    return out


@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
@pytest.mark.parametrize("rows", [1, 3])
def test_the_product_is_the_definition_to_the_bit(bits: int, group_size: int | None, rows: int) -> None:
    for columns in (128, 384, 3072) if bits == 4 else (300, 1100, 3072):
        weight = quantize_weight(draw(5, columns, seed=1), bits=bits, group_size=group_size)
        x = draw(rows, columns, seed=2)
        assert np.array_equal(quantized_linear(x, weight).numpy(), by_hand(x, weight))


@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
def test_a_row_does_not_depend_on_the_batch(bits: int, group_size: int | None) -> None:
    weight = quantize_weight(draw(40, 512, seed=1), bits=bits, group_size=group_size)
    x = draw(17, 512, seed=2)
    whole = quantized_linear(x, weight)
    assert all(torch.equal(quantized_linear(x[row : row + 1], weight)[0], whole[row]) for row in range(17))


@pytest.mark.parametrize(("bits", "group_size", "tolerance"), [(8, None, 0.02), (4, 32, 0.12)])
def test_the_product_is_near_that_of_the_unquantised_matrix(
    bits: int, group_size: int | None, tolerance: float
) -> None:
    weight, x = draw(64, 512, seed=1), draw(32, 512, seed=2)
    exact = x @ weight.t()
    error = quantized_linear(x, quantize_weight(weight, bits=bits, group_size=group_size)) - exact
    assert error.norm() / exact.norm() < tolerance


def test_largest_integers_do_not_overflow_or_round() -> None:
    columns = 4097  # odd: not rotated; the sum is more than fp32 has digits for
    weight = QuantizedWeight(torch.full((1, columns), -127, dtype=torch.int8), torch.ones(1), 8, None)
    x = torch.full((1, columns), 127.0)
    x[0, -1] = 126.0
    assert quantized_linear(x, weight).item() == float(np.float32(-127 * (127 * columns - 1)))
    assert 127 * 127 * MAX_COLUMNS < 2**31
    columns = 33 * 32 * 5  # rotated by 32: -8 * 15 everywhere, and 127 after the rotation
    x = rotate(torch.full((1, columns), 127.0)) / 32
    for step in (15, -15):
        steps = torch.full((1, columns // 32), step, dtype=torch.int8)
        weight = QuantizedWeight(torch.zeros(1, columns // 2, dtype=torch.uint8), torch.ones(1), 4, 32, steps)
        assert quantized_linear(x, weight).item() == float(np.float32(-8 * step * 127 * columns))


def test_what_is_not_finite_reaches_the_product() -> None:
    weight = quantize_weight(draw(3, 256), bits=8)
    x = torch.ones(2, 256)
    x[1, 200] = float("nan")
    out = quantized_linear(x, weight)
    assert out[0].isfinite().all() and out[1].isnan().all()


@pytest.mark.parametrize(("bits", "group_size"), [(8, 64), (4, None), (4, 8), (2, 32)])
def test_formats_that_there_are_not_are_refused(kernels: str, bits: int, group_size: int | None) -> None:
    with pytest.raises(AssertionError, match=str(bits)):
        quantize_weight(draw(2, 128), bits=bits, group_size=group_size)


def test_shapes_and_dtypes_that_do_not_fit_are_refused() -> None:
    good = quantize_weight(draw(4, 64), bits=4, group_size=32)
    assert good.steps is not None
    wide = torch.zeros(1, MAX_COLUMNS + 64, dtype=torch.uint8)
    for values, scales, bits, group_size, steps in (
        (good.values, good.scales, 4, 16, good.steps),
        (good.values, good.scales, 4, 64, good.steps),
        (good.values, good.scales.bfloat16(), 4, 32, good.steps),
        (good.values, good.scales[:, None], 4, 32, good.steps),
        (good.values, good.scales, 4, 32, None),
        (good.values, good.scales, 4, 32, good.steps.int()),
        (good.values, good.scales, 4, 32, good.steps[:, :1]),
        (good.values, good.steps.view(torch.uint8), 4, 32, good.steps),
        (good.values.to(torch.int8), good.scales, 4, 32, good.steps),
        (wide, torch.zeros(1), 4, 64, torch.zeros(1, wide.shape[1] // 32, dtype=torch.int8)),
        (torch.zeros(4, 8, dtype=torch.int8), torch.zeros(3), 8, None, None),
        (torch.zeros(4, 8, dtype=torch.int8), torch.zeros(4), 8, 32, None),
        (torch.zeros(4, 8, dtype=torch.int8), torch.zeros(4, dtype=torch.uint8), 8, None, None),
        (torch.zeros(4, 32, dtype=torch.int8), torch.zeros(4), 8, None, good.steps),
        (torch.zeros(1, MAX_COLUMNS + 1, dtype=torch.int8), torch.zeros(1), 8, None, None),
    ):
        with pytest.raises(AssertionError):
            QuantizedWeight(values, scales, bits, group_size, steps)
