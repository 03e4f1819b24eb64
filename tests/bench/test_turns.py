"""Candidates are called in turn, as often as the time allows, and compared round by round."""

import time

import pytest

from moesaic.bench.turns import Times, time_in_turn


def test_candidates_take_turns_and_warm_up_first() -> None:
    calls: list[str] = []
    times = time_in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, seconds=0.0, warmup_rounds=2)
    assert calls == ["a", "b"] * 7, "two rounds to warm up and the fewest that are timed"
    assert {name: len(seconds) for name, seconds in times.seconds.items()} == {"a": 5, "b": 5}


def test_more_time_means_more_rounds() -> None:
    times = time_in_turn({"sleep": lambda: time.sleep(0.002)}, seconds=0.05)
    assert len(times.seconds["sleep"]) >= 6
    assert min(times.seconds["sleep"]) >= 0.002


def test_what_a_call_started_is_waited_for() -> None:
    order: list[str] = []
    time_in_turn({"a": lambda: order.append("call")}, seconds=0.0, wait=lambda: order.append("wait"), warmup_rounds=0)
    assert order == ["wait", *["call", "wait"] * 5]


def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    # The machine is three times as slow in the last round, for both alike.
    times = Times({"a": [2.0, 2.2, 6.0], "b": [1.0, 1.0, 3.0]})
    assert times.ratio("a", "b") == pytest.approx(2.0)
    assert times.median("a") == 2.2
