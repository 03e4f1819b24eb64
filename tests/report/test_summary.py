import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moesaic.report.records import Metrics, TrainRecord, read_metrics
from moesaic.report.summary import RECENT, mean_rate, mean_share_of_peak, smoothed, summarize


def test_no_record_no_summary() -> None:
    assert summarize(Metrics()) is None


def test_summary_holds_means_of_recent_records_and_the_best_validation(make_run: Callable[..., Path]) -> None:
    metrics = read_metrics(make_run(40, experts=(4, 8), broken=(39,)))
    summary = summarize(metrics)
    assert summary is not None
    assert summary.loss == pytest.approx(
        metrics.train[-1].loss
    )  # the last two records of forty, of which one is not finite
    assert summary.best_validation_loss == 3.1 and summary.best_validation_step == 40  # the later of equals
    assert [layer.num_experts for layer in summary.layers] == [4, 8]
    for layer in summary.layers:
        assert sum(layer.load) == pytest.approx(1, abs=1e-3)
        assert layer.imbalance >= 1 and 0 < layer.load_entropy <= 1


def records_in(seconds: Sequence[float], record: TrainRecord) -> list[TrainRecord]:
    """Records of 1,000 tokens each, made in so many seconds; a token takes 7 FLOP, of 70,000 a second."""
    ends = np.cumsum(seconds).tolist()
    return [
        replace(
            record,
            tokens=1000 * place,
            seconds=end,
            tokens_per_second=1000 / taken,
            flops_per_second=7000 / taken,
            share_of_peak=0.1 / taken,
        )
        for place, (end, taken) in enumerate(zip(ends, seconds, strict=True), start=1)
    ]


def test_speeds_are_tokens_over_seconds_not_means_of_rates(make_record: Callable[..., TrainRecord]) -> None:
    seconds = [100.0] * 5 + [0.25, 1.75] * (RECENT // 2)  # slow, and then on a machine with a busy neighbour
    records = records_in(seconds, make_record(1))
    summary = summarize(Metrics(tuple(records)))
    assert summary is not None
    assert summary.tokens_per_second == pytest.approx(1000)  # the mean of the rates is 2,286
    assert summary.flops_per_second == pytest.approx(7000)
    assert summary.share_of_peak == pytest.approx(0.1)
    rates = [record.tokens_per_second for record in records]
    assert mean_rate(records, rates) == pytest.approx(25_000 / 520)
    assert mean_rate(records[::4], rates[::4]) == pytest.approx(25_000 / 520, rel=0.01)  # as a plot of a long run


def test_rates_that_are_not_known_are_left_out_with_their_time(make_record: Callable[..., TrainRecord]) -> None:
    records = records_in([1.0, 3.0, 1.0], make_record(1))
    rates = [record.tokens_per_second for record in records]
    assert mean_rate(records, [rates[0], math.nan, rates[2]]) == pytest.approx(1000)
    assert math.isnan(mean_rate(records, [math.nan] * 3))
    assert math.isnan(mean_rate([replace(records[0], seconds=0.0)], rates[:1]))
    unknown = [replace(record, share_of_peak=None) for record in records]
    assert mean_share_of_peak(unknown) is None
    assert mean_share_of_peak([unknown[0], *records[1:]]) == pytest.approx(0.05)


def test_imbalance_is_the_mean_of_the_records_not_that_of_the_mean_load(
    make_record: Callable[..., TrainRecord],
) -> None:
    record = make_record(1, experts=(4,))
    assert record.moe is not None
    loads = [tuple(np.roll([0.7, 0.1, 0.1, 0.1], place)) for place in range(4)]  # each batch has another fullest one
    records = [replace(record, moe=replace(record.moe, load=(load,))) for load in loads]
    summary = summarize(Metrics(tuple(records)))
    assert summary is not None
    (layer,) = summary.layers
    assert layer.load == pytest.approx([0.25] * 4) and layer.imbalance == pytest.approx(2.8)
    assert layer.load_entropy == pytest.approx(0.678, abs=1e-3)


def test_the_last_smoothed_loss_is_of_the_last_record_and_a_fortieth_before_it() -> None:
    values = np.random.default_rng(0).normal(size=400)
    assert smoothed(values)[-1] == pytest.approx(values[-11:].mean())


@pytest.mark.parametrize("broken", [(), (1,)])
def test_json_form_is_valid_json_even_when_nothing_is_finite(make_run: Callable[..., Path], broken: tuple) -> None:
    summary = summarize(read_metrics(make_run(1, experts=(4,), broken=broken)))
    assert summary is not None
    values = json.loads(json.dumps(summary.to_json(), allow_nan=False))
    assert (values["loss"] is None) == bool(broken)


def test_warnings_carry_their_sentence(make_record: Callable[..., TrainRecord]) -> None:
    record = make_record(1, experts=(4,))
    assert record.moe is not None
    values = record.to_json()
    values["moe"]["load"] = [[0.0, 0.3, 0.3, 0.4]]
    summary = summarize(Metrics((TrainRecord.from_json(values),) * 10))
    assert summary is not None
    (warning,) = summary.to_json()["warnings"]
    assert warning["kind"] == "dead" and "layer 1: expert 0 is dead" in warning["message"]


@pytest.mark.parametrize("count", [1, 2, 39, 500])
def test_smoothing_keeps_constants_ends_and_bounds(count: int) -> None:
    assert smoothed(np.full(count, 2.5)) == pytest.approx(np.full(count, 2.5))
    values = np.random.default_rng(0).normal(size=count)
    smooth = smoothed(values)
    assert smooth[0] == pytest.approx(values[0])
    assert smooth.min() >= values.min() - 1e-9 and smooth.max() <= values.max() + 1e-9


@pytest.mark.parametrize(("count", "is_smoothed"), [(4, False), (20, False), (21, True)])
def test_few_points_are_what_they_are(count: int, is_smoothed: bool) -> None:
    values = np.random.default_rng(0).normal(size=count)
    assert np.allclose(smoothed(values), values) is not is_smoothed


def test_smoothing_skips_what_is_not_finite() -> None:
    values = np.ones(100)
    values[[3, 50]] = [math.nan, math.inf]
    assert smoothed(values)[10:] == pytest.approx(np.ones(90))
    assert np.isnan(smoothed(np.full(3, math.nan))).all()
