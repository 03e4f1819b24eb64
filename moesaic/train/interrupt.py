"""Ctrl-C, SIGTERM and SIGHUP become a request that the loop reads between steps; a second Ctrl-C stops at once.

Of several processes each may get a signal, a moment before or after the others; they agree before any of them stops.
"""

import signal
import threading
from types import FrameType
from typing import Any

from moesaic.parallel.world import World


class StopRequest:
    """Context manager. `name` is the signal's name once one has come to this process, else None."""

    def __init__(self, world: World | None = None) -> None:
        self._world = world or World()
        self._number = 0
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def name(self) -> str | None:
        return _name(self._number)

    def agreed(self) -> str | None:
        """Return a signal's name once one has come to any process; all of them ask, and have the same answer."""
        return _name(self._world.highest(self._number))

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            for number in (signal.SIGINT, signal.SIGTERM, *_lost_terminal()):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            # None: not set from Python, so it cannot be given back from here.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._number = number


def _name(number: int) -> str | None:
    return signal.Signals(number).name if number else None


def _lost_terminal() -> list[signal.Signals]:
    """The signal of a terminal that has gone; none where the system has none, or it is ignored, as nohup has it."""
    number: signal.Signals | None = getattr(signal, "SIGHUP", None)
    return [] if number is None or signal.getsignal(number) is signal.SIG_IGN else [number]
