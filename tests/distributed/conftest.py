"""Processes that train together, on the CPU."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from moesaic.checkpoint.store import list_checkpoints, load_tensors
from moesaic.kernels import limits, products
from moesaic.report.records import read_metrics

MACHINE = limits.Limits(
    device="cpu", name="test", threads=1, torch_version="0", kernels="reference", buffer_bytes=1,
    bandwidth_bytes_per_second=1e10, bf16_flops_per_second=2e11, fp32_flops_per_second=1e11,
    int8_operations_per_second=None, torch_bandwidth_bytes_per_second=1e10, torch_bf16_flops_per_second=2e11,
    torch_fp32_flops_per_second=1e11, torch_int8_operations_per_second=None,
)  # fmt: skip


def on_a_rank(
    rank: int, size: int, port: int, folder: str, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size),
    }  # fmt: skip
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        # As in the tests' own process.
        patch.setattr("moesaic.train.loop.measure_limits", lambda **_: MACHINE)
        patch.setattr("moesaic.train.loop.tune_allocator", lambda: None)
        patch.setattr("moesaic.train.loop.write_plots", lambda *_, **__: [])
        patch.setattr(os, "fsync", lambda descriptor: None)
        patch.setattr(products, "is_widened", lambda _, dtype: dtype is torch.bfloat16)
        try:
            torch.save(work(rank, *arguments), Path(folder) / f"rank{rank}.pt")
        finally:
            if dist.is_initialized():  # which aborts at times where it is left to the interpreter's end
                dist.destroy_process_group()


def last_tensors(run_folder: Path) -> tuple[int, dict[str, Tensor]]:
    info = list_checkpoints(run_folder)[-1]
    kinds = ("model", "optimizer")
    return info.step, {f"{kind}: {name}": each for kind in kinds for name, each in load_tensors(info, kind).items()}


def _assert_same_training(run_folder: Path, expected: Path, *, tolerance: float) -> None:
    """Last checkpoints and all records are the same, to rounding in fp32."""
    (step, tensors), (expected_step, of_one) = last_tensors(run_folder), last_tensors(expected)
    assert step == expected_step and tensors.keys() == of_one.keys()
    for name, tensor in of_one.items():
        assert tensors[name].shape == tensor.shape and tensors[name].dtype == tensor.dtype, name
        largest = float(tensor.abs().max())
        assert torch.allclose(tensors[name], tensor, rtol=0, atol=tolerance * max(largest, 1e-3)), name
    ours, theirs = read_metrics(run_folder), read_metrics(expected)
    for records, due in ((ours.train, theirs.train), (ours.evaluation, theirs.evaluation)):
        assert [each.step for each in records] == [each.step for each in due]
        for record, each in zip(records, due, strict=True):
            assert abs(record.loss - each.loss) < tolerance
    for record, each in zip(ours.train, theirs.train, strict=True):
        assert abs(record.balance_loss - each.balance_loss) < tolerance
        assert abs(record.gradient_norm - each.gradient_norm) < 10 * tolerance
        assert (record.moe is None) == (each.moe is None)
        if record.moe is not None and each.moe is not None:
            assert torch.allclose(torch.tensor(record.moe.entropy), torch.tensor(each.moe.entropy), atol=tolerance)
            for load, of_one_process in zip(record.moe.load, each.moe.load, strict=True):
                assert torch.allclose(torch.tensor(load), torch.tensor(of_one_process), atol=1e-6)


@pytest.fixture(scope="session")
def assert_same_training() -> Callable[..., None]:
    """A function (run_folder, expected, *, tolerance) that compares two runs."""
    return _assert_same_training


@pytest.fixture
def on_processes(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """A function (size, work, *arguments) that calls work(rank, *arguments) on each process; returns what they did,
    None of one that ended inside it."""
    if not dist.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")

    def run(size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
        folder = tmp_path_factory.mktemp("ranks")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        mp.spawn(on_a_rank, args=(size, port, str(folder), work, arguments), nprocs=size)
        files = [folder / f"rank{rank}.pt" for rank in range(size)]
        return [torch.load(file, weights_only=True) if file.exists() else None for file in files]

    return run
