"""What was measured at a server is summed up as defined, and comes back from its file as it was."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from moesaic.errors import DataError
from moesaic.report.serving import (
    Distribution,
    RequestResult,
    ServingResult,
    read_serving,
    tokens_over_time,
    write_serving,
)

# Sent 1 s late; 4 tokens at 3.0, 3.2, 3.4, 3.6.
STEADY = RequestResult(
    due_seconds=1.0,
    sent_seconds=2.0,
    end_seconds=3.7,
    chunk_seconds=(3.0, 3.2, 3.4, 3.6),
    asked_prompt_tokens=10,
    asked_output_tokens=4,
    prompt_tokens=10,
    cached_tokens=3,
    output_tokens=4,
)
SINGLE = replace(
    STEADY, chunk_seconds=(2.5,), output_tokens=1, asked_output_tokens=1, end_seconds=10.0, cached_tokens=None
)
FAILED = replace(STEADY, chunk_seconds=(), end_seconds=20.0, output_tokens=None, error="timeout", message="too long")
RESULT = ServingResult(
    name="ours",
    url="http://127.0.0.1:8000",
    model="tiny",
    created="2026-01-01T00:00:00+00:00",
    workload={"rate": 2.0},
    ttft_limit_seconds=2.0,
    tpot_limit_seconds=0.25,
    requests=(STEADY, SINGLE, FAILED),
)


def test_a_requests_times() -> None:
    assert STEADY.lateness_seconds == 1.0 and STEADY.ttft_seconds == 1.0
    assert STEADY.tpot_seconds == pytest.approx(0.2) and STEADY.end_to_end_seconds == pytest.approx(1.7)
    assert SINGLE.ttft_seconds == 0.5 and SINGLE.tpot_seconds is None
    assert FAILED.ttft_seconds is None and FAILED.tpot_seconds is None
    assert replace(STEADY, chunk_seconds=(3.0,)).tpot_seconds is None  # all at once, which is no rate


@pytest.mark.parametrize(
    ("request_", "ttft_limit", "tpot_limit", "good"),
    [
        (STEADY, 1.0, 0.21, True),
        (STEADY, 0.99, 0.21, False),
        (STEADY, 1.0, 0.19, False),
        (SINGLE, 0.5, 1e-9, True),
        (FAILED, 100.0, 100.0, False),
        (replace(STEADY, error="wrong_token_count"), 100.0, 100.0, False),
    ],
)
def test_good_is_answered_and_within_both_limits(
    request_: RequestResult, ttft_limit: float, tpot_limit: float, good: bool
) -> None:
    assert request_.is_good(ttft_limit_seconds=ttft_limit, tpot_limit_seconds=tpot_limit) is good


def test_a_summary_counts_what_completed_and_never_hides_what_failed() -> None:
    summary = RESULT.summary()
    assert (summary.num_requests, summary.num_completed, summary.errors) == (3, 2, {"timeout": 1})
    assert summary.duration_seconds == 20.0, "to the end of the failed one"
    assert (summary.prompt_tokens, summary.cached_tokens, summary.output_tokens) == (20, 3, 5)
    assert summary.requests_per_second == 0.1 and summary.output_tokens_per_second == 0.25
    assert summary.total_tokens_per_second == 1.25 and summary.tokens_per_chunk == 1.0
    assert (summary.num_good, summary.goodput_share, summary.goodput_per_second) == (2, pytest.approx(2 / 3), 0.1)
    assert summary.ttft is not None and (summary.ttft.count, summary.ttft.mean) == (2, 0.75)
    assert summary.tpot is not None and summary.tpot.count == 1
    assert summary.inter_token is not None and summary.inter_token.count == 3
    assert summary.end_to_end is not None and summary.end_to_end.max == 8.0
    assert summary.lateness is not None and summary.lateness.count == 3


def test_percentiles_lie_between_neighbours() -> None:
    values = Distribution.of([float(number) for number in range(101)])
    assert values == Distribution(count=101, mean=50.0, p50=50.0, p90=90.0, p95=95.0, p99=99.0, max=100.0)
    assert Distribution.of([1.0, 2.0]) is not None and Distribution.of([]) is None
    pair = Distribution.of(iter([1.0, 2.0]))
    assert pair is not None and (pair.p50, pair.p90) == (1.5, pytest.approx(1.9))


def test_nothing_at_all_has_a_summary() -> None:
    for requests in ((), (FAILED,)):
        summary = replace(RESULT, requests=requests).summary()
        assert summary.num_completed == 0 and summary.goodput_share == 0.0
        assert summary.ttft is None and summary.tokens_per_chunk is None


def test_tokens_over_time_are_spread_over_an_answers_chunks() -> None:
    times, rates = tokens_over_time(RESULT, bin_seconds=1.0)
    assert len(times) == 20 and times[0] == 0.5
    # The answer of one token, then that of four; the one that failed gives none.
    assert rates[2] == 1.0 and rates[3] == 4.0 and sum(rates) == 5.0
    # Four tokens in two chunks, one at the very end: two tokens in half a second each.
    two = replace(RESULT, requests=(replace(STEADY, chunk_seconds=(0.1, 4.0), end_seconds=4.0),))
    _, halves = tokens_over_time(two, bin_seconds=0.5)
    assert len(halves) == 8 and halves[0] == halves[-1] == 4.0 and sum(halves) == 8.0
    # What is left over lowers no rate: three tokens in 1.25 s.
    times, rates = tokens_over_time(
        replace(two, requests=(replace(STEADY, chunk_seconds=(0.5, 1.5, 1.9, 2.2), end_seconds=2.25),)), bin_seconds=1.0
    )
    assert times == [0.5, 1.625] and rates == [1.0, 3 / 1.25]
    assert tokens_over_time(replace(RESULT, requests=()), bin_seconds=1.0) == ([0.5], [0.0])


def test_a_result_comes_back_from_its_file(tmp_path: Path) -> None:
    path = write_serving(tmp_path / "new" / "result.json", RESULT)
    assert read_serving(path) == RESULT
    values = json.loads(path.read_text())
    assert values["summary"]["errors"] == {"timeout": 1} and values["summary"]["goodput_share"] == pytest.approx(2 / 3)
    assert list(path.parent.iterdir()) == [path], "nothing half-written is left"


@pytest.mark.parametrize(
    "change",
    [
        lambda values: {**values, "kind": "task"},
        lambda values: {**values, "extra": 1},
        lambda values: {key: value for key, value in values.items() if key != "requests"},
        lambda values: {**values, "requests": [7]},
        lambda values: {**values, "requests": [{**values["requests"][0], "error": "unheard of"}]},
        lambda values: {**values, "requests": [{**values["requests"][0], "sent_seconds": "soon"}]},
        lambda values: {**values, "requests": [{**values["requests"][0], "chunk_seconds": [float("nan")]}]},
        lambda values: [values],
    ],
)
def test_another_file_is_no_result(tmp_path: Path, change) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "result.json"
    path.write_text(json.dumps(change(RESULT.to_json())))
    with pytest.raises(DataError, match=r"is no result of `moesaic bench serve`"):
        read_serving(path)


def test_a_file_that_cannot_be_read_or_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not JSON")
    with pytest.raises(DataError, match="is no result"):
        read_serving(tmp_path / "text")
    with pytest.raises(DataError, match="cannot be read"):
        read_serving(tmp_path / "none")
    with pytest.raises(DataError, match="cannot be written"):
        write_serving(tmp_path / "text" / "result.json", RESULT)
