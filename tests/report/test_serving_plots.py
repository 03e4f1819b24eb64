"""A server's answers are drawn, several runs beside one another, whatever became of them."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from moesaic.report.serving import RequestResult, ServingResult
from moesaic.report.serving_plots import serving_figure, write_serving_plot


def run_of(name: str, *, seed: int, count: int, failing: int = 0, output_tokens: int = 20) -> ServingResult:
    random = np.random.default_rng(seed)
    requests = []
    for number in range(count):
        sent = number * 0.5
        first = sent + float(random.lognormal(-1, 0.7))
        chunks = first + np.cumsum([0.0, *random.gamma(4, 0.02, output_tokens - 1)])
        is_failed = number < failing
        requests.append(
            RequestResult(
                due_seconds=sent,
                sent_seconds=sent,
                end_seconds=float(chunks[-1]),
                chunk_seconds=() if is_failed else tuple(chunks.tolist()),
                asked_prompt_tokens=10,
                asked_output_tokens=output_tokens,
                prompt_tokens=10,
                output_tokens=None if is_failed else output_tokens,
                error="refused" if is_failed else None,
            )
        )
    return ServingResult(
        name=name,
        url="http://test",
        model="tiny",
        created="2026-01-01T00:00:00+00:00",
        workload={},
        ttft_limit_seconds=2.0,
        tpot_limit_seconds=0.1,
        requests=tuple(requests),
    )


def test_runs_stand_side_by_side(tmp_path: Path) -> None:
    results = [run_of("ours", seed=0, count=60), run_of("a peer", seed=1, count=40, failing=10)]
    path = write_serving_plot(tmp_path / "plots" / "serving.png", results)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000

    first, each_token, over_time = serving_figure(results).axes
    labels = [text.get_text() for text in first.get_legend().get_texts()]
    assert labels[0].startswith("ours: good ") and labels[1].endswith("10 failed")
    assert "ours: " in over_time.get_legend().get_texts()[0].get_text()
    # A distribution ends at the share that was answered: all of the first run, three quarters of the second.
    for axes in (first, each_token):
        ends = [line.get_ydata()[-1] for line in axes.lines if len(line.get_ydata()) > 2]
        assert ends == pytest.approx([1.0, 0.75])
    # As many tokens as were answered lie under the line.
    times, rates = (np.asarray(values) for values in over_time.lines[0].get_data())
    width = times[1] - times[0]
    last_width = 2 * (times[-1] - width * (len(times) - 1))
    assert rates[:-1].sum() * width + rates[-1] * last_width == pytest.approx(60 * 20)


def test_a_name_may_begin_with_an_underscore() -> None:
    first, _, over_time = serving_figure([run_of("_hidden", seed=0, count=5), run_of("seen", seed=1, count=5)]).axes
    for axes in (first, over_time):
        names = [text.get_text() for text in axes.get_legend().get_texts()]
        assert [name.partition(":")[0] for name in names] == ["_hidden", "seen"]


def test_a_run_of_less_than_a_second_is_not_said_to_last_none() -> None:
    run = run_of("ours", seed=0, count=1, output_tokens=2)
    seconds = run.summary().duration_seconds
    assert 0 < seconds < 1
    figure = serving_figure([run])
    assert f"over {seconds * 1e3:.3g} ms" in figure.axes[2].get_legend().get_texts()[0].get_text()
    assert figure.axes[0].get_legend().get_frame_on()


def test_an_answer_of_one_token_is_no_failure() -> None:
    run = run_of("ours", seed=0, count=10, failing=2)
    single = run_of("single", seed=0, count=5, output_tokens=1).requests
    _, each_token, _ = serving_figure([replace(run, requests=(*run.requests, *single))]).axes
    assert each_token.lines[0].get_ydata()[-1] == pytest.approx(0.8)


@pytest.mark.parametrize(
    "results",
    [
        [],
        [run_of("nothing", seed=0, count=0)],
        [run_of("all failed", seed=0, count=5, failing=5)],
        [run_of("one", seed=0, count=1)],
        [run_of("single tokens", seed=0, count=5, output_tokens=1)],
        [replace(run_of("with $ and _", seed=0, count=3), ttft_limit_seconds=1e-7)],
    ],
    ids=lambda results: results[0].name if results else "none",
)
def test_little_can_be_drawn_too(tmp_path: Path, results: list[ServingResult]) -> None:
    assert write_serving_plot(tmp_path / "serving.png", results).is_file()


@pytest.mark.parametrize("factor", [1.0, 1e-2, 1e-4])
def test_the_names_of_ticks_do_not_touch(factor: float) -> None:
    """However many decades the times span: those of a second run are so many times shorter."""
    slow, fast = run_of("slow", seed=0, count=40), run_of("fast", seed=1, count=40)

    def shorter(request: RequestResult) -> RequestResult:
        chunks = tuple(request.sent_seconds + (each - request.sent_seconds) * factor for each in request.chunk_seconds)
        return replace(request, chunk_seconds=chunks)

    figure = serving_figure([slow, replace(fast, requests=tuple(map(shorter, fast.requests)))])
    figure.draw_without_rendering()
    for axes in figure.axes[:2]:
        low, high = axes.get_xlim()
        ticks = axes.xaxis.get_major_ticks()
        boxes = [tick.label1.get_window_extent() for tick in ticks if low <= tick.get_loc() <= high]
        assert len(boxes) >= 2
        assert all(right.x0 - left.x1 > 4 for left, right in pairwise(boxes))
