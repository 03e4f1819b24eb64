"""A small teacher, trained once, and configs of its students."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moesaic.config.train import TrainConfig
from moesaic.distill.run import student_config
from moesaic.train.loop import train

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
def one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports measure speed once."""
    monkeypatch.setattr("moesaic.distill.latency._FEWEST_ROUNDS", 1)
    monkeypatch.setattr("moesaic.distill.latency._SECONDS", 0.0)


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
