"""The training run's configuration. Lengths of training are in tokens, sizes of batches in sequences."""

from typing import Any, Literal

from pydantic import Field, model_validator

from moesaic.config.base import Config
from moesaic.config.distill import DistillConfig
from moesaic.config.model import ModelConfig
from moesaic.errors import ConfigError


class DataConfig(Config):
    """Which token shards to read and how to cut them into sequences."""

    path: str = Field(
        description="a folder written by `moesaic prepare SOURCE --output DIR`; `--data DIR` names it too"
    )
    sequence_length: int = Field(default=1024, ge=2, description="tokens per sequence")
    document_mask: bool = Field(default=False, description="keep attention inside documents")
    fixed_windows: bool = Field(
        default=False, description="cut the text at the same places in every epoch and for every seed"
    )


class OptimizerConfig(Config):
    """AdamW, or Muon for the matrices with AdamW for the rest."""

    name: Literal["adamw", "muon"] = "adamw"
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    epsilon: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(
        default=0.1, ge=0, description="on matrices; norms, biases and the router have none of it"
    )
    router_weight_decay: float = Field(default=0.0, ge=0)
    max_gradient_norm: float | None = Field(default=1.0, gt=0, description="null: no clipping")
    momentum: float = Field(default=0.95, ge=0, lt=1, description="Muon only")

    @model_validator(mode="after")
    def _check(self) -> "OptimizerConfig":
        if self.name != "muon":
            self._refuse_without_effect("optimizer.momentum", "momentum", needs="optimizer.name = muon")
        return self


class ScheduleConfig(Config):
    """Learning rate against tokens: linear warm-up, then cosine, or warm-up, stable, decay (WSD)."""

    kind: Literal["cosine", "wsd"] = "cosine"
    learning_rate: float = Field(default=3e-4, gt=0, description="peak")
    min_learning_rate: float = Field(default=0.0, ge=0)
    warmup_tokens: int = Field(default=0, ge=0)
    decay_tokens: int | None = Field(
        default=None,
        ge=1,
        description="cosine: where the minimum is reached, counted from the start (null: at the last token); "
        "wsd: length of the last, decaying part (null: a tenth of all tokens)",
    )

    @model_validator(mode="after")
    def _check(self) -> "ScheduleConfig":
        if self.min_learning_rate > self.learning_rate:
            raise ConfigError(
                f"schedule.min_learning_rate ({self.min_learning_rate}) is more than schedule.learning_rate "
                f"({self.learning_rate}); the rate decays from the peak to the minimum; swap or lower it."
            )
        return self


# By default, tokens trained on between two validations for each that one reads: a forward pass is a third of a step, so
# that they take a twelfth of a run's time; the one at the end of a very short run may take more.
_TRAINED_PER_VALIDATED = 4


class EvaluationConfig(Config):
    """The validation loss during training: dropless, no noise, the same sequences every time."""

    every_tokens: int | None = Field(
        default=None, ge=1, description="null: by the same rule as checkpoints; before every checkpoint in any case"
    )
    sequences: int = Field(default=64, ge=1, description="validation sequences a time, at most what there is")


class CheckpointConfig(Config):
    """When checkpoints are written and which are kept (the last ones, and always the best)."""

    every_tokens: int | None = Field(
        default=None,
        ge=1,
        description="null: ten times during the run, in a short one less often: a validation reads at most a quarter "
        "of the tokens between two",
    )
    keep_last: int = Field(default=2, ge=1)


class ParallelConfig(Config):
    """How several processes share a model: the experts are spread over them, all else each of them has."""

    expert_degree: int | None = Field(
        default=None,
        ge=1,
        description="processes over which a layer's experts are spread, a divisor of their number; a layer takes as "
        "many of these as share its experts evenly (null: all processes)",
    )


class TrainConfig(Config):
    """Everything a run depends on; written into the run folder as config.yaml."""

    model: ModelConfig
    data: DataConfig
    tokens: int = Field(ge=1, description="to train on, in all; rounded up to whole steps")
    init_from: str | None = Field(
        default=None,
        description="RUN or RUN@step: a run whose weights training starts from; its model must be the same",
    )
    batch_size: int = Field(default=32, ge=1, description="sequences per optimizer step, over all ranks")
    micro_batch_size: int = Field(default=None, ge=1, description="sequences per forward pass; null: batch_size")  # type: ignore[assignment]
    precision: Literal["bf16", "fp32"] = Field(default="bf16", description="of matrix work; master weights are fp32")
    activation_checkpointing: bool = False
    seed: int = Field(default=0, ge=0, lt=2**64)
    log_every_steps: int = Field(default=10, ge=1)
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    parallel: ParallelConfig = ParallelConfig()
    distill: DistillConfig | None = Field(default=None, description="of a student that `moesaic distill` trains")

    @model_validator(mode="before")
    @classmethod
    def _fill_derived(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("micro_batch_size") is None:
            values = {**values, "micro_batch_size": values.get("batch_size", cls.model_fields["batch_size"].default)}
        return values

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        if self.batch_size % self.micro_batch_size:
            raise ConfigError(
                f"batch_size ({self.batch_size}) is not a multiple of micro_batch_size ({self.micro_batch_size}); a "
                f"step accumulates whole micro-batches; use micro_batch_size that divides {self.batch_size}."
            )
        if self.data.sequence_length > self.model.max_positions:
            raise ConfigError(
                f"data.sequence_length ({self.data.sequence_length}) is more than model.max_positions "
                f"({self.model.max_positions}); the model has no positions beyond; shorten the sequences or raise "
                f"model.max_positions."
            )
        self._check_lengths(self.schedule)
        if self.distill is not None:
            self._check_distill(self.distill)
        return self

    def _check_distill(self, distill: DistillConfig) -> None:
        if self.init_from is not None:
            raise ConfigError(
                f"init_from ({self.init_from}) and a distill section are both given; a student's weights are drawn, or "
                f"come from its teacher; set init_from to null, and distill.init = teacher for the latter."
            )
        if distill.cache is not None and not self.data.fixed_windows:
            raise ConfigError(
                f"data.fixed_windows is false and distill.cache ({distill.cache}) is given; a cached teacher knows the "
                f"windows of one way to cut the text; set data.fixed_windows to true."
            )
        if distill.layer_map is not None and len(distill.layer_map) != self.model.num_layers:
            raise ConfigError(
                f"distill.layer_map names {len(distill.layer_map)} layers for a student of {self.model.num_layers}; "
                f"one of the teacher's layers for each is required; name {self.model.num_layers}."
            )

    def _check_lengths(self, schedule: ScheduleConfig) -> None:
        """Name every fault at once, with what to set: a short run of a preset has two."""
        warmup, decay = schedule.warmup_tokens, schedule.decay_tokens
        faults, settings = [], []
        if warmup >= self.tokens:
            faults.append(f"schedule.warmup_tokens ({warmup}) is not less than tokens ({self.tokens})")
            warmup = self.tokens // 20
            settings.append(f"--set schedule.warmup_tokens={warmup}")
        if decay is not None and schedule.kind == "cosine" and decay <= warmup:
            faults.append(f"schedule.decay_tokens ({decay}) is not more than schedule.warmup_tokens ({warmup})")
            settings.append("--set schedule.decay_tokens=null (the minimum at the last token)")
        if decay is not None and schedule.kind == "wsd" and warmup + decay > self.tokens:
            faults.append(
                f"schedule.decay_tokens ({decay}) is more than the {self.tokens - warmup} tokens after a warm-up of "
                f"{warmup}"
            )
            settings.append("--set schedule.decay_tokens=null (a tenth of all tokens)")
        if faults:
            raise ConfigError(
                f"{', and '.join(faults)}; the rate rises in the warm-up, falls after it, and both need room in the "
                f"training; use {' '.join(settings)}, or train on more tokens."
            )

    def may_change_on_resume(self, key: str) -> bool:
        """Whether a resumed run may change a.b: how it reports and saves and how long it trains; no more of a step."""
        free = [
            "checkpoint.keep_last",
            "log_every_steps",
            "tokens",
            "activation_checkpointing",
            "data.path",
            "parallel",
        ]
        if self.distill is not None:
            # Where teacher and cache lie; that they are the same, the objective's state says.
            free += ["distill.teacher", "distill.cache"]
        # Of the automatic schedule, evaluations decide how the training goes on, and each checkpoint comes after one.
        if self.distill is None or self.distill.schedule != "automatic":
            free += ["evaluation", "checkpoint"]
        return any(key == name or key.startswith(f"{name}.") for name in free)

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.data.sequence_length

    @property
    def total_steps(self) -> int:
        return -(-self.tokens // self.tokens_per_step)

    @property
    def total_tokens(self) -> int:
        """What is trained on: tokens, rounded up to whole steps."""
        return self.total_steps * self.tokens_per_step

    @property
    def evaluation_every_steps(self) -> int:
        return self._steps(self.evaluation.every_tokens)

    @property
    def checkpoint_every_steps(self) -> int:
        return self._steps(self.checkpoint.every_tokens)

    def _steps(self, every_tokens: int | None) -> int:
        if every_tokens is None:
            validated = self.evaluation.sequences * self.data.sequence_length
            rarest = -(-_TRAINED_PER_VALIDATED * validated // self.tokens_per_step)
            most = max(1, min(10, self.total_steps // max(1, rarest)))
            intervals = (-(-self.total_steps // times) for times in range(most, 0, -1))
            # One that comes within half of them before the end, where there is one in any case, is wasted.
            return next(every for every in intervals if 2 * (self.total_steps % every or every) >= every)
        return max(1, round(every_tokens / self.tokens_per_step))
