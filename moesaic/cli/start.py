"""What the start of a command leaves out: looking for garbage while modules are loaded."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def loading_modules() -> Iterator[None]:
    """Import without looking for garbage, neither now among what modules make nor there ever again.

    torch and what stands on it make some half a million objects that stay; looking through them again and again as
    they become more is a tenth of a start, and every full search later, in a server say, would go through all of them.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
