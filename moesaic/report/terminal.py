"""A run in the terminal: the live display of training, and the view that `moesaic inspect RUN` prints.

Expert loads are strips of block characters, one per MoE layer and one character per expert; height and colour are the
expert's load over the even share. Where the terminal has no block characters, or is none, plain ASCII is used.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType

import numpy as np
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.measure import Measurement
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from moesaic.logs import logger
from moesaic.report.expert_load import DEAD_SHARE, hot_share, imbalance, relative_load
from moesaic.report.quantities import duration, short_number
from moesaic.report.records import EvaluationRecord, ExpertRecord, Metrics, TrainRecord
from moesaic.report.summary import LayerSummary, RunSummary, finite_mean, smoothed, summarize

_BLOCKS = "▁▂▃▄▅▆▇█"
_ASCII_BLOCKS = "_.-=+*#@"
# Upper ends of load / even share for the first seven blocks; the fourth is the even share.
_BLOCK_LIMITS = (0.25, 0.55, 0.8, 1.25, 1.6, 2.2, 3.2)

# Records over which the time left is estimated: long enough to include an evaluation or a checkpoint now and then.
_PACE_RECORDS = 100


class TrainingDisplay:
    """Training as it goes: one block that is redrawn in a terminal, one plain line per record anywhere else.

    While the block is shown, what is written to standard error, such as log lines, is printed above it.
    """

    def __init__(
        self,
        total_tokens: int,
        *,
        console: Console | None = None,
        title: str = "training",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert total_tokens > 0, f"total_tokens must be positive: {total_tokens}"
        self._total_tokens = total_tokens
        self._console = console or Console()
        self._title = title
        self._clock = clock
        self._is_live = self._console.is_interactive
        self._live: Live | None = None
        self._record: TrainRecord | None = None
        self._evaluation: EvaluationRecord | None = None
        self._best_loss = math.inf
        self._is_gone = False
        self._losses: list[float] = []
        self._smoothed_loss = math.nan
        self._pace: deque[tuple[int, float]] = deque(maxlen=_PACE_RECORDS)

    def __enter__(self) -> "TrainingDisplay":
        if self._is_live:
            self._live = Live(
                self._render(),
                console=self._console,
                refresh_per_second=4,
                transient=False,
                vertical_overflow="crop",
                get_renderable=self._render,
            )
            self._show(self._live.start)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._show(self._live.stop)
            self._live = None

    def update(self, record: TrainRecord) -> None:
        """Show a new train record."""
        self._losses.append(record.loss)
        self._smoothed_loss = float(smoothed(np.asarray(self._losses))[-1])
        self._pace.append((record.tokens, self._clock()))
        self._record = record  # last: the block is drawn by another thread, which begins with the record
        if self._live is None:
            self._print(plain_line(record, self._total_tokens, seconds_left=self._seconds_left()))

    def evaluation(self, record: EvaluationRecord, *, best_loss: float) -> None:
        """Show a new validation loss; best_loss: the run's lowest, this one counted."""
        self._evaluation, self._best_loss = record, best_loss
        if self._live is None:
            best = " (best so far)" if record.loss == best_loss else f" (best {best_loss:.4f})"
            self._print(f"step {record.step} | validation loss {record.loss:.4f}{best}")

    def message(self, text: str) -> None:
        """Print a line: above the block in a terminal."""
        self._print(text)

    def _print(self, text: str) -> None:
        self._show(lambda: self._console.print(text, markup=False, highlight=False, soft_wrap=True))

    def _show(self, draw: Callable[[], object]) -> None:
        """Draw, until that fails: a full disk under a log, or a reader that has gone, does not end a training."""
        if self._is_gone:
            return
        try:
            draw()
        except (OSError, SystemExit) as error:  # rich makes the latter of a pipe that nobody reads
            self._is_gone = True
            problem = (error.strerror if isinstance(error, OSError) else None) or "nobody reads it"
            logger.warning("The progress cannot be shown any more (%s); it goes on all the same.", problem)

    def _seconds_left(self) -> float:
        """Return the time left at the recent pace; NaN when not known yet.

        By the clock, since `record.seconds` is training alone, and evaluations and checkpoints take their time too.
        """
        if self._record is None:
            return math.nan
        tokens_left = max(0, self._total_tokens - self._record.tokens)
        first_tokens, first_seconds = self._pace[0]
        last_tokens, last_seconds = self._pace[-1]
        tokens, seconds = last_tokens - first_tokens, last_seconds - first_seconds
        if tokens > 0 and seconds > 0:
            return tokens_left * seconds / tokens
        speed = self._record.tokens_per_second
        return tokens_left / speed if math.isfinite(speed) and speed > 0 else math.nan

    def _render(self) -> RenderableType:
        record = self._record
        if record is None:
            return self._panel(Text("waiting for the first record", style="dim"))
        share = record.tokens / self._total_tokens
        bar = Table.grid(expand=True, padding=(0, 1))
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        bar.add_row(
            ProgressBar(total=self._total_tokens, completed=min(record.tokens, self._total_tokens)),
            f"{share:4.0%}  {short_number(record.tokens)} of {short_number(self._total_tokens)} tokens  "
            f"{duration(self._seconds_left())} left",
        )
        values = Table.grid(padding=(0, 1))
        for _ in range(3):
            values.add_column(no_wrap=True, overflow="crop")
        values.add_row(
            _value("loss", f"{self._smoothed_loss:.3f}", f"smoothed, last {record.loss:.3f}"),
            _value("validation", *self._validation()),
            _value("step", f"{record.step:,}"),
        )
        speed = record.tokens_per_second
        values.add_row(
            _value("", f"{f'{speed:,.0f}' if speed < 1e5 else short_number(speed)} tokens/s", _peak(record)),
            _value("learning rate", f"{record.learning_rate:.3g}"),
            _value("gradient norm", f"{record.gradient_norm:.2f}"),
        )
        if record.objective:
            values.add_row(*(_value(name, f"{value:.4g}") for name, value in record.objective.items()))
        if record.skipped_steps:
            values.add_row(Text(_skipped(record), style="yellow"))
        parts: list[RenderableType] = [bar, values]
        if record.moe is not None:
            most_rows = max(2, self._console.height - 9)
            parts += [Text(), _expert_rows(record.moe, most_rows=most_rows)]
        return self._panel(Group(*parts), border_style="cyan")

    def _panel(self, content: RenderableType, **style: str) -> Panel:
        """Frame the block, leaving room after it for the terminal's echo of Ctrl-C, ^C.

        On a full line the echo would go to the next one, and the block would be redrawn one line too low.
        """
        width = max(1, self._console.width - 2)
        return Panel(content, title=Text(self._title), title_align="left", width=width, **style)  # type: ignore[arg-type]

    def _validation(self) -> tuple[str, str]:
        if self._evaluation is None:
            return "-", ""
        return f"{self._evaluation.loss:.3f}", f"best {self._best_loss:.3f}"


def plain_line(record: TrainRecord, total_tokens: int, *, seconds_left: float) -> str:
    """Return a train record as one line of ASCII, the way it goes into a log file."""
    parts = [
        f"step {record.step}",
        f"{short_number(record.tokens)} of {short_number(total_tokens)} tokens ({record.tokens / total_tokens:.1%})",
        f"loss {record.loss:.4f}",
        *(f"{name} {value:.4g}" for name, value in record.objective.items()),
        f"learning rate {record.learning_rate:.3g}",
        f"gradient norm {record.gradient_norm:.2f}",
        f"{record.tokens_per_second:,.0f} tokens/s",
    ]
    if record.share_of_peak is not None:
        parts.append(_peak(record))
    if record.moe is not None:
        fullest = max((imbalance(load) for load in record.moe.load), default=math.nan)
        parts += [f"max/mean load {fullest:.2f}", f"dropped {finite_mean(record.moe.drop_rate):.1%}"]
    if record.skipped_steps:
        parts.append(_skipped(record))
    parts.append(f"{duration(seconds_left)} left")
    return " | ".join(parts)


def render_run(metrics: Metrics, *, title: str = "run") -> RenderableType:
    """Return a run's metrics as one rich renderable: losses, speed, expert load, what is unusual, the last events."""
    summary = summarize(metrics)
    if summary is None:
        return Panel(Text("no train record yet", style="dim"), title=Text(title), title_align="left")
    parts: list[RenderableType] = [_numbers(summary), Text(), Text("training loss", style="bold")]
    parts.append(Sparkline([record.loss for record in metrics.train]))
    if summary.layers:
        parts += [Text(), Text("expert load, mean of the last records", style="bold"), _layer_table(summary.layers)]
        parts.append(_Legend())
    if summary.warnings:
        parts.append(Text())
        parts += [Text(f"! {warning.message}", style="yellow") for warning in summary.warnings]
    if metrics.events:
        parts += [Text(), Text("last events", style="bold")]
        parts += [Text(f"step {event.step:,}: {event.message}") for event in metrics.events[-5:]]
    return Panel(Group(*parts), title=Text(title), title_align="left", border_style="cyan")


class Sparkline:
    """A series as one line of blocks as wide as its place, between its lowest and highest value."""

    def __init__(self, values: Sequence[float]) -> None:
        self._values = list(values)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        finite = [value for value in self._values if math.isfinite(value)]
        if not finite:
            yield Text("no finite value", style="dim")
            return
        ends = f"{finite[0]:.3f} ", f" {finite[-1]:.3f}"
        blocks = _ASCII_BLOCKS if options.ascii_only else _BLOCKS
        line = spark_blocks(self._values, min(100, options.max_width - sum(map(len, ends))), blocks=blocks)
        yield Text.assemble((ends[0], "dim"), (line, "cyan"), (ends[1], "bold"), no_wrap=True)


def spark_blocks(values: Sequence[float], width: int, *, blocks: str = _BLOCKS) -> str:
    """Return at most `width` blocks, each the mean of its part of the series; a blank where no value is finite."""
    count = min(max(1, width), len(values))
    means = [
        finite_mean(values[place * len(values) // count : (place + 1) * len(values) // count]) for place in range(count)
    ]
    finite = [mean for mean in means if math.isfinite(mean)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(blocks) - 1) / (high - low) if high > low else 0.0
    return "".join(blocks[round((mean - low) * scale)] if math.isfinite(mean) else " " for mean in means)


class LoadStrip:
    """One layer's load as blocks, one per expert.

    Where the place is too narrow, a block stands for several neighbouring experts and shows the one that is furthest
    from the even share; with `wrap` the strip continues on further lines instead.
    """

    def __init__(self, load: Sequence[float], *, wrap: bool = False) -> None:
        self._relative = [float(value) for value in relative_load(load)]
        self._wrap = wrap

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(min(8, len(self._relative)), min(len(self._relative), options.max_width))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(1, options.max_width)
        shown = self._relative if self._wrap else most_unusual(self._relative, width)
        hot = hot_share(len(self._relative))
        blocks = _ASCII_BLOCKS if options.ascii_only else _BLOCKS
        for start in range(0, len(shown), width):
            line = Text(no_wrap=True)
            for value in shown[start : start + width]:
                line.append(load_block(value, blocks=blocks), style=_load_style(value, hot))
            yield line


def load_block(relative: float, *, blocks: str = _BLOCKS) -> str:
    """Return the block of a load over the even share: the fourth of eight when even, a mark of its own when dead."""
    if math.isnan(relative):
        return "?"
    if relative < DEAD_SHARE:
        return "x" if blocks.isascii() else "·"
    return blocks[sum(relative > limit for limit in _BLOCK_LIMITS)]


def most_unusual(relative: Sequence[float], width: int) -> list[float]:
    """Return at most `width` values: of each run of neighbours the one furthest from 1, as a factor."""
    count = min(width, len(relative))
    parts = [relative[place * len(relative) // count : (place + 1) * len(relative) // count] for place in range(count)]
    return [max(part, key=lambda value: abs(math.log(max(value, 1e-9))) if value == value else -1.0) for part in parts]


class _Legend:
    """What the blocks of a strip mean."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        blocks = _ASCII_BLOCKS if options.ascii_only else _BLOCKS
        text = Text("one block per expert, load / even share: ", style="dim")
        samples = ((0.05, "dead < 0.1"), (0.2, "< 0.25"), (1.0, "even"), (2.0, "2"), (3.0, "3"), (9.0, "hot > 4"))
        for value, name in samples:
            text.append(load_block(value, blocks=blocks), style=_load_style(value, 4.0))
            text.append(f" {name}   ")
        yield text


def _expert_rows(experts: ExpertRecord, *, most_rows: int) -> RenderableType:
    """The live block's strips; when the terminal is too low for all layers, those with the fullest experts."""
    places = list(range(len(experts.layers)))
    hidden = 0
    if len(places) > most_rows:
        by_fullness = sorted(places, key=lambda place: -_or_zero(imbalance(experts.load[place])))
        places = sorted(by_fullness[: most_rows - 1])
        hidden = len(experts.layers) - len(places)
    table = _strip_table()
    for place in places:
        load = experts.load[place]
        table.add_row(
            f"layer {experts.layers[place]}",
            LoadStrip(load),
            *_layer_numbers(imbalance(load), experts.drop_rate[place], experts.entropy[place]),
        )
    if hidden:
        table.add_row("", Text(f"and {hidden} others", style="dim", no_wrap=True, overflow="crop"), "", "", "")
    return table


def _layer_table(layers: Sequence[LayerSummary]) -> RenderableType:
    table = _strip_table()
    for layer in layers:
        table.add_row(
            f"layer {layer.layer}",
            LoadStrip(layer.load, wrap=True),
            *_layer_numbers(layer.imbalance, layer.drop_rate, layer.routing_entropy),
        )
    return table


def _strip_table() -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="dim", expand=False)
    table.add_column("", no_wrap=True)
    table.add_column("load of each expert")
    for name in ("max/mean", "dropped", "entropy"):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _layer_numbers(fullest: float, drop_rate: float, entropy: float) -> tuple[str, str, str]:
    return f"{fullest:.2f}", f"{drop_rate:.1%}", f"{entropy:.2f}"


def _numbers(summary: RunSummary) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(style="dim")
    table.add_row(
        "trained", f"{short_number(summary.tokens)} tokens", f"{summary.step:,} steps in {duration(summary.seconds)}"
    )
    table.add_row("training loss", f"{summary.loss:.4f}", f"smoothed, perplexity {_perplexity(summary.loss)}")
    if summary.validation_loss is not None:
        note = f"perplexity {_perplexity(summary.validation_loss)}"
        if summary.best_validation_loss is not None:
            note += f", best {summary.best_validation_loss:.4f} at step {summary.best_validation_step:,}"
        table.add_row("validation loss", f"{summary.validation_loss:.4f}", note)
    speed = f"{summary.flops_per_second / 1e9:,.0f} GFLOP/s"
    if summary.share_of_peak is not None:
        speed += f", {summary.share_of_peak:.0%} of the machine's peak"
    table.add_row("speed", f"{summary.tokens_per_second:,.0f} tokens/s", speed)
    table.add_row("learning rate", f"{summary.learning_rate:.3g}", "")
    if summary.skipped_steps:
        table.add_row("skipped steps", f"{summary.skipped_steps:,}", "their gradients were not finite")
    return table


def _value(name: str, value: str, note: str = "") -> Text:
    text = Text.assemble((f"{name} " if name else "", "dim"), (value, "bold"))
    return text.append(f"  {note}", style="dim") if note else text


def _peak(record: TrainRecord) -> str:
    return "" if record.share_of_peak is None else f"{record.share_of_peak:.0%} of peak"


def _skipped(record: TrainRecord) -> str:
    return f"{record.skipped_steps:,} skipped steps" if record.skipped_steps else ""


def _load_style(relative: float, hot: float) -> str:
    if math.isnan(relative):
        return "dim"
    if relative < DEAD_SHARE:
        return "bold bright_magenta"
    if relative > hot:
        return "bold bright_red"
    if relative > 1.6:
        return "yellow"
    return "blue" if relative < 0.55 else "green"


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):,.1f}" if loss < 50 else "?"


def _or_zero(value: float) -> float:
    return 0.0 if math.isnan(value) else value
