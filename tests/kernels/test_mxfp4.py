"""MXFP4: what it holds is kept, the rest is rounded to the nearest, and products are their definition to the bit."""

import numpy as np
import pytest
import torch

from moesaic.kernels import mxfp4, select
from moesaic.kernels.quantized import (
    QuantizedWeight,
    dequantize,
    quantize_activations_by_group,
    quantize_to_mxfp4,
    quantized_linear,
    round_to_powers,
)

MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
NUMBERS = torch.cat([-MAGNITUDES, MAGNITUDES])


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def published(rows: int, groups: int, scales: range) -> tuple[torch.Tensor, torch.Tensor]:
    """Random values and scales, and groups of each one number alone, of zeros, and of small numbers."""
    generator = torch.Generator().manual_seed(3)
    values = torch.randint(256, (rows, groups, 16), dtype=torch.uint8, generator=generator)
    for code in range(16):
        values[code] = code * 17
        values[16 + code] &= 0x99  # 0 and 0.5 alone
    exponents = torch.randint(scales.start, scales.stop, (rows, groups), dtype=torch.uint8, generator=generator)
    return values.flatten(-2), exponents


@pytest.mark.parametrize("scales", [range(4), range(100, 140), range(245, 253)])
def test_numbers_that_it_holds_are_kept_to_the_bit(scales: range) -> None:
    values, exponents = published(40, 7, scales)
    numbers = mxfp4.dequantize(values, exponents)
    for given in (numbers, numbers.float()):
        quantized = quantize_to_mxfp4(given)
        again = dequantize(quantized)
        assert torch.equal(again.view(torch.int32), numbers.float().view(torch.int32))
    assert quantized.is_mxfp4 and quantized.shape == (40, 224) and quantized.num_bytes == 40 * (112 + 7)


def test_halves_and_powers_are_the_numbers() -> None:
    values, exponents = published(40, 3, range(253))
    halves = mxfp4.halves(values)
    assert halves.dtype == torch.int8 and halves.unique().tolist() == (2 * NUMBERS).unique().tolist()
    numbers = halves.unflatten(-1, (-1, 32)).double() / 2 * (2.0 ** (exponents.double() - 127))[..., None]
    assert torch.equal(numbers.flatten(-2), mxfp4.dequantize(values, exponents).double())
    assert mxfp4.powers(torch.tensor([0, 1, 127, 254], dtype=torch.uint8)).tolist() == [
        2.0**-127,
        2.0**-126,
        1,
        2.0**127,
    ]


def test_rounding_is_to_the_nearest_and_to_even_between_two() -> None:
    x = torch.cat([torch.linspace(-7, 7, 1401), (MAGNITUDES[1:] + MAGNITUDES[:-1]) / 2, torch.tensor([100.0])])
    rounded = mxfp4.round_numbers(x)
    assert torch.equal((rounded - x).abs(), (x[:, None] - NUMBERS).abs().amin(-1))
    assert torch.equal(rounded.signbit(), x.signbit())
    # Codes of the even ones have no last bit.
    assert mxfp4.round_numbers(torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])).tolist() == [0, 1, 1, 2, 2, 4, 4]
    assert mxfp4.encode(torch.tensor([0.0, 0.5, -0.0, -6.0])).tolist() == [0x10, 0xF8]


def test_a_scale_is_the_specifications_or_the_next() -> None:
    largest = torch.tensor([0.0, 1e-45, 3.62, 4.0, 7.2499, 7.25, 8.0, 3.4e38])
    assert mxfp4.nearest_scales(largest).tolist() == [0, 0, 126, 127, 127, 128, 128, mxfp4.LARGEST_SCALE]
    weight = draw(64, 1024)
    grouped = weight.unflatten(-1, (-1, 32))

    def error(scales: torch.Tensor) -> float:
        powers = mxfp4.powers(scales)[..., None]
        return float((mxfp4.round_numbers(grouped / powers) * powers - grouped).square().sum())

    specified = (grouped.abs().amax(-1).log2().floor() - 2 + 127).to(torch.uint8)
    own = mxfp4.nearest_scales(grouped.abs().amax(-1))
    assert ((own == specified) | (own == specified + 1)).all()
    assert error(own) < 0.96 * error(specified)
    assert error(own) == float((dequantize(quantize_to_mxfp4(weight)) - weight).square().sum())


def test_kernels_round_to_the_same_bits(compiled_kernels: str) -> None:
    held = mxfp4.dequantize(*published(40, 7, range(253)))
    borders = (MAGNITUDES[1:] + MAGNITUDES[:-1]).repeat(32).view(7, 32) / 2
    shapes = [draw(1, 32), draw(37, 96).bfloat16(), draw(2, 17, 2080), draw(0, 64), draw(64, 40).t()[:, :32]]
    for weight in (
        *shapes,
        held,
        held.float(),
        borders,
        borders * -(2.0**-130),
        draw(4, 64) * 1e-40,
        draw(4, 64) * 1e37,
    ):
        with select.forced("reference"):
            plain = quantize_to_mxfp4(weight)
        quantized = quantize_to_mxfp4(weight)
        assert torch.equal(quantized.values, plain.values) and torch.equal(quantized.scales, plain.scales)
        assert quantized.shape == weight.shape


def test_activations_have_a_scale_for_every_group_and_are_not_rotated() -> None:
    x = draw(5, 96).bfloat16()
    x[1, 40] = 1000.0
    x[2, 33], x[3, 70], x[4, :32] = torch.nan, torch.inf, 1e-38
    values, scales = quantize_activations_by_group(x)
    assert values.shape == (5, 96) and values.dtype == torch.int8 and scales.shape == (5, 3)
    steps = scales.repeat_interleave(32, -1)
    assert ((values[:2] * steps[:2] - x[:2].float()).abs() <= 0.5001 * steps[:2]).all()
    assert scales.isnan().nonzero().tolist() == [[2, 1], [3, 2]]
    assert scales[4, 0] == 0 and values[4, :32].eq(0).all() and values[2, 32:64].eq(0).all()


def test_for_tiles_a_scale_is_the_smallest_power_of_two_that_reaches() -> None:
    # In fp32 the first magnitudes that the next scale is for, and the last ones that it is not.
    borders = 255.5 * 2.0 ** torch.arange(-61, 120)
    below = torch.nextafter(borders, torch.zeros(()))
    largest = torch.cat([borders, below, torch.tensor([0.0, 1e-30, torch.finfo(torch.float32).max])])
    x = torch.zeros(len(largest), 32)
    x[:, 7], x[:, 8] = -largest, largest / 3
    values, scales = round_to_powers(x)
    assert values.dtype == torch.int16 and values.abs().max() == 255
    assert torch.equal(scales[:181, 0], 2.0 ** torch.arange(-60, 121))
    assert torch.equal(scales[181:362, 0], 2.0 ** torch.arange(-61, 120).clamp_min(-60))
    assert scales[362:, 0].tolist() == [2.0**-60, 2.0**-60, 2.0**121]
    scales, x = scales.double(), x.double()  # 128 * 2**121 is no fp32
    assert ((values * scales - x).abs() <= scales / 2).all()


def test_for_tiles_what_is_not_finite_reaches_the_product() -> None:
    x = draw(3, 96).bfloat16()
    x[0, 33], x[1, 70], x[2, :32] = torch.nan, -torch.inf, 1e-38
    values, scales = round_to_powers(x)
    assert scales.isnan().nonzero().tolist() == [[0, 1], [1, 2]]
    assert values[0, 32:64].eq(0).all() and values[2, :32].eq(0).all() and scales[2, 0] == 2.0**-60
    y = quantized_linear(x, quantize_to_mxfp4(draw(5, 96)), by_tiles=True)
    assert y[:2].isnan().all() and y[2].isfinite().all()


def test_for_tiles_activations_lose_less() -> None:
    x, weight = draw(64, 512), quantize_to_mxfp4(draw(40, 512, seed=1))
    exact = x.double() @ dequantize(weight).double().t()
    errors = [(quantized_linear(x, weight, by_tiles=way) - exact).norm() for way in (False, True)]
    assert errors[1] < 0.9 * errors[0]


def test_the_product_is_the_definition_to_the_bit() -> None:
    weight, x = quantize_to_mxfp4(draw(5, 352, seed=1)), draw(3, 352, seed=2)
    values, scales = (each.numpy() for each in quantize_activations_by_group(x))
    doubled, powers = mxfp4.halves(weight.values).numpy(), mxfp4.powers(weight.scales).numpy()
    out = np.zeros((3, 5), np.float32)
    for m in range(3):
        for n in range(5):
            for g in range(11):
                part = slice(32 * g, 32 * g + 32)
                dot = np.float32(sum(int(a) * int(b) for a, b in zip(values[m, part], doubled[n, part], strict=True)))
                term = np.float32(np.float32(dot * np.float32(scales[m, g] / np.float32(2))) * powers[n, g])
                out[m, n] = np.float32(out[m, n] + term)
    assert np.array_equal(quantized_linear(x, weight).numpy(), out)
    values, scales = (each.numpy() for each in round_to_powers(x))
    out = np.zeros((3, 5), np.float32)
    for m, n, g in np.ndindex(3, 5, 11):
        part = slice(32 * g, 32 * g + 32)
        dot = sum(int(a) * int(b) for a, b in zip(values[m, part], doubled[n, part], strict=True))
        out[m, n] += np.float32(dot * powers[n, g] * scales[m, g] / 2)  # of powers of two: exact
    assert np.array_equal(quantized_linear(x, weight, by_tiles=True).numpy(), out)
    exact = x.double() @ dequantize(weight).double().t()
    assert (quantized_linear(x, weight) - exact).norm() < 0.01 * exact.norm()


def test_columns_that_are_large_cost_their_own_group_alone() -> None:
    """What rotating is for with integers, scales for every group are for here."""
    weight, x = quantize_to_mxfp4(draw(64, 512, seed=1)), draw(32, 512, seed=2)
    x[:, ::128] *= 100
    matrix, scales = dequantize(weight), x.abs().amax(-1, keepdim=True) / 127
    exact = x @ matrix.t()
    of_tokens = ((x / scales).round() * scales) @ matrix.t() - exact
    assert (quantized_linear(x, weight) - exact).norm() < 0.6 * of_tokens.norm()


def test_shapes_and_dtypes_that_do_not_fit_are_refused() -> None:
    good = quantize_to_mxfp4(draw(4, 64))
    with pytest.raises(AssertionError):
        quantize_to_mxfp4(draw(4, 48))
    for values, scales, bits, group_size in (
        (good.values, good.scales[:, :1], 4, 64),
        (good.values, good.scales[:, :1], 4, 32),
        (good.values.view(torch.int8), good.scales, 4, 32),
        (good.values.view(torch.int8), good.scales[:, 0], 8, None),
    ):
        with pytest.raises(AssertionError):
            QuantizedWeight(values, scales, bits, group_size)
