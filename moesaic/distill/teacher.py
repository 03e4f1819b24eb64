"""A student's teacher: the run that it is, whether it fits, and the running model. The cached one is cache.py's."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from moesaic.checkpoint.quantized import describe_quantization, is_quantized
from moesaic.checkpoint.store import CheckpointInfo, list_checkpoints, resolve_checkpoint
from moesaic.config.model import ModelConfig
from moesaic.config.train import TrainConfig
from moesaic.data.loader import Batch
from moesaic.data.tokenizer import Tokenizer
from moesaic.distill.loss import TeacherLogits
from moesaic.errors import CheckpointError, ConfigError, DataError
from moesaic.model.load import LoadedModel, load_run, load_run_config
from moesaic.model.transformer import Transformer

Precision = Literal["bf16", "int8", "fp32"]


@dataclass(frozen=True)
class TeacherRun:
    """The checkpoint that RUN or RUN@step names, its run's config and tokenizer; no weight is read yet."""

    info: CheckpointInfo
    config: TrainConfig
    tokenizer: Tokenizer

    @classmethod
    def open(cls, run: str | Path, *, sha256: str | None = None) -> "TeacherRun":
        """Open a teacher. sha256: of the weights that it must have; of RUN, its checkpoint that has them, best or not.

        Raises: CheckpointError for a run or step that is not there, or has other weights.
        """
        info = resolve_checkpoint(run)
        folder = info.path.parent.parent
        if sha256 is not None and _sha256(info) != sha256:
            others = list_checkpoints(folder) if Path(run).exists() else []  # RUN@step means that one
            matching = [each for each in others if _sha256(each) == sha256]
            if not matching:
                raise CheckpointError(
                    f"distill.teacher ({run}, sha256 {_sha256(info)[:12]}) is not the one that this run began with "
                    f"({sha256[:12]}); a student has one teacher to the end; name that run and step, or start a new "
                    f"run."
                )
            info = matching[-1]
        return cls(info, load_run_config(folder), Tokenizer.load(folder))

    @property
    def folder(self) -> Path:
        return self.info.path.parent.parent

    @property
    def sha256(self) -> str:
        """Of the file of the weights: what makes it this teacher, wherever it lies."""
        return _sha256(self.info)

    def check(self, student: ModelConfig, *, data: str, tokenizer: Tokenizer, sequence_length: int) -> None:
        """Raise DataError or ConfigError unless teacher and student read the same tokens at the same positions."""
        if self.tokenizer.fingerprint != tokenizer.fingerprint:
            raise DataError(
                f"the text in {data} was prepared with another tokenizer (vocabulary {tokenizer.vocab_size}, "
                f"fingerprint {tokenizer.fingerprint[:12]}) than the teacher's, {self.folder} (vocabulary "
                f"{self.tokenizer.vocab_size}, {self.tokenizer.fingerprint[:12]}); a student learns the distribution "
                f"over the same tokens; prepare the text with `moesaic prepare SOURCE --output DIR --tokenizer "
                f"{self.folder}`."
            )
        own = self.config.model
        if own.vocab_size != student.vocab_size:
            raise ConfigError(
                f"model.vocab_size ({student.vocab_size}) is not the teacher's ({own.vocab_size}); a student learns "
                f"the distribution over the same tokens; use {own.vocab_size}."
            )
        if own.max_positions < sequence_length:
            raise ConfigError(
                f"data.sequence_length ({sequence_length}) is more than the {own.max_positions} positions of the "
                f"teacher {self.folder}; it reads the same sequences as its student; use at most {own.max_positions}."
            )

    def check_precision(self, precision: Precision) -> None:
        """Raise ConfigError for a precision that a quantised run cannot have."""
        if is_quantized(self.info) and precision != "bf16":
            raise ConfigError(
                f"distill.teacher_precision ({precision}) is asked of {self.folder}, which is quantised "
                f"({describe_quantization(self.info)}) and has that precision; leave it at bf16, or name the run that "
                f"it was made from."
            )

    def load(self, precision: Precision, *, device: str) -> LoadedModel:
        """Load the model, ready to infer. Raises: CheckpointError for a file that is missing or corrupt."""
        run = f"{self.folder}@{self.info.step}"
        return load_run(run, device=device, precision=None if is_quantized(self.info) else precision)


def _sha256(info: CheckpointInfo) -> str:
    return str(info.files["model.safetensors"]["sha256"])


class LiveTeacher:
    """A teacher that runs on every micro-batch: in evaluation mode, dropless, without gradient."""

    def __init__(self, model: Transformer) -> None:
        self._model = model.eval()

    @torch.no_grad()
    def targets(self, batch: Batch) -> TeacherLogits:
        """Return its logits for each token of a batch; its hidden states are all that exists at once."""
        hidden = self._model(batch.inputs, documents=batch.documents).hidden
        flat = hidden.reshape(-1, hidden.shape[-1])

        def chunk(start: int, end: int) -> Tensor:
            with torch.no_grad():
                return self._model.logits(flat[start:end])

        return TeacherLogits(chunk)
