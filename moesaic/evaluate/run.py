"""Tasks and domains on the models of runs: load, compute, keep in the run's folder."""

import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

import moesaic
from moesaic.errors import ConfigError
from moesaic.evaluate.batched import BatchedScorer
from moesaic.evaluate.domains import DomainUsage, domains_to_json, measure_domains, read_labelled
from moesaic.evaluate.scorer import Scorer
from moesaic.evaluate.tasks.registry import SEED, check_records, load_task, resolve_names
from moesaic.logs import OnProgress, no_progress
from moesaic.model.load import LoadedModel
from moesaic.report.evaluation_plots import write_domains
from moesaic.report.evaluations import TaskResult, write_json, write_result, write_samples


@dataclass(frozen=True)
class TaskSettings:
    """How tasks are run; tasks: their names, comma-separated. data None: records come from the hub.

    Raises: ConfigError for settings that cannot be, DataError for a folder without the records of all tasks.
    """

    tasks: str
    data: Path | None = None
    shots: int = 0
    limit: int | None = None
    use_chat: bool = False

    def __post_init__(self) -> None:
        if self.shots < 0:
            raise ConfigError(
                f"shots ({self.shots}) is less than 0; 0 is none, and more are examples before each question; raise it."
            )
        if self.limit is not None and self.limit < 1:
            raise ConfigError(
                f"limit ({self.limit}) is less than 1; at least one record must be run; raise or omit it."
            )
        names = resolve_names(self.tasks)
        if self.data is not None:
            check_records(names, self.data)


def run_tasks(
    run: str,
    loaded: LoadedModel,
    settings: TaskSettings,
    *,
    scorer: Scorer | None = None,
    keep: bool = True,
    keep_samples: bool = False,
    progress: OnProgress = no_progress,
    on_result: Callable[[TaskResult], None] = lambda _: None,
) -> list[TaskResult]:
    """Run tasks on a model, and keep each result in its run's folder as soon as it is there.

    scorer: computes the model's answers; None: BatchedScorer. serve/scorer.py has one that generates by the engine.
    on_result: is given each result when it is kept, or cannot be: it is whole, whatever becomes of the later ones.

    Raises: ConfigError, DataError, GenerationError, InstallationError, EvaluationError.
    """
    from moesaic.evaluate.harness import HarnessModel, run_task

    results = []
    # All of them first: hours may lie between the first and one whose records are missing or odd.
    tasks = [
        load_task(name, data=settings.data, shots=settings.shots, seed=SEED) for name in resolve_names(settings.tasks)
    ]
    for task in tasks:

        def show(stage: str, share: float, name: str = task.name) -> None:
            progress(f"{run}: {name}, {stage}", share)

        # A model for each task: what it has encoded is of no use to the next.
        model = HarnessModel(scorer or BatchedScorer(loaded.model), loaded.tokenizer, progress=show)
        scores = run_task(model, task, limit=settings.limit, use_chat=settings.use_chat)
        result = TaskResult(
            run=run,
            step=loaded.info.step,
            task=scores.task,
            task_version=scores.version,
            shots=int(task.harness.config.num_fewshot or 0),
            limit=settings.limit,
            num_records=scores.num_records,
            precision=_precision(loaded),
            uses_chat_template=settings.use_chat,
            records_from=task.records_from,
            seed=SEED,
            metrics=scores.metrics,
            seconds=scores.seconds,
            versions={
                "moesaic": moesaic.__version__,
                "lm_eval": version("lm_eval"),
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            fingerprints={
                "weights": loaded.info.model_sha256,
                "tokenizer": loaded.tokenizer.fingerprint,
            },
            command=sys.argv,
        )
        results.append(result)
        try:
            if keep:
                is_other = loaded.config.precision != "fp32" and loaded.model.compute_dtype is torch.float32
                path = write_result(loaded.info.run_folder, result, suffix="-fp32" if is_other else "")
                if keep_samples:
                    write_samples(path, scores.samples)
        finally:
            on_result(result)
    return results


def run_domains(
    run: str,
    loaded: LoadedModel,
    path: Path,
    *,
    label_field: str,
    text_field: str,
    most_documents: int | None,
    keep: bool = True,
    progress: OnProgress = no_progress,
    on_result: Callable[[DomainUsage], None] = lambda _: None,
) -> DomainUsage:
    """Measure which experts serve which domains of labelled text; keep numbers and heat map in the run's folder.

    on_result: is given the result when it is kept, or cannot be.

    Raises: ConfigError, DataError, EvaluationError.
    """
    documents = read_labelled(
        path, loaded.tokenizer, label_field=label_field, text_field=text_field, most_documents=most_documents
    )
    usage = measure_domains(loaded.model, documents, progress=progress)
    try:
        if keep:
            values = {**domains_to_json(usage), "run": run, "step": loaded.info.step, "text": str(path)}
            write_json(loaded.info.run_folder, loaded.info.step, "domains", values)
            write_domains(
                loaded.info.run_folder / "plots" / "expert_domains.png",
                domains=usage.domains,
                layers=[each.layer for each in usage.layers],
                shares=[each.shares for each in usage.layers],
                information_bits=[each.information_bits for each in usage.layers],
                chance_bits_high=[each.chance_bits_high for each in usage.layers],
            )
    finally:
        on_result(usage)
    return usage


def _precision(loaded: LoadedModel) -> str:
    """Return bf16 or fp32, or the kind of a quantised run."""
    from moesaic.checkpoint.quantized import describe_quantization, is_quantized

    if is_quantized(loaded.info):
        return describe_quantization(loaded.info)
    return "fp32" if loaded.model.compute_dtype is torch.float32 else "bf16"
