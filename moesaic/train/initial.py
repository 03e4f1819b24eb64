"""A run whose weights training starts from: what has to agree with it, and its weights. Resuming is not this."""

from dataclasses import dataclass
from typing import Any

from moesaic.checkpoint.quantized import require_unquantized
from moesaic.checkpoint.store import CheckpointInfo, resolve_checkpoint
from moesaic.config.base import differing
from moesaic.config.model import ModelConfig
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import ConfigError, DataError
from moesaic.model.load import copy_weights, load_run_config
from moesaic.model.transformer import Transformer

# What only training reads of a model's config; the model of another run computes the same without it.
_OF_TRAINING = (
    "dropout",
    "init_std",
    "moe.capacity.",
    "moe.router.noise",
    "moe.router.jitter_epsilon",
    "moe.router.score_correction_rate",
    "moe.router.balance_loss",
    "moe.router.balance_scope",
    "moe.router.z_loss",
)


@dataclass(frozen=True)
class InitialRun:
    """The checkpoint that RUN or RUN@step names, and its run's tokenizer."""

    info: CheckpointInfo
    tokenizer: Tokenizer

    @classmethod
    def open(cls, run: str, model: ModelConfig, *, data: str, tokenizer: Tokenizer) -> "InitialRun":
        """Check that a run's weights can start the training of a model on data of this tokenizer; none is read yet.

        Raises: CheckpointError for a run or step that is not there, and for a quantised one; ConfigError for another
        model; DataError for another tokenizer.
        """
        info = resolve_checkpoint(run)
        folder = info.run_folder
        why = "training requires the weights before they were rounded"
        require_unquantized(info, why, named=f"init_from ({run})", do="name")
        free = (*_OF_TRAINING, "max_positions") if model.positions == "rotary" else _OF_TRAINING
        own = load_run_config(folder).model
        different = differing(model, own, before="model.", ignore=lambda key: key.startswith(free))
        if different:
            raise ConfigError(
                f"{different}: not as in {folder / 'config.yaml'}; init_from takes that run's weights, so the model "
                f"must be the same; leave its settings as they are, or set init_from to null to train from random "
                f"weights."
            )
        theirs = Tokenizer.load(folder)
        if theirs.fingerprint != tokenizer.fingerprint:
            raise DataError(
                f"the text in {data} was prepared with another tokenizer (vocabulary {tokenizer.vocab_size}, "
                f"fingerprint {tokenizer.fingerprint[:12]}) than that of {folder} (vocabulary {theirs.vocab_size}, "
                f"{theirs.fingerprint[:12]}); init_from takes that run's weights, which know its own tokens only; "
                f"prepare the text again with `moesaic prepare SOURCE --output DIR --tokenizer {folder}`."
            )
        return cls(info, theirs)

    def load(self, model: Transformer) -> None:
        """Copy the weights into the model. Raises: CheckpointError when their file is missing or corrupt."""
        copy_weights(model, self.info)

    def record(self) -> dict[str, Any]:
        """What run.json says of it."""
        return {
            "run": str(self.info.run_folder),
            "step": self.info.step,
            "model_sha256": self.info.model_sha256,
        }
