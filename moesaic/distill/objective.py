"""What a student learns: the objective that `moesaic distill` gives the training loop.

Alpha is a function of the tokens (config/distill.py); the automatic schedule adds one bit of state, whether it has
ended, which every checkpoint keeps. Once alpha is 0 for good the teacher is let go, and a resumed run does not need it.
"""

from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from moesaic.config.distill import DistillConfig
from moesaic.config.train import TrainConfig
from moesaic.data.loader import Batch, ValidationLoader
from moesaic.data.shards import ShardSet
from moesaic.distill.cache import CachedTeacher, CacheKey
from moesaic.distill.loss import Teacher, distillation_loss
from moesaic.distill.student import (
    CopiedLayer,
    check_copyable,
    copy_layers,
    default_map,
    expert_loads,
    has_fewer_experts,
)
from moesaic.distill.teacher import LiveTeacher, TeacherRun
from moesaic.errors import CheckpointError, ConfigError
from moesaic.logs import logger
from moesaic.model.transformer import Transformer
from moesaic.parallel.world import World
from moesaic.train.loss import Head, HeadLoss, next_token_loss
from moesaic.train.objective import NextToken, RunStart, Trials


class TeacherSource(Protocol):
    """A teacher, running or cached."""

    def targets(self, batch: Batch) -> Teacher: ...


@dataclass
class DistillationState:
    """What of a distillation a checkpoint keeps. cache_top_k None: the teacher runs."""

    teacher_sha256: str
    teacher_step: int | None = None
    has_ended: bool = False
    cache_top_k: int | None = None

    def alpha(self, config: TrainConfig, tokens: int) -> float:
        """Return alpha of the step that starts at `tokens`."""
        assert config.distill is not None
        return 0.0 if self.has_ended else config.distill.alpha_at(tokens, total_tokens=config.tokens)

    def needs_teacher(self, config: TrainConfig, tokens: int) -> bool:
        """Whether any step from `tokens` on hears the teacher; alpha never rises again."""
        return tokens < config.tokens and self.alpha(config, tokens) > 0


def check_cache_top_k(given: int | None, before: int | None) -> None:
    """Raise ConfigError unless a resumed student hears its teacher as before: None, running; else the cache's top_k."""
    if given != before:
        now, then = ("no cache" if top_k is None else f"a cache of {top_k} tokens" for top_k in (given, before))
        raise ConfigError(
            f"distill.cache is {now} and this run began with {then} of each position; a resumed student learns from "
            f"the same predictions; give the same cache (or none), or start a new run."
        )


def _state_of(start: RunStart) -> DistillationState:
    """Return what the checkpoint of a resumed run says. Raises: CheckpointError for what no distillation wrote."""
    try:
        state = DistillationState(**(start.state or {}))
        kinds = [type(each) for each in asdict(state).values()]
        if kinds[0] is not str or kinds[2] is not bool or not {kinds[1], kinds[3]} <= {int, type(None)}:
            raise TypeError(f"{start.state}")
        return state
    except TypeError as error:
        raise CheckpointError(
            f"the last checkpoint in {start.folder} does not say how far the distillation was ({error}); the objective "
            f"that `moesaic distill` writes into its manifest.json is required; restore a backup, or delete its "
            f"folder, so that the step before it is taken."
        ) from None


class Distillation:
    """The Objective of one student's run."""

    def __init__(self, config: TrainConfig) -> None:
        assert config.distill is not None
        self._config = config
        self._distill: DistillConfig = config.distill
        self._run: TeacherRun | None = None
        self._shards: ShardSet | None = None
        self._model: Transformer | None = None
        self._copied: tuple[CopiedLayer, ...] = ()
        self._source: TeacherSource | None = None
        self._state = DistillationState("")
        self._device = torch.device("cpu")
        self._world = World()

    def open(self, start: RunStart) -> None:
        """Open the teacher and check that it fits, unless the resumed run needs it no more.

        Raises: CheckpointError for a teacher that is not there or not the one that the run began with; ConfigError and
        DataError for one that does not fit the student.
        """
        self._device, self._shards, self._world = start.device, start.shards, start.world
        with start.world.together():
            run = self._find(start)
        if run is None:
            return
        run = run.agreed(start.world, start.folder)
        with start.world.together():
            self._check(run, start)
            self._run = run.keep(start.folder) if start.world.is_main else run
        with start.world.together():
            self._run = self._run.kept_in(start.folder)
        if self._source is None and self._state.needs_teacher(self._config, start.tokens):
            self._load()

    def _find(self, start: RunStart) -> TeacherRun | None:
        """Return the teacher, None where the resumed run needs it no more."""
        if start.state is None:
            return TeacherRun.open(self._distill.teacher)
        self._state = _state_of(start)
        if not self._state.needs_teacher(self._config, start.tokens):
            return None
        sha256, step = self._state.teacher_sha256, self._state.teacher_step
        return TeacherRun.reopen(self._distill.teacher, start.folder, sha256=sha256, step=step)

    def _check(self, run: TeacherRun, start: RunStart) -> None:
        """Check that it fits, and open its cache."""
        distill, config = self._distill, self._config
        run.check(
            config.model,
            data=config.data.path,
            tokenizer=start.shards.load_tokenizer(),
            sequence_length=config.data.sequence_length,
        )
        run.check_precision(distill.teacher_precision)
        if start.state is None and distill.init == "teacher":
            check_copyable(run, config.model, self._layer_map(run))
        top_k = None
        if distill.cache is not None:
            cached = CachedTeacher.open(distill.cache, CacheKey.of(config, run, start.shards), device=start.device)
            self._source, top_k = cached, cached.report.top_k
        if start.state is not None:
            check_cache_top_k(top_k, self._state.cache_top_k)
        self._state.cache_top_k = top_k
        self._state.teacher_sha256, self._state.teacher_step = run.sha256, run.info.step

    def initialize(self, model: Transformer) -> None:
        """With init = teacher, copy its layers; which experts stay, a pass over the validation sequences says."""
        if self._distill.init != "teacher":
            return
        assert self._run is not None and self._shards is not None
        layer_map = self._layer_map(self._run)
        loads: dict[int, Tensor] = {}
        if has_fewer_experts(self._run.config.model, self._config.model, layer_map):
            batches = ValidationLoader.of(self._config, self._shards.validation)
            loads = expert_loads(self._load(), batches, device=self._device, world=self._world)
            if self._source is not None:  # the cache from here on
                self._model = None
        with self._world.together():
            self._copied = copy_layers(model, self._run, layer_map, loads=loads)
        for layer, copied in enumerate(self._copied if self._world.is_main else ()):
            if copied.load is not None and copied.experts is not None:
                logger.info(
                    "layer %d keeps %d experts of the teacher's layer %d, to which %.1f %% of its tokens went.",
                    layer, len(copied.experts), copied.source, 100 * copied.load,
                )  # fmt: skip

    def head(self, batch: Batch, *, tokens: int) -> Head:
        alpha = self._state.alpha(self._config, tokens)
        value = torch.tensor(alpha, dtype=torch.float32)
        if alpha == 0.0:
            self._source = self._model = None

            def without_teacher(hidden: Tensor, weight: Tensor, targets: Tensor) -> HeadLoss:
                loss = next_token_loss(hidden, weight, targets)
                return HeadLoss(loss.total, loss.cross_entropy, {"alpha": value})

            return without_teacher
        teacher = self._teacher().targets(batch)

        def with_teacher(hidden: Tensor, weight: Tensor, targets: Tensor) -> HeadLoss:
            loss = distillation_loss(
                hidden,
                weight,
                targets,
                teacher,
                alpha=alpha,
                temperature=self._distill.temperature,
                divergence=self._distill.divergence,
            )
            return HeadLoss(loss.total, loss.cross_entropy, {self._distill.divergence: loss.divergence, "alpha": value})

        return with_teacher

    def evaluated(self, run: Trials) -> None:
        """Of the automatic schedule, end it when so many steps without the teacher reach a validation loss as low."""
        if self._distill.schedule != "automatic" or self._state.has_ended:
            return
        steps = min(self._distill.trial_steps, run.steps_left)
        if steps == 0:
            return
        alone, taught = run.trial(steps, NextToken()), run.trial(steps, self)
        self._state.has_ended = self._world.main_says(alone <= taught)
        outcome = "the teacher is let go" if self._state.has_ended else "the teacher stays"
        run.say(
            f"{steps} steps on from here the validation loss is {alone:.5f} with cross-entropy alone and {taught:.5f} "
            f"with the teacher; {outcome}"
        )

    def state(self) -> dict[str, Any]:
        return asdict(self._state)

    def record(self) -> dict[str, Any] | None:
        if self._run is None:
            return None
        return {
            "teacher": str(self._run.folder),
            "step": self._run.info.step,
            "model_sha256": self._run.sha256,
            "copied": [copied.to_json() for copied in self._copied],
        }

    def _layer_map(self, run: TeacherRun) -> tuple[int, ...]:
        return self._distill.layer_map or default_map(run.config.model, self._config.model)

    def _load(self) -> Transformer:
        """Load the teacher, on all processes, when it is first needed, and once."""
        if self._model is None:
            assert self._run is not None
            degree = self._config.parallel.expert_degree
            precision = self._distill.teacher_precision
            self._model = self._run.load(precision, device=self._device, world=self._world, degree=degree)
        return self._model

    def _teacher(self) -> TeacherSource:
        if self._source is None:
            self._source = LiveTeacher(self._load())
        return self._source
