import os
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.checkpoint.store import save_checkpoint
from moesaic.config.load import write_config
from moesaic.config.train import TrainConfig
from moesaic.data.shards import ShardSet
from moesaic.errors import CheckpointError, DataError, DeviceError
from moesaic.kernels import select
from moesaic.model.load import load_model_state, load_run, load_run_config
from moesaic.model.transformer import Transformer


@pytest.fixture
def run(make_config: Any, tiny_data: Path, tmp_path: Path) -> Path:
    """A run folder of a PR-MoE with two checkpoints, of seeds 1 and 2; the first is the better one."""
    config: TrainConfig = make_config("pr-moe", precision="bf16")
    folder = tmp_path / "run"
    folder.mkdir()
    write_config(config, folder / "config.yaml")
    ShardSet.open(tiny_data).load_tokenizer().save(folder)
    for step in (1, 2):
        model = Transformer(config.model).initialize(step)
        for layer, block in enumerate(model.blocks):
            block.feed_forward.moe.router.score_correction_bias.fill_(step + layer)
        state = dict(model.state_dict())
        save_checkpoint(folder, step, model=state, optimizer={}, metadata={"validation_loss": float(step)})
    return folder


def test_a_run_becomes_the_model_that_was_saved(run: Path, make_config: Any) -> None:
    for name, step in ((str(run), 1), (f"{run}@2", 2)):
        loaded = load_run(name, device="cpu", pack=False)
        assert loaded.info.step == step and loaded.device.type == "cpu"
        assert loaded.config == make_config("pr-moe", precision="bf16")
        assert not loaded.model.training and loaded.model.compute_dtype is torch.bfloat16
        expected = Transformer(loaded.config.model).initialize(step)
        for key, parameter in loaded.model.named_parameters():
            assert torch.equal(parameter, expected.get_parameter(key)), key
        biases = [loaded.model.blocks[layer].feed_forward.moe.router.score_correction_bias for layer in (0, 1)]
        assert [float(bias[0]) for bias in biases] == [step, step + 1]  # buffers are loaded too
        assert loaded.tokenizer.vocab_size == 320


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_a_bf16_run_is_packed_where_the_cpu_kernels_are_in_use(run: Path, kernels: str) -> None:
    with select.forced(kernels) as selection:
        packed, plain = load_run(run, device="cpu"), load_run(run, device="cpu", pack=False)
        assert packed.model.is_packed == (selection.library is not None)
        assert not plain.model.is_packed and not packed.model.training
        tokens = torch.arange(12)[None]
        with torch.no_grad():
            logits, wanted = (model.logits(model(tokens).hidden) for model in (packed.model, plain.model))
        torch.testing.assert_close(logits, wanted, rtol=0.02, atol=0.02)  # bf16 roundings in other places


def test_a_name_that_is_no_utf8_is_refused(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"r\xff")
    try:
        run.rename(folder)
    except OSError:
        pytest.skip("this system's file names are UTF-8")
    with pytest.raises(CheckpointError, match="under a name in UTF-8; rename it"):
        load_run(folder, device="cpu", pack=False)


def test_a_folder_that_is_no_run_is_an_error(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"does not exist; .*; check the path"):
        load_run(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"has no config.yaml; .*; check the path"):
        load_run_config(tmp_path)
    (run / "config.yaml").rename(run / "elsewhere.yaml")
    with pytest.raises(CheckpointError, match=r"has no config.yaml"):
        load_run(run)
    (run / "elsewhere.yaml").rename(run / "config.yaml")
    (run / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="tokenizer"):
        load_run(run)
    with pytest.raises(DeviceError, match="tpu"):
        load_run(run, device="tpu")


def test_weights_of_another_model_are_refused_and_touch_nothing(run: Path, make_config: Any) -> None:
    loaded = load_run(run, pack=False)
    tensors = dict(loaded.model.state_dict())
    model = Transformer(loaded.config.model).initialize(5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wrong = [
        {name: value for name, value in tensors.items() if name != "embedding"},
        {**tensors, "extra": torch.zeros(1)},
        {**tensors, "embedding": torch.zeros(3, 3)},
    ]
    for values, named in zip(
        wrong, (r"missing \['embedding'\]", r"unknown \['extra'\]", r"other shapes \['emb"), strict=True
    ):
        with pytest.raises(CheckpointError, match=named + r".*; .*; use the config.yaml"):
            load_model_state(model, values, loaded.info)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
