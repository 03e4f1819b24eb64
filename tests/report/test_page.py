import base64
from html.parser import HTMLParser
from pathlib import Path

import pytest

from moesaic.report.page import Commands, Paragraph, Passage, Plots, Section, Table, write_page

HOSTILE = "<script>alert(\"1\")</script> & '2'</p></table></blockquote>"
# The smallest PNG: one white point.
PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGP4DwABAQEAG7buVgAAAABJRU5ErkJggg==")


class Reader(HTMLParser):
    """What a browser sees: tags in order, text, and attributes that name an address."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text.append(data)


@pytest.fixture
def plot(tmp_path: Path) -> Path:
    path = tmp_path / "loss.png"
    path.write_bytes(PNG)
    return path


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    assert not reader.open
    return reader


def test_whatever_a_model_writes_is_text(tmp_path: Path, plot: Path) -> None:
    blocks = (
        Paragraph(HOSTILE),
        Table((HOSTILE, "b"), ((HOSTILE, "1"),), caption=HOSTILE),
        Plots(((plot, HOSTILE),)),
        Passage(HOSTILE, HOSTILE),
        Commands((HOSTILE, HOSTILE)),
    )
    path = write_page(tmp_path / "report.html", title=HOSTILE, lead=HOSTILE, sections=[Section(HOSTILE, blocks)])
    reader = read(path)
    assert "script" not in reader.tags
    assert "".join(reader.text).count(HOSTILE) == 2 + 1 + 1 + 1 + 3 + 1 + 2 + 2  # title twice: head and heading


def test_the_page_carries_its_plots_and_names_no_address(tmp_path: Path, plot: Path) -> None:
    path = write_page(tmp_path / "report.html", title="t", lead="l", sections=[Section("s", (Plots(((plot, "c"),)),))])
    (address,) = read(path).addresses
    assert base64.b64decode(address.removeprefix("data:image/png;base64,")) == PNG
    assert "http://" not in path.read_text() and "https://" not in path.read_text()
    assert {each.name for each in tmp_path.iterdir()} == {"report.html", "loss.png"}


def test_a_report_whose_plot_is_missing_leaves_the_older_one(tmp_path: Path) -> None:
    path = write_page(tmp_path / "report.html", title="t", lead="old", sections=[])
    with pytest.raises(FileNotFoundError):
        write_page(path, title="t", lead="new", sections=[Section("s", (Plots(((tmp_path / "no.png", "c"),)),))])
    assert "old" in path.read_text()
