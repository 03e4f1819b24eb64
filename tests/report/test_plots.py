import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread

from moesaic.config.train import ScheduleConfig
from moesaic.report.plots import (
    expert_balance_figure,
    heat_columns,
    learning_rate_figure,
    loss_limits,
    objective_figure,
    write_plots,
)
from moesaic.report.records import METRICS_FILE, ExpertRecord, MetricsError, TrainRecord, to_line
from moesaic.train.schedule import learning_rate

DENSE = {"loss.png", "learning_rate.png", "throughput.png"}
MOE = DENSE | {"expert_load.png", "expert_balance.png"}


@pytest.mark.parametrize(
    ("num_records", "experts", "broken"),
    [
        (30, (), ()),
        (30, (8, 8, 8, 16), (5, 6)),
        (1, (4,), ()),
        (1, (4, 8), (1,)),
        (3, (), (1, 2, 3)),
        (12, (16,) * 13, ()),
        (2, (1, 3), ()),
    ],
    ids=["dense", "pyramid", "one-record", "one-broken-record", "all-broken", "many-layers", "one-expert"],
)
def test_every_kind_of_run_is_drawn(
    make_run: Callable[..., Path], num_records: int, experts: Sequence[int], broken: Sequence[int]
) -> None:
    folder = make_run(num_records, experts=experts, broken=broken)
    paths = write_plots(folder)
    assert {path.name for path in paths} == (MOE if experts else DENSE)
    assert {path.name for path in (folder / "plots").iterdir()} == {path.name for path in paths}  # no partial file
    for path in paths:
        image = imread(path)
        assert min(image.shape[:2]) > 300
        assert image[..., :3].std() > 0.01  # not a blank sheet


@pytest.mark.parametrize("num_records", [1, 12])
def test_what_an_objective_reports_is_drawn(
    make_record: Callable[..., TrainRecord], tmp_path: Path, num_records: int
) -> None:
    """The divergence ends where alpha does."""

    def terms(step: int) -> dict[str, float]:
        return {"alpha": 0.0} if step > 8 else {"forward_kl": math.nan if step == 2 else 1.0 / step, "alpha": 1.0}

    records = [replace(make_record(step), objective=terms(step)) for step in range(1, num_records + 1)]
    (tmp_path / METRICS_FILE).write_text("".join(map(to_line, records)))
    assert {path.name for path in write_plots(tmp_path)} == DENSE | {"objective.png"}
    assert imread(tmp_path / "plots" / "objective.png")[..., :3].std() > 0.01
    figure = objective_figure(records)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["cross-entropy", "forward kl", "alpha"]
    # The mean ends with the divergence, not a record behind it.
    last = min(num_records, 8)
    for line in figure.axes[1].lines:
        x, y = line.get_data()
        assert max(np.asarray(x)[np.isfinite(y)]) == records[last - 1].tokens


@pytest.mark.parametrize("peak", [3e-3, 6e-5, 0.02])
def test_learning_rates_are_written_as_numbers(make_record: Callable[..., TrainRecord], peak: float) -> None:
    figure = learning_rate_figure([replace(make_record(step), learning_rate=peak * step / 5) for step in range(1, 6)])
    FigureCanvasAgg(figure).draw()
    ticks = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    rates = [float(text) for text in ticks]  # each by itself, with no factor beside the axis
    assert rates == sorted(rates) and rates[0] == 0 and rates[-1] >= peak / 2
    assert not figure.axes[0].yaxis.get_offset_text().get_text()


def test_learning_rate_is_drawn_by_its_schedule_between_records(make_record: Callable[..., TrainRecord]) -> None:
    config = ScheduleConfig(kind="wsd", learning_rate=1.0, decay_tokens=39_000)
    schedule = partial(learning_rate, config, total_tokens=400_000)
    records = [
        replace(make_record(step), tokens=step * 80_000, learning_rate=schedule(step * 80_000)) for step in range(1, 6)
    ]
    (line,) = learning_rate_figure(records, schedule=schedule).axes[0].lines
    tokens, rates = (np.asarray(values, dtype=np.float64) for values in line.get_data())
    assert tokens[rates == 1.0].max() == pytest.approx(361_000, abs=1_000)  # at 320,000 is the last such record
    assert tokens[-1] == 400_000 and rates[-1] == 0


def test_learning_rates_of_before_a_resume_are_drawn_as_they_were(make_record: Callable[..., TrainRecord]) -> None:
    config = ScheduleConfig(kind="wsd", learning_rate=1.0, warmup_tokens=4_000, decay_tokens=20_000)
    before, after = (partial(learning_rate, config, total_tokens=tokens) for tokens in (100_000, 400_000))
    taken = [*range(10_000, 100_001, 10_000), *range(150_000, 400_001, 50_000)]
    rates = [(before if tokens <= 100_000 else after)(tokens) for tokens in taken]
    records = [
        replace(make_record(1), tokens=tokens, learning_rate=rate) for tokens, rate in zip(taken, rates, strict=True)
    ]
    (line,) = learning_rate_figure(records, schedule=after).axes[0].lines
    tokens, drawn = (np.asarray(values, dtype=np.float64) for values in line.get_data())
    assert dict(zip(tokens, drawn, strict=True)).items() >= dict(zip(taken, rates, strict=True)).items()
    assert drawn[tokens == 100_000] == 0.0 and not ((tokens > 80_000) & (tokens < 90_000)).any()
    assert tokens[(tokens > 100_000) & (drawn == 1.0)].max() == pytest.approx(380_000, abs=1_000)
    assert drawn[tokens < 4_000] == pytest.approx(tokens[tokens < 4_000] / 4_000) and (tokens < 4_000).sum() > 5


def test_large_pyramid_is_drawn(make_run: Callable[..., Path]) -> None:
    assert len(write_plots(make_run(40, experts=[64] * 10 + [128] * 2))) == 5


def test_nothing_is_drawn_before_the_first_record(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).touch()
    assert write_plots(tmp_path) == []


def test_a_folder_without_metrics_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MetricsError, match="does not exist"):
        write_plots(tmp_path)


def test_drawing_leaves_no_global_figure_and_loads_no_pyplot(make_run: Callable[..., Path]) -> None:
    folder = make_run(5, experts=(4,))
    code = (
        "import sys; from moesaic.report.plots import write_plots; from moesaic.report import terminal; "
        f"write_plots({str(folder)!r}); "
        "assert 'matplotlib.pyplot' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_loss_frame_leaves_out_the_first_spike_and_nothing_else() -> None:
    tokens = np.arange(1, 201, dtype=np.float64)
    losses = 3 + 6 * np.exp(-tokens / 3)
    low, high = loss_limits(tokens, losses, losses, [])
    assert losses[0] > high
    assert (losses[13:] < high).all() and (losses > low).all()
    assert loss_limits(tokens[:1], losses[:1], losses[:1], [])[0] < losses[0]
    nan = np.full(3, math.nan)
    # Less steep, or with few records, all of it fits.
    gentle = 5 - tokens / 100
    assert loss_limits(tokens, gentle, gentle, [])[1] > gentle[0]
    assert loss_limits(tokens[::15], losses[::15], losses[::15], [])[1] > losses[0]
    assert loss_limits(tokens[:3], nan, nan, []) == (0.0, 1.0)


@pytest.mark.parametrize("dropped", [0.0, math.nan, 0.25])
def test_drop_rates_have_a_panel_where_tokens_were_dropped(
    make_record: Callable[..., TrainRecord], dropped: float
) -> None:
    experts = ExpertRecord(layers=(3, 5), load=((0.5, 0.5),) * 2, drop_rate=(0.0, dropped), entropy=(0.9, 0.8))
    figure = expert_balance_figure([replace(make_record(step), moe=experts) for step in (1, 2)])
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["Routing entropy", "Load of the fullest expert", *["Drop rate"] * (dropped > 0)]


@pytest.mark.parametrize("count", [1, 7, 320, 321, 1000])
def test_heat_columns_cover_the_run_and_keep_the_mean(count: int) -> None:
    random = np.random.default_rng(0)
    tokens = np.arange(1, count + 1) * 10.0
    experts = [
        ExpertRecord(layers=(3,), load=(tuple(random.dirichlet(np.ones(4))),), drop_rate=(0.0,), entropy=(0.0,))
        for _ in range(count)
    ]
    edges, loads = heat_columns(tokens, experts, 0)
    assert loads.shape == (min(count, 320), 4) and len(edges) == len(loads) + 1
    assert edges[0] == 0 and edges[-1] == tokens[-1] and (np.diff(edges) > 0).all()
    mean = np.mean([record.load[0] for record in experts], axis=0)
    assert np.average(loads, axis=0, weights=np.diff(edges)) == pytest.approx(mean)
