"""Training in this process: one thread, and without what takes seconds and is tested elsewhere."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

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


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def nothing_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_plots(run_folder: Path) -> list[Path]:
        return []

    monkeypatch.setattr("moesaic.train.loop.measure_limits", lambda **_: LIMITS)
    monkeypatch.setattr("moesaic.train.loop.tune_allocator", lambda: None)
    monkeypatch.setattr("moesaic.train.loop.write_plots", no_plots)
