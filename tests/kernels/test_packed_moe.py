"""A layer of experts on packed weights equals the loop over tokens with the weights it stands for."""

import functools

import pytest
import torch
from torch import Tensor

from moesaic.kernels import select
from moesaic.kernels.activation import ACTIVATIONS, is_gated
from moesaic.kernels.grouped_mlp import ExpertWeights
from moesaic.kernels.packed import PackedMlp, pack_mlp, pack_weight, packed_linear, packed_mlp, packed_moe
from moesaic.kernels.quantized import (
    QuantizedWeight,
    dequantize,
    quantize_to_mxfp4,
    quantize_weight,
    quantized_linear,
)
from moesaic.kernels.reference import moe as reference

from .instruction_sets import ALL, COMPILED, has_tiles

FORMATS = ("bf16", "int8", "int4-32", "mxfp4")
# Largest error of a token over its output's size, against fp32 weights of the same values: bf16 rounds x and hidden
# (1 in 512), integers quantise them (1 in 254 of a row's largest number, which is three times the typical one).
TOLERANCE = {"bf16": 1e-2, "int8": 4e-2, "int4-32": 4e-2, "mxfp4": 4e-2}


def assert_near(y: Tensor, wanted: Tensor, format: str) -> None:
    error = (y - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert y.shape == wanted.shape and error.max() < TOLERANCE[format], error.max()


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def in_format(dense: Tensor, format: str) -> Tensor | QuantizedWeight:
    if format == "bf16":
        return dense.bfloat16()
    if format == "int8":
        return quantize_weight(dense, bits=8)
    if format == "mxfp4":
        return quantize_to_mxfp4(dense)
    return quantize_weight(dense, bits=4, group_size=int(format.split("-")[1]))


def values(weight: Tensor | QuantizedWeight) -> Tensor:
    return dequantize(weight) if isinstance(weight, QuantizedWeight) else weight.float()


class Mlp:
    """The same MLPs packed, and as fp32 weights of the values that the packed ones hold."""

    def __init__(
        self, format: str, activation: str, *, hidden: int, inner: int, experts: int | None, has_bias: bool, seed: int
    ) -> None:
        stack = () if experts is None else (experts,)
        outer = 2 * inner if is_gated(activation) else inner
        size = 4 if activation == "swiglu_oai" else 1  # so that a tenth of what is clamped lies beyond the clamps
        up = in_format(numbers(*stack, outer, hidden, seed=seed) * size / hidden**0.5, format)
        down = in_format(numbers(*stack, hidden, inner, seed=seed + 1) / inner**0.5, format)
        up_bias = numbers(*stack, outer, seed=seed + 2) if has_bias else None
        down_bias = numbers(*stack, hidden, seed=seed + 3) if has_bias else None
        self.packed = pack_mlp(up, down, up_bias=up_bias, down_bias=down_bias, activation=activation)
        self.weights = ExpertWeights(
            values(up).reshape(-1, outer, hidden),
            values(down).reshape(-1, hidden, inner),
            None if up_bias is None else up_bias.reshape(-1, outer),
            None if down_bias is None else down_bias.reshape(-1, hidden),
            activation,
        )


def routes(tokens: int, experts: int, top_k: int, seed: int = 5) -> tuple[Tensor, Tensor]:
    scores = numbers(tokens, experts, seed=seed)
    routing_weights, expert_ids = scores.softmax(-1).topk(top_k, dim=-1)
    return expert_ids, routing_weights


def by_token(
    x: Tensor,
    expert_ids: Tensor,
    routing_weights: Tensor,
    experts: Mlp,
    residual: Mlp | None = None,
    residual_weights: Tensor | None = None,
) -> Tensor:
    y = reference.moe_per_token(x, expert_ids, routing_weights, expert_ids >= 0, experts.weights)
    if residual is not None:
        dense = reference.mlp(x, residual.weights, 0)
        y = y + (dense if residual_weights is None else residual_weights[:, None] * dense)
    return y


def layer(format: str, activation: str = "swiglu", *, experts: int | None = 5, has_bias: bool = False) -> Mlp:
    # F is no multiple of a panel for bf16 and int8, and the 128 columns of a task and a part of the next in all.
    inner = 136 if format in ("bf16", "int8") else 160
    return Mlp(format, activation, hidden=96, inner=inner, experts=experts, has_bias=has_bias, seed=20)


@pytest.mark.parametrize("choice", ALL)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_equals_the_loop_over_tokens(choice: str, format: str, activation: str) -> None:
    experts = layer(format, activation, has_bias=activation != "gelu")
    residual = Mlp(format, activation, hidden=96, inner=64, experts=None, has_bias=activation == "gelu", seed=40)
    for tokens in (1, 7, 40):
        x = numbers(tokens, 96, seed=tokens)
        expert_ids, routing_weights = routes(tokens, 5, 2)
        coefficients = numbers(tokens, seed=9)
        with select.forced(choice):
            plain = packed_moe(x, expert_ids, routing_weights, experts.packed)
            summed = packed_moe(x, expert_ids, routing_weights, experts.packed, residual=residual.packed)
            mixed = packed_moe(
                x,
                expert_ids,
                routing_weights,
                experts.packed,
                residual=residual.packed,
                residual_weights=coefficients,
            )
        assert_near(plain, by_token(x, expert_ids, routing_weights, experts), format)
        assert_near(summed, by_token(x, expert_ids, routing_weights, experts, residual), format)
        assert_near(mixed, by_token(x, expert_ids, routing_weights, experts, residual, coefficients), format)


@pytest.mark.parametrize("choice", COMPILED)
@pytest.mark.parametrize("format", ["bf16", "int8", "int4-32", "int4-64", "int4-128", "mxfp4"])
def test_kernels_equal_pytorch_up_to_the_exponential(choice: str, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same quantised inputs, same order of sums: what differs is an ulp of the activation, or a step of rounding it."""
    experts = Mlp(format, "swiglu", hidden=128, inner=256, experts=4, has_bias=True, seed=60)
    x = numbers(23, 128, seed=61).bfloat16()
    expert_ids, routing_weights = routes(23, 4, 2)
    definition = functools.partial(quantized_linear, by_tiles=has_tiles(choice))
    monkeypatch.setattr("moesaic.kernels.packed.quantized_linear", definition)
    with select.forced("reference"):
        wanted = packed_moe(x.float(), expert_ids, routing_weights, experts.packed)
    with select.forced(choice):
        y = packed_moe(x.float(), expert_ids, routing_weights, experts.packed)
        rounded = packed_moe(x, expert_ids, routing_weights, experts.packed)
    error = (y - wanted).abs()
    assert error.max() < 0.02 and error.mean() < 2e-4, (error.max(), error.mean())
    assert torch.equal(rounded, y.bfloat16())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("activation", ["swiglu", "swiglu_oai"])
def test_a_token_does_not_depend_on_the_others_threads_or_integer_path(format: str, activation: str) -> None:
    experts, residual = layer(format, activation, has_bias=True), layer(format, activation, experts=None)
    tokens = 45
    x = numbers(tokens, 96, seed=3).bfloat16()
    expert_ids, routing_weights = routes(tokens, 5, 3)
    before = torch.get_num_threads()
    results: dict[str, list[Tensor]] = {}
    for choice in COMPILED:
        with select.forced(choice):
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.setdefault(choice, []).append(
                    packed_moe(x, expert_ids, routing_weights, experts.packed, residual=residual.packed)
                )
                parts = zip(*(part.split((1, 2, 5, 13, 24)) for part in (x, expert_ids, routing_weights)), strict=True)
                results[choice].append(
                    torch.cat([packed_moe(*part, experts.packed, residual=residual.packed) for part in parts])
                )
    torch.set_num_threads(before)
    for choice, several in results.items():
        assert all(torch.equal(result, several[0]) for result in several), choice
    if format != "bf16":
        firsts = {choice: several[0] for choice, several in results.items()}
        for alike in (True, False):  # tiles multiply MXFP4 in another way
            of_kind = [first for choice, first in firsts.items() if format != "mxfp4" or has_tiles(choice) == alike]
            assert all(torch.equal(first, of_kind[0]) for first in of_kind)


@pytest.mark.parametrize("choice", ALL)
@pytest.mark.parametrize("format", FORMATS)
def test_all_tokens_to_one_expert_and_routes_to_none(choice: str, format: str) -> None:
    experts = layer(format)
    x, weights = numbers(19, 96, seed=1), numbers(19, 2, seed=2).abs()
    same = torch.full((19, 2), 3)
    same[:, 1] = -1
    half = same.clone()
    half[::2] = -1
    with select.forced(choice):
        y = packed_moe(x, same, weights, experts.packed)
        partly = packed_moe(x, half, weights, experts.packed)
        nothing = packed_moe(x, torch.full((19, 2), -1), weights, experts.packed)
        assert packed_moe(x[:0], same[:0], weights[:0], experts.packed).shape == (0, 96)
    assert_near(y, by_token(x, same, weights, experts), format)
    assert torch.equal(partly[1::2], y[1::2]) and not partly[::2].any() and not nothing.any()


@pytest.mark.parametrize("format", FORMATS)
def test_more_tokens_than_one_pass_takes(format: str) -> None:
    experts, residual = layer(format), layer(format, experts=None)
    x = numbers(2100, 96, seed=4)
    expert_ids, routing_weights = routes(2100, 5, 2)
    options = {"residual": residual.packed, "residual_weights": numbers(2100, seed=8)}
    y = packed_moe(x, expert_ids, routing_weights, experts.packed, **options)
    options["residual_weights"] = options["residual_weights"][2000:]
    assert torch.equal(
        y[2000:], packed_moe(x[2000:], expert_ids[2000:], routing_weights[2000:], experts.packed, **options)
    )


@pytest.mark.parametrize("choice", ALL)
@pytest.mark.parametrize("format", FORMATS)
def test_input_of_any_strides(choice: str, format: str) -> None:
    experts, residual = layer(format), layer(format, experts=None)
    expert_ids, routing_weights = routes(7, 5, 2)
    shares = numbers(7, seed=9)
    for x in (numbers(7, 96, seed=3), numbers(7, 96, seed=4).bfloat16()):
        laid_out = [x.t().contiguous().t(), torch.stack([x, -x], -1).flatten(1)[:, ::2], x[:1].expand(7, -1)]
        with select.forced(choice):
            for strided in laid_out:
                y = packed_moe(
                    strided,
                    torch.stack([expert_ids, expert_ids.flip(0)], -1)[..., 0],
                    routing_weights.t().contiguous().t(),
                    experts.packed,
                    residual=residual.packed,
                    residual_weights=torch.stack([shares, -shares], -1)[:, 0],
                )
                wanted = packed_moe(
                    strided.contiguous(),
                    expert_ids,
                    routing_weights,
                    experts.packed,
                    residual=residual.packed,
                    residual_weights=shares,
                )
                assert torch.equal(y, wanted)


@pytest.mark.parametrize("choice", ALL)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("activation", ["swiglu", "swiglu_oai"])
def test_infinities_and_nan_stay_in_their_token(choice: str, format: str, activation: str) -> None:
    experts = layer(format, activation)
    x = numbers(6, 96, seed=6)
    expert_ids, routing_weights = routes(6, 5, 2)
    with select.forced(choice):
        clean = packed_moe(x, expert_ids, routing_weights, experts.packed)
        x[1, 4], x[3, 9] = torch.nan, torch.inf
        y = packed_moe(x, expert_ids, routing_weights, experts.packed)
    assert y[1].isnan().all() and not y[3].isfinite().any()
    kept = [0, 2, 4, 5]
    assert torch.equal(y[kept], clean[kept])


@pytest.mark.parametrize("choice", ALL)
def test_a_dense_mlp_and_mixed_formats(choice: str) -> None:
    experts, residual = layer("int4-32"), layer("bf16", "gelu", experts=None, has_bias=True)
    x = numbers(9, 96, seed=7)
    expert_ids, routing_weights = routes(9, 5, 1)
    with select.forced(choice):
        dense = packed_mlp(x, residual.packed)
        both = packed_moe(x, expert_ids, routing_weights, experts.packed, residual=residual.packed)
        alone = packed_moe(x, expert_ids, routing_weights, experts.packed)
        swapped = layer("int8", experts=None)
        other = packed_moe(x, expert_ids, routing_weights, layer("bf16").packed, residual=swapped.packed)
        wanted = packed_moe(x, expert_ids, routing_weights, layer("bf16").packed) + packed_mlp(x, swapped.packed)
    torch.testing.assert_close(dense, reference.mlp(x, residual.weights, 0), atol=2e-2, rtol=4e-3)
    torch.testing.assert_close(both, alone + dense, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(other, wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("choice", ALL)
@pytest.mark.parametrize(
    ("format", "beside"),
    [("int8", "int4-32"), ("int4-32", "int8"), ("int8", "bf16"), ("mxfp4", "int8"), ("mxfp4", "int4-32")],
)
def test_experts_and_a_residual_of_other_formats(choice: str, format: str, beside: str) -> None:
    experts, residual = layer(format), layer(beside, experts=None)
    for tokens in (1, 9, 90):
        x = numbers(tokens, 96, seed=7)
        expert_ids, routing_weights = routes(tokens, 5, 2)
        with select.forced(choice):
            both = packed_moe(x, expert_ids, routing_weights, experts.packed, residual=residual.packed)
            alone = packed_moe(x, expert_ids, routing_weights, experts.packed)
            dense = packed_mlp(x, residual.packed)
        torch.testing.assert_close(both, alone + dense, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("choice", ALL)
def test_experts_that_do_not_exist_are_refused(choice: str) -> None:
    expert_ids, routing_weights = routes(4, 5, 2)
    expert_ids[2, 1] = 5
    with select.forced(choice), pytest.raises(AssertionError, match="below num_experts"):
        packed_moe(numbers(4, 96, seed=1), expert_ids, routing_weights, layer("bf16").packed)


@pytest.mark.parametrize("format", ["bf16", "int4-32"])
def test_the_operator_is_an_ordinary_one(format: str) -> None:
    experts, residual = layer(format).packed, layer("int8", "gelu", experts=None, has_bias=True).packed
    x, (expert_ids, routing_weights) = numbers(4, 96, seed=1), routes(4, 5, 2)
    for beside, weights in ((residual.flatten(), torch.ones(4)), (([], []), None)):
        arguments = (x, expert_ids, routing_weights, *experts.flatten(), *beside, weights)
        torch.library.opcheck(torch.ops.moesaic.packed_moe.default, arguments)


def test_inductor_calls_the_operators() -> None:
    """And nothing else here, so that it has no C++ of its own to compile, which takes it minutes where it is new."""
    experts, residual = layer("int4-32").packed, layer("int8", experts=None).packed
    head = pack_weight(numbers(40, 96, seed=9).bfloat16())

    def run(x: Tensor, expert_ids: Tensor, routing_weights: Tensor) -> Tensor:
        y = packed_moe(packed_mlp(x, residual), expert_ids, routing_weights, experts, residual=residual)
        return packed_linear(y, head, out_dtype=torch.float32)

    compiled = torch.compile(run, fullgraph=True)
    for tokens in (4, 9, 1):
        arguments = (numbers(tokens, 96, seed=1), *routes(tokens, 5, 2))
        assert torch.equal(compiled(*arguments), run(*arguments))
    torch.compiler.reset()


def test_wrong_arguments_are_refused() -> None:
    experts = layer("bf16").packed
    x, (expert_ids, routing_weights) = numbers(4, 96, seed=1), routes(4, 5, 2)
    with pytest.raises(AssertionError):
        packed_moe(x[:, :64], expert_ids, routing_weights, experts)
    with pytest.raises(AssertionError):
        packed_moe(x, expert_ids, routing_weights.bfloat16(), experts)
    with pytest.raises(AssertionError, match="without a residual"):
        packed_moe(x, expert_ids, routing_weights, experts, residual_weights=torch.ones(4))
    with pytest.raises(AssertionError):
        PackedMlp(experts.up, experts.up, None, None, "swiglu")
    with pytest.raises(AssertionError, match="no gradient"):
        packed_moe(x, expert_ids, routing_weights.clone().requires_grad_(), experts)
    one_up, one_down = torch.empty(192, 96, device="meta"), torch.empty(96, 96, device="meta")
    without_data = pack_mlp(one_up, one_down, activation="swiglu")
    with pytest.raises(AssertionError, match="input on cpu and packed weights on cpu, meta"):
        packed_moe(x, expert_ids, routing_weights, experts, residual=without_data)
    with pytest.raises(AssertionError, match="on meta"):
        packed_mlp(x, without_data)
    up, down = numbers(3, 64, 32, seed=1).bfloat16(), numbers(3, 32, 64, seed=2).bfloat16()
    for biases in ({"up_bias": torch.ones(64)}, {"up_bias": torch.ones(3, 32)}, {"down_bias": torch.ones(32)}):
        with pytest.raises(AssertionError):
            pack_mlp(up, down, activation="gelu", **biases)
