"""The package's one logger, and how long work says how far it is. Only the command line decides what is shown."""

import datetime
import json
import logging
import sys
from collections.abc import Callable

logger = logging.getLogger("moesaic")

# Takes the stage of long work, and the share of it that is done.
OnProgress = Callable[[str, float], None]


def no_progress(stage: str, share: float) -> None:
    """Tell nobody: the default OnProgress."""


class JsonFormatter(logging.Formatter):
    """One line of JSON per record: time (UTC), level, message, and the fields given as `extra={"fields": {...}}`."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class StderrHandler(logging.StreamHandler):
    """Writes to sys.stderr as it is at each line.

    A progress display of rich's puts a stream of its own there while it is shown, which prints above it; a stream that
    was kept from before would tear the display.
    """

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def log_to_stderr(*, as_json: bool = False) -> None:
    """Print the package's log lines to standard error, once; used by the command line."""
    if any(isinstance(handler, logging.StreamHandler) for handler in logger.handlers):
        return
    handler = StderrHandler()
    handler.setFormatter(JsonFormatter() if as_json else logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
