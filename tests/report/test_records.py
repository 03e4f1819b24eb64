import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from moesaic.report.records import (
    METRICS_FILE,
    EvaluationRecord,
    EventRecord,
    MetricsError,
    TrainRecord,
    read_metrics,
    to_line,
)
from moesaic.report.summary import smoothed_losses, summarize


def strict_json(line: str) -> dict:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(line, parse_constant=refuse)


@pytest.mark.parametrize("experts", [(), (4,), (8, 8, 16)])
@pytest.mark.parametrize("broken", [False, True])
def test_record_round_trip_is_stable_and_valid_json(
    make_record: Callable[..., TrainRecord], experts: tuple[int, ...], broken: bool
) -> None:
    line = to_line(make_record(7, experts=experts, broken=broken))
    again = TrainRecord.from_json(strict_json(line))
    assert to_line(again) == line
    assert line.count("\n") == 1


def test_what_an_objective_reports_is_kept_and_absent_where_there_is_nothing(
    make_record: Callable[..., TrainRecord],
) -> None:
    record = replace(make_record(3), objective={"forward_kl": 0.25, "alpha": math.inf})
    line = to_line(record)
    assert TrainRecord.from_json(strict_json(line)).objective == record.objective
    assert "objective" not in strict_json(to_line(make_record(3)))
    for wrong in ([1.0], {"alpha": "much"}):
        with pytest.raises(Exception, match="objective"):
            TrainRecord.from_json({**strict_json(line), "objective": wrong})


def test_scalars_are_exact_and_loads_keep_five_digits(make_record: Callable[..., TrainRecord]) -> None:
    record = make_record(3, experts=(8, 16))
    again = TrainRecord.from_json(json.loads(to_line(record)))
    assert again.loss == record.loss
    assert again.moe is not None and record.moe is not None
    assert again.moe.drop_rate == record.moe.drop_rate
    for read, written in zip(again.moe.load, record.moe.load, strict=True):
        assert read == pytest.approx(written, rel=5e-5)


@pytest.mark.parametrize(("value", "text"), [(math.nan, "NaN"), (math.inf, "Infinity"), (-math.inf, "-Infinity")])
def test_non_finite_numbers_are_strings_in_the_file_and_floats_again(value: float, text: str) -> None:
    record = EvaluationRecord(step=1, tokens=2, seconds=0.5, loss=value, sequences=4)
    values = strict_json(to_line(record))
    assert values["loss"] == text
    again = EvaluationRecord.from_json(values)
    assert again.loss == value or (math.isnan(again.loss) and math.isnan(value))


def test_null_means_not_known(make_record: Callable[..., TrainRecord]) -> None:
    values = make_record(1).to_json()
    values["share_of_peak"] = None
    record = TrainRecord.from_json(values)
    assert record.share_of_peak is None and record.moe is None


def test_read_metrics_keeps_kinds_and_order(make_run: Callable[..., Path]) -> None:
    metrics = read_metrics(make_run(25, experts=(4, 8)))
    assert [record.step for record in metrics.train] == list(range(1, 26))
    assert [record.step for record in metrics.evaluation] == [10, 20]
    assert metrics.events == (EventRecord(step=25, message="saved [bold] é"),)


def test_only_a_cut_off_last_line_is_forgiven(make_run: Callable[..., Path]) -> None:
    folder = make_run(5)
    path = folder / METRICS_FILE
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for cut in (last + 1, last + 20, len(whole) - 4, len(whole) - 1):  # the last: all but the newline
        path.write_bytes(whole[:cut])
        metrics = read_metrics(folder)
        assert len(metrics.train) == 5
        assert len(metrics.events) == (1 if cut == len(whole) - 1 else 0)
    lines = whole.splitlines(keepends=True)
    for broken in (lines[1][:30], b"[" * 200_000):
        lines[1] = broken + b"\n"
        path.write_bytes(b"".join(lines))
        with pytest.raises(MetricsError, match=r"line 2: it is not JSON.*a train, evaluation or event.*restore"):
            read_metrics(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": None}, "loss is None, not a number"),
        ({"loss": "high"}, "loss is 'high', not a number"),
        ({"loss": 10**400}, "loss is a whole number of more digits"),
        ({"step": 1.5}, "not an object with a kind and a step"),
        ({"tokens": True}, "tokens is True, not a whole number"),
        ({"kind": "guess"}, "its kind is 'guess'"),
        ({"loses": 1.0}, "unknown keys loses"),
        ({"moe": []}, "moe is neither null nor an object"),
        ({"moe": {"layers": [1], "load": [], "drop_rate": [0.0], "entropy": [0.0]}}, "moe.load is not a list with one"),
        ({"moe": {"layers": [1]}}, "it lacks drop_rate, entropy, load"),
    ],
)
def test_a_line_that_is_not_a_record_is_named(
    tmp_path: Path, make_record: Callable[..., TrainRecord], change: dict, message: str
) -> None:
    (tmp_path / METRICS_FILE).write_text(json.dumps({**make_record(1).to_json(), **change}) + "\n", encoding="utf-8")
    with pytest.raises(MetricsError, match=message):
        read_metrics(tmp_path)


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / METRICS_FILE).write_text("")

    def refuse(self: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(MetricsError, match=r"metrics\.jsonl cannot be read \(Permission denied\); .*; check"):
        read_metrics(tmp_path)


def test_missing_file_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(MetricsError, match=r"metrics\.jsonl does not exist; .*; give the folder of a run"):
        read_metrics(tmp_path)


def test_an_empty_file_is_a_run_without_records(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).touch()
    assert read_metrics(tmp_path).train == ()


@pytest.mark.parametrize("num_records", [1, 10, 64, 65, 1000])
def test_thinning_bounds_the_records_and_keeps_both_ends(make_run: Callable[..., Path], num_records: int) -> None:
    folder = make_run(num_records)
    steps = [record.step for record in read_metrics(folder, most_records=50).train]
    assert steps == sorted(set(steps))
    assert steps[0] == 1 and steps[-1] == num_records
    assert steps[-64:] == list(range(max(1, num_records - 63), num_records + 1))
    assert len(steps) <= 2 * 50 + 64
    if num_records <= 50:
        assert len(steps) == num_records


def test_the_smoothed_loss_is_that_of_all_records_however_few_are_kept(make_run: Callable[..., Path]) -> None:
    folder = make_run(1000)
    whole, thinned = read_metrics(folder), read_metrics(folder, most_records=20)
    assert len(thinned.train) < 200
    steps = [record.step for record in thinned.train]
    losses = dict(zip([record.step for record in whole.train], smoothed_losses(whole), strict=True))
    assert smoothed_losses(thinned).tolist() == [losses[step] for step in steps]
    summary = summarize(thinned)
    assert summary is not None and summary.loss == losses[1000]
    for step in (1, 500, 1000):
        part = thinned.up_to(step)
        assert [each.step for each in part.train] == [each.step for each in thinned.train if each.step <= step]
        same = whole.up_to(part.train[-1].step)
        losses = dict(zip([record.step for record in same.train], smoothed_losses(same), strict=True))
        assert smoothed_losses(part).tolist() == [losses[record.step] for record in part.train]
    assert smoothed_losses(thinned.up_to(0)).tolist() == []
