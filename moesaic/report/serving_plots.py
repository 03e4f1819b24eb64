"""How a server answered, as one picture: times to the first token, times per token, tokens over time.

Several runs are drawn side by side, a colour each, so that servers, or settings of one, can be compared.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from moesaic.report.drawing import FAINT_INK, INK, add_legend, empty_figure, set_title, style_axes, write_figure
from moesaic.report.quantities import percent, short_number
from moesaic.report.serving import ServingResult, tokens_over_time

# Stretches of time that the longest run is cut into, and what a stretch may last.
_BINS = 120
_BIN_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0)
# What a logarithmic axis can still show.
_SHORTEST_SECONDS = 1e-5


def write_serving_plot(path: Path, results: Sequence[ServingResult]) -> Path:
    """Draw runs side by side into a PNG, and return its path."""
    return write_figure(serving_figure(results), path)


def serving_figure(results: Sequence[ServingResult]) -> Figure:
    """Two distributions, with the limits of the goodput, and the throughput of answers; a colour for each run."""
    figure = empty_figure(11.0, 7.6)
    grid = figure.add_gridspec(2, 2, height_ratios=[1.15, 1.0])
    first, each_token, over_time = (figure.add_subplot(place) for place in (grid[0, 0], grid[0, 1], grid[1, :]))
    colours = colormaps["tab10"](np.arange(len(results)) % 10)
    summaries = [result.summary() for result in results]
    names = []
    for result, summary, colour in zip(results, summaries, colours, strict=True):
        failed = summary.num_requests - summary.num_completed
        names.append(f"{result.name}: good {percent(summary.goodput_share)}" + (f", {failed} failed" if failed else ""))
        _draw_shares(first, [each.ttft_seconds for each in result.completed], len(result.requests), colour)
        # Answers of one token have no time per token behind it: no reason for a curve to end lower.
        tpots = [each.tpot_seconds for each in result.completed]
        _draw_shares(each_token, tpots, len(result.requests) - tpots.count(None), colour)
    curves = list(first.lines)  # without those of the limits
    _finish_shares(first, "Time to the first token", {each.ttft_limit_seconds for each in results})
    _finish_shares(each_token, "Time per token behind it", {each.tpot_limit_seconds for each in results})
    if results:
        legend = add_legend(first, curves, names, loc="lower right", labelcolor=INK, fontsize=8.5)
        legend.set_frame_on(True)  # a limit may pass behind it
        legend.get_frame().set(facecolor="white", edgecolor="none", alpha=1.0)

    style_axes(over_time)
    longest = max((summary.duration_seconds for summary in summaries), default=0.0)
    bin_seconds = next((each for each in _BIN_SECONDS if each * _BINS >= longest), _BIN_SECONDS[-1])
    names = []
    for result, summary, colour in zip(results, summaries, colours, strict=True):
        times, rates = tokens_over_time(result, bin_seconds=bin_seconds)
        mean = summary.output_tokens_per_second
        lasted = _seconds(float(f"{summary.duration_seconds:.3g}"))
        names.append(f"{result.name}: {short_number(mean)} tokens/s over {lasted}")
        over_time.plot(times, rates, color=colour, linewidth=1.5, drawstyle="steps-mid")
    over_time.set_ylim(0, over_time.get_ylim()[1] * 1.25)  # room for the names
    over_time.set_xlim(left=0)
    over_time.set_xlabel("seconds")
    over_time.set_ylabel("output tokens / s")
    set_title(over_time, "Output tokens", f"of each {bin_seconds:g} s")
    if results:
        add_legend(over_time, over_time.lines, names, loc="upper right", labelcolor=INK, fontsize=8.5)
    return figure


def _draw_shares(axes: Axes, seconds: Sequence[float | None], num_requests: int, colour: Sequence[float]) -> None:
    """Draw which share of all requests had at most so many seconds; what failed never gets there."""
    found = np.sort(np.asarray([each for each in seconds if each is not None], dtype=np.float64))
    found = np.maximum(found, _SHORTEST_SECONDS)
    places, shares = found, np.arange(1, len(found) + 1) / max(1, num_requests)
    if len(found):  # from the axis up
        places, shares = np.concatenate([found[:1], found]), np.concatenate([[0.0], shares])
    axes.plot(places, shares, color=colour, linewidth=1.8, drawstyle="steps-post")


def _finish_shares(axes: Axes, title: str, limits: set[float]) -> None:
    style_axes(axes)
    axes.set_xscale("log")
    axes.set_ylim(0, 1.02)
    for limit in sorted(limits):
        axes.axvline(limit, color=FAINT_INK, linewidth=1.0, linestyle="--")
    low, high = axes.get_xlim()
    if high / low < 20:  # a decade at least, so that there are numbers to read
        middle = math.sqrt(low * high)
        axes.set_xlim(middle / 4.5, middle * 4.5)
    low, high = axes.get_xlim()
    subs = (1.0, 2.0, 5.0) if high / low < 10**2.5 else (1.0,)  # what the panel's width has room for
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=subs))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _seconds(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.tick_params(axis="x", labelsize=8)
    axes.set_ylabel("share of requests within it")
    set_title(axes, title, "dashed: the limit")


def _seconds(value: float) -> str:
    if value >= 1:
        return f"{value:g} s"
    return f"{value * 1e3:g} ms" if value >= 1e-3 else f"{value * 1e6:g} µs"
