import errno
import io
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

from moesaic.logs import log_to_stderr, logger
from moesaic.report.plots import loss_figure
from moesaic.report.records import EvaluationRecord, Metrics, TrainRecord, read_metrics
from moesaic.report.terminal import (
    LoadStrip,
    TrainingDisplay,
    load_block,
    most_unusual,
    plain_line,
    render_run,
    spark_blocks,
)


def plain_console(width: int = 100, encoding: str = "utf-8") -> Console:
    return Console(file=io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True), width=width, height=40)


def live_console(width: int = 100, height: int = 40) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, force_interactive=True, width=width, height=height)


def printed(console: Console) -> str:
    if isinstance(console.file, io.StringIO):
        return console.file.getvalue()
    return console.file.buffer.getvalue().decode(console.file.encoding)  # type: ignore[attr-defined]


def test_without_a_terminal_there_is_one_plain_line_per_record(make_record: Callable[..., TrainRecord]) -> None:
    console = plain_console(width=40)
    with TrainingDisplay(409_600, console=console) as display:
        for step in (1, 2):
            display.update(make_record(step, experts=(4, 8)))
        display.evaluation(EvaluationRecord(step=2, tokens=8192, seconds=1.0, loss=4.0, sequences=8), best_loss=4.0)
        display.evaluation(EvaluationRecord(step=2, tokens=8192, seconds=1.0, loss=4.0, sequences=8), best_loss=3.5)
        display.message("a [b] c")
    lines = printed(console).splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("step 1 | 4.1K of 410K tokens (1.0%) | loss 7.9")
    assert "max/mean load 1." in lines[0] and "dropped 0.5%" in lines[0] and "31% of peak" in lines[0]
    assert lines[2] == "step 2 | validation loss 4.0000 (best so far)"
    assert lines[3] == "step 2 | validation loss 4.0000 (best 3.5000)"
    assert lines[4] == "a [b] c"
    assert printed(console).isascii()


@pytest.mark.parametrize("make", [plain_console, live_console])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), BrokenPipeError()])
def test_what_cannot_be_shown_ends_nothing(
    make: Callable[[], Console],
    error: OSError,
    make_record: Callable[..., TrainRecord],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, "dup2", lambda *_: None)  # what rich does to standard output then
    console = make()
    with caplog.at_level("WARNING", "moesaic"), TrainingDisplay(409_600, console=console) as display:
        display.message("before")
        for name in ("write", "flush"):
            monkeypatch.setattr(console.file, name, refuse, raising=False)
        for step in (1, 2):
            display.update(make_record(step, experts=(4, 8)))
            display.message("a line")
    assert caplog.text.count("The progress cannot be shown any more") == 1
    assert ("No space left" in caplog.text) != ("nobody reads it" in caplog.text)


def test_time_left_follows_the_recent_pace(make_record: Callable[..., TrainRecord]) -> None:
    console = plain_console(width=400)
    clock = iter([100.0, 105.0, 110.0])
    with TrainingDisplay(100 * 4096, console=console, clock=lambda: next(clock)) as display:
        display.update(make_record(10))
        display.update(make_record(20))
        display.update(make_record(30))
    lines = printed(console).splitlines()
    assert lines[0].endswith("| 0:45 left")  # 90 steps of 4096 tokens at the record's 8192 tokens/s
    assert lines[1].endswith("| 0:40 left")  # 80 steps of half a second
    assert lines[2].endswith("| 0:35 left")


@pytest.mark.parametrize("broken", [False, True])
def test_plain_line_of_a_dense_and_of_a_broken_record(make_record: Callable[..., TrainRecord], broken: bool) -> None:
    line = plain_line(make_record(1, broken=broken), 10_000, seconds_left=math.nan)
    assert ("loss nan" in line) == broken and ("1 skipped steps" in line) == broken
    assert "load" not in line and line.endswith("? left")


@pytest.mark.parametrize("experts", [(), (4, 8), [128] * 29])
@pytest.mark.parametrize("size", [(100, 40), (60, 12)])
def test_the_block_fits_the_terminal_and_shows_everything(
    make_record: Callable[..., TrainRecord], experts: Sequence[int], size: tuple[int, int]
) -> None:
    console = live_console(*size)
    with TrainingDisplay(40_960, console=console, title="runs/[x]") as display:
        display.update(make_record(4, experts=experts))
        display.evaluation(EvaluationRecord(step=4, tokens=8192, seconds=1.0, loss=4.0, sequences=8), best_loss=4.0)
        lines = console.render_lines(display._render(), pad=False)
    assert len(lines) <= size[1]
    text = "\n".join("".join(segment.text for segment in line) for line in lines)
    assert "runs/[x]" in text and "40%" in text and "validation 4.000" in text and "0:03 left" in text
    assert ("max/mean" in text) == bool(experts)
    assert ("others" in text) == (len(experts) > size[1] - 9)


def test_messages_and_log_lines_go_above_the_block(
    make_record: Callable[..., TrainRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(logger, "handlers", [])
    log_to_stderr()
    console = live_console()
    with TrainingDisplay(40_960, console=console) as display:
        display.update(make_record(1, experts=(4,)))
        display.message("saved [x]")
        logger.warning("layer 1 is odd")
    assert "saved [x]" in printed(console) and "layer 1 is odd" in printed(console)
    assert terminal.getvalue() == ""
    logger.warning("after it")
    assert terminal.getvalue() == "after it\n"


@pytest.mark.parametrize("records", [0, 1])
def test_the_echo_of_ctrl_c_fits_behind_the_block(make_record: Callable[..., TrainRecord], records: int) -> None:
    """Else the terminal goes on to the next line, and the block's top border stays where it was."""
    console = live_console(width=72)
    with TrainingDisplay(40_960, console=console) as display:
        for step in range(records):
            display.update(make_record(step + 1, experts=(4,)))
        lines = console.render_lines(display._render(), pad=False)
    assert all(sum(segment.cell_length for segment in line) + len("^C") <= 72 for line in lines)


def test_an_error_inside_ends_the_block_and_comes_out(make_record: Callable[..., TrainRecord]) -> None:
    with pytest.raises(KeyboardInterrupt), TrainingDisplay(40_960, console=live_console()) as display:
        display.update(make_record(1))
        raise KeyboardInterrupt
    assert not isinstance(sys.stdout, io.StringIO) or sys.stdout.writable()


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize(("num_records", "experts"), [(1, ()), (30, (8, 8, 16)), (12, [128] * 12)])
def test_inspect_view_in_any_encoding(
    make_run: Callable[..., Path], num_records: int, experts: Sequence[int], encoding: str
) -> None:
    console = plain_console(encoding=encoding)
    metrics = read_metrics(make_run(num_records, experts=experts, broken=(2,)))
    # The event's message is not ours to write in ASCII.
    console.print(render_run(Metrics(metrics.train, metrics.evaluation), title="runs/a"))
    text = printed(console)
    assert "training loss" in text and "8,192 tokens/s" in text and "31% of the machine's peak" in text
    for place in range(len(experts)):
        assert f"layer {2 * place + 1} " in text


def test_the_block_the_view_and_the_plot_show_one_smoothed_loss(make_run: Callable[..., Path]) -> None:
    metrics = read_metrics(make_run(50, experts=(4,)))
    last = [record.loss for record in metrics.train[-3:]]  # a fortieth, rounded up, and the last
    mean = sum(last) / 3
    console = live_console()
    with TrainingDisplay(1 << 20, console=console) as display:
        for record in metrics.train:
            display.update(record)
    assert f"loss {mean:.3f}  smoothed, last {last[-1]:.3f}" in Text.from_ansi(printed(console)).plain
    console = plain_console()
    console.print(render_run(metrics))
    assert re.search(rf"training loss +{mean:.4f} +smoothed, perplexity", printed(console))
    labels = [text.get_text() for text in loss_figure(metrics).axes[0].get_legend().get_texts()]
    assert f"training, smoothed (now {mean:.3f})" in labels


def test_inspect_names_dead_experts_and_shows_events(make_record: Callable[..., TrainRecord]) -> None:
    values = make_record(1, experts=(4,)).to_json()
    values["moe"]["load"] = [[0.0, 0.3, 0.3, 0.4]]
    console = plain_console(width=200)
    console.print(render_run(Metrics((TrainRecord.from_json(values),) * 10)))
    assert "! layer 1: expert 0 is dead (0.0 % of tokens, even share 25.0 %)" in printed(console)


def test_inspect_before_the_first_record() -> None:
    console = plain_console()
    console.print(render_run(Metrics()))
    assert "no train record yet" in printed(console)


def test_blocks_rise_with_the_load_and_mark_what_is_dead() -> None:
    blocks = [load_block(value) for value in (0.2, 0.4, 0.7, 1.0, 1.4, 2.0, 3.0, 9.0)]
    assert "".join(blocks) == "▁▂▃▄▅▆▇█"
    assert load_block(0.0) == "·" and load_block(0.0, blocks="_.-=+*#@") == "x"
    assert load_block(math.nan) == "?"


def test_a_narrow_strip_shows_the_most_unusual_of_its_neighbours() -> None:
    relative = [1.0] * 16
    relative[5], relative[14] = 0.0, 6.0
    assert most_unusual(relative, 4) == [1.0, 0.0, 1.0, 6.0]
    assert most_unusual(relative, 100) == relative
    assert most_unusual([math.nan, 1.0], 1) == [1.0]


def test_a_wrapped_strip_shows_every_expert() -> None:
    console = plain_console(width=10)
    console.print(LoadStrip([1 / 25] * 25, wrap=True))
    assert printed(console).split() == ["▄" * 10, "▄" * 10, "▄" * 5]


def test_sparkline_spans_its_range() -> None:
    assert spark_blocks([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert spark_blocks([5.0], 10) == "▁"
    assert spark_blocks([1.0, math.nan, 3.0], 3) == "▁ █"
    assert len(spark_blocks(list(range(1000)), 40)) == 40
