"""The command line in this process, and a small trained run."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from moesaic.config.load import write_config
from moesaic.config.train import TrainConfig
from moesaic.logs import StderrHandler, logger


@dataclass(frozen=True)
class Outcome:
    """What a command printed and its exit status."""

    status: int
    out: str
    err: str


Cli = Callable[..., Outcome]


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Iterator[Cli]:
    """A function that runs `moesaic ARGUMENTS`."""
    from moesaic.cli.main import main

    level, handlers = logger.level, list(logger.handlers)

    def run(*arguments: object) -> Outcome:
        status = 0
        # The next command decides anew how its lines look.
        logger.handlers = [each for each in handlers if not isinstance(each, StderrHandler)]
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as leaving:
            status = int(leaving.code or 0)
        captured = capfd.readouterr()
        return Outcome(status, captured.out, captured.err)

    yield run
    logger.handlers = handlers
    logger.setLevel(level)


@pytest.fixture
def config_file(make_config: Callable[..., TrainConfig], tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a config as make_config makes it and returns the file."""

    def make(*arguments: Any, **changes: Any) -> Path:
        path = tmp_path / "config-given.yaml"
        write_config(make_config(*arguments, **changes), path)
        return path

    return make


@pytest.fixture(scope="session")
def trained_run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of a few steps of a PR-MoE on the tiny data."""
    from moesaic.train.loop import train

    folder = tmp_path_factory.mktemp("trained") / "run"
    config = TrainConfig.from_dict(
        {
            "model": {
                "vocab_size": 320,
                "hidden_size": 16,
                "num_layers": 2,
                "num_heads": 2,
                "intermediate_size": 32,
                "max_positions": 64,
                "moe": {"num_experts": [4, 8], "residual": "sum"},
            },
            "data": {"path": str(tiny_data), "sequence_length": 16},
            "tokens": 256,
            "batch_size": 4,
        }
    )
    train(config, folder)
    return folder
