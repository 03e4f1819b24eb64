"""A small teacher, trained once, and configs of its students; training without what takes seconds elsewhere."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moesaic.config.train import TrainConfig
from moesaic.distill.run import student_config
from moesaic.kernels.limits import Limits
from moesaic.train.loop import train

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
# Dense and MoE layers, a pyramid, a residual MLP.
TEACHER: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "num_layers": 4,
    "num_heads": 2,
    "intermediate_size": 32,
    "max_positions": 32,
    "moe": {"num_experts": [4, 8], "every": 2, "residual": "sum"},
}


@pytest.fixture(autouse=True)
def nothing_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesaic.train.loop.measure_limits", lambda **_: LIMITS)
    monkeypatch.setattr("moesaic.train.loop.tune_allocator", lambda: None)
    monkeypatch.setattr("moesaic.train.loop.write_plots", lambda run_folder: [])
    monkeypatch.setattr("moesaic.distill.report._ROUNDS", 1)


@pytest.fixture(scope="session")
def teacher(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PR-MoE of 4 layers after 40 steps of 4 sequences of 16 tokens."""
    folder = tmp_path_factory.mktemp("distill") / "teacher"
    config = TrainConfig.from_dict(
        {
            "model": TEACHER,
            "data": {"path": str(tiny_data), "sequence_length": 16},
            "tokens": 40 * 64,
            "batch_size": 4,
            "precision": "fp32",
            "schedule": {"learning_rate": 1e-2, "min_learning_rate": 1e-3, "warmup_tokens": 128},
            "evaluation": {"sequences": 4},
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moesaic.train.loop.measure_limits", lambda **_: LIMITS)
        patch.setattr("moesaic.train.loop.tune_allocator", lambda: None)
        patch.setattr("moesaic.train.loop.write_plots", lambda run_folder: [])
        train(config, folder)
    return folder


@pytest.fixture
def student(teacher: Path) -> Iterator[Callable[..., TrainConfig]]:
    """A function (steps=12, *settings, **options) that returns a student's config, a checkpoint every 4 steps."""

    def make(*settings: str, steps: int = 12, **options: Any) -> TrainConfig:
        own = [
            f"tokens={steps * 64}",
            "micro_batch_size=2",
            "log_every_steps=1",
            "evaluation.every_tokens=128",
            "checkpoint.every_tokens=256",
            "distill.teacher_precision=fp32",
        ]
        if "distill.schedule=none" in settings:
            own.pop()
        return student_config(teacher, [*own, *settings], **options)

    yield make
