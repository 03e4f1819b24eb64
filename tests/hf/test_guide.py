"""The guide's examples run, in order, on a small run."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moesaic.config.train import TrainConfig
from moesaic.train.loop import Trainer

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "transformers.md"


def test_the_examples_run(
    make_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    section = GUIDE.read_text(encoding="utf-8").split("## Use a model of ours in transformers\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(blocks) >= 4
    monkeypatch.chdir(tmp_path)
    config = make_config(model={"max_positions": 64, "dropout": 0.0, "moe": {"num_experts": 4, "residual": "sum"}})
    Trainer(config, Path("runs/small"), device="cpu", resume=False, display=None).run()
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    assert names["merged"] is names["model"]
