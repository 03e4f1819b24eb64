"""Writing a run's metrics: metrics.jsonl always, TensorBoard event files beside it, W&B where the user has set it up.

The records themselves and how they are read back are in report/records.py.
"""

import importlib.util
import netrc
import os
import secrets
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO
from urllib.parse import urlsplit

import numpy as np

from moesaic.errors import TrainingError
from moesaic.folders import writing_remedy
from moesaic.logs import logger
from moesaic.report.expert_load import imbalance, relative_load
from moesaic.report.records import (
    METRICS_FILE,
    EvaluationRecord,
    EventRecord,
    ExpertRecord,
    MetricsError,
    Record,
    TrainRecord,
    read_lines,
    to_line,
)

TENSORBOARD_FOLDER = "tensorboard"

# A histogram per MoE layer is much larger than a scalar; every tenth record shows its course as well.
_HISTOGRAM_EVERY_RECORDS = 10
_WANDB_ID_FILE = "wandb-id.txt"


class MetricsWriter:
    """Writes the records of one run, for one process (rank 0 of several).

    `resume_step` is the step of the checkpoint that training goes on from (0: from the start, all over again): records
    after it are removed first, and so is a last line that was cut off. None is for a new run and refuses a folder that
    already holds metrics, which would otherwise be mixed with another run's. config: the run's, for W&B.

    Raises: MetricsError for a folder with metrics and no `resume_step`, and for metrics that are not readable;
    TrainingError when the disk takes no more.
    """

    def __init__(
        self, run_folder: str | Path, *, resume_step: int | None = None, config: Mapping[str, Any] | None = None
    ) -> None:
        self._run_folder = Path(run_folder)
        self._path = self._run_folder / METRICS_FILE
        self._resume_step = resume_step
        self._config = config
        self._num_train_records = 0
        self._file: TextIO | None = None
        self._tensorboard: Any = None
        self._wandb: Any = None

    def __enter__(self) -> "MetricsWriter":
        self._run_folder.mkdir(parents=True, exist_ok=True)
        if self._resume_step is None:
            refuse_metrics(self._run_folder)
        elif self._path.exists():
            truncate_metrics(self._run_folder, self._resume_step)
        # Here and not above: TensorBoard takes seconds to import, and only training needs it.
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what an earlier process wrote after the checkpoint that this one goes on from.
        purge_step = None if self._resume_step is None else self._resume_step + 1
        folder = self._run_folder / TENSORBOARD_FOLDER
        self._excepthook = threading.excepthook
        threading.excepthook = self._report_threads_error
        try:
            self._tensorboard = SummaryWriter(str(folder), purge_step=purge_step, flush_secs=30)
            # Line buffering hands every record to the operating system at once: a killed process loses none.
            self._file = self._path.open("a", encoding="utf-8", buffering=1)
        except OSError as problem:
            for thread in threading.enumerate():
                if _is_tensorboards(thread):
                    thread.join(1)  # it has failed, and its traceback is still to be left out
            threading.excepthook = self._excepthook
            raise _disk_error(self._path, problem) from None
        self._wandb = start_wandb(self._run_folder, config=self._config, is_resumed=self._resume_step is not None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None, "the writer was not entered"
        threading.excepthook = self._excepthook
        to_close = [(self._path, self._file.close)]
        if self._tensorboard is not None:
            to_close.append((self._run_folder / TENSORBOARD_FOLDER, self._tensorboard.close))
        for path, close in to_close:
            try:
                close()
            except OSError as problem:
                # Earlier writes have said so as an error; another one here would hide what ended training.
                logger.warning("%s is incomplete: %s", path, problem)
        if self._wandb is not None:
            _without_failing("finish", self._wandb.finish, exit_code=0 if kind is None else 1)
            self._wandb = None

    def train(self, record: TrainRecord) -> None:
        """Write a train record: every number as a scalar, and now and then a histogram of each layer's load."""
        self._write(record)
        scalars = train_scalars(record)
        self._log_scalars(scalars, step=record.step)
        if record.moe is not None and self._num_train_records % _HISTOGRAM_EVERY_RECORDS == 0:
            self._log_histograms(record.moe, step=record.step)
        self._num_train_records += 1

    def evaluation(self, record: EvaluationRecord) -> None:
        """Write a validation loss."""
        self._write(record)
        self._log_scalars({"loss/validation": record.loss}, step=record.step)

    def event(self, step: int, message: str) -> None:
        """Write a sentence: a resume, a skipped step, an expert that died."""
        self._write(EventRecord(step=step, message=message))
        self._to_tensorboard("text", "events", message, step)

    def _report_threads_error(self, args: threading.ExceptHookArgs) -> None:
        """Leave out the traceback of TensorBoard's thread, whose error the next call raises."""
        if not _is_tensorboards(args.thread):
            self._excepthook(args)

    def _write(self, record: Record) -> None:
        assert self._file is not None, "the writer must be entered with `with` before it is used"
        try:
            self._file.write(to_line(record))
        except OSError as problem:
            raise _disk_error(self._path, problem) from None

    def _log_scalars(self, scalars: Mapping[str, float], *, step: int) -> None:
        for tag, value in scalars.items():
            self._to_tensorboard("scalar", tag, value, step)
        if self._wandb is not None and not _without_failing("log", self._wandb.log, dict(scalars), step=step):
            self._wandb = None

    def _log_histograms(self, experts: ExpertRecord, *, step: int) -> None:
        for layer, load in zip(experts.layers, experts.load, strict=True):
            relative = relative_load(load)  # (E,)
            if np.isfinite(relative).all():  # a histogram of NaN has no edges
                self._to_tensorboard("histogram", f"expert_load/{_tag(layer)}", relative, step)

    def _to_tensorboard(self, kind: str, tag: str, value: Any, step: int) -> None:
        if self._tensorboard is None:
            return
        try:
            getattr(self._tensorboard, f"add_{kind}")(tag, value, global_step=step)
        except OSError as problem:
            # Event files are written by a thread; its error comes out at a later call.
            self._tensorboard = None
            logger.warning(
                "TensorBoard is off from here on: %s cannot be written (%s); the metrics themselves are in %s.",
                self._run_folder / TENSORBOARD_FOLDER, problem.strerror or problem, METRICS_FILE,
            )  # fmt: skip


def _is_tensorboards(thread: threading.Thread | None) -> bool:
    return type(thread).__name__ == "_AsyncWriterThread"


def refuse_metrics(run_folder: str | Path) -> None:
    """Raise MetricsError for a folder that holds metrics, with which a new run's would be mixed."""
    path = Path(run_folder) / METRICS_FILE
    if path.exists() and path.stat().st_size:
        raise MetricsError(
            f"{path} already holds metrics; a new run needs a folder without any; resume the run, or choose another "
            f"folder."
        )


def truncate_metrics(run_folder: str | Path, last_step: int) -> None:
    """Remove the records after `last_step` and a cut-off last line; the file is replaced as a whole or not touched.

    Raises: MetricsError when another line is not a record.
    """
    path = Path(run_folder) / METRICS_FILE
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            for _, line, values in read_lines(path):
                if values["step"] <= last_step:
                    file.write(line + b"\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as problem:
        raise _disk_error(path, problem) from None
    finally:
        partial.unlink(missing_ok=True)


def train_scalars(record: TrainRecord) -> dict[str, float]:
    """Return a train record's numbers by tag; `max_load` is max / mean, and layers sort by their tags."""
    scalars = {
        "loss/train": record.loss,
        "loss/balance": record.balance_loss,
        "loss/z": record.z_loss,
        "optimizer/learning_rate": record.learning_rate,
        "optimizer/gradient_norm": record.gradient_norm,
        "optimizer/skipped_steps": float(record.skipped_steps),
        "speed/tokens_per_second": record.tokens_per_second,
        "speed/flops_per_second": record.flops_per_second,
        "progress/tokens": float(record.tokens),
    }
    scalars |= {f"objective/{name}": value for name, value in record.objective.items()}
    if record.share_of_peak is not None:
        scalars["speed/share_of_peak"] = record.share_of_peak
    if record.moe is not None:
        for place, layer in enumerate(record.moe.layers):
            scalars[f"drop_rate/{_tag(layer)}"] = record.moe.drop_rate[place]
            scalars[f"routing_entropy/{_tag(layer)}"] = record.moe.entropy[place]
            scalars[f"max_load/{_tag(layer)}"] = imbalance(record.moe.load[place])
    return scalars


def start_wandb(run_folder: Path, *, config: Mapping[str, Any] | None, is_resumed: bool) -> Any | None:
    """Return a W&B run, or None where wandb is not installed or not configured; never prompts, never fails."""
    specification = importlib.util.find_spec("wandb")
    # A folder that happens to be called wandb (W&B makes such folders) is found as a package without a file.
    if specification is None or specification.origin is None:
        return None
    reason = wandb_off_reason(os.environ)
    if reason is not None:
        logger.info("W&B is installed but off: %s", reason)
        return None
    runs: list[Any] = []

    def start() -> None:
        import wandb

        id_file = run_folder / _WANDB_ID_FILE
        if not (is_resumed and id_file.is_file()):
            id_file.write_text(secrets.token_hex(4), encoding="utf-8")
        identifier = id_file.read_text(encoding="utf-8").strip()
        project = os.environ.get("WANDB_PROJECT", "moesaic")
        runs.append(
            wandb.init(
                project=project,
                name=run_folder.resolve().name,
                id=identifier,
                dir=str(run_folder),
                resume="allow",
                config=None if config is None else dict(config),
            )
        )

    _without_failing("start", start)
    return runs[0] if runs else None


def wandb_off_reason(environment: Mapping[str, str]) -> str | None:
    """Return why W&B would not log in this environment; None when it would, without asking anything."""
    mode = environment.get("WANDB_MODE", "").lower()
    if mode == "disabled":
        return "WANDB_MODE is disabled."
    if mode in ("offline", "dryrun") or environment.get("WANDB_API_KEY") or _has_login(environment):
        return None
    return (
        "it would ask for a login; run `wandb login` or set WANDB_API_KEY, or WANDB_MODE=offline to log to the run "
        "folder."
    )


def _has_login(environment: Mapping[str, str]) -> bool:
    """Whether netrc, where `wandb login` leaves its key, has one for W&B's address."""
    host = urlsplit(environment.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    try:
        found = netrc.netrc(environment.get("NETRC")).authenticators(host or "")
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
        return False
    return found is not None and bool(found[2])


def _without_failing(action: str, call: Any, *arguments: Any, **options: Any) -> bool:
    """Call W&B; training must survive whatever goes wrong there (its errors share no base class), so log it."""
    try:
        call(*arguments, **options)
    except Exception as problem:
        logger.warning("W&B is off from here on, since it failed to %s: %s", action, problem)
        return False
    return True


def _tag(layer: int) -> str:
    return f"layer_{layer:03d}"


def _disk_error(path: Path, problem: OSError) -> TrainingError:
    return TrainingError(
        f"{path} cannot be written ({problem.strerror or problem}); a run needs room for its metrics and checkpoints; "
        f"{writing_remedy(problem)} and resume the run."
    )
