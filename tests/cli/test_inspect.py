"""`moesaic inspect` shows presets, files and runs, in tables and in JSON, and imports torch only for runs."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from moesaic.cli.inspect import inspect, summarize_model
from moesaic.config.load import load_model_config, load_train_config, write_config
from moesaic.config.presets import preset_names
from moesaic.errors import CheckpointError, ConfigError
from moesaic.plan.cost import count_parameters, flops_per_token, memory
from moesaic.report.records import METRICS_FILE, EvaluationRecord, EventRecord, ExpertRecord, TrainRecord, to_line

NAME = "pr-moe-tiny-8-16"


def as_json(capsys: pytest.CaptureFixture[str], source: str, **options: Any) -> dict[str, Any]:
    inspect(source, as_json=True, **options)
    return json.loads(capsys.readouterr().out)


def train_record(step: int) -> TrainRecord:
    loads = tuple((1 / count,) * count for count in (8, 8, 8, 16))
    return TrainRecord(
        step=step,
        tokens=step * 4096,
        seconds=step * 1.0,
        loss=8.0 - step / 10,
        balance_loss=1.0,
        z_loss=0.0,
        learning_rate=1e-3,
        gradient_norm=1.0,
        tokens_per_second=4096.0,
        flops_per_second=1e11,
        share_of_peak=0.5,
        skipped_steps=0,
        moe=ExpertRecord(layers=(1, 3, 5, 7), load=loads, drop_rate=(0.0,) * 4, entropy=(0.9,) * 4),
    )


def write_checkpoint(run: Path, step: int, loss: float | None) -> None:
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    files = {
        "model.safetensors": {"bytes": 1 << 20, "sha256": "0"},
        "optimizer.safetensors": {"bytes": 1, "sha256": "0"},
    }
    metadata = {} if loss is None else {"validation_loss": loss}
    manifest = {"format_version": 1, "step": step, "files": files, "metadata": metadata}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    write_config(load_train_config(NAME, ["data.path=corpus"]), folder / "config.yaml")
    records: list[TrainRecord | EvaluationRecord | EventRecord] = [train_record(step) for step in (10, 20, 30)]
    for step, loss in ((10, 7.5), (20, 6.25), (30, 6.5)):
        records.append(EvaluationRecord(step=step, tokens=step * 4096, seconds=step * 1.0, loss=loss, sequences=4))
        write_checkpoint(folder, step, loss)
    records.append(EventRecord(step=30, message="resumed from step 20"))
    (folder / METRICS_FILE).write_text("".join(map(to_line, records)), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", preset_names())
def test_every_preset(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_model_config(name)
    values = as_json(capsys, name)
    count = count_parameters(config)
    assert values["source"] == name
    assert (values["parameters"], values["active_parameters"]) == (count.total, count.active)
    assert sum(values["parameters_by_part"].values()) == count.total
    assert values["context"] == config.max_positions
    assert values["flops_per_token"] == flops_per_token(config, context=config.max_positions)
    assert len(values["layers"]) == config.num_layers
    assert values["memory"]["weights_bytes"] == 2 * count.total
    inspect(name)
    assert name in capsys.readouterr().out


def test_the_context_is_stated_and_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert as_json(capsys, NAME, context=7)["flops_per_token"] == flops_per_token(load_model_config(NAME), context=7)
    inspect(NAME, context=7)
    assert "at a context of 7" in capsys.readouterr().out
    for context in (0, 1025):
        with pytest.raises(ConfigError, match=rf"context \({context}\)"):
            summarize_model(load_model_config(NAME), name=NAME, context=context)


def test_the_activations_are_those_of_the_training_config(capsys: pytest.CaptureFixture[str]) -> None:
    values = as_json(capsys, NAME, assignments=["micro_batch_size=4"])
    assert (values["micro_batch_size"], values["sequence_length"]) == (4, 256)
    expected = memory(load_model_config(NAME), micro_batch_size=4, sequence_length=256)
    assert values["memory"]["activation_bytes"] == expected.activation_bytes


def test_set_changes_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    values = as_json(capsys, NAME, assignments=["model.moe=null"])
    assert values["parameters"] == as_json(capsys, "dense-tiny")["parameters"]
    with pytest.raises(ConfigError, match="micro_batch_size"):
        inspect(NAME, ["micro_batch_size=7"])


def test_a_file_with_a_model_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.yaml"
    path.write_text("model: {vocab_size: 64, hidden_size: 16, num_layers: 2, num_heads: 2, max_positions: 32}\n")
    values = as_json(capsys, str(path))
    assert values["parameters"] == 64 * 16 + 2 * (4 * 16 * 16 + 3 * 16 * 64 + 2 * 16) + 16
    assert (values["micro_batch_size"], values["sequence_length"]) == (1, 32)


def test_a_run_shows_the_model_its_progress_and_its_checkpoints(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect(str(run))
    text = capsys.readouterr().out
    for part in ("16 experts", "resumed from step 20", "step-00000010", "step-00000030", "best", "last", "1.00 MiB"):
        assert part in text, part
    values = as_json(capsys, str(run))
    assert values["parameters"] == as_json(capsys, NAME)["parameters"]
    assert values["progress"]["step"] == 30
    assert values["total_tokens"] == 391 * 8 * 512  # 1,600,000, rounded up to whole steps
    assert values["checkpoint"] == 20, "a run means its best checkpoint"
    assert [(info["step"], info["is_best"]) for info in values["checkpoints"]] == [(10, False), (20, True), (30, False)]


def test_a_step_of_a_run_shows_the_run_up_to_there(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = as_json(capsys, f"{run}@10")
    assert values["checkpoint"] == 10 and values["progress"]["step"] == 10
    inspect(f"{run}@10")
    text = capsys.readouterr().out
    assert "up to step 10" in text and "this one" in text and "resumed" not in text
    with pytest.raises(CheckpointError, match="it has 10, 20, 30"):
        inspect(f"{run}@15")


def test_a_run_whose_path_holds_an_at_is_that_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also beside a run of the name before it."""
    other, own = tmp_path / "a", tmp_path / "a@b"
    other.mkdir()
    write_config(load_train_config("dense-tiny", ["data.path=corpus"]), other / "config.yaml")
    shutil.copytree(run, own)
    for source, step in ((f"{own}", 20), (f"{own}@10", 10)):
        values = as_json(capsys, source)
        assert values["checkpoint"] == step and values["parameters"] == as_json(capsys, str(run))["parameters"]


def test_a_run_that_has_just_begun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(load_train_config(NAME, ["data.path=corpus"]), tmp_path / "config.yaml")
    values = as_json(capsys, str(tmp_path))
    assert values["progress"] is None and values["checkpoint"] is None and values["checkpoints"] == []
    inspect(str(tmp_path))
    assert "no checkpoint yet" in capsys.readouterr().out


def test_what_is_no_source_is_refused(tmp_path: Path, run: Path) -> None:
    with pytest.raises(ConfigError, match=r"without config\.yaml"):
        inspect(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.gguf").write_text("GGUF")
    for foreign in (tmp_path, tmp_path / "model.gguf"):
        with pytest.raises(ConfigError, match=f"`moesaic convert import {foreign} RUN`"):
            inspect(str(foreign))
    with pytest.raises(ConfigError, match=r"neither a preset nor a file; .*did you mean pr-moe-tiny-8-16"):
        inspect("pr-moe-tiny-8")
    with pytest.raises(ConfigError, match="cannot be changed"):
        inspect(str(run), ["model.moe=null"])


def test_the_command_line_passes_every_option() -> None:
    app = typer.Typer()
    app.command()(inspect)
    arguments = [NAME, "--json", "--context", "9", "--set", "model.moe.top_k=2", "--set", "micro_batch_size=2"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert (values["context"], values["micro_batch_size"]) == (9, 2)
    assert [layer["top_k"] for layer in values["layers"]] == [0, 2] * 4
    help_text = CliRunner().invoke(app, ["--help"]).stdout
    assert "Example: moesaic inspect pr-moe-350m-32-64" in help_text
    assert CliRunner().invoke(app, [NAME, "--context", "0"]).exit_code == 2


def test_a_preset_and_a_file_need_no_torch(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"preset: {NAME}\n")
    code = (
        "import sys\n"
        "from moesaic.cli.inspect import inspect\n"
        "inspect('pr-moe-350m-32-64')\n"
        f"inspect({str(path)!r}, as_json=True)\n"
        "heavy = {'torch', 'matplotlib', 'tokenizers', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "4.12B parameters, 455M active" in done.stdout


@pytest.mark.parametrize(
    ("metadata", "origin"),
    [
        ({"imported": {"path": "models/x", "family": "qwen3"}}, "imported from models/x (qwen3)"),
        ({"upcycled": {"source": "runs/dense", "step": 7}}, "upcycled from runs/dense, step 7"),
    ],
)
def test_a_converted_run_says_what_it_was_made_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], metadata: dict[str, Any], origin: str
) -> None:
    write_config(load_train_config(NAME, ["data.path=corpus"]), tmp_path / "config.yaml")
    write_checkpoint(tmp_path, 0, None)
    path = tmp_path / "checkpoints" / "step-00000000" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "metadata": metadata}))
    assert as_json(capsys, str(tmp_path))["origin"] == origin
    inspect(str(tmp_path))
    shown = capsys.readouterr().out
    assert f"{origin}; not trained here" in shown and "progress" not in shown
