"""Any name can be drawn, wherever it stands."""

from pathlib import Path

from matplotlib.image import imread
from matplotlib.text import Text

from moesaic.report.drawing import figure_with_axes, set_title, write_figure

NAMES = (r"a$b\frac$", "US$ and CA$_", "$$", "$x_1$")  # the first two are no formulas, which matplotlib refuses


def test_a_name_with_dollars_is_drawn_as_it_stands(tmp_path: Path) -> None:
    figure, axes = figure_with_axes(6, 4)
    for place, name in enumerate(NAMES):
        axes.plot([0, 1], [place, 1], label=name)
    axes.set_yticks(range(len(NAMES)), NAMES)
    set_title(axes, NAMES[0], NAMES[1])
    axes.set_xlabel(NAMES[0])
    figure.suptitle(NAMES[0])
    figure.legend(loc="outside lower center")
    axes.legend()
    axes.annotate(NAMES[1], (0.5, 0.5))
    path = write_figure(figure, tmp_path / "names.png")
    assert imread(path).shape[:2] == (520, 780)
    assert not any(text.get_parse_math() for text in figure.findobj(Text))
