"""What a student learns from a teacher: the `distill` section of its run's config. Defaults are the paper's.

Source: DeepSpeed-MoE (arXiv 2201.05596), section 4.2: alpha 1, temperature 1, the KL term ended early. Its scripts end
it after a number of steps; a share of the tokens says the same of a run of any length.
"""

from typing import Literal

from pydantic import Field, model_validator

from moesaic.config.base import Config
from moesaic.errors import ConfigError

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]
DistillSchedule = Literal["none", "throughout", "staged", "linear", "automatic"]


class DistillConfig(Config):
    """A teacher, how its distribution enters the loss (cross-entropy + alpha * T^2 * divergence), and until when."""

    teacher: str = Field(min_length=1, description="RUN or RUN@step; a run of the student's tokenizer")
    teacher_precision: Literal["bf16", "int8", "fp32"] = Field(
        default="bf16", description="of the teacher's matrices; a quantised run keeps its own"
    )
    alpha: float = Field(default=1.0, gt=0, description="weight of the divergence, while there is one")
    temperature: float = Field(default=1.0, gt=0, description="T: both models' logits are divided by it")
    divergence: Divergence = Field(
        default="forward_kl", description="KL(teacher || student), KL(student || teacher), or Jensen-Shannon"
    )
    schedule: DistillSchedule = Field(
        default="staged",
        description="none: cross-entropy alone; throughout; staged: alpha becomes 0 after stop_fraction of the tokens; "
        "linear: alpha falls to 0 until then; automatic: ends where a trial shows that it no longer helps",
    )
    stop_fraction: float = Field(default=0.70, gt=0, le=1, description="staged and linear: share of the tokens")
    trial_steps: int = Field(
        default=20, ge=1, description="automatic: steps with and without the teacher that an evaluation compares"
    )
    cache: str | None = Field(
        default=None, description="a folder of the teacher's likeliest tokens, read instead of running the teacher"
    )
    init: Literal["scratch", "teacher"] = Field(
        default="scratch", description="the student's weights at first: drawn, or copies of the teacher's layers"
    )
    layer_map: tuple[int, ...] | None = Field(
        default=None, description="init = teacher: for each layer of the student, the teacher's; null: evenly spread"
    )

    @model_validator(mode="after")
    def _check(self) -> "DistillConfig":
        if self.schedule == "none":
            for name in ("teacher_precision", "alpha", "temperature", "divergence", "cache"):
                self._refuse(name, needs="distill.schedule other than none")
        if self.schedule not in ("staged", "linear"):
            self._refuse("stop_fraction", needs="distill.schedule = staged or linear")
        if self.schedule != "automatic":
            self._refuse("trial_steps", needs="distill.schedule = automatic")
        if self.init != "teacher":
            self._refuse("layer_map", needs="distill.init = teacher")
        if self.cache is not None and self.divergence != "forward_kl":
            raise ConfigError(
                f"distill.divergence ({self.divergence}) is asked of a cached teacher (distill.cache), which holds its "
                f"likeliest tokens and the rest as one number; only forward_kl can be computed of these; use "
                f"forward_kl, or set distill.cache to null to run the teacher."
            )
        return self

    def _refuse(self, name: str, *, needs: str) -> None:
        self._refuse_without_effect(f"distill.{name}", name, needs=needs)

    def alpha_at(self, tokens: int, *, total_tokens: int) -> float:
        """Return alpha of the step that starts when `tokens` of `total_tokens` have been trained on.

        Of the automatic schedule, the value before it has ended.
        """
        share = tokens / total_tokens
        if self.schedule == "none" or (self.schedule == "staged" and share >= self.stop_fraction):
            return 0.0
        if self.schedule == "linear":
            return self.alpha * max(0.0, 1.0 - share / self.stop_fraction)
        return self.alpha
