"""Results come back as they were kept, are compared by run, and are drawn."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesaic.report import evaluation_plots
from moesaic.report.drawing import write_figure
from moesaic.report.evaluation_plots import comparison_figure, relative_shares, write_comparison, write_domains
from moesaic.report.evaluations import (
    EvaluationError,
    MetricResult,
    TaskResult,
    comparison,
    read_results,
    write_json,
    write_result,
    write_samples,
)

RESULT = TaskResult(
    run="runs/a",
    step=12,
    task="piqa",
    task_version="1.0",
    shots=0,
    limit=None,
    num_records=1838,
    precision="bf16",
    uses_chat_template=False,
    records_from="eval/piqa_valid.jsonl",
    seed=1234,
    metrics={
        "acc": MetricResult(value=0.65, standard_error=0.011, higher_is_better=True),
        "acc_norm": MetricResult(value=0.63, standard_error=0.012, higher_is_better=True),
    },
    seconds=3.5,
    versions={"moesaic": "0.1.0"},
    fingerprints={"weights": "ab"},
    command=["moesaic", "evaluate"],
)
PERPLEXITY = MetricResult(value=math.inf, standard_error=None, higher_is_better=False)


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    others = [
        replace(RESULT, shots=5),
        replace(RESULT, limit=10, uses_chat_template=True),
        replace(RESULT, step=3, task="lambada", metrics={"perplexity": PERPLEXITY}),
    ]
    paths = [write_result(tmp_path, result) for result in (RESULT, *others)]
    paths.append(write_result(tmp_path, replace(RESULT, precision="fp32"), suffix="-fp32"))
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == [
        "evaluations/step-00000012/piqa.json",
        "evaluations/step-00000012/piqa-5-shot.json",
        "evaluations/step-00000012/piqa-first-10-chat.json",
        "evaluations/step-00000003/lambada.json",
        "evaluations/step-00000012/piqa-fp32.json",
    ]
    write_samples(paths[0], [{"doc": {"x": "ü"}, "odd": {1, 2}}])
    assert json.loads(paths[0].with_suffix(".samples.jsonl").read_text(encoding="utf-8"))["doc"] == {"x": "ü"}
    write_json(tmp_path, 12, "domains", {"kind": "domains"})
    found = read_results(tmp_path)
    assert len(found) == 5 and found[0].step == 3
    assert math.isnan(found[0].metrics["perplexity"].value)
    assert found[0].metrics["perplexity"].higher_is_better is False
    kept = [RESULT, *others[:2], replace(RESULT, precision="fp32")]
    assert all(result in found for result in kept)
    assert [result.task for result in read_results(tmp_path, step=3)] == ["lambada"]
    write_result(tmp_path, replace(RESULT, seconds=9.0))
    assert len(read_results(tmp_path)) == 5
    assert read_results(tmp_path / "absent") == []


@pytest.mark.parametrize("content", ["{", "[]", '{"kind": "task"}', '{"kind": "task", "surprise": 1}'])
def test_a_file_that_is_no_result_is_named(tmp_path: Path, content: str) -> None:
    path = write_json(tmp_path, 1, "piqa", {})
    path.write_text(content, encoding="utf-8")
    with pytest.raises(EvaluationError, match=r"piqa.json is not a result that moesaic wrote .*; remove it"):
        read_results(tmp_path)


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "evaluations").write_text("in the way")
    with pytest.raises(EvaluationError, match=r"cannot be written .*; free some"):
        write_result(tmp_path, RESULT)


def test_runs_are_compared_cell_by_cell() -> None:
    other = replace(RESULT, run="runs/b", metrics={"acc": MetricResult(value=0.7, standard_error=None,
                                                                       higher_is_better=True)})  # fmt: skip
    lambada = replace(RESULT, run="runs/b", task="lambada", metrics={"perplexity": PERPLEXITY})
    assert comparison([RESULT, other, lambada]) == [
        ("piqa", "acc", [RESULT.metrics["acc"], other.metrics["acc"]]),
        ("piqa", "acc_norm", [RESULT.metrics["acc_norm"], None]),
        ("lambada", "perplexity", [None, PERPLEXITY]),
    ]
    # The same run at two precisions is two columns.
    assert comparison([RESULT, replace(RESULT, precision="fp32")])[0][2] == [RESULT.metrics["acc"]] * 2


def bars(axes: Any) -> list[float]:
    return [round(float(bar.get_height()), 6) for bar in axes.patches]


def test_the_plot_has_a_bar_for_each_run_and_task_and_a_scale_for_what_is_no_share(tmp_path: Path) -> None:
    better = MetricResult(value=1.25, standard_error=None, higher_is_better=False)
    results = [
        RESULT,
        replace(RESULT, task="wikitext2", metrics={"bits_per_byte": better}),
        replace(RESULT, run="runs/b", metrics={"acc": replace(RESULT.metrics["acc"], value=0.7)}),
        replace(RESULT, run="runs/b", task="lambada", metrics={"acc": replace(RESULT.metrics["acc"], value=0.2)}),
    ]
    figure = comparison_figure(results)
    shares, others = figure.axes
    assert bars(shares) == [0.65, 0.7, 0.2] and bars(others) == [1.25]
    assert [label.get_text() for label in shares.get_xticklabels()] == ["piqa\nacc", "lambada\nacc"]
    assert shares.get_legend() is not None and len(shares.get_legend().get_texts()) == 2
    path = write_comparison(results, tmp_path / "plots" / "evaluations.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    unknown = [replace(RESULT, task="lambada", metrics={"perplexity": PERPLEXITY})]
    assert bars(comparison_figure(unknown).axes[0]) == []


def test_a_runs_name_may_begin_with_an_underscore() -> None:
    (axes,) = comparison_figure([replace(RESULT, run="_a"), replace(RESULT, run="_b")]).axes
    assert [text.get_text()[:2] for text in axes.get_legend().get_texts()] == ["_a", "_b"]


def test_long_names_of_runs_leave_the_plot_its_place(tmp_path: Path) -> None:
    long = comparison_figure([replace(RESULT, run="experiments/" * 20 + "a"), RESULT])
    write_figure(long, tmp_path / "long.png")
    (axes,) = long.axes
    assert axes.get_position().width * long.get_figwidth() > 4.5


def test_shares_are_relative_to_the_mean_and_experts_in_order_of_their_domain(tmp_path: Path) -> None:
    shares = np.array([[0.1, 0.6, 0.3, 0.0], [0.5, 0.2, 0.3, 0.0]])
    relative, order = relative_shares(shares)
    assert relative[:, 0] == pytest.approx([1 / 3, 5 / 3]) and relative[:, 2] == pytest.approx([1.0, 1.0])
    assert np.isnan(relative[:, 3]).all()
    assert order.tolist() == [1, 2, 0, 3]
    path = write_domains(
        tmp_path / "plots" / "expert_domains.png", domains=["law", "art"], layers=[1, 3, 5], shares=[shares] * 3,
        information_bits=[0.3, 0.2, 0.01], chance_bits_high=[0.02] * 3,
    )  # fmt: skip
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_colour_bars_label_is_whole_where_there_are_few_domains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = []
    monkeypatch.setattr(evaluation_plots, "write_figure", lambda figure, path: figures.append(figure))
    evaluation_plots.write_domains(
        tmp_path / "domains.png", domains=["a", "b"], layers=[0], shares=[np.full((2, 4), 0.25)],
        information_bits=[0.1], chance_bits_high=[0.05],
    )  # fmt: skip
    (figure,) = figures
    figure.draw_without_rendering()
    label = figure.axes[-1].yaxis.label.get_window_extent()
    assert figure.bbox.y0 <= label.y0 and label.y1 <= figure.bbox.y1
