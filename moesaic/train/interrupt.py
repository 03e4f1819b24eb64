"""Ctrl-C, SIGTERM and SIGHUP become a request that the loop reads between steps; a second Ctrl-C stops at once."""

import signal
import threading
from types import FrameType
from typing import Any


class StopRequest:
    """Context manager. `name` is the signal's name once one has come, else None."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

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
        if self.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name


def _lost_terminal() -> list[signal.Signals]:
    """The signal of a terminal that has gone; none where the system has none, or it is ignored, as nohup has it."""
    number: signal.Signals | None = getattr(signal, "SIGHUP", None)
    return [] if number is None or signal.getsignal(number) is signal.SIG_IGN else [number]
