"""docs/guides/serve.md names every setting with its default and every endpoint; its examples load and run."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic_core import PydanticUndefined

from moesaic.config.base import Config
from moesaic.config.load import load_serve_config
from moesaic.config.serve import EngineConfig, OverloadConfig, ServerConfig, SpeculationConfig
from moesaic.config.train import TrainConfig
from moesaic.train.loop import Trainer

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "guides" / "serve.md").read_text(encoding="utf-8")


def written(default: Any) -> str:
    if default is PydanticUndefined:
        return "required"
    default = list(default) if isinstance(default, tuple) else default
    return f"`{json.dumps(default) if default is None or isinstance(default, bool) else default}`"


@pytest.mark.parametrize(
    ("title", "kind"), [("server", ServerConfig), ("engine", EngineConfig), ("overload", OverloadConfig)]
)
def test_the_tables_have_every_key_with_its_default_in_order(title: str, kind: type[Config]) -> None:
    section = re.search(rf"^### `{title}`\n(.*?)(?=^##|\Z)", GUIDE, re.M | re.S)
    assert section
    rows = re.findall(r"^\| `(\w+)` \| (`.+?`|required) \|", section[1], re.M)
    assert rows == [(name, written(field.default)) for name, field in kind.model_fields.items()]


def test_the_file_and_the_assignments_load(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", GUIDE, re.S)
    file = tmp_path / "serve.yaml"
    file.write_text(block)
    assignments = re.findall(r"--set (\S+)", GUIDE)
    assert len(assignments) >= 2
    config = load_serve_config(file, assignments)
    assert config.engine.max_sequences == 16 and config.server.host == "0.0.0.0"


def test_every_endpoint_and_metric_is_named() -> None:
    app = pytest.importorskip("moesaic.serve.server.app", reason="the server is FastAPI's (extra `serve`)")
    source = Path(app.__file__).read_text(encoding="utf-8")
    for path in re.findall(r'@router\.(?:get|post)\("(/[^"{]*[a-z])"', source):
        assert f"{path}`" in GUIDE, path
    metrics = (Path(app.__file__).parent / "metrics.py").read_text(encoding="utf-8")
    names = re.findall(r'^            \("(\w+)", |"moesaic_(\w+)"|= _histogram\("(\w+)"', metrics, re.M)
    assert {"running", "expert_hit_rate", "time_to_first_token"} <= {"".join(each) for each in names}
    for name in map("".join, names):
        assert f"`moesaic_{name}" in GUIDE, name


def test_the_python_example_runs(
    make_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    code = re.findall(r"```python\n(.*?)```", GUIDE, re.S)[-1]
    monkeypatch.chdir(tmp_path)
    config = make_config("pr-moe", steps=4, model={"max_positions": 64, "dropout": 0.0})
    Trainer(config, Path("runs/first"), device="cpu", resume=False, display=None).run()
    exec(code, {})
    assert capsys.readouterr().out


def test_the_drafts_settings_are_named_with_their_bounds() -> None:
    section = GUIDE.partition("### Drafts")[2].partition("###")[0]
    schema = SpeculationConfig.model_json_schema()["properties"]
    for name in schema:
        assert re.search(rf"\b{name}\b", section), name
    assert f"`max_tokens` ({schema['max_tokens']['default']}, at most {schema['max_tokens']['maximum']})" in section


def test_the_pages_of_the_engine_run_one_behind_another(
    make_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    pytest.importorskip("xgrammar", reason="xgrammar compiles grammars (extra `structured`)")
    plain, with_grammar = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "serving.md").read_text("utf-8"), re.S)
    monkeypatch.chdir(tmp_path)
    config = make_config("pr-moe", steps=4, model={"max_positions": 96, "dropout": 0.0})
    Trainer(config, Path("runs/first"), device="cpu", resume=False, display=None).run()
    names: dict[str, Any] = {}
    exec(plain, names)
    assert capsys.readouterr().out
    exec(with_grammar, names)
    assert capsys.readouterr().out in ("yes", "no")
