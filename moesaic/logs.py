"""The package's one logger. Library code logs through it; only the command line decides where lines go."""

import logging

logger = logging.getLogger("moesaic")


def log_to_stderr(level: int = logging.INFO) -> None:
    """Print the package's log lines to standard error, once; used by the command line."""
    if any(isinstance(handler, logging.StreamHandler) for handler in logger.handlers):
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(level)
