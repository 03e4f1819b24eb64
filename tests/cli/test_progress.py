import errno
import io
import re
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import typer

from moesaic.cli.progress import ends_on_interrupt, shown_progress
from moesaic.logs import log_to_stderr, logger


def test_a_log_line_goes_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich's word for a terminal
    monkeypatch.setattr(logger, "handlers", [])
    log_to_stderr()  # before the bar, as the commands do
    monkeypatch.setattr(sys, "stderr", terminal)
    with shown_progress(kept="") as show:
        show("reading", 0.5)
        logger.info("Calibrating on data/mine")
    assert re.search(r"(\n|\x1b\[2K)(\x1b\[\d*m)*Calibrating on data/mine\n", terminal.getvalue())


class _FullDisk(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_call_does_not_fail_since_nobody_sees_how_far_it_is(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys, "stderr", _FullDisk())
    shown = []
    with shown_progress(kept="") as show:
        show("reading", 0.5)
        shown.append(1)
    assert shown == [1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("ending", [ends_on_interrupt, shown_progress])
def test_what_a_batch_system_sends_is_taken_as_ctrl_c(
    ending: Callable[..., AbstractContextManager[Any]], number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    signal.signal(number, signal.SIG_DFL)
    try:
        with pytest.raises(typer.Exit) as ended, ending(kept="nothing was written"):
            signal.raise_signal(number)
            raise AssertionError("no interrupt")
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert ended.value.exit_code == 130
    assert capsys.readouterr().err.endswith("Stopped; nothing was written.\n")


def test_an_interrupt_after_the_folder_has_its_name_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    for words in (f"Stopped; {out} was written, and is whole.", "Stopped; nothing was written."):
        with pytest.raises(typer.Exit), shown_progress(kept="nothing was written", output=out):
            out.mkdir(exist_ok=True)  # the second time it was there before
            raise KeyboardInterrupt
        assert capsys.readouterr().err.splitlines()[-1] == words
    with pytest.raises(typer.Exit), shown_progress(kept="nothing was written", output=tmp_path / ("x" * 300)):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("called", "command", "words"),
    [
        ("data.prepare.prepare", ["prepare", "embedded", "--output", "{new}"], "Stopped; the same command goes on"),
        ("convert.importer.import_model", ["convert", "import", "{run}", "{new}"], "Stopped; nothing was written."),
        ("convert.exporter.export_run", ["convert", "export", "{run}", "{new}"], "Stopped; nothing was written."),
        ("convert.parity.verify_models", ["convert", "verify", "{run}", "{run}"], "Stopped; nothing was written."),
        ("convert.quantize.quantize_run", ["convert", "quantize", "{run}", "{new}"], "Stopped; nothing was written."),
        (
            "convert.upcycle.upcycle_run",
            ["convert", "upcycle", "{run}", "{new}", "--experts", "2"],
            "Stopped; nothing was written.",
        ),
        ("model.load.load_run", ["evaluate", "{run}", "--text", "x"], "Stopped; nothing was written."),
        (
            "model.load.load_run",
            ["evaluate", "{run}", "--tasks", "piqa"],
            "Stopped; what was finished is in the runs' folders.",
        ),
    ],
)
def test_ctrl_c_ends_with_a_line_on_what_was_kept(
    cli: Any,
    trained_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    called: str,
    command: list[str],
    words: str,
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"moesaic.{called}", interrupted)
    result = cli(*(each.format(run=trained_run, new=tmp_path / "new") for each in command))
    assert result.status == 130 and result.out == ""
    assert result.err.splitlines()[-1].startswith(words) and "Traceback" not in result.err
