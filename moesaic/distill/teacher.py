"""A student's teacher: the run that it is, whether it fits, and the running model. The cached one is cache.py's.

A run that trains deletes old checkpoints. A student of one keeps the checkpoint that teaches it in its own folder,
STUDENT/teacher, until its report is written.
"""

import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from moesaic.checkpoint.quantized import is_quantized, require_unquantized
from moesaic.checkpoint.store import CheckpointInfo, list_checkpoints, read_info, resolve_checkpoint
from moesaic.config.load import write_config
from moesaic.config.model import ModelConfig
from moesaic.config.train import TrainConfig
from moesaic.data.loader import Batch
from moesaic.data.tokenizer import Tokenizer
from moesaic.distill.loss import TeacherLogits
from moesaic.errors import CheckpointError, ConfigError, DataError
from moesaic.folders import is_being_written, split_run
from moesaic.logs import logger
from moesaic.model.load import copy_weights, load_run, load_run_config
from moesaic.model.transformer import Transformer
from moesaic.moe.experts import own_rows
from moesaic.parallel.expert import ExpertParallel
from moesaic.parallel.world import World

Precision = Literal["bf16", "int8", "fp32"]
KEPT_NAME = "teacher"
_WEIGHTS_NAME = "model.safetensors"


@dataclass(frozen=True)
class TeacherRun:
    """The checkpoint that RUN or RUN@step names, its run's config and tokenizer; no weight is read yet.

    folder: the run that was named; the checkpoint may be what a student has kept of it.
    """

    folder: Path
    info: CheckpointInfo
    config: TrainConfig
    tokenizer: Tokenizer

    @classmethod
    def open(cls, run: str | Path) -> "TeacherRun":
        """Open a teacher. Raises: CheckpointError for a run or step that is not there."""
        info = resolve_checkpoint(run)
        return cls._of(info.run_folder, info)

    @classmethod
    def reopen(cls, run: str | Path, student: Path, *, sha256: str, step: int | None) -> "TeacherRun":
        """Open the teacher that a student began with: of RUN the checkpoint that it was, best or not, or what is kept.

        sha256, step: its weights and its step, as the student's checkpoints have them; step None: they do not say.

        Raises: CheckpointError for a run that is not there, has other weights, or has deleted them.
        """
        folder, step_text = split_run(run)
        kept, there = list_checkpoints(student / KEPT_NAME), list_checkpoints(folder)
        candidates = [*kept, *there]
        if step_text and any(str(each.step) == step_text for each in there):
            candidates = [resolve_checkpoint(run)]  # that one is meant, and no other
        equal = [info for info in candidates if info.model_sha256 == sha256]
        if equal:  # more than one where a last step of rate 0 changed nothing
            return cls._of(folder, next((info for info in equal if info.step == step), equal[0]))
        if there and not kept and step is not None and step not in (steps := [each.step for each in there]):
            keep_last = load_run_config(folder).checkpoint.keep_last
            raise CheckpointError(
                f"step {step} of the teacher {folder}, with which this student began (sha256 {sha256[:12]}), is gone: "
                f"that run keeps its best checkpoint and the last {keep_last} (checkpoint.keep_last), now "
                f"{', '.join(map(str, steps))}; a student has one teacher to the end; name a copy of the run that "
                f"still has it, or do without: the student works as it is, and `moesaic train {student} --output DIR` "
                f"trains it on alone."
            )
        raise CheckpointError(
            f"distill.teacher ({run}, sha256 {resolve_checkpoint(run).model_sha256[:12]}) is not the one that this run "
            f"began with ({sha256[:12]}); a student has one teacher to the end; name that run and step, or start a "
            f"new run."
        )

    @classmethod
    def _of(cls, folder: Path, info: CheckpointInfo) -> "TeacherRun":
        own = info.run_folder
        return cls(folder, info, load_run_config(own), Tokenizer.load(own))

    def keep(self, student: Path) -> "TeacherRun":
        """Return the teacher, of a run that is being trained as what the student's folder keeps of it.

        Its files are linked, which takes no room, or copied where the file systems cannot link.

        Raises: CheckpointError where they cannot be kept.
        """
        kept = student / KEPT_NAME
        if (is_kept := self.kept_in(student)) is not self or not is_being_written(self.folder):
            return is_kept
        shutil.rmtree(kept, ignore_errors=True)
        checkpoint = kept / self.info.path.parent.name / self.info.path.name
        try:
            checkpoint.mkdir(parents=True)
            write_config(self.config, kept / "config.yaml")
            self.tokenizer.save(kept)
            how = _link_or_copy(self.info.path / _WEIGHTS_NAME, checkpoint / _WEIGHTS_NAME)
            shutil.copyfile(self.info.path / "manifest.json", checkpoint / "manifest.json")
        except OSError as error:
            shutil.rmtree(kept, ignore_errors=True)
            raise CheckpointError(
                f"the teacher {self.folder} is being trained, and its step {self.info.step} cannot be kept in {kept} "
                f"({error}); it is needed to the student's end, and that run deletes old checkpoints "
                f"(checkpoint.keep_last); give the command again, free some space, or wait until the run has ended."
            ) from None
        logger.info(
            "%s is being trained and deletes old checkpoints: %s keeps its step %d (%s) until the report is written.",
            self.folder, kept, self.info.step, how,
        )  # fmt: skip
        return replace(self, info=read_info(checkpoint))

    def agreed(self, world: World, student: Path) -> "TeacherRun":
        """Return, on each process of a world, what the main one has opened: its run may just have saved a better one.

        Raises: CheckpointError, on all processes, where another has not got it.
        """
        sha256, step = world.values((self.sha256, self.info.step))[0]
        with world.together():
            if self.sha256 == sha256:
                return self
            return TeacherRun.reopen(self.folder, student, sha256=sha256, step=step)

    def kept_in(self, student: Path) -> "TeacherRun":
        """Return the teacher as what the student's folder keeps of it, or as it is where that keeps nothing."""
        kept = (info for info in list_checkpoints(student / KEPT_NAME) if info.model_sha256 == self.sha256)
        info = next(kept, None)
        return self if info is None else replace(self, info=info)

    @property
    def sha256(self) -> str:
        return self.info.model_sha256

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
        if precision != "bf16":
            named = f"distill.teacher_precision ({precision}) is asked of {self.folder}, which"
            do = "leave it at bf16, or name"
            require_unquantized(self.info, "what is rounded stays so", named=named, do=do, error=ConfigError)

    def load(
        self, precision: Precision, *, device: torch.device, world: World | None = None, degree: int | None = None
    ) -> Transformer:
        """Load the model, ready to infer.

        Over the processes of a world, all of which call it, the experts are spread (ExpertParallel, with this degree),
        but for those of an int8 or a quantised teacher, which each process has whole.

        Raises: CheckpointError, on all processes, for a file that is missing or corrupt.
        """
        world = world or World()
        wanted = world.size if degree is None else degree
        degrees = [math.gcd(each.num_experts, wanted) for each in self.config.model.layers if each.is_moe]
        is_whole = max(degrees, default=1) == 1 or precision == "int8" or is_quantized(self.info)
        model = None if is_whole else self._spread(precision, degree)
        with world.together():
            if model is None:
                of_run = None if is_quantized(self.info) else precision
                return load_run(self.info.run_at_step, device=device.type, precision=of_run).model
            model.to_empty(device=device)
            copy_weights(model, self.info)
        return model.eval()

    def _spread(self, precision: Precision, degree: int | None) -> Transformer:
        """Return the model without its weights, of whose layers each process has some experts."""
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        with torch.device("meta"):
            model = Transformer(self.config.model, compute_dtype=dtype)
        ExpertParallel(model, degree=degree)
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and not name.endswith("router.weight"):
                parameter.data = parameter.data.to(dtype)  # what they are computed in anyway
        return model


def _link_or_copy(source: Path, target: Path) -> str:
    """Return how it was done. Raises: OSError."""
    try:
        target.hardlink_to(source)
    except FileNotFoundError:  # deleted just now
        raise
    except OSError as error:
        shutil.copyfile(source, target)
        return f"a copy of {target.stat().st_size:,} bytes, since it cannot be linked: {error.strerror}"
    return "a link, which takes no room"


class LiveTeacher:
    """A teacher that runs on every micro-batch: in evaluation mode, dropless, without gradient.

    is_spread: every process has to ask for targets as often as the others.
    """

    def __init__(self, model: Transformer) -> None:
        self._model = model.eval()
        self.is_spread = bool(own_rows(model))

    @torch.no_grad()
    def targets(self, batch: Batch) -> TeacherLogits:
        """Return its logits for each token of a batch; its hidden states are all that exists at once."""
        hidden = self._model(batch.inputs, documents=batch.documents).hidden
        flat = hidden.reshape(-1, hidden.shape[-1])

        def chunk(start: int, end: int) -> Tensor:
            with torch.no_grad():
                return self._model.logits(flat[start:end])

        return TeacherLogits(chunk)
