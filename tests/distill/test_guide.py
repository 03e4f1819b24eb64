"""docs/guides/distill.md: its commands make students, its example runs."""

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer

from moesaic.cli import distill as verb
from moesaic.cli.main import main
from moesaic.config.train import TrainConfig
from moesaic.train.loop import train

GUIDE = (Path(__file__).parents[2] / "docs" / "guides" / "distill.md").read_text(encoding="utf-8")


@pytest.fixture
def quickstart(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folders that the guide starts from, with a run of eight layers."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_data, tmp_path / "runs" / "quickstart-data")
    values: dict[str, Any] = {
        "model": {
            "vocab_size": 320, "hidden_size": 16, "num_layers": 8, "num_heads": 2, "max_positions": 32,
            "moe": {"num_experts": [4, 4, 4, 8], "every": 2, "residual": "sum"},
        },
        "data": {"path": "runs/quickstart-data", "sequence_length": 16}, "tokens": 64, "batch_size": 4,
        "evaluation": {"sequences": 4},
    }  # fmt: skip
    train(TrainConfig.from_dict(values), "runs/quickstart")


def test_the_commands_make_students(quickstart: None, monkeypatch: pytest.MonkeyPatch) -> None:
    configs: list[TrainConfig] = []

    def keep(config: TrainConfig, *arguments: Any, **options: Any) -> None:
        configs.append(config)
        raise typer.Exit

    monkeypatch.setattr("moesaic.distill.run.make_trainer", keep)
    monkeypatch.setattr(verb, "_write_cache", lambda *_, **__: None)
    commands = [shlex.split(line) for line in re.findall(r"^    moesaic (distill .*)$", GUIDE, re.M)]
    assert len(commands) >= 4
    for command in commands:
        with pytest.raises(SystemExit) as ending:
            main(command)
        assert not ending.value.code, command
    assert len(configs) == len(commands)
    assert [config.model.num_layers for config in configs] == [7, 6, 7, 7]
    assert [config.data.fixed_windows for config in configs] == [False, False, True, True]


def test_the_example_runs(quickstart: None, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE, re.S)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["config"].model.num_layers == 6
    assert 0.5 < float(capsys.readouterr().out.split()[-1]) < 2
