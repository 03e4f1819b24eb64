"""A folder that appears when it is finished, or not at all, and what makes one of a run's."""

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from moesaic.checkpoint.store import write_manifest
from moesaic.config.load import write_config
from moesaic.config.train import TrainConfig
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import ConfigError, ConversionError, FolderInUseError
from moesaic.folders import FolderLock, empty_folder, sync, writing_name, writing_path, writing_remedy


def check_is_new(output: Path) -> None:
    """Raise ConfigError when there is something already, or nothing can be."""
    try:
        is_there = output.exists() or output.is_symlink()
    except (OSError, ValueError) as error:  # a name that is too long, or holds a zero byte
        raise ConfigError(
            f"{output} cannot be a folder ({error}); what is converted needs one; name another."
        ) from None
    if is_there:
        raise ConfigError(f"{output} exists; what is converted needs a folder of its own; name another, or delete it.")


def check_is_outside(output: Path, source: Path) -> None:
    """Raise ConfigError when a folder would be written into the one that it is made of."""
    if source.is_dir() and output.resolve().is_relative_to(source.resolve()):
        raise ConfigError(
            f"{output} is inside {source}, which is only read; what is converted needs a folder of its own; name one "
            f"outside."
        )


@contextmanager
def folder_in_progress(output: Path) -> Iterator[Path]:
    """Give a folder to write, which becomes `output` at the end, or goes away with whatever went wrong.

    Raises: FolderInUseError where another process is making the same; ConversionError where it cannot be written.
    """
    made = [parent for parent in output.parents if not parent.exists()]
    try:
        temporary = writing_path(output)
        try:
            lock = FolderLock(temporary)  # which follows the folder to its new name
        except FolderInUseError as error:
            raise FolderInUseError(str(error).replace(str(temporary), str(output), 1)) from None
        with lock:
            try:
                empty_folder(temporary)  # of a process that was killed
                yield temporary
                for each in (*temporary.rglob("*"), temporary):  # else the name could be on the disk before they are
                    sync(each)
                temporary.rename(output)
            except BaseException:  # not after the renaming: the name may be another process's by then
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            with suppress(OSError):  # whole as it is; a folder whose names may not be read
                sync(output.parent)
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise  # the command line has words for it
        if not _is_of_folder(error, output):
            raise ConversionError(
                f"{output} was not written, since what it is made of could not be read ({error}); files that can be "
                f"read are required; check the path and its permissions."
            ) from None
        raise ConversionError(
            f"{output} could not be written: {error}; a folder that can be written to, with room for what is "
            f"converted, is required; {writing_remedy(error)}, or name another."
        ) from None
    finally:
        for parent in made if not output.exists() else ():
            with suppress(OSError):  # another process has put something there
                parent.rmdir()


def _is_of_folder(error: OSError, output: Path) -> bool:
    """Whether an error is of the folder that is being made, and not of what is read for it."""
    if not isinstance(error.filename, str | bytes):
        return True
    path, output = Path(os.fsdecode(error.filename)).absolute(), output.absolute()
    return path.is_relative_to(writing_name(output)) or path in (output, *output.parents)


def new_weights(folder: Path, step: int) -> Path:
    """Return where the weights of a new run's one checkpoint go, in a folder that is there then."""
    checkpoint = folder / "checkpoints" / f"step-{step:08d}"
    checkpoint.mkdir(parents=True)
    return checkpoint / "model.safetensors"


def finish_run(
    weights: Path,
    step: int,
    *,
    config: TrainConfig,
    tokenizer: Tokenizer,
    metadata: dict[str, Any],
    sha256: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write what a run's folder holds beside the weights, which are complete. sha256: as write_manifest takes it."""
    checkpoint = weights.parent
    write_manifest(checkpoint, step, metadata, sha256=sha256)
    folder = checkpoint.parent.parent
    write_config(config, folder / "config.yaml")
    tokenizer.save(folder)
