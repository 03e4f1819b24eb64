import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from moesaic.report.comparison import Curve, comparison_figure, write_comparison


def curve(name: str, *, points: int, floor: float, flops_per_token: float = 1e8) -> Curve:
    tokens = tuple(1e6 * (1 + place) for place in range(points))
    losses = tuple(floor + 3 / (1 + place) for place in range(points))
    return Curve(name, tokens, tuple(each / 5e3 for each in tokens), losses, flops_per_token)


def test_each_panel_has_every_run_in_its_own_unit() -> None:
    curves = [curve("dense", points=8, floor=3.4), curve("PR-MoE", points=6, floor=3.1, flops_per_token=2e8)]
    figure = comparison_figure(curves)
    tokens, flops, minutes = (
        [np.asarray(line.get_xdata(), dtype=float) for line in axes.get_lines()] for axes in figure.axes
    )
    for place, each in enumerate(curves):
        assert np.array_equal(tokens[place], each.tokens)
        assert np.allclose(flops[place], np.asarray(each.tokens) * each.flops_per_token / 1e15)
        assert np.allclose(minutes[place], np.asarray(each.seconds) / 60)
    assert figure.axes[1].get_xlabel() == "training PFLOP"
    low, high = figure.axes[0].get_ylim()
    assert low < min(curves[1].losses) and high > max(each.losses[-1] for each in curves)
    assert high < curves[0].losses[0]  # the first loss of all would flatten what differs


@pytest.mark.parametrize("points", [(), (1,), (1, 30), (5,) * 9, (0, 3)], ids=str)
def test_every_set_of_runs_is_drawn(tmp_path: Path, points: tuple[int, ...]) -> None:
    curves = [curve(f"run {place}", points=count, floor=3 + place / 10) for place, count in enumerate(points)]
    path = write_comparison(tmp_path / "comparison.png", curves)
    assert imread(path)[..., :3].std() > 0.01


def test_a_curve_is_read_from_the_run(make_run: Callable[..., Path]) -> None:
    read = Curve.of_run(make_run(25), name="a", flops_per_token=2.0)
    assert read.tokens == (40960.0, 81920.0)
    assert read.losses == (3.1, 3.1)
    assert all(map(math.isfinite, read.seconds))
