import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.text import Text

from moesaic import __version__
from moesaic.cli.main import VERBS, app


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_every_verb_shows_an_example(cli: Any, verb: str) -> None:
    result = cli(verb, "--help")
    assert result.status == 0
    assert f"Example: moesaic {verb}" in result.out


def commands(group: Any) -> list[Any]:
    inner = getattr(group, "commands", {})
    return [group] if not inner else [each for command in inner.values() for each in commands(command)]


def test_helps_are_printed_whole_and_arguments_in_capitals() -> None:
    from typer.main import get_command

    for command in commands(get_command(app)):
        for parameter in command.params:
            text = getattr(parameter, "help", None) or ""
            # Brackets that rich would take for its own are escaped.
            assert Text.from_markup(text).plain == text.replace("\\[", "["), (command.name, text)
            assert not re.search(r"\s\.$", text), (command.name, text)
            if parameter.param_type_name == "argument":
                assert re.fullmatch("[A-Z_]+", parameter.metavar or ""), (command.name, parameter.name)


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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device without room is required (Linux)")
def test_a_full_disk_behind_standard_output_is_told_without_a_traceback() -> None:
    command = [sys.executable, "-m", "moesaic", "--version"]
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith("what was printed is not whole (No space left") and result.stderr.count("\n") == 1


def test_python_m_moesaic_is_the_command() -> None:
    result = subprocess.run([sys.executable, "-m", "moesaic", "--version"], capture_output=True, text=True, check=True)
    assert result.stdout == f"moesaic {__version__}\n"
