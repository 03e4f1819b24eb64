"""A report as one self-contained HTML file: text, tables, plots and samples, with everything escaped.

What a report says is decided by who makes it; here is how it looks. The file loads nothing (its policy forbids it):
plots are embedded as PNG. It follows the reader's light or dark setting; plots keep their white ground.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from moesaic.folders import write_whole

# Two columns of plots on a wide screen, one on a phone; a wide table scrolls in its own frame.
_STYLE = """
:root { color-scheme: light dark; --ink: #1f2933; --faint: #5f6c7b; --line: #e3e7ec; --ground: #ffffff;
  --panel: #f6f8fa; --accent: #1f5fa8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ed; --faint: #9aa7b4; --line: #2e3742; --ground: #14191f;
  --panel: #1c232b; --accent: #7db4ee; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1rem 4rem; color: var(--ink); background: var(--ground);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--line); }
p { margin: .5rem 0; max-width: 46rem; }
.lead, figcaption, caption { color: var(--faint); }
.frame { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; text-align: left; padding-top: .4rem; font-size: .88rem; }
th, td { padding: .3rem 1rem .3rem 0; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { color: var(--faint); font-weight: 600; vertical-align: bottom; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1rem; }
figure { margin: .4rem 0; }
figure img { width: 100%; height: auto; background: #fff; border-radius: 6px; border: 1px solid var(--line); }
figcaption { font-size: .88rem; }
blockquote { margin: .8rem 0; padding: .7rem 1rem; background: var(--panel); border-left: 3px solid var(--accent);
  border-radius: 0 6px 6px 0; white-space: pre-wrap; overflow-wrap: anywhere; }
blockquote b { color: var(--accent); font-weight: 600; }
pre { background: var(--panel); padding: .7rem 1rem; border-radius: 6px; overflow-x: auto; font-size: .88rem; }
@media print { h2 { break-after: avoid; } figure, blockquote { break-inside: avoid; } }
"""


@dataclass(frozen=True)
class Paragraph:
    """Plain text."""

    text: str


@dataclass(frozen=True)
class Table:
    """Every row has one cell per column; the first column holds names, the others numbers."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), (self.columns, self.rows)


@dataclass(frozen=True)
class Plots:
    """PNG files side by side, each with what it shows."""

    pictures: tuple[tuple[Path, str], ...]


@dataclass(frozen=True)
class Passage:
    """What a model wrote after a prompt."""

    prompt: str
    continuation: str


@dataclass(frozen=True)
class Commands:
    """Lines for a shell."""

    lines: tuple[str, ...]


Block = Paragraph | Table | Plots | Passage | Commands


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: tuple[Block, ...]


def write_page(path: str | Path, *, title: str, lead: str, sections: Sequence[Section]) -> Path:
    """Write the report, replacing an older one as a whole; return its path.

    Raises: FileNotFoundError when a plot does not exist.
    """
    path = Path(path)
    body = "\n".join(_section(section) for section in sections)
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f'<header><h1>{escape(title)}</h1>\n<p class="lead">{escape(lead)}</p></header>\n'
        f"<main>\n{body}\n</main>\n</body>\n</html>\n"
    )
    write_whole(path, page)
    return path


def _section(section: Section) -> str:
    blocks = "\n".join(_block(block) for block in section.blocks)
    return f"<section>\n<h2>{escape(section.title)}</h2>\n{blocks}\n</section>"


def _block(block: Block) -> str:
    match block:
        case Paragraph(text):
            return f"<p>{escape(text)}</p>"
        case Table(columns, rows, caption):
            head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
            body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
            below = f"<caption>{escape(caption)}</caption>" if caption else ""
            table = f"{below}<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>"
            return f'<div class="frame"><table>{table}</table></div>'
        case Plots(pictures):
            return f'<div class="plots">\n{"".join(_picture(path, caption) for path, caption in pictures)}</div>'
        case Passage(prompt, continuation):
            return f"<blockquote><b>{escape(prompt)}</b>{escape(continuation)}</blockquote>"
        case Commands(lines):
            return f"<pre>{escape(chr(10).join(lines))}</pre>"


def _picture(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{escape(caption)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>\n"
    )
