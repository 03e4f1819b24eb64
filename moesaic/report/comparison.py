"""Validation losses of several runs in one picture, against tokens, training FLOPs or wall clock."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from moesaic.report.drawing import add_legend, empty_figure, set_title, style_axes, write_figure
from moesaic.report.quantities import short_number
from moesaic.report.records import read_metrics

# Okabe and Ito's colours: told apart with any kind of colour vision; the markers tell them apart without any.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999999")
_FLOP_UNITS = (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


@dataclass(frozen=True)
class Curve:
    """A run's validation losses (nats per token), each at so many tokens and seconds of training.

    flops_per_token: of training, forward and backward; what turns tokens into compute.
    """

    name: str
    tokens: tuple[float, ...]
    seconds: tuple[float, ...]
    losses: tuple[float, ...]
    flops_per_token: float

    @classmethod
    def of_run(cls, run_folder: str | Path, *, name: str, flops_per_token: float) -> "Curve":
        """Read a run's curve. Raises: MetricsError when it has no readable metrics."""
        found = [each for each in read_metrics(run_folder, most_records=1).evaluation if math.isfinite(each.loss)]
        return cls(
            name,
            tuple(float(each.tokens) for each in found),
            tuple(each.seconds for each in found),
            tuple(each.loss for each in found),
            flops_per_token,
        )


def comparison_figure(curves: Sequence[Curve], *, title: str = "Validation loss") -> Figure:
    """One panel each for tokens, training FLOPs and time; the early losses of a steep start may leave the frame."""
    drawn = [curve for curve in curves if curve.losses]
    figure = empty_figure(13.0, 4.9)
    panels = figure.subplots(1, 3, sharey=True)
    most = max((curve.tokens[-1] * curve.flops_per_token for curve in drawn), default=0.0)
    unit, size = next((each for each in _FLOP_UNITS if most >= each[1]), _FLOP_UNITS[-1])
    quantities = (
        ("tokens", [np.asarray(curve.tokens) for curve in drawn]),
        (f"training {unit}", [np.asarray(curve.tokens) * (curve.flops_per_token / size) for curve in drawn]),
        ("minutes of training", [np.asarray(curve.seconds) / 60 for curve in drawn]),
    )
    for axes, (label, values) in zip(panels, quantities, strict=True):
        style_axes(axes)
        for place, (curve, x) in enumerate(zip(drawn, values, strict=True)):
            axes.plot(
                x,
                curve.losses,
                color=_COLOURS[place % len(_COLOURS)],
                marker=_MARKERS[place % len(_MARKERS)],
                markersize=4.5,
                markeredgecolor="white",
                markeredgewidth=0.5,
                linewidth=1.5,
            )
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
        axes.set_xlabel(label)
    if drawn:
        panels[0].set_ylim(*_limits(drawn))
        names = [f"{curve.name} ({curve.losses[-1]:.3f})" for curve in drawn]
        add_legend(figure, panels[0].lines, names, loc="outside lower center", ncols=4)
    panels[0].set_ylabel("cross-entropy (nats per token)")
    set_title(panels[0], title)
    set_title(panels[2], "", "last value of each in brackets")
    return figure


def write_comparison(path: str | Path, curves: Sequence[Curve], *, title: str = "Validation loss") -> Path:
    """Draw comparison_figure into a PNG file and return its path."""
    return write_figure(comparison_figure(curves, title=title), Path(path))


def _limits(curves: Sequence[Curve]) -> tuple[float, float]:
    """Show every curve's last three quarters of points, which is where they differ, and no less than half a nat."""
    low = min(min(curve.losses) for curve in curves)
    high = max(max(curve.losses[len(curve.losses) // 4 :]) for curve in curves)
    high = max(high, low + 0.5)
    margin = 0.04 * (high - low)
    return low - margin, high + margin
