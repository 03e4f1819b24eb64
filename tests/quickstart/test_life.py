"""The settings of `moesaic quickstart`; tests/architecture/test_readme.py runs it."""

from pathlib import Path

from moesaic.config.load import load_train_config
from moesaic.quickstart.life import PRESET, quickstart_config


def test_the_folder_may_have_any_name(tmp_path: Path) -> None:
    folder = tmp_path / "d 😀: é"
    assert quickstart_config(folder).data.path == str(folder)


def test_short_changes_the_length_and_not_the_model(tmp_path: Path) -> None:
    short, full = quickstart_config(tmp_path, short=True), quickstart_config(tmp_path)
    assert short.model == full.model == load_train_config(PRESET, [f"data.path={tmp_path}"]).model
    assert short.tokens < full.tokens / 20
    assert full.model.num_layers == 8
