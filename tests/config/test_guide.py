"""docs/guides/configuration.md names every key with its default and every preset, and its examples load."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic_core import PydanticUndefined

from moesaic.config.base import Config
from moesaic.config.distill import DistillConfig
from moesaic.config.load import load_model_config, load_train_config
from moesaic.config.model import (
    CapacityConfig,
    LatentAttentionConfig,
    ModelConfig,
    MoEConfig,
    RopeScalingConfig,
    RouterConfig,
)
from moesaic.config.presets import preset_names
from moesaic.config.serve import Grammar, Sampling
from moesaic.config.train import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainConfig,
)

GUIDE = (Path(__file__).parents[2] / "docs" / "guides" / "configuration.md").read_text(encoding="utf-8")
SECTIONS: dict[str, type[Config]] = {
    "Top level": TrainConfig,
    "`model`": ModelConfig,
    "`model.rope_scaling`": RopeScalingConfig,
    "`model.latent_attention`": LatentAttentionConfig,
    "`model.moe`": MoEConfig,
    "`model.moe.router`": RouterConfig,
    "`model.moe.capacity`": CapacityConfig,
    "`data`": DataConfig,
    "`optimizer`": OptimizerConfig,
    "`schedule`": ScheduleConfig,
    "`evaluation`": EvaluationConfig,
    "`checkpoint`": CheckpointConfig,
    "`parallel`": ParallelConfig,
    "`distill`": DistillConfig,
    "`Sampling`": Sampling,
    "`Grammar`": Grammar,
}


def written(default: Any) -> str:
    if default is PydanticUndefined:
        return "required"
    if isinstance(default, Config):
        return "defaults"
    if default is None or isinstance(default, bool):
        return f"`{json.dumps(default)}`"
    if default in ((), "", {}):
        return f"`{json.dumps(default)}`"
    return f"`{default}`"


@pytest.mark.parametrize("title", SECTIONS)
def test_the_tables_have_every_key_with_its_default_in_order(title: str) -> None:
    section = re.search(rf"^### {re.escape(title)}\n(.*?)(?=^### |\Z)", GUIDE, re.M | re.S)
    assert section, title
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (?:.*?) ?\|$", section[1], re.M)
    assert rows == [
        (name, written(field.get_default(call_default_factory=True)))
        for name, field in SECTIONS[title].model_fields.items()
    ]


def test_every_preset_is_listed() -> None:
    start = GUIDE.split("## Write a file")[0]
    assert {name for name in preset_names() if f"`{name}`" not in start} == set()


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", GUIDE, re.S))
def test_the_files_load(block: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(block)
    config = load_train_config(path)
    assert load_train_config(path, ["tokens=5e8"]).tokens == 500_000_000
    assert config.data.path == "data/mine"


def test_the_assignments_load() -> None:
    commands = re.findall(r"^moesaic (?:inspect|train) (\S+)(.*)$", GUIDE, re.M)
    assert len(commands) >= 5
    for source, options in commands:
        assignments = [quoted or plain for quoted, plain in re.findall(r'--set (?:"(.*?)"|(\S+))', options)]
        load_model_config(source, assignments)


def test_the_python_example_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE, re.S)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["longer"].tokens == 8_000_000
