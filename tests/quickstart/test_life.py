"""The settings of `moesaic quickstart`; tests/architecture/test_readme.py runs it."""

from pathlib import Path

import pytest

from moesaic.config.load import load_train_config, write_config
from moesaic.config.train import TrainConfig
from moesaic.errors import ConfigError
from moesaic.quickstart import life
from moesaic.quickstart.life import PRESET, quickstart, quickstart_config


def test_the_folder_may_have_any_name(tmp_path: Path) -> None:
    folder = tmp_path / "d 😀: é"
    assert quickstart_config(folder).data.path == str(folder)


def test_short_changes_the_length_and_not_the_model(tmp_path: Path) -> None:
    short, full = quickstart_config(tmp_path, short=True), quickstart_config(tmp_path)
    assert short.model == full.model == load_train_config(PRESET, [f"data.path={tmp_path}"]).model
    assert short.tokens < full.tokens / 20
    assert full.model.num_layers == 8


def test_another_run_is_refused_whatever_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = {"vocab_size": 320, "hidden_size": 32, "num_layers": 1, "num_heads": 2, "max_positions": 64}
    config = {"model": model, "data": {"path": "none", "sequence_length": 16}, "tokens": 1024, "batch_size": 4}
    write_config(TrainConfig.from_dict(config), tmp_path / "config.yaml")  # with quickstart's data it is no config
    ours = quickstart_config(tmp_path / "data", short=True)
    with pytest.raises(ConfigError, match="holds another run"):
        life._train(tmp_path, ours, say=lambda _: None, device="cpu", show=None)


def test_a_folder_without_a_name_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"has no name, .*--output"):
        quickstart("/")


def test_the_current_folder_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Path] = []

    def prepare(sources: object, output: Path, **_: object) -> None:
        found.append(output)
        raise KeyboardInterrupt

    (tmp_path / "own").mkdir()
    monkeypatch.chdir(tmp_path / "own")
    monkeypatch.setattr(life, "prepare", prepare)
    with pytest.raises(KeyboardInterrupt):
        quickstart(".")
    assert [path.resolve() for path in found] == [(tmp_path / "own-data").resolve()]
