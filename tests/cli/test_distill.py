"""`moesaic distill`: a student of a run, from the command line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from moesaic.config.load import load_train_config
from moesaic.distill.latency import Latency
from moesaic.report.records import read_metrics

SETTINGS = ["--set", "tokens=512", "--set", "log_every_steps=1", "--set", "evaluation.sequences=4"]


@pytest.fixture(autouse=True)
def one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports measure speed once."""
    monkeypatch.setattr("moesaic.distill.latency._FEWEST_ROUNDS", 1)
    monkeypatch.setattr("moesaic.distill.latency._SECONDS", 0.0)


def test_a_student_is_trained_shown_and_reported(
    cli: Any, drawing: None, trained_run: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "student"
    result = cli("distill", trained_run, run, "--data", tiny_data, *SETTINGS, "--set", "distill.alpha=0.5")
    assert result.status == 0, result.err
    config = load_train_config(run / "config.yaml")
    assert config.distill is not None and config.distill.teacher == str(trained_run)
    assert config.model.num_layers == 1 and config.model.layers[0].num_experts == 8
    for expected in (
        "forward_kl ", "alpha 0.5", "alpha 0 ", "Trained 512 tokens", "student / teacher", "parameters",
        "active per token", "validation loss", "a token after it, ms", "times the teacher's", str(run),
    ):  # fmt: skip
        assert expected in result.out, expected
    assert (run / "plots" / "objective.png").is_file() and (run / "distill.json").is_file()
    alphas = [record.objective["alpha"] for record in read_metrics(run).train]
    assert alphas == [0.5] * 6 + [0.0] * 2
    inspected = cli("inspect", run)
    assert inspected.status == 0 and "validation loss" in inspected.out


def test_a_speed_that_is_not_clear_is_shown_by_its_bounds(
    cli: Any, trained_run: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wild = {"teacher": [1.0] * 6, "student": [0.11, 0.2, 0.7, 0.7, 2.0, 3.0]}
    calm = {"teacher": [0.5, 1.0, 2.0] * 2, "student": [0.25, 0.5, 1.0] * 2}
    monkeypatch.setattr("moesaic.distill.report.measure_latency", lambda *_, **__: Latency(wild, calm))
    result = cli("distill", trained_run, tmp_path / "student", "--data", tiny_data, *SETTINGS)
    prompt, token = (line.rstrip() for line in result.out.splitlines() if line.rstrip().endswith(("3.00", "0.500")))
    assert prompt.lstrip().startswith("prompt of") and prompt.endswith(" 0.11 to 3.00")
    assert token.lstrip().startswith("a token after it")
    assert "the machine is busy: a prompt takes the student" in result.err


def test_json_is_the_result_with_its_report_and_resuming_makes_it_again(
    cli: Any, trained_run: Path, tiny_data: Path, tmp_path: Path
) -> None:
    teacher, run = tmp_path / "teacher", tmp_path / "student"
    shutil.copytree(trained_run, teacher)
    command = ["distill", teacher, run, "--data", tiny_data, "--schedule", "linear", "--init", "teacher", "--layers", 2]
    command += ["--experts", "2,4", *SETTINGS, "--json"]
    values = json.loads(cli(*command).out)
    assert values["step"] == 8 and values["run"] == str(run) and values["stopped_by"] is None
    assert values["report"]["student"]["parameters"] < values["report"]["teacher"]["parameters"]
    assert values["report"] == json.loads((run / "distill.json").read_text())
    (run / "distill.json").unlink()
    again = json.loads(cli(*command, "--resume").out)
    assert again["loss"] is None and again["report"]["student"]["step"] == values["report"]["student"]["step"]
    # Past its teacher, a student goes on without it, and says that there is no report.
    shutil.rmtree(teacher)
    alone = cli(*command, "--resume")
    assert alone.status == 0 and json.loads(alone.out)["report"] is None
    assert "no report of the distillation" in alone.err


def test_a_run_that_was_not_distilled_is_no_student_to_go_on_with(cli: Any, trained_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    before = sorted(path.name for path in run.rglob("*"))
    command = ["distill", trained_run, run, "--resume", "--set", "data.fixed_windows=true"]
    for more in ([], ["--cache", tmp_path / "cache"]):
        refused = cli(*command, *more)
        assert refused.status == 2 and "ConfigError: " in refused.err and "Traceback" not in refused.err
    assert f"{run} was not distilled;" in refused.err
    assert sorted(path.name for path in run.rglob("*")) == before and not (tmp_path / "cache").exists()


def test_a_resumed_student_keeps_its_own_config_whatever_its_teacher_has_become(
    cli: Any, trained_run: Path, tiny_data: Path, tmp_path: Path
) -> None:
    teacher, run = tmp_path / "teacher \U0001f600", tmp_path / "student"
    shutil.copytree(trained_run, teacher)
    command = ["distill", teacher, run, "--data", tiny_data, "--layers", 2, "--experts", "2,4", "--json"]
    assert cli(*command, "--set", "seed=7").status == 0  # for the teacher's 256 tokens
    own = (run / "config.yaml").read_text()
    longer = cli("train", teacher, "--output", teacher, "--resume", "--set", "tokens=320", "--json")
    assert json.loads(longer.out)["tokens"] == 320
    result = cli(*command, "--resume")
    assert result.status == 0 and json.loads(result.out)["tokens"] == 256, result.err
    assert (run / "config.yaml").read_text() == own
    # Only what the command line says is changed; and what it says of the model has to agree.
    assert json.loads(cli(*command, "--resume", "--set", "tokens=320").out)["tokens"] == 320
    own = (run / "config.yaml").read_text()
    start = ["distill", teacher, run, "--resume"]
    for options, message in (
        (["--layers", 1], "layers (1, there 2)"),
        (["--experts", 4], "experts (4, there [2, 4])"),
        (["--dense"], "dense (there are [2, 4] experts)"),
        (["--student", teacher], "model.moe.num_experts of"),
    ):
        refused = cli(*start, *options)
        assert refused.status == 2 and message in refused.err and refused.err.count(";") >= 2, refused.err
    assert (run / "config.yaml").read_text() == own
    shutil.rmtree(teacher)
    gone = cli(*start, "--layers", 1, "--json")
    assert gone.status == 2 and "layers (1, there 2)" in gone.err
    assert cli(*start, "--layers", 2, "--experts", "2,4", "--student", run, "--json").status == 0


def test_a_cache_is_written_once_and_read_by_the_next(
    cli: Any, trained_run: Path, tiny_data: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    command = ["--data", tiny_data, "--cache", cache, *SETTINGS]
    first = cli("distill", trained_run, tmp_path / "a", *command, "--cache-top-k", 16)
    assert first.status == 0, first.err
    assert "16 tokens of each of" in first.out and "bytes per token" in first.out and "nats" in first.out
    written = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    second = cli("distill", trained_run, tmp_path / "b", *command, "--set", "seed=5", "--dense", "--json")
    assert second.status == 0, second.err
    assert {path.name: path.stat().st_mtime_ns for path in cache.iterdir()} == written
    assert load_train_config(tmp_path / "b" / "config.yaml").data.fixed_windows


def test_a_cache_that_is_gone_is_written_again_when_resuming_while_it_is_needed(
    cli: Any, trained_run: Path, tiny_data: Path, tmp_path: Path
) -> None:
    cache, run = tmp_path / "cache", tmp_path / "run"
    settings = ["--data", tiny_data, "--cache", cache, "--set", "log_every_steps=1", "--set", "distill.alpha=0.5"]
    first = cli("distill", trained_run, run, *settings, "--cache-top-k", 16, "--set", "tokens=256", "--json")
    assert first.status == 0, first.err
    shutil.rmtree(cache)
    # All its tokens are trained: nobody needs the cache.
    assert cli("distill", trained_run, run, *settings, "--resume", "--json").status == 0
    assert not cache.exists()
    longer = ["distill", trained_run, run, *settings, "--resume", "--set", "tokens=1024", "--json"]
    other = cli(*longer, "--cache-top-k", 8)
    assert other.status == 2 and "a cache of 8 tokens and this run began with a cache of 16 tokens" in other.err
    assert not cache.exists()
    result = cli(*longer)
    assert result.status == 0 and json.loads(result.out)["step"] == 16, result.err
    assert json.loads((cache / "manifest.json").read_text())["top_k"] == 16
    live = cli("distill", trained_run, tmp_path / "live", *settings[:2], "--set", "data.fixed_windows=true", "--json")
    assert live.status == 0, live.err
    late = cli("distill", trained_run, tmp_path / "live", *settings[:2], "--cache", tmp_path / "new", "--set",
               "tokens=1024", "--resume")  # fmt: skip
    assert late.status == 2 and "this run began with no cache" in late.err
    assert not (tmp_path / "new").exists()


MISTAKES: dict[str, tuple[list[str], str]] = {
    "no teacher": (["{new}", "{out}"], "CheckpointError: "),
    "folder taken": (["{run}", "{run}"], "ConfigError: "),
    "missing data": (["{run}", "{out}", "--data", "{new}"], "DataError: "),
    "no list": (["{run}", "{out}", "--experts", "many"], "ConfigError: --experts (many) is not a list of integers"),
    "own config and layers": (["{run}", "{out}", "--student", "mos-350m", "--layers", "1"], "ConfigError: a student"),
    "another vocabulary": (
        ["{run}", "{out}", "--student", "dense-tiny", "--data", "{data}", "--set", "data.sequence_length=16"],
        "ConfigError: model.vocab_size (4096) is not the teacher's (320)",
    ),
    "another divergence of a cache": (
        ["{run}", "{out}", "--cache", "{new}", "--set", "distill.divergence=jsd"],
        "ConfigError: distill.divergence (jsd) is asked of a cached teacher",
    ),
    "a size of no cache": (
        ["{run}", "{out}", "--cache-top-k", "8"],
        "ConfigError: --cache-top-k (8) is given without a cache",
    ),
    "windows that no cache knows": (
        ["{run}", "{out}", "--cache", "{new}", "--set", "data.fixed_windows=false"],
        "ConfigError: data.fixed_windows is false and distill.cache",
    ),
    "no distillation": (["{run}", "{out}", "--set", "distill=null"], "ConfigError: distill is set to None"),
    "no distillation of an own config": (
        ["{run}", "{out}", "--student", "{run}", "--set", "distill=null"],
        "ConfigError: distill is set to None",
    ),
    "nothing to resume": (["{run}", "{out}", "--resume"], "CheckpointError: "),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_with_status_2_and_a_message_in_three_parts(
    cli: Any, trained_run: Path, tiny_data: Path, tmp_path: Path, name: str
) -> None:
    arguments, message = MISTAKES[name]
    places = {"new": tmp_path / "new", "out": tmp_path / "out", "run": trained_run, "data": tiny_data}
    result = cli("distill", *(argument.format(**places) for argument in arguments))
    assert result.status == 2
    assert message in result.err and "Traceback" not in result.err
    assert result.err.count(";") >= 2, result.err
    assert result.out == ""
    assert not (tmp_path / "out").exists()
