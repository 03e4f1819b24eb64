"""A folder that appears when it is finished, or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moesaic.errors import ConfigError, ConversionError


def check_is_new(output: Path) -> None:
    """Raise ConfigError when there is something already."""
    if output.exists():
        raise ConfigError(f"{output} exists; what is converted needs a folder of its own; name another, or delete it.")


@contextmanager
def folder_in_progress(output: Path) -> Iterator[Path]:
    """Give a folder to write, which becomes `output` at the end, or goes away with whatever went wrong."""
    temporary = output.with_name(f".writing-{output.name}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
        temporary.mkdir()
        yield temporary
        temporary.rename(output)
    except OSError as error:
        raise ConversionError(
            f"{output} could not be written: {error}; a folder with room for what is converted is required; free some "
            f"space, or name another."
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
