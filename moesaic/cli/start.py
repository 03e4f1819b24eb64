"""What the start of a command leaves out: looking for garbage while modules are loaded."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def loading_modules() -> Iterator[None]:
    """Import without looking for garbage, neither now among what modules make nor there ever again.

    torch and what stands on it make some 300,000 objects that stay; looking through them again and again as they become
    more is a fifth of a start, and every full search later, in a server say, would go through all of them.
    """
    was_enabled, before = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > before:  # or what is there is a caller's
            gc.freeze()
        if was_enabled:
            gc.enable()
