"""Several processes train as one does: weights, records, checkpoints, and what goes wrong on some of them."""

import os
import signal
import socket
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from moesaic.checkpoint.store import list_checkpoints, load_tensors
from moesaic.config.train import TrainConfig
from moesaic.kernels import limits, products
from moesaic.report.records import EvaluationRecord, TrainRecord, read_metrics
from moesaic.train.loop import train

MakeConfig = Callable[..., TrainConfig]

# What makes one process with smaller micro-batches do as several do, to rounding: nothing is drawn by a micro-batch's
# place on a process, and no balance loss is taken over the counts of others.
PLAIN_MOE: dict[str, Any] = {
    "dropout": 0.0,
    "moe": {
        "num_experts": [4, 6],
        "top_k": 2,
        "residual": "sum",
        "router": {"balance_loss": 0.01, "z_loss": 1e-3, "score_correction_bias": True},
    },
}


class Stopper:
    """Sends this process a signal at a step."""

    def __init__(self, step: int) -> None:
        self._step = step
        self.messages: list[str] = []

    def update(self, record: TrainRecord) -> None:
        if record.step == self._step:
            signal.raise_signal(signal.SIGTERM)

    def evaluation(self, record: EvaluationRecord, *, best_loss: float) -> None: ...

    def message(self, text: str) -> None:
        self.messages.append(text)


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
        torch.save(work(rank, *arguments), Path(folder) / f"rank{rank}.pt")


MACHINE = limits.Limits(
    device="cpu", name="test", threads=1, torch_version="0", kernels="reference", buffer_bytes=1,
    bandwidth_bytes_per_second=1e10, bf16_flops_per_second=2e11, fp32_flops_per_second=1e11,
    int8_operations_per_second=None, torch_bandwidth_bytes_per_second=1e10, torch_bf16_flops_per_second=2e11,
    torch_fp32_flops_per_second=1e11, torch_int8_operations_per_second=None,
)  # fmt: skip


@pytest.fixture
def on_processes(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """A function (size, work, *arguments) that calls work(rank, *arguments) on each process; returns what they did."""
    if not dist.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")

    def run(size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
        folder = tmp_path_factory.mktemp("ranks")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        mp.spawn(on_a_rank, args=(size, port, str(folder), work, arguments), nprocs=size)
        return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(size)]

    return run


def run_training(rank: int, configs: list[TrainConfig], folder: Path, resume: bool = False) -> list[dict[str, Any]]:
    """Train each config in a folder of its own, one after the other; return how each ended."""
    return [
        asdict(train(config, folder / str(number), device="cpu", resume=resume)) | {"run_folder": None}
        for number, config in enumerate(configs)
    ]


def last_tensors(run_folder: Path) -> tuple[int, dict[str, Tensor]]:
    info = list_checkpoints(run_folder)[-1]
    kinds = ("model", "optimizer")
    return info.step, {f"{kind}: {name}": each for kind in kinds for name, each in load_tensors(info, kind).items()}


def assert_same_training(run_folder: Path, expected: Path, *, tolerance: float) -> None:
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


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {"micro_batch_size": 1}),
    "dense, muon": ("dense", {"micro_batch_size": 1, "optimizer": {"name": "muon"}}),
    "moe": ("pr-moe", {"micro_batch_size": 1, "model": PLAIN_MOE}),
    "moe, muon": ("pr-moe", {"micro_batch_size": 1, "model": PLAIN_MOE, "optimizer": {"name": "muon"}}),
    "moe, accumulated": ("pr-moe", {"micro_batch_size": 1, "batch_size": 8, "model": PLAIN_MOE}),
    "moe, pairs, recomputed, no clipping": (
        "pr-moe",
        {"micro_batch_size": 1, "model": PLAIN_MOE, "activation_checkpointing": True,
         "optimizer": {"max_gradient_norm": None}, "parallel": {"expert_degree": 2}},
    ),
    "moe, documents": ("pr-moe", {"micro_batch_size": 1, "model": PLAIN_MOE, "data": {"document_mask": True}}),
}  # fmt: skip


def test_several_processes_train_as_one_does(
    make_config: MakeConfig,
    tmp_path: Path,
    on_processes: Callable[..., list[Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In 4 processes, the 5 validation sequences among them; then one process goes on from there, and 2 after it."""
    monkeypatch.setattr(products, "is_widened", lambda _, dtype: dtype is torch.bfloat16)  # Muon's in fp32, as on the processes
    evaluation = {"sequences": 5}
    configs = [
        make_config(base, precision="fp32", evaluation=evaluation, **changes) for base, changes in KINDS.values()
    ]
    ends = on_processes(4, run_training, configs, tmp_path / "four")
    assert ends[0] == ends[1] == ends[2] == ends[3]
    for number, (kind, config) in enumerate(zip(KINDS, configs, strict=True)):
        alone = config.replace(parallel={"expert_degree": None})
        train(alone, tmp_path / "one" / str(number), device="cpu")
        # Muon makes small differences larger.
        tolerance = 2e-3 if config.optimizer.name == "muon" else 2e-4
        assert_same_training(tmp_path / "four" / str(number), tmp_path / "one" / str(number), tolerance=tolerance)
        assert ends[0][number]["step"] == config.total_steps, kind
