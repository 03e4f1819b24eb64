"""Any name can be drawn, wherever it stands, and what cannot be written is told."""

from pathlib import Path

import pytest
from matplotlib.image import imread
from matplotlib.text import Text

from moesaic.errors import ConfigError, DataError
from moesaic.report.drawing import check_figure_path, empty_figure, figure_with_axes, set_title, write_figure

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


def test_a_path_that_cannot_be_written_is_told_before_and_after_drawing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    for path in (tmp_path / "file" / "a.png", tmp_path / "folder.png"):
        with pytest.raises(ConfigError, match=rf"^{path} cannot be written \(.*\); .*; name another"):
            check_figure_path(path)
        with pytest.raises(DataError, match=rf"^{path} cannot be written \(.*\); .*; name a file in a folder"):
            write_figure(empty_figure(1, 1), path)
    check_figure_path(tmp_path / "new" / "a.png")
    assert write_figure(empty_figure(1, 1), tmp_path / "new" / "a.png").is_file()
