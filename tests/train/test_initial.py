"""Training from another run: its weights and nothing else of it, and only where model and tokens are the same."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.checkpoint.store import list_checkpoints, load_tensors, resolve_checkpoint, save_checkpoint
from moesaic.config.load import load_train_config, run_folder_of
from moesaic.config.train import TrainConfig
from moesaic.data.prepare import prepare
from moesaic.errors import CheckpointError, ConfigError, DataError
from moesaic.model.load import load_run_config
from moesaic.train.loop import Trainer, train

MakeConfig = Callable[..., TrainConfig]


@pytest.fixture(scope="module")
def trained(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "first"
    train(make_config("pr-moe", steps=8), folder)
    return folder


@pytest.fixture
def first(trained: Path, tmp_path: Path) -> Path:
    """A run of eight steps, for a test to do with what it likes."""
    return shutil.copytree(trained, tmp_path / "first")


def trainer_of(config: TrainConfig, run_folder: Path, *, resume: bool = False) -> Trainer:
    return Trainer(config, run_folder, device="cpu", resume=resume, display=None)


@pytest.mark.parametrize("step", [None, 4, 8])
def test_it_starts_at_step_0_with_the_weights_and_a_fresh_optimizer(
    first: Path, tmp_path: Path, step: int | None
) -> None:
    run = str(first) if step is None else f"{first}@{step}"
    trainer = trainer_of(load_train_config(run), tmp_path / "second")
    info = resolve_checkpoint(run)
    wanted = load_tensors(info, "model")
    own = trainer.model.state_dict()
    assert own.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(own[name], tensor), name
    assert trainer.step == 0 and trainer.optimizers.named_state() == {}
    assert load_run_config(tmp_path / "second").init_from == run
    (start,) = json.loads((tmp_path / "second" / "run.json").read_text())["starts"]
    digest = info.files["model.safetensors"]["sha256"]
    assert start["init_from"] == {"run": str(first), "step": info.step, "model_sha256": digest}


def test_the_config_is_the_runs_but_for_what_is_set(first: Path) -> None:
    config = load_train_config(f"{first}/", ["seed=5", "model.dropout=0.3"])
    before = load_run_config(first)
    assert config == before.replace(seed=5, init_from=str(first), model=before.model.replace(dropout=0.3))
    assert load_train_config(first, ["init_from=null"]) == before
    assert run_folder_of(f"{first}@8") == first
    assert run_folder_of(first / "config.yaml") is run_folder_of("dense-tiny") is run_folder_of("absent@8") is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_other_dtypes_become_fp32(first: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    stored = {name: tensor.to(dtype) for name, tensor in load_tensors(resolve_checkpoint(first), "model").items()}
    save_checkpoint(first, 99, model=stored, optimizer={}, metadata={})
    trainer = trainer_of(load_train_config(f"{first}@99"), tmp_path / "second")
    for name, tensor in trainer.model.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, stored[name].float()), name


def test_resuming_needs_the_first_run_no_more(first: Path, tmp_path: Path) -> None:
    (first / "chat_template.jinja").write_text("{{ messages }}")
    config = load_train_config(first, ["tokens=512"])
    train(config.replace(tokens=256), tmp_path / "second")
    shutil.rmtree(first)
    train(config, tmp_path / "second", resume=True)
    assert list_checkpoints(tmp_path / "second")[-1].step == 8
    starts = json.loads((tmp_path / "second" / "run.json").read_text())["starts"]
    assert starts[0]["init_from"]["run"] == str(first) and starts[1]["init_from"] is None
    assert (tmp_path / "second" / "chat_template.jinja").read_text() == "{{ messages }}"
    with pytest.raises(CheckpointError, match="does not exist"):
        train(config, tmp_path / "third")


def test_a_resumed_one_equals_the_unbroken_one(first: Path, tmp_path: Path) -> None:
    # A schedule of its own length: a shorter run would have decayed sooner.
    config = load_train_config(first, ["tokens=512", "schedule.decay_tokens=512"])
    train(config, tmp_path / "unbroken")
    train(config.replace(tokens=256), tmp_path / "second")
    train(config, tmp_path / "second", resume=True)
    one, other = (list_checkpoints(tmp_path / name)[-1] for name in ("unbroken", "second"))
    assert one.step == other.step == 8 and one.files == other.files


def test_what_only_training_reads_may_differ(first: Path, tmp_path: Path) -> None:
    changes = [
        "model.dropout=0.2",
        "model.max_positions=64",
        "model.moe.capacity.factor=2",
        "model.moe.router.balance_loss=0.1",
        "model.moe.router.noise=none",
        "tokens=192",
    ]
    assert train(load_train_config(first, changes), tmp_path / "second").step == 3


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("model.moe.top_k=1", r"model\.moe\.top_k \(1, there 2\)"),
        ("model.rope_theta=500", r"model\.rope_theta \(500\.0, there 10000\.0\)"),
        ("model.moe=null", r"model\.moe\.capacity\.drop_policy|model\.moe\.every \(None, there 1\)"),
        ("model.moe.output_scale=true", r"model\.moe\.output_scale \(True, there False\)"),
    ],
)
def test_another_model_is_refused_before_a_folder_exists(first: Path, tmp_path: Path, change: str, named: str) -> None:
    with pytest.raises(ConfigError, match=f"(?:{named}).*: not as in .*config.yaml; .*must be the same; .*null"):
        trainer_of(load_train_config(first, [change]), tmp_path / "second")
    assert not (tmp_path / "second").exists()


def test_text_of_another_tokenizer_is_refused_and_that_of_the_run_is_not(first: Path, tmp_path: Path) -> None:
    source = tmp_path / "other.txt"
    source.write_text("Other words in another order. " * 400)
    prepare([source], tmp_path / "wrong", vocab_size=260, num_workers=1)
    config = load_train_config(first, ["tokens=192", f"data.path={tmp_path / 'wrong'}"])
    remedy = rf"; prepare .*moesaic prepare SOURCE --output DIR --tokenizer {first}"
    with pytest.raises(DataError, match=rf"wrong was prepared with another tokenizer \(vocabulary 260.*{remedy}"):
        trainer_of(config, tmp_path / "second")
    assert not (tmp_path / "second").exists()
    prepare([source], tmp_path / "right", tokenizer=first, num_workers=1)
    config = load_train_config(first, ["tokens=192", f"data.path={tmp_path / 'right'}"])
    assert train(config, tmp_path / "second").step == 3


@pytest.mark.parametrize("path", ["", "somewhere/else"])
def test_a_run_whose_data_is_not_here_asks_for_data(first: Path, tmp_path: Path, path: str) -> None:
    config = load_train_config(f"{first}@8", [f"data.path='{path}'"])
    given = r"data.path \(somewhere/else\) is no folder here" if path else "data.path is empty"
    with pytest.raises(DataError, match=rf"{given}; .*; name it with --data DIR .*--tokenizer {first}`"):
        trainer_of(config, tmp_path / "second")


def test_no_data_at_all_asks_for_data(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.path is empty; .*; name it with --data DIR.*--output DIR` writes"):
        trainer_of(make_config(data={"path": ""}), tmp_path / "run")


def test_weights_without_an_optimizers_state_are_not_resumed(first: Path, tmp_path: Path) -> None:
    converted = tmp_path / "converted"
    shutil.copytree(first, converted)
    for info in list_checkpoints(converted):
        manifest: dict[str, Any] = json.loads((info.path / "manifest.json").read_text())
        del manifest["files"]["optimizer.safetensors"]
        (info.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=rf"no optimizer's state; .*; .*moesaic train {converted} --output NEW"):
        train(load_run_config(converted), converted, resume=True)
    assert trainer_of(load_train_config(converted), tmp_path / "second").step == 0
