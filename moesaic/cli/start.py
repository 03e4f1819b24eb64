"""The start of a command: modules are loaded without looking for garbage, and Ctrl-C ends it at once."""

import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


@contextmanager
def loading_modules() -> Iterator[None]:
    """Import without looking for garbage, neither now among what modules make nor there ever again.

    torch and what stands on it make some 300,000 objects that stay; looking through them again and again as they become
    more is a fifth of a start, and every full search later, in a server say, would go through all of them.

    Ctrl-C, and SIGTERM where `heed_termination` listens, end the process meanwhile, which has nothing to leave in order
    yet: an exception is lost where it comes in a call that Python makes for itself, as many of an import's are.
    """
    was_enabled, before = gc.isenabled(), len(sys.modules)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    replaced = [
        number
        for number, handler in handlers.items()
        if handler in (signal.default_int_handler, _leave) and threading.current_thread() is threading.main_thread()
    ]
    for number in replaced:
        signal.signal(number, _end)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > before:  # or what is there is a caller's
            gc.freeze()
        if was_enabled:
            gc.enable()
        for number in replaced:
            if signal.getsignal(number) is _end:
                signal.signal(number, handlers[number])


def heed_termination() -> None:
    """Let SIGTERM end a container's first process, for which the system's own action is none: `docker stop` waits."""
    if os.getpid() == 1 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _leave)


def _leave(number: int, _: object) -> NoReturn:
    """Unwind, and end with the status that a shell gives to the signal."""
    sys.exit(128 + number)


def _end(number: int, _: object) -> NoReturn:
    """End the process by the signal, as its default action does."""
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)
    os._exit(128 + number)  # a container's first process, which survives that
