"""`moesaic quickstart --short` from the command line to the last file, and again on what it left."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moesaic.checkpoint.store import resolve_checkpoint
from moesaic.config.load import load_train_config
from moesaic.data.corpus import embedded_corpus
from moesaic.errors import ConfigError, DataError
from moesaic.quickstart.life import PRESET, quickstart, quickstart_config
from moesaic.report.records import read_metrics


def run_quickstart(output: Path) -> str:
    result = subprocess.run(
        [sys.executable, "-m", "moesaic", "quickstart", "--short", "--output", str(output)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
        env={**os.environ, "COLUMNS": "300"},
        check=False,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.mark.slow
def test_the_whole_life_cycle_and_once_more(tmp_path: Path) -> None:
    try:
        embedded_corpus()
    except DataError as error:
        pytest.skip(str(error))
    run, student = tmp_path / "runs" / "quickstart", tmp_path / "runs" / "quickstart-student"
    shown = run_quickstart(run)
    config = load_train_config(run / "config.yaml")
    assert config == quickstart_config(tmp_path / "runs" / "quickstart-data", short=True)
    for folder in (run, student):
        for name in ("config.yaml", "run.json", "metrics.jsonl", "tokenizer.json"):
            assert (folder / name).is_file()
        plots = {path.name for path in (folder / "plots").glob("*.png")}
        assert {"loss.png", "learning_rate.png", "expert_load.png", "expert_balance.png"} <= plots
        metrics = read_metrics(folder)
        assert metrics.train[-1].step == config.total_steps
        assert metrics.train[-1].loss < metrics.train[0].loss - 0.5
        loss = resolve_checkpoint(folder).validation_loss
        assert loss is not None and f"validation loss {loss:.3f}" in shown
    taught = load_train_config(student / "config.yaml")
    assert taught.distill is not None and taught.distill.schedule == "staged"
    assert (config.model.num_layers, taught.model.num_layers) == (8, 7)
    for expected in ("1/5", "5/5", "The teacher writes", "The student writes", "The state of the Union is",
                     str(run / "plots"), str(run / "report.html"), f"moesaic inspect {run}"):  # fmt: skip
        assert expected in shown
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.count('<img src="data:image/png;base64,') == 7
    assert page.count("The state of the Union is") == 2

    kept = [*run.glob("checkpoints/*/*"), *student.glob("checkpoints/*/*")]
    before = {path: path.stat().st_mtime_ns for path in kept}
    metrics = read_metrics(student)
    again = run_quickstart(run)
    assert again.count("going on with it") == 2
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    assert read_metrics(student).train == metrics.train
    assert (run / "report.html").read_text(encoding="utf-8") == page

    # Without --short it is another run, which must not be mixed with this one.
    with pytest.raises(ConfigError, match=r"holds another run, .*--short; .*; name another folder"):
        quickstart(run)


def test_the_folder_may_have_any_name(tmp_path: Path) -> None:
    folder = tmp_path / "d 😀: é"
    assert quickstart_config(folder).data.path == str(folder)


def test_short_changes_the_length_and_not_the_model(tmp_path: Path) -> None:
    short, full = quickstart_config(tmp_path, short=True), quickstart_config(tmp_path)
    assert short.model == full.model == load_train_config(PRESET, [f"data.path={tmp_path}"]).model
    assert short.tokens < full.tokens / 20
    assert full.model.num_layers == 8
