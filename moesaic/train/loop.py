"""The training loop: a step stands between two rules; evaluation, saving and reporting are outside it."""

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from moesaic.checkpoint.quantized import require_unquantized
from moesaic.checkpoint.store import (
    has_checkpoints,
    last_good,
    list_checkpoints,
    prune_checkpoints,
    save_checkpoint,
    set_aside_after,
)
from moesaic.checkpoint.stream import TensorStream
from moesaic.config.base import differing
from moesaic.config.load import run_folder_of, write_config
from moesaic.config.train import TrainConfig
from moesaic.data.loader import TrainLoader, ValidationLoader
from moesaic.data.shards import ShardSet
from moesaic.data.tokenizer import TOKENIZER_NAME, Tokenizer
from moesaic.errors import CheckpointError, ConfigError, DataError, TrainingError
from moesaic.evaluate.validation import validation_loss
from moesaic.folders import FolderLock, empty_folder, writing_remedy
from moesaic.kernels.allocator import tune_allocator
from moesaic.kernels.limits import measure_limits
from moesaic.logs import logger
from moesaic.model.load import load_model_state, load_run_config
from moesaic.model.transformer import Transformer
from moesaic.moe.router import Router
from moesaic.moe.seeds import mix_seeds
from moesaic.parallel.expert import ExpertParallel
from moesaic.parallel.world import World
from moesaic.plan.cost import count_parameters, training_flops_per_token
from moesaic.report.expert_load import WINDOW, ExpertWatch
from moesaic.report.plots import write_plots
from moesaic.report.quantities import short_number
from moesaic.report.records import (
    METRICS_FILE,
    EvaluationRecord,
    ExpertRecord,
    MetricsError,
    TrainRecord,
    read_metrics,
)
from moesaic.train.initial import InitialRun
from moesaic.train.interrupt import StopRequest
from moesaic.train.loss import Losses, language_model_loss
from moesaic.train.memory import check_memory
from moesaic.train.metrics import MetricsWriter, refuse_metrics
from moesaic.train.objective import NextToken, Objective, RunStart
from moesaic.train.optim import Optimizers, clip_gradients
from moesaic.train.provenance import known_data_times, write_provenance
from moesaic.train.schedule import learning_rate

# So many steps in a row without a finite gradient are no accident.
MOST_SKIPPED_IN_A_ROW = 10
# Plots are redrawn during the run at most this often; drawing takes a second or two.
_PLOT_EVERY_SECONDS = 60.0
# From here on drawing the first weights takes so long that it is announced.
_MANY_PARAMETERS = 500_000_000
# Rows of the vocabulary without a token: so many, and a tenth of the tokens, are more than rounding up explains.
_UNUSED_ROWS = 1024
_VOCABULARY_STEP = 128


class Display(Protocol):
    """What shows progress; report.terminal.TrainingDisplay is one."""

    def update(self, record: TrainRecord) -> None: ...

    def evaluation(self, record: EvaluationRecord, *, best_loss: float) -> None: ...

    def message(self, text: str) -> None: ...


@dataclass(frozen=True)
class TrainResult:
    """How a run ended; stopped_by names the signal that ended it early, None when it trained all its tokens.

    loss is the last record's, None when a resumed run had nothing left to do; validation_loss None when this step has
    none.
    """

    run_folder: Path
    step: int
    tokens: int
    loss: float | None
    validation_loss: float | None
    stopped_by: str | None


def train(
    config: TrainConfig,
    run_folder: str | Path,
    *,
    device: str = "auto",
    resume: bool = False,
    display: Display | None = None,
) -> TrainResult:
    """Train a model as config says, into run_folder; with resume, go on from its last good checkpoint.

    A resumed run gives, bit for bit on the CPU, what the uninterrupted one would have given.

    Where torchrun has started several processes, or torch.distributed is initialised, each of them calls it and all
    train the one model; the main one, of rank 0, writes the folder and shows the progress. The process group stays, for
    whatever comes next.

    Raises: ConfigError, DataError, CheckpointError, TrainingError, DeviceError, each saying what to do; ElsewhereError
    where another process has raised one of these.
    """
    return Trainer(config, Path(run_folder), device=device, resume=resume, display=display).run()


def refuse_taken(run_folder: Path) -> None:
    """Raise ConfigError for a folder that holds a run, where a new one was to begin."""
    if (run_folder / "config.yaml").exists() or has_checkpoints(run_folder):
        raise ConfigError(
            f"{run_folder} already holds a run; a new run needs a folder of its own; go on with it by --resume "
            f"(resume=True), or name another folder."
        )


def check_processes(config: TrainConfig, world: World) -> None:
    """Raise ConfigError unless the processes can share a config's batches and experts."""
    size = world.size
    share, rest = divmod(config.batch_size, size)
    if rest or share % min(config.micro_batch_size, share):
        raise ConfigError(
            f"batch_size ({config.batch_size}) for {size} processes and micro_batch_size ({config.micro_batch_size}) "
            f"was given; each process takes the same number of sequences, in whole micro-batches; use a batch_size "
            f"that {size} divides, and a micro_batch_size that divides each one's part of it."
        )
    world.check_degree(config.parallel.expert_degree)


class Trainer:
    """One run's state: model, optimizers, data, and where it stands.

    Of several processes that train together (parallel/world.py) each has one, and all call it alike.
    """

    def __init__(
        self,
        config: TrainConfig,
        run_folder: Path,
        *,
        device: str,
        resume: bool,
        display: Display | None,
        objective: Objective | None = None,
    ) -> None:
        """Raises: ConfigError for a student's config without an objective, which alone can read its section, and for a
        folder's name that is no UTF-8, under which safetensors and TensorBoard write nothing.
        """
        self.world = World.join()
        self.config = config
        self.run_folder = run_folder
        self.display = display
        self.resumes = resume
        self.step = 0
        self.skipped_steps = 0
        self.seconds = 0.0
        self.validation_loss: float | None = None
        self.best_loss = math.inf  # the lowest validation loss
        self.evaluated_step = 0  # whose validation_loss is
        self.objective = objective or NextToken()
        # The main process's alone, as all that is written is.
        self._lock: FolderLock | None = None
        self._is_new = False
        self._metrics: MetricsWriter | None = None
        with self.world.together():
            self._check_request(has_objective=objective is not None)
            self.device = self.world.device(device)
        tune_allocator()
        with self.world.together():
            if self.world.is_main:
                self._lock = self._hold_folder()
                self._is_new = not any(run_folder.iterdir())
        with self._leaving_nothing(), self.world.noticing_losses("start all again"):
            self._set_up()

    def _check_request(self, *, has_objective: bool) -> None:
        """Refuse what no folder and no data could mend."""
        config = self.config
        if config.distill is not None and not has_objective:
            raise ConfigError(
                f"the config has a distill section (teacher {config.distill.teacher}) and `moesaic train` trains "
                f"without a teacher; a student is trained by `moesaic distill`; use that, or set distill to null."
            )
        try:
            str(self.run_folder.absolute()).encode()
        except UnicodeEncodeError:
            raise ConfigError(
                f"the run folder is {str(self.run_folder)!r}; checkpoints need a path in UTF-8; choose another name."
            ) from None
        check_processes(config, self.world)

    def _set_up(self) -> None:
        """Check everything, build model and data, load what a resumed run has, and write the folder at last.

        Each step of it is behind all processes before any of them begins the next.
        """
        config, world = self.config, self.world
        with world.together():
            self._check()
        world.require_same({"config": config.to_dict(), "data": self.shards.fingerprint})
        with world.together():
            self._build()
        with world.together():
            objective_state = self._load()
        world.require_same({"checkpoint to resume": self.step})
        self.objective.open(RunStart(self.tokens, objective_state, self.shards, self.device, self.run_folder, world))
        if objective_state is None:
            self.objective.initialize(self.model)
        with world.together():
            self.peak_flops_per_second: float | None = None
            self.flops_per_token = training_flops_per_token(config.model, config.data.sequence_length)
            if world.is_main:
                self._begin()

    def _begin(self) -> None:
        """Write the folder, now that nothing can be refused any more."""
        config = self.config
        if config.total_steps == 1 and self._learning_rate(config.total_tokens) == 0:
            logger.warning(
                "The only step of this run has a learning rate of 0, the schedule's minimum, and leaves all weights as "
                "they are; train on more than %d tokens (--set tokens=N), or with smaller batches.",
                config.tokens_per_step,
            )
        if self.step:
            set_aside_after(self.run_folder, self.step)
        self._write_folder()
        limits = measure_limits(device=self.device.type)
        rate = limits.bf16_flops_per_second if config.precision == "bf16" else limits.fp32_flops_per_second
        self.peak_flops_per_second = rate * self.world.size or None

    def _check(self) -> None:
        """Open the data and what the weights come from, and refuse what does not go together."""
        config, run_folder, resume = self.config, self.run_folder, self.resumes
        self._check_folder()
        shards = self._open_data()
        tokenizer = shards.load_tokenizer()
        self.initial: InitialRun | None = None
        # A run that has a checkpoint of its own is resumed from it, whether or not the first run is still there.
        if config.init_from is not None and not (resume and has_checkpoints(run_folder)):
            self.initial = InitialRun.open(config.init_from, config.model, data=config.data.path, tokenizer=tokenizer)
        # With the first run's chat template, which the data's may have come without.
        self._tokenizer = tokenizer if self.initial is None else self.initial.tokenizer
        if not resume:
            self._check_own_tokenizer(self._tokenizer)
        if tokenizer.vocab_size > config.model.vocab_size:
            raise ConfigError(
                f"model.vocab_size ({config.model.vocab_size}) is less than the {tokenizer.vocab_size} tokens of "
                f"{config.data.path}; every token needs an embedding; use model.vocab_size >= {tokenizer.vocab_size}."
            )
        num_unused = config.model.vocab_size - tokenizer.vocab_size
        is_free = config.init_from is None and config.distill is None  # else another model has as many
        if is_free and num_unused >= max(_UNUSED_ROWS, tokenizer.vocab_size // 10) and self.world.is_main:
            logger.warning(
                "model.vocab_size is %d and %s has %d tokens: %d embeddings and outputs stand for none, are computed "
                "at every position, and an untrained model draws them; model.vocab_size=%d is enough.",
                config.model.vocab_size, config.data.path, tokenizer.vocab_size, num_unused,
                -(-tokenizer.vocab_size // _VOCABULARY_STEP) * _VOCABULARY_STEP,
            )  # fmt: skip
        self.shards = shards
        self.loader = TrainLoader(
            shards.train,
            sequence_length=config.data.sequence_length,
            batch_size=config.batch_size,
            seed=config.seed,
            end_of_text_id=tokenizer.end_of_text_id,
            with_documents=config.data.document_mask,
            fixed_windows=config.data.fixed_windows,
        )
        self.validation = ValidationLoader.of(config, shards.validation)
        for _ in self.validation:  # ids that are none are found now, and not at the first evaluation
            pass
        check_memory(config, self.device, self.world)

    def _build(self) -> None:
        """Make the model, of whose layers each process may have some experts alone, and the optimizers."""
        config = self.config
        if (parameters := count_parameters(config.model).total) >= _MANY_PARAMETERS and self.world.is_main:
            logger.info("Making a model of %s parameters, which takes a while.", short_number(parameters))
        with torch.device("meta"):
            self.model = Transformer(
                config.model, compute_dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32
            )
        self.parallel: ExpertParallel | None = None
        if self.world.size > 1:
            self.parallel = ExpertParallel(self.model, degree=config.parallel.expert_degree)
        self.model.to_empty(device=self.device)
        self.model.activation_checkpointing = config.activation_checkpointing
        self.model.train()
        self.optimizers = Optimizers(self.model, config.optimizer)
        self.routers = [module for module in self.model.modules() if isinstance(module, Router)]

    def _load(self) -> dict[str, Any] | None:
        """Draw the weights, or read another run's or a checkpoint's; return the objective's state of the latter."""
        if self.initial is None:
            self.model.initialize(self.config.seed)
        else:
            self.initial.load(self.model)
        return self._resume() if self.resumes else None

    def train_step(self) -> "StepResult":
        """Do one optimizer step; a step whose gradient is not finite changes nothing and is counted.

        Each process takes its part of the batch, in micro-batches.
        """
        config, world = self.config, self.world
        share = config.batch_size // world.size
        micro_size = min(config.micro_batch_size, share)
        num_micro = share // micro_size
        batch = self.loader.batch(self.step, rank=world.rank, world_size=world.size).to(self.device)
        losses: list[Losses] = []
        counts: list[Tensor] = []
        for micro in range(num_micro):
            # A function of the step and the micro-batch's place in it, so that no generator's state need be saved.
            seed = mix_seeds(mix_seeds(config.seed, self.step), world.rank * num_micro + micro)
            torch.manual_seed(seed)  # of dropout
            rows = batch.rows(micro * micro_size, (micro + 1) * micro_size)
            micro_losses = language_model_loss(
                self.model,
                rows,
                seed=seed,
                batch_counts=partial(self._batch_counts, counts),
                head=self.objective.head(rows, tokens=self.tokens),
            )
            (micro_losses.total / num_micro).backward()
            counts = _added(counts, [statistics.tokens_per_expert for statistics in micro_losses.moe])
            losses.append(replace(micro_losses, total=micro_losses.total.detach()))  # whose graph has served
        counts = world.sum(counts)
        gradient_norm = self._clip_gradients()
        tokens_after = self.tokens + config.tokens_per_step
        rate = self._learning_rate(tokens_after)
        is_finite = math.isfinite(gradient_norm)
        if is_finite:
            self.optimizers.step(rate)
            for router, layer_counts_of_step in zip(self.routers, counts, strict=True):
                if router.score_correction_bias is not None:
                    router.update_score_correction(layer_counts_of_step)
        self.optimizers.zero_grad()
        self.step += 1
        return StepResult(losses, counts, gradient_norm, rate, is_finite)

    def _batch_counts(self, earlier: list[Tensor], own: list[Tensor]) -> list[Tensor]:
        """Return each layer's tokens of this micro-batch on every process, and of all their earlier ones."""
        return self.world.sum(_added(earlier, own))

    def _clip_gradients(self) -> float:
        """Make the gradients those of the whole batch, clip them, and return the norm that they had."""
        most = self.config.optimizer.max_gradient_norm
        if self.parallel is None:
            return clip_gradients(self.model, most)
        self.parallel.average_gradients()
        return float(self.parallel.clip_gradients(math.inf if most is None else most))

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return self.step * self.config.tokens_per_step

    @property
    def steps_left(self) -> int:
        return max(0, self.config.total_steps - self.step)

    def trial(self, steps: int, objective: Objective) -> float:
        """Return the validation loss after so many more steps with another objective; then be exactly as before.

        Memory: another copy of the weights and of the optimizers' state.
        """
        weights = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        moments = self.optimizers.copy_state()
        step, own = self.step, self.objective
        self.objective = objective
        try:
            for _ in range(steps):
                self.train_step()
            return validation_loss(self.model, self.validation, device=self.device, world=self.world)
        finally:
            self.step, self.objective = step, own
            self.optimizers.zero_grad()
            self.model.load_state_dict(weights)
            self.optimizers.restore_state(moments)

    def say(self, message: str) -> None:
        """Record an event, and show it."""
        self._event(message)

    def run(self) -> TrainResult:
        """Train to the end or to a signal, and let go of the run folder."""
        with self._leaving_nothing(), self.world.noticing_losses():
            result = self._run()
        self._release()
        return result

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    @contextmanager
    def _leaving_nothing(self) -> Iterator[None]:
        """Let go of the run folder where something goes wrong; a new one, where no step was taken, is as it was."""
        try:
            yield
        except BaseException:
            if self._is_new and not self.step:
                with suppress(OSError):
                    empty_folder(self.run_folder)
            self._release()
            raise

    def _run(self) -> TrainResult:
        config = self.config
        window = Window()
        watch = ExpertWatch()
        skipped_in_a_row = 0
        last_plot = time.perf_counter()
        last_saved = self.step  # a resumed run stands on a checkpoint
        loss: float | None = None
        with ExitStack() as stack:
            if self.world.is_main:
                resume_step = self.step if self.resumes else None
                self._metrics = stack.enter_context(
                    MetricsWriter(self.run_folder, resume_step=resume_step, config=config.to_dict())
                )
                if self.step:
                    self._event(f"resumed from step {self.step}")
                    # What they show is told already; the last records are kept one by one in any case.
                    for record in read_metrics(self.run_folder, most_records=WINDOW).train[-WINDOW:]:
                        watch.update(record.moe)
            stop = stack.enter_context(StopRequest(self.world))
            while self.step < config.total_steps and stop.agreed() is None:
                started = time.perf_counter()
                result = self.train_step()
                window.add(result)
                elapsed = time.perf_counter() - started
                self.seconds += elapsed
                window.seconds += elapsed
                skipped_in_a_row = 0 if result.is_finite else skipped_in_a_row + 1
                if not result.is_finite:
                    self._skip(result, skipped_in_a_row)
                is_last = self.step >= config.total_steps
                is_checkpoint = is_last or self.step % config.checkpoint_every_steps == 0
                # Every log_every_steps, but the first ones soon: a person is waiting to see it move. And before every
                # checkpoint, so that a run resumed there has the records of the unbroken one.
                is_record = self.step % config.log_every_steps == 0 or self.step in (1, 2, 5)
                if is_checkpoint or is_record or stop.agreed() is not None:
                    loss = self._report(window, result, watch)
                    window = Window()
                if is_checkpoint or self.step % config.evaluation_every_steps == 0:
                    self._evaluate()
                if is_checkpoint and self._save(must_succeed=is_last):
                    last_saved = self.step
                if is_checkpoint and not is_last and time.perf_counter() - last_plot > _PLOT_EVERY_SECONDS:
                    self._plot()
                    last_plot = time.perf_counter()
            stopped_by = stop.agreed() if self.step < config.total_steps else None
            if stopped_by is not None:
                if window.steps:  # it came during an evaluation
                    loss = self._report(window, result, watch)
                self._event(f"{stopped_by}: stopping at step {self.step}, with a checkpoint to resume from")
                if self.evaluated_step != self.step:
                    self.validation_loss = None
                if last_saved != self.step:
                    self._save(must_succeed=True)
        self._plot()
        if stopped_by is None and loss is not None:
            with self.world.together():
                self._check_end(loss)
        return TrainResult(self.run_folder, self.step, self.tokens, loss, self.validation_loss, stopped_by)

    def _skip(self, result: "StepResult", in_a_row: int) -> None:
        self.skipped_steps += 1
        (loss,) = self.world.mean([result.cross_entropy])
        self._event(f"step {self.step} skipped: its gradient norm is {result.gradient_norm} (loss {loss:.4g})")
        with self.world.together():
            if in_a_row >= MOST_SKIPPED_IN_A_ROW:
                raise TrainingError(
                    f"the last {in_a_row} steps had no finite gradient; training requires finite losses and would meet "
                    f"the same steps again if resumed ({self._describe_last()}); start a new run with a lower "
                    f"schedule.learning_rate or precision=fp32, or look at the data around step {self.step}."
                )

    def _check_end(self, loss: float) -> None:
        """Raise TrainingError where all steps are done and the model gives no numbers."""
        name, value = ("loss", loss) if self.validation_loss is None else ("validation loss", self.validation_loss)
        if not math.isfinite(value):
            raise TrainingError(
                f"the run ended at step {self.step} with a {name} of {value}, {self.skipped_steps} steps skipped; a "
                f"finite one is required; start a new run with a lower schedule.learning_rate or "
                f"optimizer.weight_decay, or precision=fp32."
            )

    def _describe_last(self) -> str:
        infos = list_checkpoints(self.run_folder)
        return f"the last checkpoint is of step {infos[-1].step}" if infos else "there is no checkpoint yet"

    def _event(self, message: str) -> None:
        if self._metrics is None:
            return
        self._metrics.event(self.step, message)
        if self.display is not None:
            self.display.message(message)
        else:
            logger.info("%s", message)

    def _report(self, window: "Window", result: "StepResult", watch: ExpertWatch) -> float:
        """Write and show the record of a window's steps; return its loss."""
        record = self._record(window, result)
        if self._metrics is None:
            return record.loss
        self._metrics.train(record)
        if self.display is not None:
            self.display.update(record)
        for warning in watch.update(record.moe):
            self._event(warning.message)
        return record.loss

    def _record(self, window: "Window", result: "StepResult") -> TrainRecord:
        config = self.config
        rate = window.steps * config.tokens_per_step / max(window.seconds, 1e-9)
        flops = rate * self.flops_per_token
        means = window.means(self.world)
        return TrainRecord(
            step=self.step,
            tokens=self.tokens,
            seconds=self.seconds,
            loss=means.cross_entropy,
            balance_loss=means.balance,
            z_loss=means.z,
            learning_rate=result.learning_rate,
            gradient_norm=result.gradient_norm,
            tokens_per_second=rate,
            flops_per_second=flops,
            share_of_peak=flops / self.peak_flops_per_second if self.peak_flops_per_second else None,
            skipped_steps=self.skipped_steps,
            moe=window.experts(config.model.moe_layers, means),
            objective=window.terms(self.world),
        )

    def _evaluate(self) -> None:
        self.validation_loss = validation_loss(self.model, self.validation, device=self.device, world=self.world)
        self.evaluated_step = self.step
        if self.validation_loss < self.best_loss:  # which NaN is not
            self.best_loss = self.validation_loss
        record = EvaluationRecord(
            step=self.step,
            tokens=self.tokens,
            seconds=self.seconds,
            loss=self.validation_loss,
            sequences=self.validation.num_sequences,
        )
        if self._metrics is not None:
            self._metrics.evaluation(record)
            if self.display is not None:
                self.display.evaluation(record, best_loss=self.best_loss)
        self.objective.evaluated(self)

    def _learning_rate(self, tokens: int) -> float:
        return learning_rate(self.config.schedule, tokens, total_tokens=self.config.tokens)

    def _plot(self) -> None:
        """Redraw the plots; a full disk costs them, not the run."""
        if not self.world.is_main:
            return
        try:
            write_plots(self.run_folder, schedule=self._learning_rate)
        except (OSError, DataError, MetricsError) as error:
            logger.warning("no plots: %s (`moesaic inspect` shows the same)", error)

    def _save(self, *, must_succeed: bool) -> bool:
        """Write a checkpoint; when a periodic one fails (a full disk), say so, train on from memory, return False.

        It is one process's, of all experts, whatever the number of processes that train.
        """
        gather = TensorStream.of if self.parallel is None else self.parallel.gather
        model, optimizer = gather(self.model.state_dict()), gather(self.optimizers.named_state())
        is_saved = False
        with self.world.together():
            try:
                if self.world.is_main:
                    is_saved = self._write_checkpoint(model, optimizer, must_succeed=must_succeed)
            finally:
                # The others send them in any case.
                model.drop()
                optimizer.drop()
        return self.world.main_says(is_saved)

    def _write_checkpoint(self, model: TensorStream, optimizer: TensorStream, *, must_succeed: bool) -> bool:
        loss = self.validation_loss
        metadata: dict[str, Any] = {
            "tokens": self.tokens,
            "seconds": self.seconds,
            "skipped_steps": self.skipped_steps,
            "validation_loss": loss if loss is not None and math.isfinite(loss) else None,
            "model": self.config.model.to_dict(),
            "data": self.loader.state_dict(),
            "objective": self.objective.state(),
        }
        try:
            if not (self.run_folder / "config.yaml").exists():
                self._event(
                    f"{self.run_folder} was moved or deleted; a new one of this name has what comes from here on"
                )
                self._write_folder()
            save_checkpoint(self.run_folder, self.step, model=model, optimizer=optimizer, metadata=metadata)
        except (CheckpointError, TrainingError) as error:
            if must_succeed:
                raise
            self._event(f"no checkpoint: {error} Training goes on.")
            return False
        prune_checkpoints(self.run_folder, keep_last=self.config.checkpoint.keep_last)
        return True

    def _open_data(self) -> ShardSet:
        path, source = self.config.data.path, self.config.init_from
        if not path or (source is not None and not Path(path).is_dir()):
            option = "" if source is None else f" --tokenizer {run_folder_of(source) or source}"
            given = f"data.path ({path}) is no folder here" if path else "data.path is empty"
            raise DataError(
                f"{given}; training requires text prepared for it; name it with --data DIR (data.path), a folder that "
                f"`moesaic prepare SOURCE --output DIR{option}` writes."
            )
        return ShardSet.open(path)

    def _hold_folder(self) -> FolderLock:
        """Keep other processes out of the run folder from here on; _check_folder may trust what it sees."""
        try:
            return FolderLock(self.run_folder)
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> TrainingError:
        return TrainingError(
            f"{self.run_folder} cannot be written ({error.strerror or error}); a run needs a folder with room for its "
            f"checkpoints; {writing_remedy(error)}, or name another folder."
        )

    def _check_folder(self) -> None:
        """Refuse a new run where there is one, and resuming where there is none or another."""
        exists = (self.run_folder / "config.yaml").exists()
        if self.resumes and not exists:
            raise CheckpointError(
                f"{self.run_folder} holds no run to resume; a folder with config.yaml is required; start it without "
                f"--resume, or check the path."
            )
        if self.resumes:
            self._check_trainable()
            self._check_same_run()
        else:
            refuse_taken(self.run_folder)
            refuse_metrics(self.run_folder)

    def _check_own_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Refuse a folder with the tokenizer of something else, over which a new run would write its own."""
        if (name := tokenizer.would_replace(self.run_folder)) is not None:
            raise ConfigError(
                f"{self.run_folder} holds a {name} that is not this run's; a new run writes its own there; name "
                f"another folder."
            )

    def _check_trainable(self) -> None:
        infos = list_checkpoints(self.run_folder)
        why = "training requires the weights before they were rounded, and the optimizer's state"
        for info in infos:
            require_unquantized(info, why, named=str(self.run_folder), do="resume")
        if infos and not any("optimizer.safetensors" in info.files for info in infos):
            raise CheckpointError(
                f"{self.run_folder} holds weights and no optimizer's state; resuming requires both, and a run that was "
                f"converted has only its weights; start a new run from it: moesaic train {self.run_folder} --output "
                f"NEW."
            )

    def _check_same_run(self) -> None:
        before = load_run_config(self.run_folder)
        changed = differing(self.config, before, verb="was", ignore=self.config.may_change_on_resume)
        if changed:
            raise ConfigError(
                f"{changed}: not as in {self.run_folder / 'config.yaml'}; a resumed run must take the same steps; give "
                f"the settings it was started with, or start a new run in another folder."
            )

    def _write_folder(self) -> None:
        """Write what a run folder holds besides checkpoints and metrics; every file is replaced whole."""
        try:
            is_its_own = self.initial is not None or self.config.init_from is None
            if is_its_own or not (self.run_folder / TOKENIZER_NAME).is_file():
                self._tokenizer.save(self.run_folder)
            write_provenance(
                self.run_folder,
                data_path=self.config.data.path,
                data_fingerprint=self.shards.fingerprint,
                data_times=self.shards.times(),
                device=self.device,
                processes=self.world.size,
                init_from=None if self.initial is None else self.initial.record(),
                objective=self.objective.record(),
            )
            write_config(self.config, self.run_folder / "config.yaml")
        except OSError as error:
            raise self._unwritable(error) from None

    def _resume(self) -> dict[str, Any] | None:
        """Go on from the last good checkpoint; return the objective's state there, None where there is none yet."""
        found = last_good(self.run_folder)
        if found is None:
            if self.world.is_main:
                logger.info("%s has no checkpoint yet; starting from step 0.", self.run_folder)
            return None
        info, model, optimizer = found
        try:
            data, objective = dict(info.metadata["data"]), dict(info.metadata.get("objective", {}))
            self.skipped_steps, self.seconds = int(info.metadata["skipped_steps"]), float(info.metadata["seconds"])
            if not math.isfinite(self.seconds):
                raise ValueError(f"{self.seconds} seconds")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(
                f"the manifest.json in {info.path} does not say how far the training was ({error!r}); data, "
                f"skipped_steps and seconds as `moesaic train` writes them are required; restore a backup, or delete "
                f"the folder, so that the step before it is taken."
            ) from None
        self.loader.check_state(data)
        if self.world.local_rank == 0:
            self.shards.verify(known_times=known_data_times(self.run_folder))
        load_model_state(self.model, model, info)
        self.optimizers.load_named_state(optimizer if self.parallel is None else self.parallel.own_state(optimizer))
        self.step = info.step
        if self.config.total_steps < self.step:
            raise ConfigError(
                f"tokens is {self.config.tokens:,}, and {self.run_folder} has been trained on {self.tokens:,} already; "
                f"at least these are required to resume it; give --set tokens=N as it was started with, or more."
            )
        if (self.run_folder / METRICS_FILE).exists():
            evaluations = read_metrics(self.run_folder, most_records=64).evaluation
            earlier = (each.loss for each in evaluations if each.step <= self.step)
            self.best_loss = min(filter(math.isfinite, earlier), default=math.inf)
        self.validation_loss, self.evaluated_step = info.validation_loss, info.step
        return objective


@dataclass(frozen=True)
class StepResult:
    """One step's losses by micro-batch, each MoE layer's tokens_per_expert (E,), norm, rate, and whether it counted.

    Of several processes the losses are this one's, all else is the same on each.
    """

    losses: list[Losses]
    counts: list[Tensor]
    gradient_norm: float
    learning_rate: float
    is_finite: bool

    @property
    def cross_entropy(self) -> float:
        return float(torch.stack([losses.cross_entropy for losses in self.losses]).mean())


def _added(counts: list[Tensor], more: list[Tensor]) -> list[Tensor]:
    return [a + b for a, b in zip(counts, more, strict=True)] if counts else more


@dataclass(frozen=True)
class WindowMeans:
    """What a record says of a window's micro-batches; drop_rate and entropy of each MoE layer."""

    cross_entropy: float
    balance: float
    z: float
    drop_rate: tuple[float, ...]
    entropy: tuple[float, ...]


class Window:
    """The steps since the last record; tensors are read back only when a record is made."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._results: list[StepResult] = []

    @property
    def steps(self) -> int:
        return len(self._results)

    def add(self, result: StepResult) -> None:
        self._results.append(result)

    def means(self, world: World) -> "WindowMeans":
        """Return the means over all micro-batches of all processes, which ask for them together."""
        losses = self._losses()
        names = [("drop_rate", place) for place in range(len(losses[0].moe))]
        names += [("entropy", place) for place in range(len(losses[0].moe))]
        of_losses = [[getattr(each, name) for each in losses] for name in ("cross_entropy", "balance", "z")]
        of_layers = [[getattr(each.moe[place], name) for each in losses] for name, place in names]
        values = world.mean([float(torch.stack(each).mean()) for each in of_losses + of_layers])
        half = 3 + len(losses[0].moe)
        return WindowMeans(values[0], values[1], values[2], tuple(values[3:half]), tuple(values[half:]))

    def terms(self, world: World) -> dict[str, float]:
        """Return the objective's terms, means over all processes' micro-batches that had them; alpha is the last."""
        values: dict[str, list[Tensor]] = {}
        for losses in self._losses():
            for name, value in losses.terms.items():
                values.setdefault(name, []).append(value)
        means = [float(each[-1] if name == "alpha" else torch.stack(each).mean()) for name, each in values.items()]
        return dict(zip(values, world.mean(means), strict=True))

    def experts(self, layers: tuple[int, ...], means: "WindowMeans") -> ExpertRecord | None:
        if not layers:
            return None
        totals = [torch.stack(counts).sum(0) for counts in zip(*(each.counts for each in self._counted()), strict=True)]
        loads = [counts.double() / counts.sum().clamp_min(1) for counts in totals]
        return ExpertRecord(
            layers=layers,
            load=tuple(tuple(load.tolist()) for load in loads),
            drop_rate=means.drop_rate,
            entropy=means.entropy,
        )

    def _losses(self) -> list[Losses]:
        return [losses for result in self._counted() for losses in result.losses]

    def _counted(self) -> list[StepResult]:
        """Without the skipped steps, whose NaN would hide the others' losses; all of them when all were skipped."""
        return [result for result in self._results if result.is_finite] or self._results
