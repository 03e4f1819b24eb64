import io
import re
import sys

import pytest

from moesaic.cli.progress import shown_progress
from moesaic.logs import log_to_stderr, logger


def test_a_log_line_goes_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich's word for a terminal
    monkeypatch.setattr(logger, "handlers", [])
    log_to_stderr()  # before the bar, as the commands do
    monkeypatch.setattr(sys, "stderr", terminal)
    with shown_progress() as show:
        show("reading", 0.5)
        logger.info("Calibrating on data/mine")
    assert re.search(r"(\n|\x1b\[2K)(\x1b\[\d*m)*Calibrating on data/mine\n", terminal.getvalue())
