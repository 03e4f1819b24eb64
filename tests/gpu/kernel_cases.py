"""The kernels in Triton against their definitions; `test_triton.py` starts it in a process of its own.

On a GPU where there is one, else in Triton's interpreter. There what follows a product is rounded as defined, to the
bit, so that only sums of bf16 and functions (exp, erf) may differ.
"""

import os
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.config.model import RouterConfig
from moesaic.kernels import latent_attention as latent
from moesaic.kernels import packed, quantized, select
from moesaic.kernels import paged_attention as paged
from moesaic.kernels.activation import is_gated
from moesaic.kernels.quantized import QuantizedWeight, quantize_to_mxfp4, quantize_weight, quantized_linear
from moesaic.kernels.triton import activations, attention, launch, products, rows
from moesaic.kernels.triton.self_test import run_self_test
from moesaic.model.rotary import rotate
from moesaic.moe.router import Router

if IS_INTERPRETED := os.environ.get("TRITON_INTERPRET") == "1":
    from . import interpreter

    interpreter.mend()
GPU = torch.device("cpu" if IS_INTERPRETED else "cuda")
CPU = torch.device("cpu")
FORMATS = ("bf16", "int8", "int4-32", "int4-64", "int4-128", "mxfp4")

pytestmark = pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow", "ignore:All-NaN")


@pytest.fixture(autouse=True)
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they are compared with."""
    monkeypatch.setenv(select.VARIABLE, select.REFERENCE)
    torch.manual_seed(0)


def made(weight: Tensor, format: str) -> Tensor | QuantizedWeight:
    """weight (..., N, K) in a format."""
    name, _, group = format.partition("-")
    if name == "bf16":
        return weight.to(torch.bfloat16)
    if name == "mxfp4":
        return quantize_to_mxfp4(weight)
    return quantize_weight(weight, bits=int(name[3:]), group_size=int(group) if group else None)


def there(weight: Tensor | QuantizedWeight) -> Tensor | QuantizedWeight:
    if isinstance(weight, Tensor):
        return weight.to(GPU)
    return weight.map(lambda tensor: tensor.to(GPU))


def first(weight: Any) -> Any:
    """Of a stack, on the processor."""
    return weight[0].cpu() if isinstance(weight, Tensor) else weight.map(lambda tensor: tensor[0].cpu())


def same_bits(a: Tensor, b: Tensor) -> bool:
    """NaN is NaN."""
    return a.dtype == b.dtype and torch.equal(a.cpu().float().nan_to_num(1e30), b.float().nan_to_num(1e30))


class TestActivations:
    @pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 7), (5, 48), (4, 96), (3, 768), (1, 2048)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_rotated_and_rounded_to_the_bit(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        x = torch.randn(rows, columns).to(dtype)
        values, scales = activations.quantize_activations(x.to(GPU))
        expected_values, expected_scales = quantized.quantize_activations(x)
        assert same_bits(values, expected_values) and same_bits(scales, expected_scales)
        assert same_bits(activations.rotate(x.to(GPU)), quantized.rotate(x))

    def test_even_columns_of_every_eight_come_first_for_words_of_4_bits(self) -> None:
        x = torch.randn(3, 96)
        values, scales = activations.quantize_activations(x.to(GPU), even_first=True)
        expected, expected_scales = quantized.quantize_activations(x)
        order = torch.arange(96).view(-1, 4, 2).mT.flatten()
        assert same_bits(values, expected[:, order]) and same_bits(scales, expected_scales)

    @pytest.mark.parametrize("groups", [1, 3, 65])
    def test_rounded_by_group_to_the_bit(self, groups: int) -> None:
        x = torch.randn(3, 32 * groups)
        for made, expected in zip(
            activations.quantize_activations_by_group(x.to(GPU)),
            quantized.quantize_activations_by_group(x),
            strict=True,
        ):
            assert same_bits(made, expected)

    @pytest.mark.parametrize("number", [0.0, 1e-37, 3e38, float("inf"), float("-inf"), float("nan")])
    def test_extreme_numbers(self, number: float) -> None:
        """A row of an infinity or a NaN becomes zeros with scale NaN, one that is all but zero zeros with scale 0."""
        x = torch.full((2, 64), 1e-38)
        x[1, 5] = number
        for own, defined in (
            (activations.quantize_activations, quantized.quantize_activations),
            (activations.quantize_activations_by_group, quantized.quantize_activations_by_group),
        ):
            for made, expected in zip(own(x.to(GPU)), defined(x), strict=True):
                assert same_bits(made, expected)


class TestLinear:
    @pytest.mark.parametrize("format", FORMATS)
    @pytest.mark.parametrize(("rows", "out_size", "in_size"), [(1, 16, 128), (5, 40, 384), (33, 70, 256), (70, 3, 128)])
    def test_equals_the_definition(self, format: str, rows: int, out_size: int, in_size: int) -> None:
        x, bias = torch.randn(rows, in_size), torch.randn(out_size)
        weight = made(torch.randn(1, out_size, in_size), format)
        y = products.linear(x.to(GPU), there(weight), bias.to(GPU), out_dtype=torch.float32).cpu()
        if isinstance(weight, Tensor):
            expected = F.linear(x.to(torch.bfloat16).float(), weight[0].float()) + bias
            torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-5)
        else:
            assert torch.equal(y, quantized_linear(x, first(weight)) + bias)
        rounded = products.linear(x.to(GPU), there(weight), bias.to(GPU), out_dtype=torch.bfloat16)
        assert torch.equal(rounded.cpu(), y.to(torch.bfloat16))

    @pytest.mark.parametrize(
        ("format", "in_size"),
        [("bf16", 7), ("bf16", 131), ("int8", 7), ("int8", 130), ("int4-32", 32), ("int4-32", 352), ("int4-64", 192)],
    )
    def test_odd_columns(self, format: str, in_size: int) -> None:
        x, weight = torch.randn(3, in_size), made(torch.randn(1, 5, in_size), format)
        y = products.linear(x.to(GPU), there(weight), None, out_dtype=torch.float32).cpu()
        if isinstance(weight, Tensor):
            torch.testing.assert_close(y, F.linear(x.to(torch.bfloat16).float(), weight[0].float()))
        else:
            assert torch.equal(y, quantized_linear(x, first(weight)))

    @pytest.mark.parametrize("rows", [2, 70])
    @pytest.mark.parametrize("group", [32, 64, 128])
    def test_every_step_and_value_of_int4(self, rows: int, group: int) -> None:
        """As int8 of the bytes that they are, in blocks of which a part is behind the last column."""
        columns = 384
        steps = torch.arange(31)[:, None] - 15 + torch.zeros(columns // group, dtype=torch.int64)
        steps[:, 1::2] *= -1
        values = (torch.arange(columns) * 7 + torch.arange(31)[:, None]) % 16 - 8
        scales, x = torch.rand(31) + 0.1, torch.randn(rows, columns)
        weight = QuantizedWeight(quantized.pack_nibbles(values), scales, 4, group, steps.to(torch.int8))
        expanded = QuantizedWeight((values * steps.repeat_interleave(group, 1)).to(torch.int8), scales, 8, None)
        made = (
            products.linear(x.to(GPU), there(each.map(lambda tensor: tensor[None])), None, out_dtype=torch.float32)
            for each in (weight, expanded)
        )
        for y in made:
            assert torch.equal(y.cpu(), quantized_linear(x, weight))

    @pytest.mark.parametrize("format", ["bf16", "int8", "int4-64", "mxfp4"])
    def test_what_is_not_finite_stays_in_its_row(self, format: str) -> None:
        x, weight = torch.randn(3, 64), made(torch.randn(1, 16, 64), format)
        y = products.linear(x.to(GPU), there(weight), None, out_dtype=torch.float32).cpu()
        x[1, 3] = float("nan")
        damaged = products.linear(x.to(GPU), there(weight), None, out_dtype=torch.float32).cpu()
        assert damaged[1].isnan().all() and torch.equal(damaged[[0, 2]], y[[0, 2]])

    @pytest.mark.parametrize("code", range(16))
    def test_every_number_of_mxfp4_and_its_smallest_scales(self, code: int) -> None:
        values = torch.full((1, 4, 16), code * 17, dtype=torch.uint8)
        weight = QuantizedWeight(values, torch.tensor([[[0], [1], [127], [130]]], dtype=torch.uint8), 4, 32)
        x = torch.eye(32)[:2] * 127
        y = products.linear(x.to(GPU), there(weight), None, out_dtype=torch.float32).cpu()
        assert torch.equal(y, quantized_linear(x, QuantizedWeight(values[0], weight.scales[0], 4, 32)))


def an_mlp(format: str, activation: str, experts: int, hidden: int, inner: int, *, bias: bool) -> tuple[Any, Any]:
    """The same experts as the kernels take them, and packed for the processor."""
    rows = 2 * inner if is_gated(activation) else inner
    up, down = (
        made(torch.randn(experts, rows, hidden) * 0.2, format),
        made(torch.randn(experts, hidden, inner) * 0.2, format),
    )
    biases = (torch.randn(experts, rows), torch.randn(experts, hidden)) if bias else (None, None)
    moved = (None if each is None else each.to(GPU) for each in biases)
    own = products.Mlp(there(up), there(down), *moved, activation)
    return own, packed.pack_mlp(up, down, up_bias=biases[0], down_bias=biases[1], activation=activation)


def single(mlp: packed.PackedMlp, weights: products.Mlp) -> packed.PackedMlp:
    """A stack of one as one MLP."""
    return packed.pack_mlp(first(weights.up), first(weights.down), activation=mlp.activation)


MOES = [
    # tokens, top_k, experts, format, activation, bias, residual
    (1, 2, 4, "bf16", "swiglu", False, "none"),
    (1, 2, 4, "int8", "gelu", True, "plain"),
    (7, 3, 5, "int4-64", "swiglu", True, "weighed"),
    (7, 3, 5, "mxfp4", "swiglu_oai", True, "none"),
    (40, 2, 3, "bf16", "gelu_tanh", True, "weighed"),
    (70, 2, 3, "int8", "swiglu", False, "none"),
    (9, 1, 130, "int4-32", "gelu_tanh", False, "plain"),
]


class TestExperts:
    @pytest.mark.parametrize(("tokens", "top_k", "experts", "format", "activation", "bias", "residual"), MOES)
    def test_equal_the_definition(
        self, tokens: int, top_k: int, experts: int, format: str, activation: str, bias: bool, residual: str
    ) -> None:
        """Routes of no expert, experts of no token, and one expert named twice by a token."""
        own, defined = an_mlp(format, activation, experts, 64, 64, bias=bias)
        x, weights = torch.randn(tokens, 64), torch.rand(tokens, top_k)
        ids = torch.randint(-1, experts, (tokens, top_k))
        extra, extra_defined = an_mlp(format, activation, 1, 64, 128, bias=False)
        shares = torch.rand(tokens) if residual == "weighed" else None
        y = products.moe(
            x.to(GPU), ids.to(GPU), weights.to(GPU), own, residual=None if residual == "none" else extra,
            residual_weights=None if shares is None else shares.to(GPU),
        ).cpu()  # fmt: skip
        beside = None if residual == "none" else single(extra_defined, extra)
        expected = packed.packed_moe(x, ids, weights, defined, residual=beside, residual_weights=shares)
        # A function's last bit may round a hidden number to bf16 otherwise.
        torch.testing.assert_close(y, expected, atol=2e-2, rtol=2e-3)
        assert (y - expected).abs().mean() < 1e-4

    def test_the_residual_alone(self) -> None:
        own, defined = an_mlp("int8", "swiglu", 1, 64, 64, bias=False)
        x, none = torch.randn(5, 64), torch.empty(5, 0, dtype=torch.int64)
        y = products.moe(x.to(GPU), none.to(GPU), none.float().to(GPU), None, residual=own, residual_weights=None)
        torch.testing.assert_close(y.cpu(), packed.packed_mlp(x, single(defined, own)), atol=1e-3, rtol=1e-3)

    def test_no_expert_and_experts_beyond_the_last_count_as_none(self) -> None:
        own, _ = an_mlp("bf16", "swiglu", 3, 64, 64, bias=False)
        ids, weights = torch.tensor([[-1, 5], [3, -2]], device=GPU), torch.ones(2, 2, device=GPU)
        y = products.moe(torch.randn(2, 64, device=GPU), ids, weights, own, residual=None, residual_weights=None)
        assert y.abs().max() == 0

    @pytest.mark.parametrize("shape", [(0, 2), (3, 2)])
    def test_routes_are_in_order_of_their_experts(self, shape: tuple[int, int]) -> None:
        ids = torch.randint(-1, 4, shape)
        routes = products.Routes.of(ids.to(GPU), 4)
        starts = routes.starts.tolist()
        for expert in range(4):
            own = routes.routes[starts[expert] : starts[expert + 1]].tolist()
            assert own == (ids.flatten() == expert).nonzero().flatten().tolist()


class TestRows:
    @pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 3, 100), (0, 16), (4, 1024)])
    @pytest.mark.parametrize("has_bias", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_norms(self, shape: tuple[int, ...], has_bias: bool, dtype: torch.dtype) -> None:
        x = torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)[..., : shape[-1]] + 3.0
        weight, bias = torch.randn(shape[-1]), torch.randn(shape[-1]) if has_bias else None
        y = rows.norm(x.to(GPU), weight.to(GPU), None if bias is None else bias.to(GPU), 1e-5).cpu()
        wide = x.float()
        expected = F.rms_norm(wide, weight.shape, weight, 1e-5)
        if bias is not None:
            expected = F.layer_norm(wide, weight.shape, weight, bias, 1e-5)
        torch.testing.assert_close(y, expected.to(dtype))

    @pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 3, 4, 24), (1, 5, 2, 64)])
    @pytest.mark.parametrize("is_slice", [False, True])
    def test_rotation(self, shape: tuple[int, ...], is_slice: bool) -> None:
        x = torch.randn(*shape[:-1], shape[-1] + 8)[..., 4:-4] if is_slice else torch.randn(shape)
        angles = torch.rand(shape[1], shape[-1] // 2) * 6
        y = rows.rotate(x.to(GPU), angles.cos().to(GPU), angles.sin().to(GPU))
        torch.testing.assert_close(y.cpu(), rotate(x, angles.cos(), angles.sin()))

    @pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
    @pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (5, 2), (130, 8), (64, 64)])
    @pytest.mark.parametrize("finish", ["plain", "renormalized", "all"])
    def test_the_choice_of_experts(self, scoring: Any, experts: int, top_k: int, finish: str) -> None:
        """As a router's forward chooses, whose statistics nobody asks for."""
        has_all = finish == "all"
        config = RouterConfig(
            scoring=scoring, renormalize=finish != "plain" and top_k > 1, scale=2.5 if has_all else 1.0, bias=has_all,
            score_correction_bias=has_all and scoring == "sigmoid",
        )  # fmt: skip
        router = Router(16, experts, top_k=top_k, config=config).eval()
        for bias in (router.bias, router.score_correction_bias):
            if bias is not None:
                torch.nn.init.normal_(bias)
        output_scale = torch.tensor(0.7) if has_all else None
        x = torch.randn(9, 16)
        with torch.no_grad():
            expected_ids, expected = router.choose(x, output_scale=output_scale)
            correction = router.score_correction_bias
            ids, weights = rows.choose(
                (x @ router.weight.t()).to(GPU), None if router.bias is None else router.bias.to(GPU),
                None if correction is None else correction.to(GPU), top_k=top_k, scoring=scoring,
                renormalize=config.renormalize, scale=config.scale,
                output_scale=None if output_scale is None else output_scale.to(GPU),
            )  # fmt: skip
        assert torch.equal(ids.cpu(), expected_ids)
        torch.testing.assert_close(weights.cpu(), expected)

    def test_of_equal_scores_the_lower_expert_comes_first_and_nan_names_experts_too(self) -> None:
        logits = torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0], [float("nan")] * 5], device=GPU)
        ids, weights = rows.choose(
            logits, None, None, top_k=3, scoring="softmax", renormalize=False, scale=1.0, output_scale=None
        )
        assert ids.tolist() == [[1, 2, 4], [0, 1, 2]] and weights[1].isnan().all()

    @pytest.mark.parametrize("cache", [torch.float32, torch.bfloat16, torch.int8])
    @pytest.mark.parametrize("turned", ["no", "before norms", "after norms", "without norms"])
    def test_new_heads_are_normed_turned_and_kept(self, cache: torch.dtype, turned: str) -> None:
        """As the operations of model/attention one by one do it, in fp32."""
        batch, _, count = a_batch([2, 3], [40, 70], 32)
        own, defined = (blocks_of(cache, count, 32, 2, 24, device) for device in (GPU, CPU))
        qkv = torch.randn(5, 8, 24)
        query, key, value = qkv.split([4, 2, 2], 1)
        norms = None if turned == "without norms" else (torch.rand(24) + 0.5, torch.rand(24) + 0.5)
        angles = torch.rand(5, 12) * 6
        tables = (1.2 * angles.cos(), 1.2 * angles.sin())  # yarn scales them

        def normed(x: Tensor, weight: Tensor) -> Tensor:
            return F.rms_norm(x, (24,), weight, 1e-5)

        def turn(x: Tensor) -> Tensor:
            return rotate(x[None], *tables)[0] if turned != "no" else x

        steps = [query, key]
        if turned == "before norms":
            steps = [turn(each) for each in steps]
        if norms is not None:
            steps = [normed(each, weight) for each, weight in zip(steps, norms, strict=True)]
        if turned in ("after norms", "without norms"):
            steps = [turn(each) for each in steps]
        paged.write_kv(steps[1], value.contiguous(), defined, batch)
        moved = qkv.to(GPU)
        places = batch.slots_on(GPU, block_size=32, num_blocks=count)
        y = rows.place_heads(
            *moved.split([4, 2, 2], 1), places, own.keys, own.values, own.scales,
            rotary=None if turned == "no" else (tables[0].to(GPU), tables[1].to(GPU)),
            norms=None if norms is None else (norms[0].to(GPU), norms[1].to(GPU)), epsilon=1e-5,
            norms_rotated=turned == "before norms",
        )  # fmt: skip
        torch.testing.assert_close(y.cpu(), steps[0], atol=1e-5, rtol=1e-5)
        for made, expected in zip(vars(own).values(), vars(defined).values(), strict=True):
            if isinstance(made, Tensor):
                exact = {"atol": 1, "rtol": 0} if made.dtype is torch.int8 else {"atol": 1e-5, "rtol": 1e-2}
                torch.testing.assert_close(made.cpu().float(), expected.float(), **exact)


def blocks_of(dtype: torch.dtype, count: int, size: int, heads: int, dim: int, device: torch.device) -> paged.KVBlocks:
    """Rows, of numbers that nothing has written yet."""
    keys, values = (torch.full((count, size, heads, dim), 3, dtype=dtype, device=device) for _ in range(2))
    scales = (torch.zeros(count, size, heads, device=device) if dtype is torch.int8 else None for _ in range(2))
    return paged.KVBlocks(keys, values, *scales, dim)


def a_batch(new: list[int], lengths: list[int], block_size: int) -> tuple[paged.PagedBatch, paged.PagedBatch, int]:
    """A batch of new tokens, one of all positions, and how many blocks there are, in no order."""
    blocks = [-(-length // block_size) for length in lengths]
    order = torch.randperm(sum(blocks) + 2).to(torch.int32)
    tables = torch.zeros(len(lengths), max(blocks), dtype=torch.int32)
    for row, (count, end) in enumerate(zip(blocks, np.cumsum(blocks), strict=True)):
        tables[row, :count] = order[end - count : end]

    def batch(counts: list[int]) -> paged.PagedBatch:
        starts = torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32)
        return paged.PagedBatch(starts, torch.tensor(lengths, dtype=torch.int32), tables)

    return batch(new), batch(lengths), len(order)


F32, BF16, INT8 = torch.float32, torch.bfloat16, torch.int8
ATTENTIONS = [
    # new tokens, lengths, heads, key/value heads, head_dim, block size, cache, queries, window, sinks
    ([1, 1], [5, 70], 4, 2, 16, 32, F32, F32, None, False),
    ([1, 1, 1], [700, 33, 1], 8, 2, 64, 32, BF16, BF16, None, True),
    ([1, 0, 3], [1000, 33, 900], 6, 3, 80, 64, BF16, BF16, 100, True),
    ([1, 0, 3], [1000, 33, 900], 6, 3, 80, 64, INT8, BF16, 600, False),
    ([40, 1], [40, 300], 4, 4, 24, 32, INT8, BF16, None, False),
    ([40, 70, 2], [90, 70, 300], 4, 1, 128, 32, F32, F32, 50, True),
    ([40, 70, 2], [90, 70, 300], 5, 1, 128, 32, BF16, BF16, None, False),
]


class TestAttention:
    @pytest.mark.parametrize("case", range(len(ATTENTIONS)))
    @pytest.mark.parametrize("shortest", [1 << 20, 256])
    def test_equals_the_definition(self, case: int, shortest: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Long contexts whole, and in parts of 256 positions."""
        monkeypatch.setattr(attention, "_SPLIT", shortest)
        monkeypatch.setattr(attention, "multiprocessors", lambda device: 132)
        new, lengths, heads, kv_heads, dim, size, cache, dtype, window, sinks = ATTENTIONS[case]
        batch, everything, count = a_batch(new, lengths, size)
        own, defined = (blocks_of(cache, count, size, kv_heads, dim, device) for device in (GPU, CPU))
        for each in (own, defined):
            torch.manual_seed(1)
            key, value = (torch.randn(sum(lengths), kv_heads, dim).to(dtype) for _ in range(2))
            paged._write_reference(key.to(each.keys.device), value.to(each.keys.device), each, everything)
        query, weights = torch.randn(sum(new), heads, dim).to(dtype), torch.randn(heads) if sinks else None
        moved = None if weights is None else weights.to(GPU)
        y = paged._attention_on_cuda(query.to(GPU), own, batch, dim**-0.5, window, moved).cpu()
        expected = paged.paged_attention(query, defined, batch, window=window, sinks=weights)
        # Shares are rounded to bf16 where queries are.
        torch.testing.assert_close(y, expected, **({} if dtype is F32 else {"atol": 2e-2, "rtol": 1e-2}))
        plan = attention.plan_of(query.to(GPU), batch, dim=dim, kv_heads=kv_heads, window=window)
        assert (plan.num_parts > 0) == (shortest == 256 and max(lengths) >= 300 and window not in (50, 100))

    @pytest.mark.parametrize(
        ("new", "lengths", "heads", "rank", "key_dim", "dtype"),
        [([1, 1], [600, 40], 16, 32, 8, BF16), ([5, 40], [600, 40], 20, 64, 16, BF16), ([3], [3], 3, 48, 8, F32)],
    )
    def test_latent_attention(
        self, new: list[int], lengths: list[int], heads: int, rank: int, key_dim: int, dtype: torch.dtype
    ) -> None:
        batch, everything, count = a_batch(new, lengths, 32)
        vectors = torch.randn(sum(lengths), rank + key_dim).to(dtype)
        own, defined = (
            latent.LatentBlocks(torch.zeros(count, 32, rank + key_dim, dtype=dtype, device=device), rank, key_dim)
            for device in (GPU, CPU)
        )
        latent.write_latents(vectors.to(GPU), own, everything)
        latent.write_latents(vectors, defined, everything)
        query = torch.randn(sum(new), heads, rank + key_dim).to(dtype)
        y = latent._attention_on_cuda(query.to(GPU), own, batch, 0.2).cpu()
        expected = latent.latent_attention(query, defined, batch, scale=0.2)
        torch.testing.assert_close(y, expected, **({} if dtype is F32 else {"atol": 3e-2, "rtol": 2e-2}))

    def test_a_plan_covers_every_position_once(self) -> None:
        """Over random batches: rows and positions of all pieces are those that are visible, each once."""
        generator = np.random.default_rng(0)
        for _ in range(50):
            count, group = int(generator.integers(1, 6)), int(generator.integers(1, 9))
            lengths = generator.integers(1, 1500, count).astype(np.int32)
            new = np.minimum(lengths, generator.integers(0, 60, count))
            starts = np.concatenate([[0], np.cumsum(new)]).astype(np.int32)
            window = [None, 40, 700][int(generator.integers(3))]
            plan = attention.plan_attention(
                starts, lengths, group=group, kv_heads=2, window=window, largest_tile=64, device=CPU
            )
            seen: dict[tuple[int, int], int] = {}
            for sequence, first, position, begin_row, end_row, begin, end, _ in plan.work.tolist():
                assert first == starts[sequence] and position == lengths[sequence] - new[sequence]
                for row in range(begin_row, end_row):
                    own = position + row // group
                    lowest = 0 if window is None else max(0, own - window + 1)
                    visible = max(0, min(end, own + 1) - max(begin, lowest))
                    seen[sequence, row] = seen.get((sequence, row), 0) + visible
            for sequence in range(count):
                for row in range(int(new[sequence]) * group):
                    own = int(lengths[sequence] - new[sequence]) + row // group
                    assert seen[sequence, row] == (own + 1 if window is None else min(own + 1, window))
            assert plan.num_parts == sum(piece[7] >= 0 for piece in plan.work.tolist())

    @pytest.mark.parametrize("others", [[], [(2048, 2048)], [(1, 1000)] * 40])
    def test_a_long_context_is_shared_out_whatever_runs_beside_it(self, others: list[tuple[int, int]]) -> None:
        new, lengths = zip(*[(1, 100_000), *others], strict=True)
        plan = attention.plan_attention(
            np.array([0, *np.cumsum(new)], dtype=np.int32), np.array(lengths, dtype=np.int32), group=4, kv_heads=8,
            window=None, largest_tile=64, device=CPU,
        )  # fmt: skip
        assert max(end - begin for *_, begin, end, _ in plan.work.tolist()) < 8000


def test_the_self_test_passes_here_and_finds_wrong_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_self_test(GPU).startswith("triton ")
    monkeypatch.setattr(products, "quantize_activations", lambda x, **_: (x.to(torch.int8), x.abs().amax(-1)))
    with pytest.raises(Exception, match="int8 products"):
        run_self_test(GPU)


def test_shared_memory_bounds_what_is_on_its_way() -> None:
    assert launch.stages(1 << 30, GPU) == 1 and launch.stages(1, GPU) == 4
