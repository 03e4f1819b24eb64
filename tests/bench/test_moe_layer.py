"""The benchmark runs the layer that it says, counts what the layer must move and do, and refuses what cannot be."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moesaic.bench import moe_layer
from moesaic.bench.moe_layer import MoELayerCase, bench_moe_layer, required_work
from moesaic.errors import ConfigError
from moesaic.kernels import select
from moesaic.kernels.limits import Limits

SMALL = {"tokens": 24, "num_experts": 4, "top_k": 2, "hidden_size": 64, "intermediate_size": 128}


@pytest.fixture
def bytes_too(machine_limits: Limits) -> Limits:
    """Limits of a machine with products of bytes."""
    return replace(machine_limits, int8_operations_per_second=4e11, torch_int8_operations_per_second=4e11)


@pytest.mark.parametrize("kernels", ["reference", "auto"])
@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4", "mxfp4"])
@pytest.mark.parametrize("has_residual", [False, True])
def test_inference_is_timed_in_every_format(kernels: str, dtype: str, has_residual: bool, bytes_too: Limits) -> None:
    case = MoELayerCase(**SMALL, dtype=dtype, has_residual=has_residual)  # type: ignore[arg-type]
    with select.forced(kernels):
        result = bench_moe_layer(case, seconds=0.0, limits=bytes_too)
    check(result, bytes_too)


@pytest.mark.parametrize("has_residual", [False, True])
def test_training_is_timed(has_residual: bool, bytes_too: Limits) -> None:
    check(
        bench_moe_layer(
            MoELayerCase(**SMALL, has_backward=True, has_residual=has_residual), seconds=0.0, limits=bytes_too
        ),
        bytes_too,
    )


@pytest.mark.parametrize("size", [64, 100])
def test_it_names_what_computed_the_experts(size: int, bytes_too: Limits) -> None:
    case = {**SMALL, "hidden_size": size, "intermediate_size": size}
    for has_backward in (False, True):
        result = bench_moe_layer(MoELayerCase(**case, has_backward=has_backward), seconds=0.0, limits=bytes_too)
        is_ours = size == 64 or not has_backward or bytes_too.kernels == "reference"
        assert result.kernels == (bytes_too.kernels if is_ours else "reference")


def check(result: moe_layer.MoELayerResult, limits: Limits) -> None:
    assert result.rounds >= 5
    assert 0 < result.fastest_seconds <= result.seconds <= result.slowest_seconds
    assert result.ratio > 0 and result.dense_seconds > 0
    work = required_work(result.case, touched_experts=result.touched_experts)
    assert result.touched_experts == 4, "24 tokens of two experts each reach all four"
    assert result.required_bytes == work.memory_bytes
    moving = work.memory_bytes / limits.bandwidth_bytes_per_second
    peak = limits.bf16_flops_per_second if result.case.dtype == "bf16" else limits.int8_operations_per_second
    assert peak == result.operations_per_second
    rate = "bf16" if result.case.dtype == "bf16" else "int8"
    doing = work.operations[rate] / peak + work.operations["fp32"] / limits.fp32_flops_per_second
    assert result.share_of_limit == pytest.approx(max(moving, doing) / result.seconds)
    assert result.limit == ("bytes" if moving >= doing else "FLOPs")


@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4", "mxfp4"])
def test_the_timed_inference_is_the_layer(dtype: str) -> None:
    torch.manual_seed(0)
    case = MoELayerCase(**SMALL, dtype=dtype, has_residual=True)  # type: ignore[arg-type]
    layer = moe_layer._layer(case, torch.device("cpu"))
    x = torch.randn(24, 64, dtype=torch.bfloat16)
    with torch.inference_mode():
        expected: Tensor = layer(x)[0].float()
    actual = moe_layer._inference(case, layer)(x).float()
    error = (actual - expected).norm() / expected.norm()
    # bf16 rounds; 8 and 4 bits of Gaussian weights lose about 1 % and 10 %.
    assert error < {"bf16": 0.01, "int8": 0.03, "int4": 0.2, "mxfp4": 0.3}[dtype]


def test_a_training_step_leaves_every_gradient_fresh() -> None:
    case = MoELayerCase(**SMALL, has_backward=True, has_residual=True)
    layer = moe_layer._layer(case, torch.device("cpu"))
    step = moe_layer._training(layer, lambda x: layer(x)[0], torch.randn(24, 64, dtype=torch.bfloat16))
    step()
    first = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}  # type: ignore[union-attr]
    step()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and torch.equal(parameter.grad, first[name]), name


def test_forward_work_is_counted_from_the_shapes() -> None:
    case = MoELayerCase(tokens=10, num_experts=4, top_k=2, hidden_size=64, intermediate_size=128, has_residual=True)
    expert = 3 * 64 * 128
    work = required_work(case, touched_experts=3)
    assert work.memory_bytes == (3 + 1) * 2 * expert + 4 * 64 * 4 + 2 * 10 * 64 * 2
    assert work.operations == {"bf16": 2 * expert * 10 * 3, "fp32": 2 * 64 * 4 * 10}


def test_backward_work_is_twice_the_products_and_every_gradient() -> None:
    case = MoELayerCase(tokens=10, num_experts=4, top_k=1, hidden_size=64, intermediate_size=128, has_backward=True)
    expert, tokens, router = 2 * 3 * 64 * 128, 10 * 64 * 2, 4 * 64 * 4
    work = required_work(case, touched_experts=3)
    assert work.memory_bytes == 2 * (3 * expert + router) + (4 * expert + router) + 5 * tokens
    assert work.operations == {"bf16": 3 * 2 * 3 * 64 * 128 * 10, "fp32": 3 * 2 * 64 * 4 * 10}


def test_quantised_weights_are_counted_with_their_scales() -> None:
    def expert_bytes(dtype: str) -> float:
        case = MoELayerCase(tokens=1, num_experts=1, top_k=1, hidden_size=64, intermediate_size=128, dtype=dtype)  # type: ignore[arg-type]
        one, none = (required_work(case, touched_experts=count).memory_bytes for count in (1, 0))
        return one - none

    weights = 3 * 64 * 128
    assert expert_bytes("int8") == weights + 4 * (2 * 128 + 64)
    assert expert_bytes("int4") == weights / 2 + weights / 64 + 4 * (2 * 128 + 64)
    assert expert_bytes("mxfp4") == weights / 2 + weights / 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "int8", "has_backward": True}, r"dtype int8.*no gradient.*--dtype bf16"),
        ({"dtype": "int4", "hidden_size": 96}, r"hidden \(96\) is not a multiple of 64"),
        ({"dtype": "int4", "intermediate_size": 100}, r"intermediate \(100\) is not a multiple of 64"),
        ({"dtype": "mxfp4", "hidden_size": 72}, r"hidden \(72\) is not a multiple of 32; mxfp4 weights"),
        ({"dtype": "int8", "intermediate_size": 1 << 18}, r"intermediate \(262144\) is too large; sums of int8 take"),
        ({"dtype": "int4", "hidden_size": 1 << 18}, r"hidden \(262144\) is too large; sums of int4 take at most"),
        ({"top_k": 5}, r"top_k \(5\) is more than num_experts \(4\)"),
    ],
)
def test_what_cannot_be_run_is_refused(changes: dict[str, object], message: str, bytes_too: Limits) -> None:
    with pytest.raises(ConfigError, match=message):
        bench_moe_layer(MoELayerCase(**{**SMALL, **changes}), seconds=0.0, limits=bytes_too)  # type: ignore[arg-type]


@pytest.mark.parametrize("changes", [{"tokens": 10**11}, {"num_experts": 10**9}])
def test_sizes_beyond_memory_are_refused_before_anything_is_measured(
    changes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moe_layer, "measure_limits", None)
    with pytest.raises(ConfigError, match=r"take [\d,.]+ GB at least; [\d,.]+ GB of memory are free; lower --tokens"):
        bench_moe_layer(MoELayerCase(**{**SMALL, **changes}))  # type: ignore[arg-type]


def test_limits_are_measured_anew_unless_given(
    bytes_too: Limits, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[dict[str, object]] = []

    def measure(**options: object) -> Limits:
        asked.append(options)
        return bytes_too

    monkeypatch.setattr(moe_layer, "measure_limits", measure)
    assert bench_moe_layer(MoELayerCase(**SMALL), seconds=0.0).bandwidth_bytes_per_second == 1e10
    assert asked == [{"device": "cpu", "reuse": False}]
