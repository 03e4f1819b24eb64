"""Plots of evaluations: tasks compared across runs, and which experts serve which domains."""

import math
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from moesaic.report.drawing import (
    FAINT_INK,
    INK,
    LOAD_COLOURS,
    add_legend,
    empty_figure,
    set_title,
    style_axes,
    write_figure,
)
from moesaic.report.evaluations import MetricResult, TaskResult, comparison, run_name

_OCTAVES = 2.0
_NAMED_BARS = 24
_LEGEND_CHARS = 36


def write_comparison(results: Sequence[TaskResult], path: Path) -> Path:
    """Draw the main metric of every task for every run into a PNG, and return its path."""
    return write_figure(comparison_figure(results), path)


def comparison_figure(results: Sequence[TaskResult]) -> Figure:
    """Bars, a group for each task and a colour for each run, with standard errors; above, what should be high (a share
    of records), below, what should be low, each task on a scale of its own.
    """
    main = {(result.label, next(iter(result.metrics))) for result in results if result.metrics}
    rows = [row for row in comparison(results) if (row[0], row[1]) in main]
    runs = list(dict.fromkeys(run_name(result) for result in results))
    shares = [row for row in rows if _is_share(row[2])]
    others = [row for row in rows if not _is_share(row[2])]
    panels = [*([shares] if shares else []), *([row] for row in others)]
    names = ["\n".join(wrap(run, _LEGEND_CHARS)) for run in runs]  # a path may be longer than the plot is wide
    legend_width = 0.5 + 0.075 * min(_LEGEND_CHARS, max(map(len, runs), default=0))
    bars_width = max(5.0, 0.5 * len(shares) * (len(runs) + 1))
    figure = empty_figure(bars_width + legend_width, 3.4 * max(1, len(panels)) + 0.6)
    colours = colormaps["tab10"](np.arange(max(len(runs), 1)) % 10)
    for axes, panel in zip(figure.subplots(max(1, len(panels)), 1, squeeze=False)[:, 0], panels or [[]], strict=True):
        style_axes(axes)
        axes.grid(False, axis="x")
        width = 0.8 / max(1, len(runs))
        bars = []
        for place in range(len(runs)):
            cells = [(at, row[2][place]) for at, row in enumerate(panel)]
            found = [(at, cell) for at, cell in cells if cell is not None and math.isfinite(cell.value)]
            at = [number + (place - (len(runs) - 1) / 2) * width for number, _ in found]
            heights = [cell.value for _, cell in found]
            errors = [cell.standard_error or 0.0 for _, cell in found]
            bars.append(axes.bar(at, heights, width * 0.92, color=colours[place], yerr=errors, ecolor=FAINT_INK))
            if len(panel) * len(runs) <= _NAMED_BARS:
                for x, height, error in zip(at, heights, errors, strict=True):
                    axes.annotate(
                        f"{height:.3g}", (x, height + error), (0, 3), textcoords="offset points", ha="center",
                        color=INK, fontsize=8,
                    )  # fmt: skip
        axes.set_xticks(range(len(panel)), [f"{label}\n{name}" for label, name, _ in panel], fontsize=8.5)
        if panel is shares:
            axes.set_ylim(0, 1.08)
            set_title(axes, "Tasks", "share of records; lines: standard error")
        elif panel:
            set_title(axes, panel[0][1], "lower is better" if _is_low(panel[0][2]) else "")
        if any(bars):
            add_legend(axes, bars, names, loc="upper left", bbox_to_anchor=(1.0, 1.0), labelcolor=INK, fontsize=8.5)
    return figure


def _is_share(cells: Sequence[MetricResult | None]) -> bool:
    return all(cell is None or (cell.higher_is_better and 0 <= cell.value <= 1) for cell in cells)


def _is_low(cells: Sequence[MetricResult | None]) -> bool:
    return any(cell is not None and cell.higher_is_better is False for cell in cells)


def write_domains(
    path: Path,
    *,
    domains: Sequence[str],
    layers: Sequence[int],
    shares: Sequence[npt.NDArray[np.float64]],
    information_bits: Sequence[float],
    chance_bits_high: Sequence[float],
) -> Path:
    """Draw a heat map of each MoE layer into a PNG, and return its path.

    shares: of each layer (domains, experts), each expert's share of a domain's routes. Its colour is that over its mean
    over the domains; experts stand in the order of the domain that uses them most.
    """
    columns = min(len(layers), 2)
    rows = math.ceil(len(layers) / columns)
    height = max((0.9 + 0.22 * len(domains)) * rows + 1.0, 4.0)  # the colour bar's label is 3 inches long
    figure = empty_figure(6.4 * columns + 1.2, height)
    grid = figure.subplots(rows, columns, squeeze=False)
    norm = Normalize(-_OCTAVES, _OCTAVES)
    for place, axes in enumerate(grid.flat):
        if place >= len(layers):
            axes.set_visible(False)
            continue
        relative, order = relative_shares(shares[place])
        with np.errstate(divide="ignore", invalid="ignore"):
            octaves = np.log2(relative[:, order])
        octaves = np.ma.masked_invalid(np.where(np.isneginf(octaves), -2 * _OCTAVES, octaves))
        num_experts = octaves.shape[1]
        axes.pcolorfast(
            np.arange(num_experts + 1) - 0.5, np.arange(len(domains) + 1) - 0.5, octaves, cmap=LOAD_COLOURS, norm=norm
        )
        axes.set_ylim(len(domains) - 0.5, -0.5)
        axes.set_yticks(range(len(domains)), domains if place % columns == 0 else [""] * len(domains), fontsize=8)
        step = max(1, math.ceil(num_experts / 32))
        axes.set_xticks(range(0, num_experts, step), order[::step], fontsize=7, rotation=90 if num_experts > 16 else 0)
        axes.tick_params(colors=FAINT_INK)
        beyond = information_bits[place] > chance_bits_high[place]
        note = f"{information_bits[place]:.3f} bits, by chance up to {chance_bits_high[place]:.3f}"
        set_title(axes, f"Layer {layers[place]}", note if beyond else f"{note}: no more than chance", size=10)
        if place + columns >= len(layers):
            axes.set_xlabel("expert", color=FAINT_INK, fontsize=9)
    bar = figure.colorbar(ScalarMappable(norm, LOAD_COLOURS), ax=grid, extend="both", aspect=16 * rows, pad=0.015)
    bar.set_ticks([-2, -1, 0, 1, 2], labels=["1/4", "1/2", "1", "2", "4"])
    bar.ax.tick_params(labelsize=9, colors=FAINT_INK)
    bar.set_label("expert's share of the domain / its mean share", color=FAINT_INK, fontsize=9)
    bar.outline.set_visible(False)
    figure.suptitle("Experts by domain", color=INK, fontsize=13, fontweight="bold", x=0.01, ha="left")
    return write_figure(figure, path)


def relative_shares(shares: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Return shares (domains, experts) over their mean over the domains, NaN for an expert that none uses, and the
    experts in the order of the domain that uses each most.
    """
    mean = shares.mean(0)
    relative = np.where(mean > 0, shares / np.where(mean > 0, mean, 1.0), np.nan)
    best = np.where(mean > 0, np.nan_to_num(relative).argmax(0), len(shares))  # the unused ones last
    strength = np.nan_to_num(relative).max(0)
    return relative, np.lexsort((-strength, best))
