"""`moesaic bench` prints what was measured, as a table and as JSON, and refuses what cannot be run."""

import json
from typing import Any

import pytest

from moesaic.cli import bench as bench_module
from moesaic.kernels.limits import Limits

LIMITS = Limits(
    device="cpu",
    name="test",
    threads=1,
    torch_version="0",
    kernels="reference",
    buffer_bytes=1,
    bandwidth_bytes_per_second=1e10,
    bf16_flops_per_second=2e11,
    fp32_flops_per_second=1e11,
    int8_operations_per_second=None,
    torch_bandwidth_bytes_per_second=1e10,
    torch_bf16_flops_per_second=2e11,
    torch_fp32_flops_per_second=1e11,
    torch_int8_operations_per_second=None,
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """No time spent, nothing measured: returns the options of each measurement asked for."""
    asked: list[dict[str, Any]] = []

    def measure(**options: Any) -> Any:
        asked.append(options)
        return LIMITS

    monkeypatch.setattr("moesaic.kernels.limits.measure_limits", measure)
    monkeypatch.setattr("moesaic.bench.moe_layer.measure_limits", measure)
    monkeypatch.setattr("moesaic.kernels.allocator.tune_allocator", lambda: None)
    monkeypatch.setattr(bench_module, "_LAYER_SECONDS", 0.0)
    return asked


LAYER = ("bench", "moe-layer", "--tokens", 8, "--experts", 4, "--top-k", 2, "--hidden", 64, "--intermediate", 64)


def test_limits_are_a_table_and_json(cli: Any, quick: list[dict[str, Any]]) -> None:
    table = cli("bench", "limits")
    assert table.status == 0, table.err
    for expected in ("reading memory", "10.0 GB/s", "0.200 TFLOP/s", "int8 products", "none"):
        assert expected in table.out
    values = json.loads(cli("bench", "limits", "--json").out)
    assert values["bandwidth_bytes_per_second"] == 1e10 and values["int8_operations_per_second"] is None
    assert [(options["device"], options["reuse"]) for options in quick] == [("cpu", False)] * 2


@pytest.mark.parametrize("flags", [(), ("--backward",), ("--residual", "--backward")])
def test_a_layer_is_json_with_the_case_and_the_result(cli: Any, flags: tuple[str, ...]) -> None:
    result = cli(*LAYER, *flags, "--json")
    assert result.status == 0, result.err
    values = json.loads(result.out)
    assert {"seconds", "dense_seconds", "ratio", "share_of_limit", "limit"} <= set(values)
    assert (values["tokens"], values["num_experts"], values["top_k"]) == (8, 4, 2)
    assert values["has_backward"] is ("--backward" in flags) and values["has_residual"] is ("--residual" in flags)
    assert values["limit"] in ("bytes", "FLOPs")


def test_a_layer_is_a_table(cli: Any) -> None:
    result = cli(*LAYER, "--residual")
    assert result.status == 0, result.err
    for expected in ("4 experts, top-2 and a residual MLP", "ratio to dense", "share of the limit", "bound by"):
        assert expected in result.out


def test_what_the_machine_does_not_have_is_refused(cli: Any) -> None:
    result = cli(*LAYER, "--dtype", "int8")  # the fixed limits have no products of bytes
    assert result.status == 2
    assert "no products of bytes" in result.err and "Traceback" not in result.err


@pytest.mark.parametrize("flags", [("--dtype", "int8", "--backward"), ("--top-k", 5)])
def test_a_mistake_is_told(cli: Any, flags: tuple[object, ...]) -> None:
    result = cli(*LAYER, *flags)
    assert result.status == 2
    assert "ConfigError" in result.err


def test_help_shows_examples(cli: Any) -> None:
    assert "Example: moesaic bench limits" in cli("bench", "limits", "--help").out
    assert "Example: moesaic bench moe-layer" in cli("bench", "moe-layer", "--help").out
