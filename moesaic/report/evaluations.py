"""The results of evaluations as they are kept: RUN/evaluations/step-00000123/NAME.json, one file each.

A task's file is named by the task and what makes its result another one (shots, a limit, a chat template, a precision
that is not the run's). Who computes them is evaluate/; what is drawn of them, evaluation_plots.py.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moesaic.errors import MoesaicError
from moesaic.folders import load_json, write_whole, writing_path
from moesaic.report.json_values import json_values

FOLDER = "evaluations"
_KIND = "task"


class EvaluationError(MoesaicError):
    """A kept result that cannot be read, or results that cannot be written."""


@dataclass(frozen=True, kw_only=True)
class MetricResult:
    """standard_error None: it has none. higher_is_better None: neither is better."""

    value: float
    standard_error: float | None
    higher_is_better: bool | None


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One task on one checkpoint. The first metric is the one to compare runs by.

    limit None: all records. precision: of the matrices. fingerprints: SHA-256 of the weights' file and the tokenizer.
    """

    run: str
    step: int
    task: str
    task_version: str
    shots: int
    limit: int | None
    num_records: int
    precision: str
    uses_chat_template: bool
    records_from: str
    seed: int
    metrics: Mapping[str, MetricResult]
    seconds: float
    versions: Mapping[str, str]
    fingerprints: Mapping[str, str]
    command: Sequence[str]

    @property
    def label(self) -> str:
        """The task and what sets this result apart from others of it."""
        parts = [self.task]
        if self.shots:
            parts.append(f"{self.shots}-shot")
        if self.limit is not None:
            parts.append(f"first-{self.limit}")
        if self.uses_chat_template:
            parts.append("chat")
        return "-".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Return JSON-able values; what is not finite becomes null."""
        return dict(json_values({"kind": _KIND, **asdict(self)}))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "TaskResult":
        """Raises: KeyError, TypeError or ValueError for values that to_json did not make."""
        given = {key: value for key, value in values.items() if key != "kind"}
        given["metrics"] = {
            name: MetricResult(**{**metric, "value": math.nan if metric["value"] is None else metric["value"]})
            for name, metric in given["metrics"].items()
        }
        return cls(**given)


def check_results_can_be_kept(run_folder: Path, step: int) -> None:
    """Find out whether a step's results could be written: hours of evaluation should not end with one that cannot.

    Raises: EvaluationError where nothing can be written.
    """
    folder = _file(run_folder, step, "result.json").parent
    while not folder.exists():
        folder = folder.parent
    try:
        probe = writing_path(folder / "result.json")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise _unwritable(folder, error) from None


def write_result(run_folder: Path, result: TaskResult, *, suffix: str = "") -> Path:
    """Keep a result in its run's folder, in the place of an earlier one of the same name, and return its file.

    suffix: of the file's name, for a precision that is not the run's.

    Raises: EvaluationError where it cannot be written.
    """
    return write_json(run_folder, result.step, f"{result.label}{suffix}", result.to_json())


def write_json(run_folder: Path, step: int, name: str, values: Mapping[str, Any]) -> Path:
    """Write an evaluation's values, whole or not at all, and return the file.

    Raises: EvaluationError where it cannot be written.
    """
    return _write(_file(run_folder, step, f"{name}.json"), json.dumps(values, indent=1, allow_nan=False) + "\n")


def write_samples(path: Path, samples: Iterable[Mapping[str, Any]]) -> Path:
    """Write what became of each record beside its result's file, one JSON object a line, and return the file."""
    lines = (json.dumps(sample, ensure_ascii=False, default=str) + "\n" for sample in samples)
    return _write(path.with_suffix(".samples.jsonl"), "".join(lines))


def read_results(run_folder: str | Path, *, step: int | None = None) -> list[TaskResult]:
    """Return the kept task results of a run, of one step or of all, by step and name; none is an empty list.

    Raises: EvaluationError for a file that is not one of ours.
    """
    folder = Path(run_folder) / FOLDER
    pattern = "step-*" if step is None else f"step-{step:08d}"
    results = []
    for path in sorted(folder.glob(f"{pattern}/*.json")):
        try:
            values = load_json(path)
            if values["kind"] == _KIND:
                results.append(TaskResult.from_json(values))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise EvaluationError(
                f"{path} is not a result that moesaic wrote ({error!r}); whole JSON files are required in "
                f"{folder}; remove it, and evaluate again."
            ) from None
    return results


def comparison(results: Sequence[TaskResult]) -> list[tuple[str, str, list[MetricResult | None]]]:
    """Return a row for each (label, metric), with one cell for each run in order of first appearance."""
    runs = list(dict.fromkeys(run_name(result) for result in results))
    cells: dict[tuple[str, str], dict[str, MetricResult]] = {}
    for result in results:
        for name, metric in result.metrics.items():
            cells.setdefault((result.label, name), {})[run_name(result)] = metric
    return [(label, name, [found.get(run) for run in runs]) for (label, name), found in cells.items()]


def run_name(result: TaskResult) -> str:
    """Return what tells results of different runs, steps and precisions apart."""
    return f"{result.run} ({result.precision})"


def _file(run_folder: Path, step: int, name: str) -> Path:
    return run_folder / FOLDER / f"step-{step:08d}" / name.replace("/", "-")  # a user names tasks as they like


def _write(path: Path, text: str) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    except OSError as error:
        raise _unwritable(path, error) from None
    return path


def _unwritable(path: Path, error: OSError) -> EvaluationError:
    return EvaluationError(
        f"{path} cannot be written ({error}); results are kept in the run's folder, which must be writable and have "
        f"room; free some, or print them with --no-keep."
    )
