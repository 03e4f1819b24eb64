"""A run's metrics as PNG files: loss, learning rate, expert load, expert balance, throughput.

Drawn with matplotlib's objects on the Agg canvas: no pyplot, no global style, so a training process, a thread or a
server may call it. Each file is replaced as a whole, so a viewer never sees half of one.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, MultipleLocator, NullFormatter

from moesaic.report.drawing import (
    BLUE,
    FAINT_INK,
    INK,
    LOAD_COLOURS,
    ORANGE,
    RED,
    empty_figure,
    figure_with_axes,
    set_title,
    style_axes,
    write_figure,
)
from moesaic.report.expert_load import ExpertWarning, imbalance, name_unusual
from moesaic.report.quantities import short_number
from moesaic.report.records import EvaluationRecord, ExpertRecord, Metrics, TrainRecord, read_metrics
from moesaic.report.summary import mean_rate, mean_share_of_peak, smoothed, smoothed_losses

# Points of a line and columns of a heat map: more than a plot has pixels for would only cost time.
_MOST_RECORDS = 2000
_HEAT_COLUMNS = 320
_SCHEDULE_POINTS = 1000
_UNSETTLED = 0.06  # the share of a run in which its loss falls so steeply that it may leave the frame
_LOAD_OCTAVES = 2.5  # the colours span even share / 5.7 to even share * 5.7


def write_plots(run_folder: str | Path, *, schedule: Callable[[int], float] | None = None) -> list[Path]:
    """Draw a run's metrics into run_folder/plots and return the files written; a dense model has no expert plots.

    schedule: the learning rate after so many tokens; where it is not known, the line joins the rates of the records.

    Raises: MetricsError when the run has no readable metrics; DataError when a plot cannot be written.
    """
    run_folder = Path(run_folder)
    metrics = read_metrics(run_folder, most_records=_MOST_RECORDS)
    if not metrics.train:
        return []
    figures = {
        "loss.png": loss_figure(metrics),
        "learning_rate.png": learning_rate_figure(metrics.train, schedule=schedule),
        "throughput.png": throughput_figure(metrics.train),
    }
    if any(record.objective for record in metrics.train):
        figures["objective.png"] = objective_figure(metrics.train)
    experts = [record for record in metrics.train if record.moe is not None]
    if experts:
        figures["expert_load.png"] = expert_load_figure(experts)
        figures["expert_balance.png"] = expert_balance_figure(experts)
    folder = run_folder / "plots"
    return [write_figure(figure, folder / name) for name, figure in figures.items()]


def loss_figure(metrics: Metrics) -> Figure:
    """Training loss, raw and smoothed, and validation loss, against tokens."""
    records = metrics.train
    figure, axes = figure_with_axes(9.0, 5.2)
    tokens = np.asarray([record.tokens for record in records], dtype=np.float64)
    losses = np.asarray([record.loss for record in records], dtype=np.float64)
    smooth = smoothed_losses(metrics)
    evaluations = [record for record in metrics.evaluation if math.isfinite(record.loss)]

    axes.plot(tokens, losses, color=BLUE, alpha=0.25, linewidth=0.8, marker=_marker(records))
    axes.plot(tokens, smooth, color=BLUE, linewidth=1.8, label=f"training, smoothed (now {smooth[-1]:.3f})")
    if (best := metrics.best_evaluation) is not None:
        axes.plot(
            [record.tokens for record in evaluations],
            [record.loss for record in evaluations],
            color=ORANGE,
            linewidth=1.0,
            marker="o",
            markersize=4.5,
            markeredgecolor="white",
            markeredgewidth=0.6,
            label=f"validation (best {best.loss:.3f} at step {best.step:,})",
        )
    low, high = loss_limits(tokens, smooth, losses, evaluations)
    axes.set_ylim(low, high)
    notes = []
    first = next((loss for loss in losses if math.isfinite(loss)), math.nan)
    if first > high:
        notes.append(f"starts at {first:.2f}, above the frame")
    broken = ~np.isfinite(losses)
    if broken.any():
        axes.plot(
            tokens[broken],
            np.full(broken.sum(), 0.02),
            transform=axes.get_xaxis_transform(),
            linestyle="none",
            marker="x",
            color=RED,
            markersize=5,
            label=f"not finite ({broken.sum():,})",
        )
    if records[-1].skipped_steps:
        notes.append(f"{records[-1].skipped_steps:,} steps skipped")
    set_title(axes, "Loss", "; ".join(notes))
    axes.set_ylabel("cross-entropy (nats per token)")
    _tokens_axis(axes, tokens)
    axes.legend(frameon=False, loc="upper left" if len(records) == 1 else "upper right", labelcolor=INK)
    return figure


def learning_rate_figure(records: Sequence[TrainRecord], *, schedule: Callable[[int], float] | None = None) -> Figure:
    """Learning rate, and below it the gradient norm that clipping sees.

    schedule: the rate after so many tokens; it says how the rate went between two records that both follow it, as those
    do not that a run has from before it was resumed with another.
    """
    figure = empty_figure(9.0, 6.4)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    tokens = np.asarray([record.tokens for record in records], dtype=np.float64)
    rates = np.asarray([record.learning_rate for record in records])
    style_axes(top)
    times, drawn = (tokens, rates) if schedule is None else _between_records(tokens, rates, schedule)
    top.plot(times, drawn, color=BLUE, linewidth=1.8, marker=_marker(times))
    top.set_ylim(bottom=0)
    top.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    top.set_ylabel("learning rate")
    set_title(
        top, "Learning rate", f"now {rates[-1]:.3g}, peak {np.nanmax(rates):.3g}" if np.isfinite(rates).any() else ""
    )
    style_axes(bottom)
    _raw_and_smooth(bottom, tokens, np.asarray([record.gradient_norm for record in records], dtype=np.float64))
    _log_scale(bottom)
    bottom.set_ylabel("gradient norm")
    set_title(bottom, "Gradient norm", "before clipping")
    _tokens_axis(bottom, tokens)
    return figure


def objective_figure(records: Sequence[TrainRecord]) -> Figure:
    """What the objective reports beside the loss, one panel each under the cross-entropy: divergence and alpha."""
    names = list(dict.fromkeys(name for record in records for name in record.objective))
    tokens = np.asarray([record.tokens for record in records], dtype=np.float64)
    figure = empty_figure(9.0, 2.2 * (len(names) + 1))
    panels = figure.subplots(len(names) + 1, 1, sharex=True)
    series = {"cross-entropy": [record.loss for record in records]}
    series |= {name: [record.objective.get(name, math.nan) for record in records] for name in names}
    for axes, (name, values) in zip(panels, series.items(), strict=True):
        style_axes(axes)
        if name == "alpha":  # a step, which a mean would slur
            axes.plot(tokens, values, color=ORANGE, linewidth=1.8, marker=_marker(records), drawstyle="steps-pre")
            axes.set_ylim(bottom=0)
        else:
            _raw_and_smooth(axes, tokens, np.asarray(values, dtype=np.float64))
        finite = [value for value in values if math.isfinite(value)]
        set_title(axes, name.replace("_", " "), f"last {finite[-1]:.4g}" if finite else "", size=11)
        if name != "alpha":
            axes.set_ylabel("nats per token")
    _tokens_axis(panels[-1], tokens)
    return figure


def throughput_figure(records: Sequence[TrainRecord]) -> Figure:
    """Training speed, as tokens per second and as a share of the machine's peak (or FLOP/s where that is unknown)."""
    figure = empty_figure(9.0, 6.4)
    top, bottom = figure.subplots(2, 1, sharex=True)
    tokens = np.asarray([record.tokens for record in records], dtype=np.float64)
    speeds = np.asarray([record.tokens_per_second for record in records], dtype=np.float64)
    style_axes(top)
    _raw_and_smooth(top, tokens, speeds)
    _from_zero(top, speeds)
    top.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    top.set_ylabel("tokens per second")
    set_title(top, "Throughput", f"mean {mean_rate(records, speeds.tolist()):,.0f} tokens/s")
    style_axes(bottom)
    if (mean_share := mean_share_of_peak(records)) is not None:
        shares = np.asarray(
            [math.nan if record.share_of_peak is None else record.share_of_peak * 100 for record in records]
        )
        _raw_and_smooth(bottom, tokens, shares)
        _from_zero(bottom, shares)
        bottom.set_ylabel("share of peak (%)")
        set_title(bottom, "Share of the machine's peak", f"mean {mean_share * 100:.1f} %")
    else:
        flops = np.asarray([record.flops_per_second for record in records], dtype=np.float64) / 1e9
        _raw_and_smooth(bottom, tokens, flops)
        _from_zero(bottom, flops)
        bottom.set_ylabel("GFLOP/s")
        mean = mean_rate(records, flops.tolist())
        set_title(bottom, "Arithmetic", f"mean {mean:,.0f} GFLOP/s; the peak is not known")
    _tokens_axis(bottom, tokens)
    return figure


def expert_load_figure(records: Sequence[TrainRecord]) -> Figure:
    """One heat map per MoE layer: x tokens, y expert, colour the expert's load over the even share."""
    experts = [record.moe for record in records if record.moe is not None]
    layers = experts[-1].layers
    warnings = name_unusual(experts)
    columns = min(len(layers), 2 if len(layers) <= 4 else 3 if len(layers) <= 12 else 4)
    rows = math.ceil(len(layers) / columns)
    most_experts = max(len(load) for load in experts[-1].load)
    figure = empty_figure(max(6.6, 4.9 * columns), (3.1 if most_experts > 64 else 2.55) * rows + 1.1)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
    tokens = np.asarray([record.tokens for record in records], dtype=np.float64)
    norm = Normalize(-_LOAD_OCTAVES, _LOAD_OCTAVES)
    for place, axes in enumerate(grid.flat):
        if place >= len(layers):
            axes.set_visible(False)
            continue
        edges, loads = heat_columns(tokens, experts, place)
        num_experts = loads.shape[1]
        with np.errstate(divide="ignore", invalid="ignore"):
            octaves = np.log2(loads.T * num_experts)  # (E, columns); an expert without tokens is -inf: deepest blue
        octaves = np.ma.masked_invalid(np.where(np.isneginf(octaves), -2 * _LOAD_OCTAVES, octaves))
        axes.pcolorfast(edges, np.arange(num_experts + 1) - 0.5, octaves, cmap=LOAD_COLOURS, norm=norm)
        axes.set_ylim(num_experts - 0.5, -0.5)
        axes.yaxis.set_major_locator(MultipleLocator(max(1, 2 ** math.ceil(math.log2(num_experts / 5)))))
        for spine in axes.spines.values():
            spine.set_color("#b8c0c9")
        axes.tick_params(labelsize=8.5, colors=FAINT_INK)
        set_title(axes, f"Layer {layers[place]}: {num_experts} experts", _unusual(warnings, layers[place]), size=10)
        below = place + columns >= len(layers)
        if below:
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("tokens", color=FAINT_INK, fontsize=9)
        if place % columns == 0:
            axes.set_ylabel("expert", color=FAINT_INK, fontsize=9)
        _tokens_axis(axes, tokens, label=False)
    bar = figure.colorbar(ScalarMappable(norm, LOAD_COLOURS), ax=grid, extend="both", aspect=18 * rows, pad=0.015)
    bar.set_ticks([-2, -1, 0, 1, 2], labels=["1/4", "1/2", "1", "2", "4"])
    bar.ax.tick_params(labelsize=9, colors=FAINT_INK)
    bar.set_label("expert's share of tokens / even share", color=FAINT_INK, fontsize=9)
    bar.outline.set_visible(False)
    figure.suptitle("Expert load over training", color=INK, fontsize=13, fontweight="bold", x=0.01, ha="left")
    return figure


def expert_balance_figure(records: Sequence[TrainRecord]) -> Figure:
    """Routing entropy and load imbalance of every MoE layer against tokens, and drop rate where tokens were dropped."""
    experts = [record.moe for record in records if record.moe is not None]
    layers = experts[-1].layers
    tokens = np.asarray([record.tokens for record in records], dtype=np.float64)
    dropped = np.asarray([record.drop_rate for record in experts], dtype=np.float64) * 100  # (records, layers)
    entropy = np.asarray([record.entropy for record in experts], dtype=np.float64)
    unevenness = np.asarray([[imbalance(load) for load in record.load] for record in experts], dtype=np.float64)
    series = [entropy, unevenness] if not np.nan_to_num(dropped).any() else [entropy, unevenness, dropped]
    figure = empty_figure(9.6, 0.5 + 2.7 * len(series))
    panels = figure.subplots(len(series), 1, sharex=True)
    shades = colormaps["viridis"](np.linspace(0.0, 0.9, len(layers)))
    for axes, values in zip(panels, series, strict=True):
        style_axes(axes)
        for place, layer in enumerate(layers):
            axes.plot(
                tokens,
                smoothed(values[:, place]),
                color=shades[place],
                linewidth=1.5,
                label=f"layer {layer}",
                marker=_marker(records),
            )
    panels[0].set_ylabel("entropy / log(experts)")
    set_title(panels[0], "Routing entropy", "1: the router is undecided, 0: certain of every token")
    panels[1].set_ylabel("max / mean load")
    panels[1].set_ylim(bottom=1)
    set_title(
        panels[1], "Load of the fullest expert", "1: even; what a device with that expert computes against the mean"
    )
    if len(series) > 2:
        _from_zero(panels[2], dropped)
        panels[2].set_ylabel("dropped routes (%)")
        set_title(panels[2], "Drop rate", "over all routed tokens")
    _tokens_axis(panels[-1], tokens)
    if len(layers) <= 8:
        panels[0].legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), labelcolor=INK)
    else:
        scale = ScalarMappable(Normalize(layers[0], layers[-1]), colormaps["viridis"].resampled(len(layers)))
        scale.set_cmap(LinearSegmentedColormap.from_list("layers", shades, N=len(layers)))
        bar = figure.colorbar(scale, ax=panels, aspect=45, pad=0.02)
        bar.ax.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        bar.ax.tick_params(labelsize=9, colors=FAINT_INK)
        bar.set_label("layer", color=FAINT_INK)
        bar.outline.set_visible(False)
    return figure


def loss_limits(
    tokens: np.ndarray, smooth: np.ndarray, losses: np.ndarray, evaluations: Sequence[EvaluationRecord]
) -> tuple[float, float]:
    """Return the limits of the loss axis: the first steps, and lone spikes, may leave the frame at the top.

    The frame ends at the highest smoothed or validation loss after the first 6 % of the tokens, and at the lowest loss.
    It holds the first steps too where they take less than half of it, or there are too few records for 6 % of them.
    """
    settled = tokens >= tokens[0] + _UNSETTLED * (tokens[-1] - tokens[0])
    seen = np.concatenate([smooth[settled], [record.loss for record in evaluations if record.tokens >= tokens[0]]])
    seen = seen[np.isfinite(seen)]
    finite = losses[np.isfinite(losses)]
    if not len(seen):
        seen = finite
    if not len(seen):
        return 0.0, 1.0
    low = min(seen.min(), np.quantile(finite, 0.002) if len(finite) else math.inf)
    high = seen.max()
    first = smooth[~settled & np.isfinite(smooth)]
    if len(first) and (first.max() - high < high - low or len(tokens) * _UNSETTLED < 1):
        high = max(high, first.max())
    margin = max(0.06 * (high - low), 0.02)
    return float(low - margin), float(high + 1.5 * margin)


def heat_columns(tokens: np.ndarray, experts: Sequence[ExpertRecord], place: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (edges in tokens, loads) of one layer's heat map; a record's load fills the tokens since the one before.

    Shapes: edges (columns + 1,), loads (columns, E), columns at most 320; NaN where no record of a column is finite.
    """
    loads = np.asarray([record.load[place] for record in experts], dtype=np.float64)  # (records, E)
    starts = np.linspace(0, len(loads), min(len(loads), _HEAT_COLUMNS) + 1).round().astype(int)[:-1]
    finite = np.isfinite(loads)
    counts = np.add.reduceat(finite, starts, axis=0, dtype=np.int64)
    sums = np.add.reduceat(np.where(finite, loads, 0.0), starts, axis=0)
    means = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    ends = np.append(starts[1:], len(loads)) - 1
    return np.concatenate([[0.0], tokens[ends]]), means


def _between_records(
    tokens: np.ndarray, rates: np.ndarray, schedule: Callable[[int], float]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the records' learning rates with the schedule's between and before them, where they are its own."""
    follows = np.isclose(rates, [schedule(int(time)) for time in tokens], rtol=1e-6, atol=0.0)
    follows = np.concatenate([[True], follows, [False]])  # at the start, and not after the last record
    times = np.linspace(0, tokens[-1], _SCHEDULE_POINTS).round()
    after = np.searchsorted(tokens, times, side="right")
    times = times[follows[after] & follows[after + 1]]
    every = np.concatenate([tokens, times])
    order = np.argsort(every, kind="stable")
    return every[order], np.concatenate([rates, [schedule(int(time)) for time in times]])[order]


def _tokens_axis(axes: Axes, tokens: np.ndarray, *, label: bool = True) -> None:
    end = max(float(tokens[-1]), 1.0)
    axes.set_xlim(0, end * 1.01 if label else end)  # a marker on a last point stays whole, a heat map has no margin
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    if label:
        axes.set_xlabel("tokens")


def _raw_and_smooth(axes: Axes, tokens: np.ndarray, values: np.ndarray) -> None:
    values = np.where(np.isfinite(values), values, np.nan)
    axes.plot(tokens, values, color=BLUE, alpha=0.25, linewidth=0.8, marker=_marker(values))
    # Where values have ended, as a teacher's that has fallen silent, the mean of the last ones does not go on.
    known = np.flatnonzero(np.isfinite(values))
    inside = slice(known[0], known[-1] + 1) if len(known) else slice(0)
    axes.plot(tokens[inside], smoothed(values)[inside], color=BLUE, linewidth=1.8)


def _marker(points: Sequence[object] | np.ndarray) -> str:
    """A line through one point is invisible: draw it as a point."""
    return "o" if len(points) == 1 else ""


def _log_scale(axes: Axes) -> None:
    lines = [np.asarray(line.get_ydata(), dtype=np.float64) for line in axes.get_lines()]
    if any((line > 0).any() for line in lines):
        axes.set_yscale("log", nonpositive="mask")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 1e3 else (1.0,)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _from_zero(axes: Axes, values: np.ndarray) -> None:
    finite = values[np.isfinite(values)]
    highest = float(np.quantile(finite, 0.995)) if len(finite) else 0.0
    axes.set_ylim(0, 1.12 * highest if highest > 0 else 1.0)


def _unusual(warnings: Sequence[ExpertWarning], layer: int) -> str:
    phrases = []
    for warning in warnings:
        if warning.layer == layer:
            named = ", ".join(str(expert) for expert in warning.experts)
            phrases.append(f"{warning.kind}: {named if len(warning.experts) <= 3 else len(warning.experts)}")
    return "; ".join(phrases)
