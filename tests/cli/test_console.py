import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from moesaic.cli.console import print_json


def test_what_is_in_brackets_in_a_name_is_printed(
    cli: Any, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    names = [str(shutil.copytree(trained_run, tmp_path / f"{kind} [bold] :star:")) for kind in ("first", "second")]
    text = tmp_path / "text [red].txt"
    text.write_text("The state of the Union is strong. " * 20)
    for arguments, wanted in (
        (["inspect", names[0]], names[:1]),
        (["evaluate", *names, "--text", text], names),
        (["convert", "quantize", names[0], f"{names[0]} int8", "--rest", "int8", "--text", text, "--force"],
         [f"Written to {names[0]} int8.", f"tokens of {text}"]),
    ):  # fmt: skip
        shown = cli(*arguments)
        assert shown.status == 0, shown.err
        assert all(each in shown.out for each in wanted), shown.out


def test_json_has_null_for_what_is_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"loss": math.nan, "rates": [1.5, math.inf], "report": {"kl": -math.inf}, "name": "é"})
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out) == {"loss": None, "rates": [1.5, None], "report": {"kl": None}, "name": "é"}


def test_progress_names_a_run_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from moesaic.cli import progress

    console = Console(force_terminal=True, width=120, record=True)
    monkeypatch.setattr(progress, "open_console", lambda *, stderr: console)
    with progress.shown_progress(kept="nothing is") as show:
        show("runs/a [bold]: lambada", 0.5)
    assert "runs/a [bold]: lambada" in console.export_text()
