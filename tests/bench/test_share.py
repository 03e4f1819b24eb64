"""The share of the limit is max(bytes / bandwidth, FLOPs / peak) / time."""

from dataclasses import replace

import pytest

from moesaic.bench.share import Work, bound
from moesaic.errors import DeviceError
from moesaic.kernels.limits import Limits

LIMITS = Limits(
    device="cpu",
    name="Some CPU",
    threads=2,
    torch_version="0",
    kernels="avx2",
    buffer_bytes=1,
    bandwidth_bytes_per_second=10.0,
    bf16_flops_per_second=100.0,
    fp32_flops_per_second=50.0,
    int8_operations_per_second=200.0,
    torch_bandwidth_bytes_per_second=1.0,
    torch_bf16_flops_per_second=1.0,
    torch_fp32_flops_per_second=1.0,
    torch_int8_operations_per_second=1.0,
)


def test_the_slower_of_moving_and_doing_is_the_limit() -> None:
    few = bound(Work(100.0, {"bf16": 500.0}), LIMITS)
    assert (few.seconds, few.limit, few.share(20.0)) == (10.0, "bytes", 0.5)
    many = bound(Work(100.0, {"bf16": 5000.0}), LIMITS)
    assert (many.seconds, many.limit, many.share(50.0)) == (50.0, "FLOPs", 1.0)


def test_each_kind_of_product_has_its_own_peak() -> None:
    assert bound(Work(0.0, {"int8": 400.0, "fp32": 150.0}), LIMITS).seconds == 2.0 + 3.0


def test_products_that_the_machine_does_not_have_are_refused() -> None:
    without = replace(LIMITS, int8_operations_per_second=None)
    with pytest.raises(DeviceError, match=r"Some CPU has no products of bytes.*--dtype bf16"):
        bound(Work(1.0, {"int8": 1.0}), without)
    assert bound(Work(1.0, {"bf16": 1.0}), without).limit == "bytes"
