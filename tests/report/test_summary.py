import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moesaic.report.records import Metrics, TrainRecord, read_metrics
from moesaic.report.summary import smoothed, summarize


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
