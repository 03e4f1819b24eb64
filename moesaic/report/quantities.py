"""Quantities as people read them: counts, durations and shares as short text."""

import math


def short_number(value: float) -> str:
    """Return a count in three digits: 1.5K, 20M, 300B, 1.2T; '?' when it is not finite."""
    if not math.isfinite(value):
        return "?"
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        # A count that rounds up to the next unit is written in that unit: 999,999 is 1M, not 1e+03K.
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Return 0:05, 12:30, 3:02:10 or 4 d 6 h; '?' when it is not finite."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    days, hours, minutes = whole // 86_400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def percent(share: float) -> str:
    """Return a share of one as 12.5 %, with two digits when it is tiny (0.0021 %), so that it is not read as none."""
    return f"{share * 100:.1f} %" if share >= 0.0005 or share == 0 else f"{share * 100:.2g} %"


def measured(value: float, decimals: int) -> str:
    """Return a value with so many decimals, and from 1,000 on, where they would claim too much, without any."""
    return f"{value:,.{decimals if abs(value) < 1000 else 0}f}"


def counted(number: int, noun: str) -> str:
    """Return `1 thread`, `2 threads`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
