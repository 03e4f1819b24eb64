"""The command line in this process, and a small trained run."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from moesaic.config.load import write_config
from moesaic.config.train import TrainConfig
from moesaic.kernels.limits import Limits
from moesaic.logs import StderrHandler, logger


@dataclass(frozen=True)
class Outcome:
    """What a command printed and its exit status."""

    status: int
    out: str
    err: str


Cli = Callable[..., Outcome]


def fixed_limits() -> Limits:
    return Limits(
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


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Cli]:
    """A function that runs `moesaic ARGUMENTS`, on one thread and without measuring the machine."""
    import torch

    from moesaic.cli.main import main

    monkeypatch.setattr("moesaic.train.loop.measure_limits", lambda **_: fixed_limits())
    monkeypatch.setattr("moesaic.train.loop.tune_allocator", lambda: None)
    threads, level, handlers = torch.get_num_threads(), logger.level, list(logger.handlers)
    torch.set_num_threads(1)

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
    torch.set_num_threads(threads)
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
    import torch

    from moesaic.train import loop

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
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "measure_limits", lambda **_: fixed_limits())
        patch.setattr(loop, "tune_allocator", lambda: None)
        patch.setattr(loop, "write_plots", lambda run_folder: [])
        loop.train(config, folder)
    torch.set_num_threads(threads)
    return folder
