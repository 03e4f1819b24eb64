"""How every plot looks: figures without pyplot, their axes, colours and titles, and files that appear whole.

What is drawn is in plots.py, comparison.py, evaluation_plots.py and serving_plots.py.
"""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.legend import Legend
from matplotlib.text import Text

from moesaic.errors import ConfigError, DataError
from moesaic.folders import check_can_be_written, write_whole

INK, FAINT_INK, GRID = "#1f2933", "#5f6c7b", "#e3e7ec"
BLUE, ORANGE, RED = "#1f5fa8", "#d9731a", "#c0282d"

# Under-used is blue, over-used red, the even share nearly white; equal steps of colour are equal factors.
LOAD_COLOURS = LinearSegmentedColormap.from_list(
    "load", ["#0b2e63", "#2166ac", "#8fbfe0", "#f7f7f7", "#f6b48f", "#d6452f", "#6d0a1f"]
).with_extremes(bad="#c9ced4")


def empty_figure(width: float, height: float) -> Figure:
    """Return a figure of so many inches, without axes."""
    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))


def figure_with_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a figure of so many inches, and its one pair of axes."""
    figure = empty_figure(width, height)
    axes = figure.subplots()
    style_axes(axes)
    return figure, axes


def style_axes(axes: Axes) -> None:
    """Give axes our grid, frame and colours."""
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#b8c0c9")
    axes.tick_params(colors=FAINT_INK, labelsize=9)
    axes.xaxis.label.set_color(FAINT_INK)
    axes.yaxis.label.set_color(FAINT_INK)


def add_legend(owner: Axes | Figure, handles: Sequence[Any], names: Sequence[str], **options: Any) -> Legend:
    """Write names beside their lines or bars, also those with a first underscore, which matplotlib leaves out."""
    legend = owner.legend(handles, [str(place) for place in range(len(names))], frameon=False, **options)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_text(name)
    return legend


def set_title(axes: Axes, title: str, note: str = "", *, size: float = 12) -> None:
    """Write a title at the left of the axes, and a note at their right."""
    axes.set_title(title, loc="left", color=INK, fontsize=size, fontweight="bold")
    if note:
        axes.set_title(note, loc="right", color=FAINT_INK, fontsize=size - 2.5)


def check_figure_path(path: Path) -> None:
    """Raise ConfigError for a path that says that its picture is anything but a PNG, or that cannot be written."""
    if path.suffix.lower() != ".png":
        raise ConfigError(
            f"a plot was asked for as {path}, which ends in {path.suffix or 'nothing'}; plots are PNGs; let the name "
            f"end in .png."
        )
    check_can_be_written(path)


def write_figure(figure: Figure, path: Path) -> Path:
    """Write a PNG, whole or not at all, and return its path. Texts are drawn as they stand: a $ begins no formula.

    Raises: DataError where it cannot be written.
    """
    picture = BytesIO()
    FigureCanvasAgg(figure)
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    with rc_context({"text.parse_math": False}):  # ticks are made while drawing
        figure.savefig(picture, format="png", dpi=130, facecolor="white", metadata={"Software": None})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, picture.getvalue())
    except OSError as error:
        raise DataError(
            f"{path} cannot be written ({error.strerror}); a plot is one PNG; name a file in a folder that can be "
            f"written to, or free some space."
        ) from None
    return path
