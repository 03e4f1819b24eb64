"""What the log line of a request says: filled while it is answered, written when it has ended (gate.py)."""

import time
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Scope

_KEY = "moesaic.log"


@dataclass
class LogFields:
    """A request's name and arrival (by time.perf_counter), whether its turn has come, and what its line says beside;
    never of its text."""

    arrival: float
    request_id: str
    values: dict[str, Any] = field(default_factory=dict)
    had_turn: bool = False


def begin_log(scope: Scope, request_id: str) -> LogFields:
    """Start the fields of a request that has just come."""
    fields = LogFields(time.perf_counter(), request_id)
    scope[_KEY] = fields
    return fields


def log_fields(scope: Scope) -> LogFields:
    """Return the fields of a request, to be added to."""
    fields = scope[_KEY]
    assert isinstance(fields, LogFields)
    return fields
