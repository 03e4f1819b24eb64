"""The mistakes a caller can make, one exception type each.

Every message has three parts: what was given, what is required, what to do. Our own invariants are asserts, not these.
"""


class MoesaicError(Exception):
    """Base of every error that the caller can mend; the command line prints it without a traceback."""


class ConfigError(MoesaicError):
    """A configuration value, or a combination of values, that cannot work. key: the one to blame, where it is known."""

    def __init__(self, message: str, *, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


class DataError(MoesaicError):
    """A corpus, a tokenizer or a token shard that is missing, empty, corrupt or does not fit the others."""


class CheckpointError(MoesaicError):
    """A checkpoint that is missing, truncated, corrupt or belongs to another model."""


class ConversionError(MoesaicError):
    """A conversion that would lose more than is allowed, or cannot be written."""


class TrainingError(MoesaicError):
    """Training cannot go on: losses stay non-finite, the disk is full, or the data does not fit the run."""


class ElsewhereError(MoesaicError):
    """What another process of the same run has raised, which says it; the command line prints nothing for this one."""


class DeviceError(MoesaicError):
    """A device or a kernel was asked for by name and this machine does not have it."""


class InstallationError(MoesaicError):
    """A package that a part of moesaic stands on is missing or too old."""


class GenerationError(MoesaicError):
    """A generation request that the model cannot serve, for example a prompt longer than its positions."""


class NotFiniteError(GenerationError):
    """The model gave what is no number: the request is well, and others go on."""

    REMEDY = (
        "the model's weights, their packed file or the arithmetic are broken; evaluate the run, use another step, or "
        "delete the checkpoint's packed-*.safetensors, which are made again"
    )


class FolderInUseError(MoesaicError):
    """A folder that another process is writing."""
