"""What a run learns: the objective that the loop is given. This package has one, the prediction of the next token.

Another (distillation) brings its own loss at the model's head, its own state, and may try things out at evaluations;
the loop asks and knows nothing of it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from moesaic.data.loader import Batch
from moesaic.data.shards import ShardSet
from moesaic.model.transformer import Transformer
from moesaic.parallel.world import World
from moesaic.train.loss import Head, next_token_loss


@dataclass(frozen=True)
class RunStart:
    """Where a run stands when its objective is opened: tokens trained on, and the state that its checkpoint kept.

    state: None where the run begins. folder: the run's own, which is locked, and empty where the run begins; the main
    process of the world writes there.
    """

    tokens: int
    state: dict[str, Any] | None
    shards: ShardSet
    device: torch.device
    folder: Path
    world: World


class Trials(Protocol):
    """What an objective may ask of the run that it belongs to, after an evaluation."""

    @property
    def steps_left(self) -> int: ...

    def trial(self, steps: int, objective: "Objective") -> float:
        """Return the validation loss after so many more steps with an objective; the run stays exactly as it is."""
        ...

    def say(self, message: str) -> None:
        """Record an event."""
        ...


class Objective(Protocol):
    """What a run learns, beside the balance of its experts.

    Of several processes that train together each has one, and all call it alike.
    """

    def open(self, start: RunStart) -> None:
        """Get ready, once, before the run writes anything.

        Raises: MoesaicError, on all processes, for what does not fit the run.
        """
        ...

    def initialize(self, model: Transformer) -> None:
        """Change the weights that were drawn, where a run begins."""
        ...

    def head(self, batch: Batch, *, tokens: int) -> Head:
        """Return the loss at the model's head for a micro-batch of the step that starts at `tokens`."""
        ...

    def evaluated(self, run: Trials) -> None:
        """Take note of an evaluation; the weights are those that were evaluated, a checkpoint may follow."""
        ...

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: JSON-able, and all that decides how the run goes on."""
        ...

    def record(self) -> dict[str, Any] | None:
        """Return what run.json says of it."""
        ...


class NextToken:
    """The cross-entropy of the next token, and nothing else."""

    def open(self, start: RunStart) -> None:
        pass

    def initialize(self, model: Transformer) -> None:
        pass

    def head(self, batch: Batch, *, tokens: int) -> Head:
        return next_token_loss

    def evaluated(self, run: Trials) -> None:
        pass

    def state(self) -> dict[str, Any]:
        return {}

    def record(self) -> dict[str, Any] | None:
        return None
