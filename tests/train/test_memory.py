"""A model whose training state the device cannot hold is refused before anything is allocated; others never are."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moesaic.config.load import load_train_config
from moesaic.config.train import TrainConfig
from moesaic.errors import ConfigError
from moesaic.parallel.world import World
from moesaic.plan.cost import least_training_bytes
from moesaic.train import loop, memory
from moesaic.train.loop import Trainer
from moesaic.train.memory import check_memory

CPU = torch.device("cpu")
GIB = 1 << 30


def config_of(preset: str, *assignments: str) -> TrainConfig:
    return load_train_config(preset, ["data.path=x", *assignments])


def test_a_model_that_cannot_fit_is_told_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_obtainable_bytes", lambda device: 24 * GIB)
    config = config_of("pr-moe-350m-32-64")
    with pytest.raises(ConfigError) as caught:
        check_memory(config, CPU)
    message = str(caught.value)
    assert message.startswith("the model (4.") and "cpu has 24.0 GiB available" in message
    assert message.count(";") >= 2 and message.endswith(".")
    (counts,) = re.findall(r"--set (model\.moe\.num_experts=\S+),", message)
    check_memory(config_of("pr-moe-350m-32-64", counts), CPU)
    assert "muon" not in message  # would not be enough


def test_of_a_dense_model_the_remedy_names_no_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("dense-1.3b")
    monkeypatch.setattr(memory, "_obtainable_bytes", lambda device: 18 * GIB)
    with pytest.raises(ConfigError, match=r"optimizer\.name=muon") as caught:
        check_memory(config, CPU)
    assert "num_experts" not in str(caught.value)
    check_memory(config_of("dense-1.3b", "optimizer.name=muon"), CPU)


def test_processes_share_a_machine_and_the_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 4.2 billion parameters, most of them experts', 2 of 8 processes here hold a good quarter."""
    config = config_of("pr-moe-350m-32-64")
    alone = least_training_bytes(config.model, optimizer="adamw")
    two = World(size=8, local_size=2)
    monkeypatch.setattr(memory, "_obtainable_bytes", lambda device: alone / 2)
    check_memory(config, CPU, two)
    check_memory(config, torch.device("cuda"), two)
    with pytest.raises(ConfigError, match=r"to train in the 8 processes here and cpu has"):
        check_memory(config, CPU, World(size=8, local_size=8))
    whole = config_of("pr-moe-350m-32-64", "parallel.expert_degree=1")
    with pytest.raises(ConfigError, match="in the 2 processes here"):
        check_memory(whole, CPU, two)
    with pytest.raises(ConfigError, match="to train and cuda has"):
        check_memory(whole, torch.device("cuda"), two)


@pytest.mark.parametrize(
    "changes", [{"num_experts": 64, "top_k": 64}, {"num_experts": 8, "router": {"num_groups": 8}}, {"num_experts": 1}]
)
def test_where_no_halving_is_possible_there_is_still_an_answer(
    make_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch, changes: dict[str, object]
) -> None:
    monkeypatch.setattr(memory, "_obtainable_bytes", lambda device: 1.0)
    with pytest.raises(ConfigError, match="a smaller model"):
        check_memory(make_config("pr-moe", model={"moe": changes}), CPU)


def test_a_trainer_asks_before_it_allocates(
    make_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(memory, "_obtainable_bytes", lambda device: 1000.0)
    monkeypatch.setattr(loop, "Transformer", None)
    with pytest.raises(ConfigError, match=r"0\.98 KiB available"):
        Trainer(make_config(), tmp_path / "run", device="cpu", resume=False, display=None)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("model", ["dense", "pr-moe"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_estimate_is_at_most_what_a_step_holds(
    make_config: Callable[..., TrainConfig], tmp_path: Path, model: str, optimizer: str
) -> None:
    config = make_config(model, optimizer={"name": optimizer})
    trainer = Trainer(config, tmp_path / "run", device="cpu", resume=False, display=None)
    trainer.train_step()
    weights = sum(each.numel() for each in trainer.model.parameters())
    moments = sum(each.numel() for each in trainer.optimizers.named_state().values() if each.dim())
    estimate = least_training_bytes(config.model, optimizer=optimizer)
    assert 0.9 * 4 * (2 * weights + moments) < estimate <= 4 * (2 * weights + moments)


def test_memory_of_this_process_and_swap_count_and_an_unknown_system_refuses_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "available_memory_bytes", lambda device=None: 0)
    texts = {"/proc/self/status": "VmRSS:\t  1000 kB\n", "/proc/meminfo": "SwapFree:  24 kB\n"}
    monkeypatch.setattr(Path, "read_text", lambda path: texts[str(path)])
    assert memory._obtainable_bytes(CPU) == 1024 << 10
    monkeypatch.setattr(Path, "read_text", lambda path: (_ for _ in ()).throw(FileNotFoundError))
    assert memory._obtainable_bytes(CPU) == math.inf
