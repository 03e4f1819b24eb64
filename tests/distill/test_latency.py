"""Two models are timed in turns and compared round by round, so that what hits both alike changes no ratio."""

import itertools
from types import SimpleNamespace

import pytest

from moesaic.distill import latency
from moesaic.distill.latency import Ratio, in_turns


def test_turns_change_their_order_every_round_and_the_first_of_each_is_not_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(latency, "_FEWEST_ROUNDS", 3)
    calls: list[str] = []

    def measure(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    times = in_turns(["a", "b"], measure)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert times == {"a": [3.0, 6.0, 7.0], "b": [4.0, 5.0, 8.0]}


def test_rounds_go_on_until_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr(latency, "_SECONDS", 10.0)
    monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    assert len(in_turns(["a"], lambda name: 1.0)["a"]) == 10


def test_a_load_that_comes_and_goes_leaves_the_ratio_as_it_is() -> None:
    """In most rounds the machine is one to nine times as slow; some calls of one model are hit alone."""
    teacher = [1.0 + number % 9 for number in range(40)]
    student = [0.7 * seconds for seconds in teacher]
    for hit in (3, 17, 31):
        student[hit] *= 20
    ratio = Ratio.of(student, teacher)
    assert ratio.median == pytest.approx(0.7) and ratio.is_clear and ratio.num_rounds == 40


def test_rounds_that_do_not_agree_are_no_number() -> None:
    few = Ratio.of([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0] * 6)
    assert (few.low, few.median, few.high) == (1.0, 3.5, 6.0) and not few.is_clear
    # Ranks 40 and 61 of a hundred: the sign test's.
    many = Ratio.of([float(number) for number in range(1, 101)], [1.0] * 100)
    assert (many.low, many.median, many.high) == (41.0, 50.5, 60.0) and not many.is_clear
    assert Ratio.of([0.5], [1.0]) == Ratio(0.5, 0.5, 0.5, 1)
