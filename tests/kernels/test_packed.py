"""Packed weights: linear layers equal their definition, integer ones to the bit, on every instruction set."""

import hashlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.kernels import mxfp4, select
from moesaic.kernels.packed import (
    PackedWeight,
    pack_mlp,
    pack_weight,
    packed_heads,
    packed_linear,
    packed_rows,
    unpack_weight,
)
from moesaic.kernels.panels import LAYOUT_VERSION
from moesaic.kernels.quantized import (
    QuantizedWeight,
    as_int8,
    dequantize,
    quantize_to_mxfp4,
    quantize_weight,
    quantized_linear,
    rotate,
    rotation_size,
    round_to_powers,
)

from .instruction_sets import ALL, COMPILED, SUPPORTED, has_tiles

FORMATS = ("bf16", "int8", "int4-32", "int4-64", "int4-128", "mxfp4")
# N that no panel divides, K of one group, of several blocks of the kernels' loops, and of a part of one.
SIZES = [(40, 128), (32, 256), (7, 384), (96, 640)]


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight_of(format: str, n: int, k: int, seed: int = 1) -> Tensor | QuantizedWeight:
    dense = numbers(n, k, seed=seed)
    return dense.to(torch.bfloat16) if format == "bf16" else quantized(dense, format)


def quantized(dense: Tensor, format: str) -> QuantizedWeight:
    if format == "mxfp4":
        return quantize_to_mxfp4(dense)
    if format == "int8":
        return quantize_weight(dense, bits=8)
    return quantize_weight(dense, bits=4, group_size=int(format.split("-")[1]))


def same_numbers(a: QuantizedWeight, b: QuantizedWeight) -> bool:
    """Whether two weights are of one format and hold the same bits."""
    if a.steps is not None and b.steps is not None and not torch.equal(a.steps, b.steps):
        return False
    formats = [(each.bits, each.group_size, each.steps is None) for each in (a, b)]
    return formats[0] == formats[1] and torch.equal(a.values, b.values) and torch.equal(a.scales, b.scales)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32)) or bool(
        ((a == b) | (a.isnan() & b.isnan())).all()  # the sign and payload of a NaN say nothing
    )


def defined(choice: str, x: Tensor, weight: QuantizedWeight) -> Tensor:
    return quantized_linear(x, weight, by_tiles=has_tiles(choice))


def one(x: Tensor, packed: PackedWeight, **options: Tensor | torch.dtype) -> Tensor:
    return packed_linear(x, packed, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("interleave_gate", [False, True])
def test_unpacking_gives_back_what_was_packed(format: str, interleave_gate: bool) -> None:
    for n, k in [(40, 128), (64, 256), (8, 384)]:
        weight = weight_of(format, n, k)
        packed = pack_weight(weight, interleave_gate=interleave_gate)
        back = unpack_weight(packed)
        assert packed.shape == (n, k)
        if isinstance(weight, Tensor):
            assert isinstance(back, Tensor) and torch.equal(back, weight)
        else:
            assert isinstance(back, QuantizedWeight) and same_numbers(back, weight)


@pytest.mark.parametrize("interleave_gate", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_kernels_pack_to_the_same_bytes(compiled_kernels: str, format: str, interleave_gate: bool) -> None:
    for shape in [(40, 128), (2, 96, 256), (3, 66, 384), (34, 1920), (1, 2, 128), (0, 32, 128)]:
        dense = numbers(*shape, seed=sum(shape))
        dense[..., 0] *= 1e-40  # subnormal in bf16 too
        if format == "bf16":
            sources = [dense, dense.bfloat16(), dense.half(), dense.transpose(-1, -2), dense[..., :-3], dense[..., :1]]
        else:
            sources = [quantized(dense, format)]
            if format == "int8":
                sources.append(quantize_weight(dense[..., :-3], bits=8))
            if format in ("int4-32", "mxfp4"):
                sources.append(quantized(dense[..., :96], format))
            if format.startswith("int4") and len(shape) == 2 and shape[0]:
                sources.append(steps_at_their_ends(*shape, int(format.split("-")[1])))
        for source in sources:
            packed = pack_weight(source, interleave_gate=interleave_gate and source.shape[-2] % 2 == 0)
            with select.forced("reference"):
                plain = pack_weight(source, interleave_gate=packed.is_gated)
            assert torch.equal(packed.data, plain.data), (shape, source.shape)
            assert packed.scales is plain.scales or torch.equal(packed.scales, plain.scales), shape


@pytest.mark.skipif("avx2" not in SUPPORTED, reason="no AVX2 here")
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 13, 50])
def test_without_dot_products_bf16_is_summed_in_the_order_of_k(rows: int) -> None:
    x, weight = (numbers(n, 320, seed=n).bfloat16() for n in (rows, 40))
    # Products of two bf16 numbers are exact in fp32, so that only additions round.
    expected, wide = np.zeros((rows, 40), dtype=np.float32), weight.float().numpy().T
    for column, terms in zip(x.float().numpy().T, wide, strict=True):
        expected += np.outer(column, terms)
    with select.forced("avx2"):
        result = packed_linear(x, pack_weight(weight), out_dtype=torch.float32)
    assert np.array_equal(result.numpy(), expected)


def test_a_stack_is_its_matrices() -> None:
    dense = numbers(3, 40, 128, seed=2)
    for weight in (dense.bfloat16(), *(quantized(dense, format) for format in ("int8", "int4-32", "mxfp4"))):
        packed = pack_weight(weight)
        assert packed.shape == (3, 40, 128)
        for index in range(3):
            back = unpack_weight(packed, index)
            if isinstance(weight, Tensor):
                assert isinstance(back, Tensor) and torch.equal(back, weight[index])
            else:
                own = weight.map(lambda tensor, index=index: tensor[index])  # type: ignore[misc]
                assert isinstance(back, QuantizedWeight) and same_numbers(back, own)


@pytest.mark.parametrize("choice", ALL)
@pytest.mark.parametrize("format", FORMATS[1:])
def test_integer_weights_equal_their_definition_to_the_bit(choice: str, format: str) -> None:
    for n, k in SIZES:
        weight = weight_of(format, n, k)
        assert isinstance(weight, QuantizedWeight)
        packed = pack_weight(weight)
        for rows in (1, 2, 3, 5, 7, 8, 12, 13, 16, 17, 33, 70):
            x = numbers(rows, k, seed=rows) * torch.logspace(-3, 3, rows)[:, None]
            with select.forced(choice):
                assert same_bits(one(x, packed), defined(choice, x, weight)), (n, k, rows)


def steps_at_their_ends(n: int, k: int, group_size: int) -> QuantizedWeight:
    """4 bits whose first rows are -8 * 15 and 8 * 15 everywhere, 7 * 15, of steps 1 and -1, of zeros by their steps, by
    their values and by their scale; of the others every fifth group is zeros and every seventh has a step of 1."""
    generator = torch.Generator().manual_seed(k)
    values = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=generator)
    steps = torch.randint(-15, 16, (n, k // group_size), dtype=torch.int8, generator=generator)
    steps.view(-1)[::5] = 0
    steps.view(-1)[::7] = 1
    values[0], steps[0] = 0x00, 15
    values[1], steps[1] = 0x00, -15
    values[2], steps[2] = 0xFF, 15
    steps[3] = 1 - 2 * (torch.arange(steps.shape[1]) % 2).to(torch.int8)
    steps[4] = 0
    values[5] = 0x88
    scales = torch.full((n,), 0.5) + torch.arange(n) / 1024
    scales[:6] = 0.5
    scales[6] = 0
    return QuantizedWeight(values, scales, 4, group_size, steps)


@pytest.mark.parametrize("choice", ALL)
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_4_bits_are_8_bits_of_every_value_times_its_step(choice: str, group_size: int) -> None:
    """Of one group, of several, of more than one block, and of sums beyond 24 bits."""
    for k in (group_size, 3 * group_size, 640, 4480, 70_016):
        weight = steps_at_their_ends(40, k, group_size)
        x = numbers(37, k, seed=k) * torch.logspace(-3, 3, 37)[:, None]
        size = rotation_size(k)
        x[:3] = rotate(torch.full((3, k), 127.0)) / size  # rotated again, 127 everywhere
        x[1] = -x[1]
        packed = pack_weight(weight)
        with select.forced(choice):
            for rows in (1, 2, 6, 13, 37):
                y = one(x[:rows], packed)
                assert same_bits(y, quantized_linear(x[:rows], weight)), (k, rows)
                assert same_bits(y, one(x[:rows], pack_weight(as_int8(weight)))), (k, rows)
                assert y[0, 0] == -float(np.float32(120 * 127 * k)) / 2 == -y[0, 1]
                assert y[:, 4:7].eq(0).all()


@pytest.mark.parametrize("choice", ALL)
@pytest.mark.parametrize("format", ["int8", "int4-64"])
def test_a_rotation_of_every_size_rounds_in_the_same_order(choice: str, format: str) -> None:
    """Registers hold 64 or 256 of the columns that are rotated together; more take further steps of 2, 4 and 8."""
    sizes = (64, 192, 512, 768, 1024, 2048, 4096, 8192)
    for k in sizes if format == "int4-64" else (4, 16, 24, 48, *sizes):
        weight, x = weight_of(format, 33, k), numbers(6, k, seed=k) * torch.logspace(-4, 4, k)
        assert isinstance(weight, QuantizedWeight)
        packed = pack_weight(weight)
        with select.forced(choice):
            for rows in (x, x.bfloat16().float()):
                assert same_bits(one(rows, packed), quantized_linear(rows, weight)), k
            bits = one(x.bfloat16(), packed, out_dtype=torch.float32)
        assert same_bits(bits, quantized_linear(x.bfloat16(), weight)), k


@pytest.mark.parametrize("choice", ALL)
def test_sums_of_8_bits_beyond_24_bits_and_offsets_beyond_32(choice: str) -> None:
    for k in (4097, 70_001):  # odd numbers, which are not rotated
        values = torch.full((33, k), 127, dtype=torch.int8)
        values[1] = -127
        values[2, ::3] = 5
        values[3] = -128
        weight = QuantizedWeight(values, torch.full((33,), 0.5), 8, None)
        x = torch.full((37, k), 127.0)
        x[1::2, 7] = -126.0
        x[2::4] = -127.0
        with select.forced(choice):
            for rows in (1, 6, 37):
                y = one(x[:rows], pack_weight(weight))
                assert same_bits(y, quantized_linear(x[:rows], weight)), (k, rows)
                assert y[0, 0] == float(np.float32(127 * 127 * k)) / 2 == -y[0, 1]


@pytest.mark.parametrize("choice", ALL)
def test_k_that_no_block_divides(choice: str) -> None:
    for n, k in [(33, 1), (40, 72), (64, 130), (5, 200)]:
        weight = quantize_weight(numbers(n, k, seed=3), bits=8)
        for rows in (1, 4, 19):
            x = numbers(rows, k, seed=4)
            with select.forced(choice):
                assert same_bits(one(x, pack_weight(weight)), quantized_linear(x, weight)), (n, k, rows)
                dense = numbers(n, k, seed=5).bfloat16()
                wanted = x.bfloat16().double() @ dense.double().t()
                torch.testing.assert_close(one(x, pack_weight(dense)).double(), wanted, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("choice", ALL)
def test_mxfp4_at_the_ends_of_its_range_and_in_half_a_header(choice: str) -> None:
    """All magnitudes 6 and all activations 127, whose sums 16 bits just hold; an odd number of groups; every scale, by
    tiles up to where sums on the way stay finite."""
    for k in (32, 96, 224, 4448):
        values = torch.full((40, k // 2), 0x77, dtype=torch.uint8)
        values[1], values[2], values[3] = 0xFF, 0xF7, 0
        values[4:, :] = (torch.arange(36)[:, None] * 7 + torch.arange(k // 2) * 29).to(torch.uint8)
        scales = torch.full((40, k // 32), 127, dtype=torch.uint8)
        largest = 127 + 60 if has_tiles(choice) else mxfp4.LARGEST_SCALE
        scales[4:] = ((torch.arange(36)[:, None] * 31 + torch.arange(k // 32) * 7) % (largest + 1)).to(torch.uint8)
        weight = QuantizedWeight(values, scales, 4, 32)
        x = numbers(70, k, seed=k)
        x[::3] = 127.0
        x[1::6, 1::2] = -127.0
        x[2::9, ::32] *= 1e-38
        x[5, 3:] = 0.0
        with select.forced(choice):
            for rows in (1, 2, 6, 13, 70):
                y = one(x[:rows], pack_weight(weight))
                assert same_bits(y, defined(choice, x[:rows], weight)), (k, rows)
                assert y[0, 0] == 6 * 127 * k == -y[0, 1] and y[0, 2] == 0 == y[0, 3]


@pytest.mark.parametrize("choice", COMPILED)
def test_tiles_multiply_mxfp4_as_the_bf16_numbers_that_it_stands_for(choice: str) -> None:
    if not has_tiles(choice):
        pytest.skip(f"{choice} has no tiles")
    for n, k in ((40, 32), (33, 160), (64, 2080)):
        weight = quantize_to_mxfp4(numbers(n, k, seed=n) * 0.1)
        x = numbers(70, k, seed=k) * torch.logspace(-3, 3, 70)[:, None]
        values, scales = round_to_powers(x)
        rounded = values.float() * scales.repeat_interleave(32, -1)
        assert torch.equal(rounded, rounded.bfloat16().float())
        with select.forced(choice):
            y = one(x, pack_weight(weight))
            assert same_bits(y, one(rounded, pack_weight(dequantize(weight).bfloat16())))
            assert all(same_bits(one(x[:rows], pack_weight(weight)), y[:rows]) for rows in range(1, 8))


@pytest.mark.parametrize("choice", ALL)
def test_bf16_weights_sum_in_fp32(choice: str) -> None:
    for n, k in SIZES:
        weight = weight_of("bf16", n, k)
        assert isinstance(weight, Tensor)
        packed = pack_weight(weight)
        for rows in (1, 2, 3, 7, 8, 13, 33, 70):
            x = numbers(rows, k, seed=rows).bfloat16()
            with select.forced(choice):
                y = one(x, packed, out_dtype=torch.float32)
            # fp32 sums of up to 640 products of size 1: some 1e-5 apart, where bf16 sums would be 1e-1.
            torch.testing.assert_close(y.double(), x.double() @ weight.double().t(), atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("choice", COMPILED)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("k", (256, 640))
def test_a_row_does_not_depend_on_the_others_or_on_threads(choice: str, format: str, k: int) -> None:
    packed = pack_weight(weight_of(format, 72, k))
    x = numbers(110, k, seed=6)
    before = torch.get_num_threads()
    with select.forced(choice):
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results += [one(x, packed), torch.cat([one(part, packed) for part in x.split((1, 2, 4, 12, 13, 38, 40))])]
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("choice", COMPILED)
@pytest.mark.parametrize("k", (32, 96, 2048, 2112, 4480))
@pytest.mark.parametrize("scale", (1.0, 1e-20, 1e19))
def test_one_and_two_rows_have_the_bits_of_many(choice: str, k: int, scale: float) -> None:
    # One and two go by other instructions than many where there are tiles. Small ones have subnormal products, large
    # ones overflow.
    weight = (numbers(40, k, seed=11) * scale).bfloat16()
    x = (numbers(33, k, seed=12) * scale).bfloat16()
    x[0, :4] = torch.tensor([1e-39, -1e-40, 0.0, -0.0])
    packed = pack_weight(weight)
    with select.forced(choice):
        many = one(x, packed, out_dtype=torch.float32)
        ones = torch.cat([one(row, packed, out_dtype=torch.float32) for row in x.split(1)])
        twos = torch.cat([one(rows, packed, out_dtype=torch.float32) for rows in x.split(2)])
    assert same_bits(ones, many) and same_bits(twos, many)
    assert many.isfinite().all() == (scale < 1e19)


@pytest.mark.parametrize("format", FORMATS)
def test_many_rows_and_deep_sums_go_by_blocks(format: str) -> None:
    # More rows than are worked on at once, and more of K than stays in a cache.
    for n, k, rows in [(64, 4480, 130), (320, 128, 900), (64, 1152, 200)]:
        weight = weight_of(format, n, k)
        x = numbers(rows, k, seed=7)
        y = one(x, pack_weight(weight))
        if isinstance(weight, QuantizedWeight):
            assert same_bits(y, defined(select.cpu_kernels().name, x, weight))
        else:
            wanted = x.bfloat16().double() @ weight.double().t()
            torch.testing.assert_close(y.double(), wanted, atol=2e-3, rtol=1e-5)


@pytest.mark.parametrize("choice", ALL)
@pytest.mark.parametrize("format", ("bf16", "int8", "int4-32", "mxfp4"))
def test_dtypes_bias_and_rows_that_are_not_contiguous(choice: str, format: str) -> None:
    weight, bias = weight_of(format, 40, 128), numbers(40, seed=8)
    packed = pack_weight(weight)
    x = numbers(128, 9, seed=9).t().bfloat16()
    assert not x.is_contiguous()
    with select.forced(choice):
        exact = one(x, packed, bias=bias, out_dtype=torch.float32)
        rounded = one(x, packed, bias=bias)
        assert rounded.dtype == torch.bfloat16 and torch.equal(rounded, exact.bfloat16())
        assert same_bits(exact, one(x, packed, out_dtype=torch.float32) + bias)
        if format != "bf16":
            assert same_bits(exact, one(x.float(), packed, bias=bias))
        assert one(x[:0], packed).shape == (0, 40)


@pytest.mark.parametrize("choice", ALL)
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_product_over_no_columns_is_the_bias(choice: str, has_bias: bool) -> None:
    packed, bias = pack_weight(numbers(40, 0, seed=8)), numbers(40, seed=8)
    with select.forced(choice):
        found = packed_linear(numbers(3, 0, seed=9), packed, bias if has_bias else None)
    assert torch.equal(found, bias.expand(3, 40) if has_bias else torch.zeros(3, 40))


@pytest.mark.parametrize("choice", COMPILED)
@pytest.mark.parametrize("shape", [(550, 2080, 96), (300, 72, 2048), (130, 72, 4480)])
def test_rows_far_apart_and_results_past_the_caches(choice: str, shape: tuple[int, int, int]) -> None:
    rows, n, k = shape  # 2 MiB of results and more; rows of x 4 KiB apart; sums in more than one pass
    packed, bias = pack_weight(weight_of("bf16", n, k)), numbers(n, seed=8)
    x = numbers(rows, k, seed=9).bfloat16()
    with select.forced(choice):
        for options in ({}, {"bias": bias}):
            rounded, exact = one(x, packed, **options), one(x, packed, out_dtype=torch.float32, **options)
            assert torch.equal(rounded, exact.bfloat16())
            assert torch.equal(rounded, torch.cat([one(part, packed, **options) for part in x.split(37)]))


@pytest.mark.parametrize("choice", ALL)
@pytest.mark.parametrize("format", ("bf16", "int8", "int4-64", "mxfp4"))
def test_infinities_and_nan_stay_in_their_row(choice: str, format: str) -> None:
    weight = weight_of(format, 40, 256)
    x = numbers(5, 256, seed=10)
    x[1, 3], x[2, 200], x[3, 7] = torch.inf, torch.nan, 3e38
    x[4] = 1e-38
    with select.forced(choice):
        y = one(x, pack_weight(weight))
    if isinstance(weight, QuantizedWeight):
        assert same_bits(y, defined(choice, x, weight))
    assert not y[1:3].isfinite().any() and y[0].isfinite().all() and y[2].isnan().all()


@pytest.mark.parametrize("choice", ALL)
@pytest.mark.parametrize("format", FORMATS)
def test_rows_are_embeddings(choice: str, format: str) -> None:
    weight = weight_of(format, 50, 256)
    dense = (weight if isinstance(weight, Tensor) else dequantize(weight)).bfloat16()
    ids = torch.tensor([0, 49, 7, 7, 16, 31, 32])
    with select.forced(choice):
        assert torch.equal(packed_rows(pack_weight(weight), ids), F.embedding(ids, dense))


def test_packed_weights_take_the_room_of_their_format() -> None:
    dense = numbers(64, 256, seed=11)
    assert pack_weight(dense).num_bytes == 64 * 256 * 2
    assert pack_weight(quantize_weight(dense, bits=8)).num_bytes == 64 * (256 + 4)
    assert pack_weight(quantize_weight(dense, bits=4, group_size=32)).num_bytes == 64 * (128 + 2 * 8 + 4)
    assert pack_weight(quantize_to_mxfp4(dense)).num_bytes == 64 * (128 + 8)
    assert pack_weight(quantize_to_mxfp4(dense[:, :96])).num_bytes == 64 * (64 + 4)  # as of 128 columns


def test_wrong_shapes_are_refused() -> None:
    packed = pack_weight(numbers(40, 128, seed=12))
    with pytest.raises(AssertionError):
        packed_linear(numbers(3, 64, seed=1), packed)
    with pytest.raises(AssertionError):
        packed_linear(numbers(3, 128, seed=1), packed, numbers(41, seed=1))
    with pytest.raises(AssertionError):
        packed_linear(numbers(3, 128, seed=1).double(), packed)
    with pytest.raises(AssertionError, match="no gradient"):
        packed_linear(numbers(3, 128, seed=1), packed, numbers(40, seed=1).requires_grad_())
    # The kernels would read from address 0.
    without_data = pack_weight(torch.empty(40, 128, device="meta"))
    with pytest.raises(AssertionError, match="input on cpu and packed weights on meta"):
        packed_linear(numbers(3, 128, seed=1), without_data)
    with pytest.raises(AssertionError, match="on meta"):
        packed_rows(without_data, torch.tensor([3]))
    with pytest.raises(AssertionError, match="on meta"):
        packed_heads(numbers(3, 2, 128, seed=1), pack_weight(torch.empty(2, 40, 128, device="meta")))


@pytest.mark.parametrize("choice", ALL)
@pytest.mark.parametrize("wrong", [-1, 40])
def test_rows_that_do_not_exist_are_refused(choice: str, wrong: int) -> None:
    packed = pack_weight(numbers(40, 128, seed=12))
    with select.forced(choice), pytest.raises(AssertionError, match="rows of a matrix"):
        packed_rows(packed, torch.tensor([3, wrong]))


@pytest.mark.parametrize("format", ["bf16", "int8", "int4-32"])
def test_the_operators_are_ordinary_ones(format: str) -> None:
    parts = pack_weight(weight_of(format, 40, 128)).flatten()
    linear = (numbers(3, 128, seed=2), *parts, numbers(40, seed=3), torch.bfloat16)
    torch.library.opcheck(torch.ops.moesaic.packed_linear.default, linear)
    torch.library.opcheck(torch.ops.moesaic.packed_rows.default, (*parts, torch.tensor([39, 0, 7])))


@pytest.mark.parametrize("choice", [*SUPPORTED[:1], select.REFERENCE])
def test_the_operator_of_heads_is_an_ordinary_one(choice: str) -> None:
    packed, heads = pack_weight(numbers(2, 40, 128, seed=1)), numbers(3, 2, 128, seed=2)
    with select.forced(choice):
        torch.library.opcheck(torch.ops.moesaic.packed_heads.default, (heads, *packed.flatten()))
        compiled = torch.compile(packed_heads, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(heads, packed), packed_heads(heads, packed))
    torch.compiler.reset()


def test_the_layout_is_what_its_version_says() -> None:
    """A change of these bits that keeps LAYOUT_VERSION would make old files give wrong answers."""
    weight = (torch.arange(70 * 96).view(70, 96) * 37 % 101 - 50).float() / 64
    digest = hashlib.sha256()
    for each in (weight, *(quantized(weight, format) for format in ("int8", "int4-32", "mxfp4"))):
        for gated in (False, True):
            packed = pack_weight(each, interleave_gate=gated)
            digest.update(packed.data.numpy().tobytes())
            if packed.scales is not None:
                digest.update(packed.scales.numpy().tobytes())
    mlp = pack_mlp(weight[None], weight[:35].t()[None], up_bias=weight[None, :, 0], activation="swiglu")
    assert mlp.up_bias is not None
    digest.update(mlp.up_bias.numpy().tobytes())
    assert (LAYOUT_VERSION, digest.hexdigest()[:16]) == (3, "d507cc9fdf270be8")
