import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moesaic.config.train import TrainConfig
from moesaic.convert.quantize import REPORT_NAME


@pytest.fixture(scope="module")
def wide_run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps, of a PR-MoE wide enough for groups of 32."""
    import torch

    from moesaic.checkpoint.store import save_checkpoint
    from moesaic.config.load import write_config
    from moesaic.data.shards import ShardSet
    from moesaic.model.transformer import Transformer

    folder = tmp_path_factory.mktemp("wide") / "run"
    folder.mkdir()
    config = TrainConfig.from_dict(
        {
            "model": {
                "vocab_size": 320,
                "hidden_size": 64,
                "num_layers": 2,
                "num_heads": 2,
                "intermediate_size": 64,
                "max_positions": 64,
                "init_std": 0.1,
                "moe": {"num_experts": [4, 8], "every": 1, "residual": "sum"},
            },
            "data": {"path": str(tiny_data), "sequence_length": 32},
            "tokens": 256,
            "batch_size": 4,
        }
    )
    write_config(config, folder / "config.yaml")
    ShardSet.open(tiny_data).load_tokenizer().save(folder)
    model = dict(Transformer(config.model).initialize(0).state_dict())
    save_checkpoint(folder, 3, model=model, optimizer={"none": torch.zeros(1)}, metadata={"validation_loss": 5.0})
    return folder


def test_the_tables_the_json_and_the_file_say_the_same(cli: Any, wide_run: Path, tmp_path: Path) -> None:
    options = ["--experts", "int4", "--group-size", "32", "--limit-tokens", "300", "--calibrate", "none"]
    result = cli("convert", "quantize", wide_run, tmp_path / "a", *options, "--json")
    assert result.status == 0, result.err
    values = json.loads(result.out)
    assert values.pop("output") == str(tmp_path / "a")
    assert values == json.loads((tmp_path / "a" / REPORT_NAME).read_text())
    assert (values["experts"], values["rest"], values["group_size"]) == ("int4", "int8", 32)
    shown = cli("convert", "quantize", wide_run, tmp_path / "b", *options).out
    assert json.loads((tmp_path / "b" / REPORT_NAME).read_text()) == values
    for text in ("int4 by 32", "attention", f"{values['kl']:.5f}", f"x {values['perplexity_ratio']:.4f}"):
        assert text in shown, text
    assert "rounded to nearest" in " ".join(shown.split()) and "calibrated" not in shown  # a long path wraps the line


def test_int4_is_calibrated_on_the_runs_own_data_unless_told_otherwise(
    cli: Any, wide_run: Path, tmp_path: Path
) -> None:
    options = ["--experts", "int4", "--limit-tokens", "100", "--calibration-tokens", "320"]
    result = cli("convert", "quantize", wide_run, tmp_path / "out", *options, "--json")
    values = json.loads(result.out)
    assert values["calibration_tokens"] == 320 and values["calibration"].endswith("shards")
    assert "Calibrating on" in result.err
    plain = cli("convert", "quantize", wide_run, tmp_path / "int8", "--limit-tokens", "100", "--json")
    assert json.loads(plain.out)["calibration"] is None


def test_what_comes_out_is_a_run_for_every_verb_but_train(cli: Any, wide_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cli("convert", "quantize", wide_run, out, "--experts", "int4", "--rest", "int4", "--force").status == 0
    generated = json.loads(
        cli("generate", out, "--prompt", "The License", "--max-new-tokens", "5", "--temperature", "0", "--json").out
    )
    assert len(generated["token_ids"]) == 5
    inspected = json.loads(cli("inspect", out, "--json").out)
    (checkpoint,) = inspected["checkpoints"]
    assert checkpoint["quantization"] == "experts int4, rest int4" and checkpoint["step"] == 3
    assert checkpoint["bytes"] < json.loads(cli("inspect", wide_run, "--json").out)["checkpoints"][0]["bytes"] / 3
    shown = " ".join(cli("inspect", out).out.split())
    assert f"quantised from {wide_run}, step 3: experts int4, rest int4" in shown and "not trained here" in shown
    report = json.loads((out / REPORT_NAME).read_text())
    evaluated = json.loads(cli("evaluate", out, "--text", report["text"], "--json").out)
    assert evaluated["loss"] == report["quantized"]["loss"]
    resumed = cli("train", out / "config.yaml", "--output", out, "--resume")
    assert resumed.status == 2
    assert f"CheckpointError: {out} is quantised (experts int4, rest int4); training requires" in resumed.err
    assert f"resume the run that it was made from ({wide_run})" in resumed.err and "Traceback" not in resumed.err


@pytest.mark.parametrize("record", [None, "int8", {}])
def test_a_run_that_does_not_say_how_it_is_quantised_is_not_shown(
    cli: Any, wide_run: Path, tmp_path: Path, record: Any
) -> None:
    run = tmp_path / "run"
    shutil.copytree(wide_run, run)
    (path,) = run.glob("checkpoints/*/manifest.json")
    manifest = json.loads(path.read_text())
    manifest["metadata"]["quantization"] = record
    path.write_text(json.dumps(manifest))
    for options in ([], ["--json"]):
        refused = cli("inspect", run, *options)
        assert refused.status == 2 and "Traceback" not in refused.err
        assert "does not say how its matrices are quantised" in refused.err


def test_too_great_a_loss_is_refused_unless_forced(cli: Any, wide_run: Path, tmp_path: Path) -> None:
    command = ["convert", "quantize", wide_run, tmp_path / "deep" / "out", "--limit-tokens", "100", "--max-kl", "1e-9"]
    refused = cli(*command)
    assert refused.status == 2 and refused.out == ""
    assert "ConversionError: the quantised model's perplexity is" in refused.err and "--force" in refused.err
    assert not (tmp_path / "deep").exists()
    forced = cli(*command, "--force")
    assert forced.status == 0 and "written all the same" in forced.err and (tmp_path / "deep" / "out").is_dir()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}", "{run}"], "ConfigError: "),
        (["{run}-none", "{out}"], "CheckpointError: "),
        (["{run}", "{out}", "--experts", "int3"], "ConfigError: experts ('int3')"),
        (["{run}", "{out}", "--text", "absent.txt"], "DataError: absent.txt"),
        (["{run}", "{out}", "--calibrate", "absent.txt"], "DataError: absent.txt"),
        (["{run}", "{out}", "--group-size", "32"], "ConfigError: group_size (32)"),
    ],
)
def test_a_mistake_ends_with_status_2_and_a_message_in_three_parts(
    cli: Any, wide_run: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    out = tmp_path / "out"
    result = cli("convert", "quantize", *(argument.format(run=wide_run, out=out) for argument in arguments))
    assert result.status == 2
    assert message in result.err and "Traceback" not in result.err and result.err.count(";") >= 2
    assert result.out == "" and not out.exists()


def test_the_verbs_have_help_without_torch(cli: Any) -> None:
    shown = cli("convert", "quantize", "--help")
    assert shown.status == 0 and "Example: moesaic convert quantize" in shown.out
    code = """
import sys
from moesaic.cli.main import main
try:
    main(["convert", "quantize", "--help"])
finally:
    assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_commands_of_the_guide_work(
    cli: Any, wide_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "guides" / "quantize.md").read_text(encoding="utf-8")
    commands = [shlex.split(line)[1:] for line in guide.splitlines() if line.startswith("    moesaic ")]
    assert len(commands) >= 6
    monkeypatch.chdir(tmp_path)
    for name in ("first", "gpt-oss-20b"):
        shutil.copytree(wide_run, f"runs/{name}")
    Path("book.txt").write_text("The License shall prevail over the Work.\n" * 80, encoding="utf-8")
    for command in commands:
        result = cli(*command)
        assert result.status == 0, (command, result.err)
