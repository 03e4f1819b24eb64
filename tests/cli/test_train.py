import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moesaic.checkpoint.store import list_checkpoints
from moesaic.config.load import load_train_config
from moesaic.report.records import METRICS_FILE, read_metrics

ConfigFile = Callable[..., Path]


def test_a_run_from_a_file_with_settings_shows_its_progress_and_what_is_next(
    cli: Any, drawing: None, config_file: ConfigFile, tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    path = config_file("pr-moe", data={"path": "nowhere"})
    result = cli("train", path, "--data", tiny_data, "-o", run, "--set", "tokens=500", "--set", "seed=3")
    assert result.status == 0, result.err
    assert load_train_config(run / "config.yaml").seed == 3
    for expected in (
        "step 8 ",
        "512 of 512 tokens (100.0%)",
        "validation loss",
        "Trained 512 tokens",
        str(run),
        "moesaic inspect",
        "moesaic generate",
    ):
        assert expected in result.out
    assert len(list((run / "plots").glob("*.png"))) >= 5
    command = json.loads((run / "run.json").read_text())["starts"][0]["command"]
    assert command == sys.argv  # of this process, which called the command line


def test_json_is_the_result_and_nothing_else(cli: Any, config_file: ConfigFile, tmp_path: Path) -> None:
    path, run = config_file(steps=4), tmp_path / "run"
    values = json.loads(cli("train", path, "--output", run, "--json").out)
    assert values["step"] == 4 and values["tokens"] == 256 and values["stopped_by"] is None
    assert values["run"] == str(run) and 0 < values["validation_loss"] < 10 and 0 < values["loss"] < 10
    again = json.loads(cli("train", path, "--output", run, "--json", "--resume").out)
    assert again == {**values, "loss": None}  # nothing was left to train


def test_a_run_in_the_place_of_the_config_is_trained_from_and_resumed_without_it(
    cli: Any, trained_run: Path, tiny_data: Path, tmp_path: Path
) -> None:
    first, run = tmp_path / "first", tmp_path / "run"
    shutil.copytree(trained_run, first)
    command = ["train", f"{first}/", "--data", tiny_data, "--output", run, "--set", "tokens=128", "--json"]
    assert json.loads(cli(*command).out)["step"] == 2
    assert load_train_config(run / "config.yaml").init_from == str(first)
    (start,) = json.loads((run / "run.json").read_text())["starts"]
    assert start["init_from"]["run"] == str(first)
    shutil.rmtree(first)
    command[7] = "tokens=192"
    assert json.loads(cli(*command, "--resume").out)["step"] == 3
    again = cli("train", run, "--output", run, "--resume", "--set", "tokens=256", "--json")
    assert json.loads(again.out)["step"] == 4
    gone = cli(*command[:4], "--output", tmp_path / "other")
    assert gone.status == 2 and "is neither a preset nor a file" in gone.err


def test_a_folders_name_may_hold_any_character(
    cli: Any, config_file: ConfigFile, tiny_data: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(tiny_data, tmp_path / 'd\u00e9 "\U0001f600": #'))
    result = cli("train", config_file(steps=4), "--data", data, "--output", tmp_path / "run", "--json")
    assert result.status == 0, result.err
    assert load_train_config(tmp_path / "run" / "config.yaml").data.path == str(data)


MISTAKES: dict[str, tuple[list[str], str]] = {
    "unknown preset": (["train", "pr-moe-tiny", "--output", "{new}"], "ConfigError: 'pr-moe-tiny' is neither"),
    "no data": (
        ["train", "dense-tiny", "--output", "{new}"],
        "ConfigError: data.path is missing; DataConfig requires it: a folder written by `moesaic prepare SOURCE "
        "--output DIR`; `--data DIR` names it too; set it",
    ),
    "unknown key": (
        ["train", "{config}", "--output", "{new}", "--set", "model.n_layer=3"],
        "ConfigError: model.n_layer",
    ),
    "a foreign model": (["train", "{foreign}", "--output", "{new}"], "is a model in Hugging Face's layout; a run is"),
    "a text": (
        ["train", "{config}", "--output", "{new}", "--data", "{config}"],
        "is a file; a folder of token shards is required; write one with `moesaic prepare",
    ),
    "small vocabulary": (
        ["train", "{config}", "--output", "{new}", "--set", "model.vocab_size=9"],
        "ConfigError: model.vocab_size (9) is less than the 320",
    ),
    "missing data": (["train", "{config}", "--output", "{new}", "--data", "{new}"], "DataError: "),
    "no such device": (["train", "{config}", "--output", "{new}", "--device", "tpu"], "DeviceError: device 'tpu'"),
    "nothing to resume": (["train", "{config}", "--output", "{new}", "--resume"], "CheckpointError: "),
    "folder taken": (["train", "{config}", "--output", "{run}"], "ConfigError: "),
    "no such step": (["train", "{run}@77", "--output", "{new}"], "CheckpointError: "),
    "a run without its data": (
        ["train", "{run}", "--output", "{new}", "--set", "data.path=''"],
        "DataError: data.path is empty; training requires text prepared for it; name it with --data DIR",
    ),
    "another model": (
        ["train", "{run}", "--output", "{new}", "--set", "model.moe.top_k=2"],
        "ConfigError: model.moe.top_k (2, there 1): not as in",
    ),
    "other settings": (
        ["train", "{config}", "--output", "{run}", "--resume", "--set", "seed=9"],
        "ConfigError: ",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_with_status_2_and_a_message_in_three_parts(
    cli: Any, config_file: ConfigFile, trained_run: Path, tmp_path: Path, name: str
) -> None:
    arguments, message = MISTAKES[name]
    places = {"new": tmp_path / "new", "config": config_file(), "run": trained_run, "foreign": tmp_path / "foreign"}
    places["foreign"].mkdir()
    (places["foreign"] / "config.json").write_text('{"model_type": "llama"}')
    result = cli(*(argument.format(**places) for argument in arguments))
    assert result.status == 2
    assert message in result.err and "Traceback" not in result.err
    assert result.err.count(";") >= 2, result.err
    assert result.out == ""  # no empty display
    assert not (tmp_path / "new").exists()


def wait_for_records(run: Path, count: int, process: "subprocess.Popen[str]") -> None:
    """Wait until the run has written so many lines of metrics."""
    for _ in range(2400):
        assert process.poll() is None, process.communicate()
        path = run / METRICS_FILE
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.05)
    raise AssertionError("no records after two minutes")


@pytest.mark.skipif(os.name != "posix", reason="a signal to one process needs POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_process_saves_and_goes_on_with_resume(
    cli: Any, config_file: ConfigFile, tmp_path: Path, number: signal.Signals
) -> None:
    """A real process and a real signal; the steps are many and short, so it cannot end by itself before."""
    path, run = config_file("pr-moe", steps=4000, checkpoint={"every_tokens": 10**6}), tmp_path / "run"
    arguments = ["train", str(path), "--output", str(run), "--set", "evaluation.every_tokens=1000000"]
    # The machine's limits are not what is tested, nor the plots, and both take seconds.
    code = (
        "import types, moesaic.train.loop as loop, moesaic.cli.main as main;"
        "loop.measure_limits = lambda **_: types.SimpleNamespace(bf16_flops_per_second=0, fp32_flops_per_second=0);"
        "loop.write_plots = lambda *_, **__: [];"
        "main.main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        wait_for_records(run, 3, process)
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, err
    (info,) = list_checkpoints(run)
    assert f"{number.name}: stopping at step {info.step}" in out
    assert f"Stopped at step {info.step}; go on with the same command and --resume." in out
    assert "Traceback" not in err
    tokens = (info.step + 2) * 64
    resumed = cli(*arguments, "--resume", "--set", f"tokens={tokens}")
    assert resumed.status == 0, resumed.err
    assert f"resumed from step {info.step}" in resumed.out and f"Trained {tokens:,} tokens" in resumed.out
    steps = [record.step for record in read_metrics(run).train]
    assert steps == list(range(1, info.step + 3))


def test_what_was_passed_over_is_said(cli: Any, config_file: ConfigFile, tmp_path: Path) -> None:
    path, run = config_file(steps=8), tmp_path / "run"
    assert cli("train", path, "--output", run, "--json").status == 0
    (run / "checkpoints" / "step-00000008" / "model.safetensors").write_bytes(b"")
    result = cli("train", path, "--output", run, "--resume")
    assert result.status == 0
    assert "step-00000008" in result.err and "truncated" in result.err
    assert "Passing over step 8" in result.err
    assert "resumed from step 4" in result.out


def test_only_broken_checkpoints_are_an_error(cli: Any, config_file: ConfigFile, tmp_path: Path) -> None:
    path, run = config_file(steps=4), tmp_path / "run"
    assert cli("train", path, "--output", run, "--json").status == 0
    (run / "checkpoints" / "step-00000004" / "manifest.json").write_text("{")
    result = cli("train", path, "--output", run, "--resume")
    assert result.status == 2 and "CheckpointError: none of the checkpoints" in result.err
