import subprocess
import sys
from typing import Any

import pytest
import typer
from rich.text import Text

from moesaic import __version__
from moesaic.cli.main import VERBS, app


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_every_verb_shows_an_example(cli: Any, verb: str) -> None:
    result = cli(verb, "--help")
    assert result.status == 0
    assert f"Example: moesaic {verb}" in result.out


def test_help_and_version(cli: Any) -> None:
    result = cli("--help")
    assert result.status == 0
    assert all(verb in result.out for verb in VERBS)
    assert cli("--version").out == f"moesaic {__version__}\n"
    nothing = cli()
    assert "Usage" in nothing.out + nothing.err


def test_a_mistake_in_the_command_is_told_without_a_traceback(cli: Any) -> None:
    for arguments in (["trian"], ["train"], ["generate", "--top-k", "many"]):
        result = cli(*arguments)
        assert result.status == 2
        assert "Usage" in result.err and "Traceback" not in result.err


def test_an_interrupt_before_anything_is_running_ends_with_its_status(
    cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moesaic.config.load.read_values", interrupted)
    result = cli("train", "dense-tiny", "--output", "unused")
    assert result.status != 0 and "Traceback" not in result.err


def test_python_m_moesaic_is_the_command() -> None:
    result = subprocess.run([sys.executable, "-m", "moesaic", "--version"], capture_output=True, text=True, check=True)
    assert result.stdout == f"moesaic {__version__}\n"


def test_no_default_is_lost_in_the_help() -> None:
    """Rich takes what stands in brackets for a style, and shows nothing, unless it is escaped."""
    commands = [typer.main.get_command(app)]
    for command in commands:
        commands += getattr(command, "commands", {}).values()
        for parameter in command.params:
            text = getattr(parameter, "help", None) or ""
            assert Text.from_markup(text).plain == text.replace("\\[", "["), (command.name, parameter.name)
    assert len(commands) > len(VERBS)
