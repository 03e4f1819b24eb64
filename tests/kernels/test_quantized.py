"""The quantised formats: round trips, bounds on the error, and the product against a loop over exact integers."""

import numpy as np
import pytest
import torch

from moesaic.kernels import select
from moesaic.kernels.quantized import (
    MAX_COLUMNS,
    QuantizedWeight,
    dequantize,
    pack_nibbles,
    quantize_activations,
    quantize_weight,
    quantized_linear,
    rotate,
    rotate_weight,
    rotation_size,
    round_to_scales,
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


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_four_bits_use_all_sixteen_levels_of_each_group(group_size: int) -> None:
    weight = draw(5, 2 * 128)
    quantized = quantize_weight(weight, bits=4, group_size=group_size)
    assert quantized.values.dtype == torch.uint8 and quantized.values.shape == (5, 128)
    assert quantized.scales.dtype == torch.bfloat16 and quantized.scales.shape == (5, 256 // group_size)
    assert quantized.shape == weight.shape
    assert quantized.num_bytes == 5 * 128 + 2 * 5 * 256 // group_size
    values = unpack_nibbles(quantized.values).unflatten(-1, (-1, group_size))
    assert values.amin(-1).eq(-8).all()  # the number of largest magnitude, whatever its sign
    rotated_back = rotate_weight(dequantize(quantized))
    error = (rotated_back - rotate_weight(weight)).unflatten(-1, (-1, group_size)).abs()
    # Half a step, and another half where the other sign is clamped at 7 of 8; the scale's own rounding is 2**-8.
    assert (error <= quantized.scales.float().abs()[..., None] * 1.04).all()
    is_inside = values.ne(7)
    assert (error <= quantized.scales.float().abs()[..., None] * 0.54)[is_inside].all()


def test_rows_of_zeros_stay_zeros() -> None:
    for bits, group_size in FORMATS:
        quantized = quantize_weight(torch.zeros(2, 128), bits=bits, group_size=group_size)
        assert dequantize(quantized).eq(0).all() and quantized.scales.eq(0).all()


def test_given_scales_clamp_what_they_do_not_reach() -> None:
    weight = torch.tensor([[10.0, -10.0, 1.4, 0.0] * 8])
    quantized = round_to_scales(weight, torch.ones(1, 1), bits=4, group_size=32)
    assert unpack_nibbles(quantized.values)[0, :4].tolist() == [7, -8, 1, 0]


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
        assert torch.equal(dequantize(quantized), dense), (bits, group_size)


def by_hand(x: torch.Tensor, weight: QuantizedWeight) -> np.ndarray:
    """One output at a time, integers in Python, fp32 steps in NumPy, which never fuses."""
    values, scales = (each.numpy() for each in quantize_activations(x))
    matrix = (weight.values if weight.bits == 8 else unpack_nibbles(weight.values)).numpy()
    step = weight.group_size or matrix.shape[1]
    weight_scales = weight.scales.float().numpy()
    out = np.zeros((x.shape[0], matrix.shape[0]), np.float32)
    for m in range(out.shape[0]):
        for n in range(out.shape[1]):
            dots = [
                np.float32(sum(int(a) * int(b) for a, b in zip(values[m, part], matrix[n, part], strict=True)))
                for part in (slice(start, start + step) for start in range(0, matrix.shape[1], step))
            ]
            if weight.bits == 8:
                out[m, n] = np.float32(dots[0] * scales[m]) * weight_scales[n]
                continue
            total = np.float32(0)
            for dot, scale in zip(dots, weight_scales[n], strict=True):
                total = np.float32(total + np.float32(dot * scale))
            out[m, n] = total * scales[m]
    return out


@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
@pytest.mark.parametrize("rows", [1, 3])
def test_the_product_is_the_definition_to_the_bit(bits: int, group_size: int | None, rows: int) -> None:
    for columns in (384,) if bits == 4 else (300, 1100, 3072):
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
    for values, scales, bits, group_size in (
        (good.values, good.scales, 4, 16),
        (good.values, good.scales, 4, 64),
        (good.values, good.scales.float(), 4, 32),
        (good.values.to(torch.int8), good.scales, 4, 32),
        (torch.zeros(4, 8, dtype=torch.int8), torch.zeros(3), 8, None),
        (torch.zeros(4, 8, dtype=torch.int8), torch.zeros(4), 8, 32),
        (torch.zeros(1, MAX_COLUMNS + 1, dtype=torch.int8), torch.zeros(1), 8, None),
    ):
        with pytest.raises(AssertionError):
            QuantizedWeight(values, scales, bits, group_size)
