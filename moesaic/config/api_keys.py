"""API keys: the file that holds them, and what one may look like. Where else a server finds them is its gate's."""

import re
from collections.abc import Iterable
from pathlib import Path

from moesaic.errors import ConfigError


def read_key_file(path: str | Path, named: str) -> list[str]:
    """Return the keys of a file, one a line; # first in it: a comment. named: what errors call the file.

    Raises: ConfigError for a file that cannot be read or holds none, and for a key that no header can carry.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:  # the latter of what is no UTF-8, and no path
        raise ConfigError(
            f"{named} cannot be read ({type(error).__name__}); a text file with one key per line is required; check "
            f"the path."
        ) from None
    keys = checked_keys((line for line in lines if not line.startswith("#")), named)
    if not keys:
        raise ConfigError(f"{named} holds no key; one per line is required; write one, or leave the file out.")
    return keys


def checked_keys(given: Iterable[str], named: str) -> list[str]:
    """Return keys without the space around them, and without empty ones. named: what errors call where they are from.

    Raises: ConfigError for a key that no header can carry.
    """
    keys = [key.strip() for key in given if key.strip()]
    if any(not re.fullmatch(r"[\x21-\x7e]+", key) for key in keys):
        raise ConfigError(
            f"an API key of {named} has a space or a character outside ASCII; printable ASCII is required, as it "
            f"stands in a header; choose another."
        )
    return keys
