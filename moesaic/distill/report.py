"""What a distillation gave: student and teacher side by side, from their run folders; distill.json in the student's.

Both are measured now, on this machine, packed as for inference: the validation loss over the student's validation
sequences, and the latency of a prompt and of each token after it (latency.py). Task scores are those that `moesaic
evaluate` has kept in the run folders; none is computed here.
"""

import json
import math
import shutil
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moesaic.data.loader import ValidationLoader
from moesaic.data.shards import ShardSet
from moesaic.distill.latency import Ratio, measure_latency
from moesaic.distill.teacher import KEPT_NAME, TeacherRun
from moesaic.errors import CheckpointError, ConfigError
from moesaic.evaluate.validation import validation_loss
from moesaic.folders import write_whole
from moesaic.logs import logger
from moesaic.model.load import load_run, load_run_config
from moesaic.plan.cost import count_parameters
from moesaic.report.evaluations import EvaluationError, read_results
from moesaic.report.json_values import json_values

REPORT_NAME = "distill.json"
_PROMPT_TOKENS, _NEW_TOKENS = 128, 32


@dataclass(frozen=True)
class TaskScore:
    """A task's first metric. higher_is_better None: neither is."""

    metric: str
    value: float
    higher_is_better: bool | None


@dataclass(frozen=True)
class Side:
    """One of the two models. prefill_seconds: of a prompt of one sequence; decode_seconds: of each token after it."""

    run: str
    step: int
    parameters: int
    active_parameters: int
    validation_loss: float
    prefill_seconds: float
    decode_seconds: float
    tasks: dict[str, TaskScore]


@dataclass(frozen=True)
class DistillationReport:
    """Teacher and student. prompt_tokens, new_tokens: of the latencies; validation_tokens: of the losses.

    prefill_ratio, decode_ratio: the student's latencies over the teacher's.
    """

    teacher: Side
    student: Side
    prefill_ratio: Ratio
    decode_ratio: Ratio
    schedule: str
    validation_tokens: int
    prompt_tokens: int
    new_tokens: int

    @property
    def perplexity_retention(self) -> float:
        """The teacher's perplexity over the student's: 1 where nothing is lost."""
        gain = self.teacher.validation_loss - self.student.validation_loss
        return math.exp(gain) if gain < 700 else gain * math.inf  # NaN stays NaN

    @property
    def task_retention(self) -> float | None:
        """The student's mean score over the teacher's, of the tasks that both have and where higher is better."""
        common = [
            (self.student.tasks[name].value, score.value)
            for name, score in self.teacher.tasks.items()
            if score.higher_is_better and name in self.student.tasks
        ]
        total = sum(theirs for _, theirs in common)
        return sum(own for own, _ in common) / total if total > 0 else None

    def to_json(self) -> dict[str, Any]:
        """Return JSON-able values; what is not finite becomes null."""
        values = {
            **asdict(self),
            "perplexity_retention": self.perplexity_retention,
            "task_retention": self.task_retention,
        }
        return dict(json_values(values))


def report_distillation(run_folder: str | Path, *, device: str = "auto") -> DistillationReport:
    """Measure a student's best checkpoint beside the one that taught it, write distill.json, return the report.

    Raises: ConfigError for a run that is no student; CheckpointError where student or teacher cannot be read.
    """
    folder = Path(run_folder)
    config = load_run_config(folder)
    if config.distill is None:
        raise ConfigError(
            f"{folder} is no student: its config has no distill section; a run that `moesaic distill` trained is "
            f"required; name one."
        )
    student = load_run(folder, device=device)
    state = student.info.metadata.get("objective", {})
    if "teacher_sha256" in state:
        run = TeacherRun.reopen(
            config.distill.teacher, folder, sha256=state["teacher_sha256"], step=state.get("teacher_step")
        )
    else:  # of a converted student
        run = TeacherRun.open(config.distill.teacher)
    loaded = {"teacher": load_run(run.info.run_at_step, device=device), "student": student}
    folders = {"teacher": run.folder, "student": folder}
    shards = ShardSet.open(config.data.path)
    positions = min(each.config.model.max_positions for each in loaded.values())
    num_prompt = max(1, min(_PROMPT_TOKENS, positions // 2, shards.validation.num_tokens))
    num_new = max(1, min(_NEW_TOKENS, positions - num_prompt))
    prompt = torch.from_numpy(shards.validation.read(0, num_prompt))[None]
    latency = measure_latency({name: each.model for name, each in loaded.items()}, prompt, num_new=num_new)
    batches = ValidationLoader.of(config, shards.validation)
    sides = {
        name: Side(
            run=str(folders[name]),
            step=each.info.step,
            parameters=(count := count_parameters(each.config.model)).total,
            active_parameters=count.active,
            validation_loss=validation_loss(each.model, batches, device=each.device),
            prefill_seconds=statistics.median(latency.prefill[name]),
            decode_seconds=statistics.median(latency.decode[name]),
            tasks=_task_scores(folders[name], each.info.step),
        )
        for name, each in loaded.items()
    }
    report = DistillationReport(
        teacher=sides["teacher"],
        student=sides["student"],
        prefill_ratio=Ratio.of(latency.prefill["student"], latency.prefill["teacher"]),
        decode_ratio=Ratio.of(latency.decode["student"], latency.decode["teacher"]),
        schedule=config.distill.schedule,
        validation_tokens=batches.num_sequences * config.data.sequence_length,
        prompt_tokens=num_prompt,
        new_tokens=num_new,
    )
    _warn_of_noise(report)
    write_whole(folder / REPORT_NAME, json.dumps(report.to_json(), indent=1, allow_nan=False))
    return report


def try_report(run_folder: str | Path, *, device: str = "auto") -> DistillationReport | None:
    """Return a finished student's report, or None, said in the log, without the checkpoint that taught, or the memory.

    What the student has kept of a teacher that trained is needed no more, and removed.
    """
    try:
        report = report_distillation(run_folder, device=device)
    except CheckpointError as error:
        logger.warning("no report of the distillation: %s", error)
        return None
    except torch.OutOfMemoryError as error:
        logger.warning(
            "no report of the distillation: teacher and student did not fit on one device (%s); the student is "
            "complete; the same command with --resume makes it on another device (--device cpu).",
            str(error).partition("\n")[0],
        )
        return None
    shutil.rmtree(Path(run_folder) / KEPT_NAME, ignore_errors=True)
    return report


def _warn_of_noise(report: DistillationReport) -> None:
    for name, ratio in (("a prompt", report.prefill_ratio), ("a token", report.decode_ratio)):
        if not ratio.is_clear:
            logger.warning(
                "the machine is busy: %s takes the student %.2f to %.2f times as long as the teacher by %d rounds, "
                "which says little; the same command with --resume measures both again when the machine is quiet",
                name, ratio.low, ratio.high, ratio.num_rounds,
            )  # fmt: skip


def _task_scores(run_folder: Path, step: int) -> dict[str, TaskScore]:
    """Return the first metric of each task that was evaluated at this step, by task and precision."""
    try:
        results = read_results(run_folder, step=step)
    except EvaluationError as error:
        logger.warning("no task scores in the report: %s", error)
        return {}
    scores = {}
    for result in results:
        name, metric = next(iter(result.metrics.items()))
        if math.isfinite(metric.value):
            scores[f"{result.label}, {result.precision}"] = TaskScore(name, metric.value, metric.higher_is_better)
    return scores
