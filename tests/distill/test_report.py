"""The report of a distillation: measured from the folders of student and teacher, and written into the student's."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.checkpoint.store import resolve_checkpoint
from moesaic.config.train import TrainConfig
from moesaic.distill.cache import write_cache
from moesaic.distill.latency import Latency, Ratio
from moesaic.distill.report import REPORT_NAME, DistillationReport, Side, TaskScore, report_distillation, try_report
from moesaic.distill.run import distill, make_trainer, write_needed_cache
from moesaic.errors import ConfigError
from moesaic.evaluate.validation import validation_loss
from moesaic.model.load import load_run
from moesaic.plan.cost import count_parameters
from moesaic.report.evaluations import MetricResult, TaskResult, write_json, write_result

Student = Callable[..., TrainConfig]


def write_score(
    run: Path, step: int, task: str, value: float, *, higher_is_better: bool = True, precision: str = "fp32"
) -> Path:
    metrics = {
        "acc": MetricResult(value=value, standard_error=None, higher_is_better=higher_is_better),
        "other": MetricResult(value=0.1, standard_error=None, higher_is_better=None),
    }
    result = TaskResult(
        run=str(run), step=step, task=task, task_version="1", shots=0, limit=None, num_records=3, precision=precision,
        uses_chat_template=False, records_from="here", seed=0, metrics=metrics, seconds=1.0, versions={},
        fingerprints={}, command=(),
    )  # fmt: skip
    return write_result(run, result, suffix=f"-{precision}")


def test_both_sides_are_measured_as_they_are_now(student: Student, teacher: Path, tmp_path: Path) -> None:
    config = student("distill.schedule=none", steps=8)
    distill(config, tmp_path / "run")
    report = report_distillation(tmp_path / "run", device="cpu")
    info = resolve_checkpoint(tmp_path / "run")
    assert (report.student.step, report.teacher.step) == (info.step, resolve_checkpoint(teacher).step)
    count = count_parameters(config.model)
    assert (report.student.parameters, report.student.active_parameters) == (count.total, count.active)
    assert report.student.parameters < report.teacher.parameters
    # Of fp32 precision, so what the run measured when it saved is what is measured again.
    assert report.student.validation_loss == pytest.approx(info.validation_loss, abs=1e-6)
    trainer = make_trainer(config, tmp_path / "other", device="cpu", resume=False, display=None)
    model = load_run(teacher, device="cpu").model
    loss = validation_loss(model, trainer.validation, device=torch.device("cpu"))
    assert report.teacher.validation_loss == pytest.approx(loss)
    assert report.perplexity_retention == pytest.approx(
        math.exp(report.teacher.validation_loss) / math.exp(report.student.validation_loss)
    )
    for side in (report.teacher, report.student):
        assert side.prefill_seconds > 0 and side.decode_seconds > 0
    assert report.prefill_ratio.median > 0 and report.decode_ratio.num_rounds == 1
    assert (report.prompt_tokens, report.new_tokens, report.validation_tokens) == (16, 16, 4 * 16)
    assert report.task_retention is None
    written = json.loads((tmp_path / "run" / REPORT_NAME).read_text())
    assert written == report.to_json()
    assert written["teacher"]["run"] == str(teacher)


def test_the_teacher_is_the_checkpoint_that_taught_not_its_runs_best_of_now(
    student: Student, teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs, run, cache = Path(shutil.copytree(teacher, tmp_path / "teacher")), tmp_path / "run", tmp_path / "cache"
    config = student(f"distill.teacher={theirs}", f"distill.cache={cache}", steps=4)
    write_cache(cache, config, top_k=4)
    distill(config, run)
    taught = resolve_checkpoint(theirs)
    manifest = taught.path / "manifest.json"
    values = json.loads(manifest.read_text())
    values["metadata"]["validation_loss"] = 99.0  # another one is the best from here on
    manifest.write_text(json.dumps(values))
    assert resolve_checkpoint(theirs).step != taught.step
    assert report_distillation(run, device="cpu").teacher.step == taught.step
    # A student that still hears it goes on with it as well, live or from a cache, also one that is written again.
    shutil.rmtree(cache)
    longer = config.replace(tokens=8 * 64)
    assert write_needed_cache(longer, run, top_k=None, device=torch.device("cpu"), on_progress=lambda *_: None)
    assert distill(longer, run, resume=True).step == 8
    shutil.rmtree(taught.path)
    (run / REPORT_NAME).unlink()
    with caplog.at_level("WARNING", "moesaic"):
        assert try_report(run, device="cpu") is None
    left = resolve_checkpoint(theirs).step
    assert f"step {taught.step} of the teacher {theirs}, with which this student began" in caplog.text
    assert f"the last 2 (checkpoint.keep_last), now {left};" in caplog.text and not (run / REPORT_NAME).exists()


def test_a_device_without_room_for_both_costs_the_report_alone(
    student: Student, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    distill(student(steps=4), tmp_path / "run")

    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nMore of it.")

    monkeypatch.setattr("moesaic.distill.report.measure_latency", fail)
    with caplog.at_level("WARNING", "moesaic"):
        assert try_report(tmp_path / "run", device="cpu") is None
    assert "did not fit on one device (CUDA out of memory. Tried to allocate 20 GiB.); the student is" in caplog.text


def test_kept_task_scores_are_read_and_nothing_else(
    student: Student, teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    distill(student(steps=4), tmp_path / "run")
    theirs, own = resolve_checkpoint(teacher).step, resolve_checkpoint(tmp_path / "run").step
    try:
        for run, step, score in ((teacher, theirs, 0.5), (tmp_path / "run", own, 0.4)):
            write_score(run, step, "arc_easy", score)
            write_score(run, step, "wikitext2", 30.0 / score, higher_is_better=False)
            write_json(run, step, "domains", {"kind": "domains"})
        write_score(teacher, theirs, "piqa", 0.9)  # the student's is not there
        write_score(teacher, theirs, "arc_easy", 0.8, precision="bf16")  # nor is this precision
        write_score(tmp_path / "run", own + 1, "blimp", 0.9)  # another step
        report = report_distillation(tmp_path / "run", device="cpu")
        write_json(tmp_path / "run", own, "broken", {"kind": "task"})
        with caplog.at_level("WARNING", "moesaic"):
            without = report_distillation(tmp_path / "run", device="cpu")
    finally:
        for path in (teacher / "evaluations").rglob("*.json"):
            path.unlink()
    assert report.student.tasks == {
        "arc_easy, fp32": TaskScore("acc", 0.4, True),
        "wikitext2, fp32": TaskScore("acc", 75.0, False),
    }
    assert {"piqa, fp32", "arc_easy, bf16"} < report.teacher.tasks.keys()
    assert report.task_retention == pytest.approx(0.8)
    assert without.student.tasks == {} and "broken.json" in caplog.text


def side(tasks: dict[str, float], loss: float = 3.0) -> Side:
    return Side("r", 1, 1, 1, loss, 1.0, 1.0, {name: TaskScore("acc", value, True) for name, value in tasks.items()})


def report_of(teacher: Side, student: Side) -> DistillationReport:
    same = Ratio(1.0, 1.0, 1.0, 6)
    return DistillationReport(teacher, student, same, same, "staged", 1, 1, 1)


def test_retention_is_of_the_means_as_the_papers_is() -> None:
    """DeepSpeed-MoE's table 5, 1.3B: 48.37 and 47.96 in the mean of six tasks, 99.1 %."""
    names = ("lambada", "piqa", "boolq", "race_h", "triviaqa", "webqs")
    teacher = dict(zip(names, (70.60, 77.75, 67.16, 38.09, 28.86, 7.73), strict=True))
    student = dict(zip(names, (70.17, 77.69, 65.66, 36.94, 29.05, 8.22), strict=True))
    report = report_of(side(teacher), side(student))
    assert report.task_retention == pytest.approx(0.991, abs=1e-3)
    assert report_of(side({"a": 0.0}), side({"a": 1.0})).task_retention is None
    broken = report_of(side({}), side({}, math.nan)).to_json()
    assert broken["student"]["validation_loss"] is None and broken["perplexity_retention"] is None
    assert report_of(side({}, 1000.0), side({}, 1.0)).perplexity_retention == math.inf
    assert report_of(side({}, 1.0), side({}, 1000.0)).perplexity_retention == 0


def test_latencies_that_say_nothing_are_told(
    student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    distill(student("distill.schedule=none", steps=4), tmp_path / "run")
    wild = {"teacher": [1.0] * 6, "student": [0.1, 0.2, 0.7, 0.7, 2.0, 3.0]}
    calm = {"teacher": [1.0] * 6, "student": [0.5] * 6}
    monkeypatch.setattr("moesaic.distill.report.measure_latency", lambda *_, **__: Latency(wild, calm))
    with caplog.at_level("WARNING", "moesaic"):
        report = report_distillation(tmp_path / "run", device="cpu")
    assert report.prefill_ratio == Ratio(0.7, 0.1, 3.0, 6) and not report.prefill_ratio.is_clear
    assert report.decode_ratio == Ratio(0.5, 0.5, 0.5, 6) and report.student.decode_seconds == 0.5
    assert "a prompt takes the student 0.10 to 3.00 times as long as the teacher by 6 rounds" in caplog.text
    assert "a token takes" not in caplog.text


def test_a_teacher_that_is_gone_costs_the_report_alone(
    student: Student, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import yaml

    distill(student("distill.schedule=none", steps=4), tmp_path / "run")
    values = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    values["distill"]["teacher"] = str(tmp_path / "gone")
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(values))
    with caplog.at_level("WARNING", "moesaic"):
        assert try_report(tmp_path / "run", device="cpu") is None
    assert "no report of the distillation" in caplog.text


def test_a_run_that_is_no_student_is_refused(teacher: Path) -> None:
    with pytest.raises(ConfigError, match="is no student"):
        report_distillation(teacher, device="cpu")
