"""Values as JSON has them, which knows no NaN and no infinity. How metrics.jsonl keeps those is in records.py."""

import math
from typing import Any


def json_values(values: Any) -> Any:
    """Return values with null for every number, at any depth, that is not finite."""
    if isinstance(values, dict):
        return {key: json_values(each) for key, each in values.items()}
    if isinstance(values, list | tuple):
        return [json_values(each) for each in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values
