import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moesaic.config.train import TrainConfig
from moesaic.convert.upcycle import REPORT_NAME


@pytest.fixture(scope="module")
def dense_run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense run of four layers that nobody has trained."""
    from moesaic.checkpoint.store import save_checkpoint
    from moesaic.config.load import write_config
    from moesaic.data.shards import ShardSet
    from moesaic.model.transformer import Transformer

    folder = tmp_path_factory.mktemp("dense") / "run"
    folder.mkdir()
    model = {"vocab_size": 320, "hidden_size": 16, "num_layers": 4, "num_heads": 2, "max_positions": 64}
    config = TrainConfig.from_dict(
        {"model": model, "data": {"path": str(tiny_data), "sequence_length": 16}, "tokens": 256, "batch_size": 4}
    )
    write_config(config, folder / "config.yaml")
    ShardSet.open(tiny_data).load_tokenizer().save(folder)
    save_checkpoint(
        folder, 3, model=dict(Transformer(config.model).initialize(0).state_dict()), optimizer={}, metadata={}
    )
    return folder


def test_the_table_the_json_and_the_file_say_the_same(cli: Any, dense_run: Path, tmp_path: Path) -> None:
    options = ["--experts", "4,8", "--layers", "1,3", "--residual", "--top-k", "2", "--granularity", "2", "--seed", "5"]
    result = cli("convert", "upcycle", dense_run, tmp_path / "a", *options, "--json")
    assert result.status == 0, result.err
    values = json.loads(result.out)
    assert values.pop("output") == str(tmp_path / "a")
    assert values == json.loads((tmp_path / "a" / REPORT_NAME).read_text())
    assert (values["layers"], values["num_experts"], values["top_k"]) == ([1, 3], [4, 8], 2)
    assert (values["residual"], values["granularity"], values["noise"], values["seed"]) == (True, 2, 0.01, 5)
    assert values["max_logit_difference"] == 0.0
    shown = cli("convert", "upcycle", f"{dense_run}@3", tmp_path / "b", *options).out
    for text in ("layers 1, 3: 4, 8 experts of 32, top-2 beside the MLP, noise 0.01", "on a prompt: 0\n", "active per"):
        assert text in shown, text
    inspected = json.loads(cli("inspect", tmp_path / "a", "--json").out)
    assert inspected["parameters"] == values["parameters_after"]


def test_top_1_without_the_mlp_says_what_it_does(cli: Any, dense_run: Path, tmp_path: Path) -> None:
    shown = cli("convert", "upcycle", dense_run, tmp_path / "a", "--experts", "4").out
    assert "layers 1, 3: 4 experts of 64, top-1, noise 0" in shown
    assert "times the routing probability" in shown and "on a prompt: 0\n" not in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}-none", "{out}", "--experts", "4"], "CheckpointError: "),
        (["{run}", "{run}", "--experts", "4"], "ConfigError: "),
        (["{run}", "{out}", "--experts", "four"], "ConfigError: --experts (four) is not a list of integers"),
        (["{run}", "{out}", "--experts", "4", "--layers", "1-3"], "ConfigError: --layers (1-3) is not a list"),
        (["{run}", "{out}", "--experts", "4", "--layers", "1", "--every", "2"], "ConfigError: layers (1) and every"),
        (["{run}", "{out}", "--experts", "8,2", "--layers", "3,1"], "ConfigError: moe.layers ([3, 1]) does not rise"),
        (["{run}", "{out}", "--experts", "4", "--granularity", "2"], "ConfigError: granularity (2)"),
    ],
)
def test_a_mistake_ends_with_status_2_and_a_message_in_three_parts(
    cli: Any, dense_run: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    out = tmp_path / "out"
    result = cli("convert", "upcycle", *(argument.format(run=dense_run, out=out) for argument in arguments))
    assert result.status == 2
    assert message in result.err and "Traceback" not in result.err and result.err.count(";") >= 2
    assert result.out == "" and not out.exists()


def test_it_is_trained_from_and_not_resumed(cli: Any, dense_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cli("convert", "upcycle", dense_run, out, "--experts", "4", "--residual").status == 0
    resumed = cli("train", out, "--output", out, "--resume")
    assert resumed.status == 2 and f"moesaic train {out} --output NEW" in resumed.err
    trained = cli("train", out, "--output", tmp_path / "new", "--set", "tokens=128", "--json")
    assert json.loads(trained.out)["step"] == 2
    (start,) = json.loads((tmp_path / "new" / "run.json").read_text())["starts"]
    assert (start["init_from"]["run"], start["init_from"]["step"]) == (str(out), 0)


def test_help_comes_without_torch(cli: Any) -> None:
    shown = cli("convert", "upcycle", "--help")
    assert shown.status == 0 and "Example: moesaic convert upcycle" in shown.out
    code = """
import sys
from moesaic.cli.main import main
try:
    main(["convert", "upcycle", "--help"])
finally:
    assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_commands_of_the_guide_work(
    cli: Any, dense_run: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "guides" / "upcycle.md").read_text(encoding="utf-8")
    for shown, executed in {"tokens=20e6": "tokens=2000", "warmup_tokens=500e3": "warmup_tokens=100"}.items():
        assert shown in guide
        guide = guide.replace(shown, executed)
    commands = [shlex.split(line)[1:] for line in guide.splitlines() if line.startswith("    moesaic ")]
    assert len(commands) >= 5
    monkeypatch.chdir(tmp_path)
    shutil.copytree(dense_run, "runs/dense")
    Path("data").mkdir()
    Path("data/mine").symlink_to(tiny_data)
    for command in commands:
        result = cli(*command)
        assert result.status == 0, (command, result.err)
