import math

import pytest

from moesaic.report.quantities import duration, measured, percent, short_number


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1500, "1.5K"),
        (999_999, "1M"),
        (20e6, "20M"),
        (3e11, "300B"),
        (1.2e12, "1.2T"),
        (math.nan, "?"),
    ],
)
def test_short_number(value: float, text: str) -> None:
    assert short_number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (5.4, "0:05"), (59.6, "1:00"), (3600, "1:00:00"), (4 * 86_400 + 7200, "4 d 2 h"), (math.inf, "?")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("share", "text"), [(0.125, "12.5 %"), (0.002, "0.2 %"), (0.0, "0.0 %"), (2.1e-5, "0.0021 %")])
def test_percent(share: float, text: str) -> None:
    assert percent(share) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.45678, "0.4568"), (999.5, "999.5000"), (22_882_584.9204, "22,882,585"), (math.inf, "inf"), (math.nan, "nan")],
)
def test_measured(value: float, text: str) -> None:
    assert measured(value, 4) == text
