import errno
import os
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


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "memory was refused; room for the model"),
        (MemoryError("Cannot allocate memory (os error 12)"), r"refused \(Cannot allocate .*error 12\)\); room"),
        (MemoryError("the kernels were; x is; do"), r"refused \(the kernels were\); room"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), r"refused \(.*Cannot allocate memory\); room"),
        (RuntimeError("can't allocate memory: you tried to allocate 77 bytes. E"), r"\(77 bytes more were asked for\)"),
        (ImportError("/a/b/libtorch.so: failed to map segment from shared object"), r"\(libtorch.so could not be loa"),
        (OSError("libb.so: failed to map segment from shared object"), r"\(libb.so could not be loaded\); room"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0"), r"\(2.00 GiB more were asked for\)"),
    ],
)  # fmt: skip
def test_memory_that_is_refused_is_told_without_a_traceback(
    cli: Any, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("moesaic.config.load.read_values", refused)
    result = cli("train", "dense-tiny", "--output", "unused")
    assert result.status == 1 and result.err.count("\n") == 1
    assert re.search(words, result.err) and result.err.endswith(
        "less at a time (shorter sequences, smaller batches).\n"
    )


def test_threads_that_are_refused_are_not_called_memory(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("moesaic.config.load.read_values", refused)
    result = cli("train", "dense-tiny", "--output", "unused")
    assert result.status == 1 and result.err.count("\n") == 1
    assert re.search("no more threads; .* are required; .*ulimit -u", result.err) and "memory" not in result.err


def test_a_folder_that_is_gone_is_told(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    code = "import os, sys; os.rmdir('../gone'); from moesaic.cli.main import main; main(['--version'])"
    command = [sys.executable, "-P", "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    result = subprocess.run(
        command, cwd=tmp_path / "gone", env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == "the folder that this was started in is gone; one that exists is required; cd to one.\n"


@pytest.mark.parametrize(("columns", "is_taken"), [("0", False), ("1", False), ("30", True), ("x", False)])
def test_a_terminal_without_width_is_not_believed(
    cli: Any, monkeypatch: pytest.MonkeyPatch, columns: str, is_taken: bool
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    out = cli("inspect", "dense-tiny").out
    assert "parameters" in out
    assert (max(len(line) for line in out.splitlines()) <= 30) is is_taken


def test_the_name_of_a_file_is_not_taken_for_refused_memory(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "out of memory.yaml")

    monkeypatch.setattr("moesaic.config.load.read_values", missing)
    with pytest.raises(FileNotFoundError):
        cli("train", "dense-tiny", "--output", "unused")


def test_a_name_that_is_too_long_is_told_without_a_traceback(cli: Any) -> None:
    result = cli("generate", "a prompt where a run is meant " * 20, "--prompt", "x")
    assert result.status == 2 and result.err.count("\n") == 1
    assert re.search(r"a prompt where a run .*: File name too long; .* name another", result.err)


def test_a_file_that_may_not_be_read_is_told_without_a_traceback(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "shards/x.bin")

    monkeypatch.setattr("moesaic.config.load.read_values", refuse)
    result = cli("train", "dense-tiny", "--output", "unused")
    assert result.status == 2 and result.err.count("\n") == 1
    assert re.search(r"shards/x.bin: Permission denied; .* readable, .*; check its permissions", result.err)


def test_other_errors_keep_their_traceback(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr("moesaic.config.load.read_values", fail)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        cli("train", "dense-tiny", "--output", "unused")


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="a limit of addresses that the system keeps is required"
)
def test_under_a_limit_of_addresses_a_command_says_what_it_was_refused(trained_run: Path) -> None:
    script = """
import resource, sys
from moesaic.cli.main import main
import moesaic.model.load
import torch
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (512 << 20), -1))
moesaic.model.load.load_run = lambda *_, **__: torch.empty(1 << 30)
main(["evaluate", sys.argv[1], "--text", sys.argv[1] + "/config.yaml"])
"""
    done = subprocess.run([sys.executable, "-c", script, str(trained_run)], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert re.search(
        r"memory was refused \(4294967296 bytes more .*; raise the limit \(ulimit -v is \d+ here\)", done.stderr
    )


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="a limit of addresses that the system keeps is required"
)
def test_under_a_limit_that_torch_cannot_be_loaded_in_a_command_says_so(trained_run: Path) -> None:
    script = """
import resource, sys
from moesaic.cli.main import main
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), -1))
main(["generate", sys.argv[1], "--prompt", "a"])
"""
    done = subprocess.run([sys.executable, "-c", script, str(trained_run)], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert re.search(r"memory was refused \(\S+\.so\S* could not be loaded\); .*; raise the limit", done.stderr)


@pytest.mark.parametrize("arguments", [("inspect", "pr-moe-tiny-8-16"), ("bench", "serve", "--help")])
def test_what_an_encoding_does_not_have_is_replaced(arguments: tuple[str, ...]) -> None:
    """A table that is cut ends in a character that few encodings have; nothing is lost of a text."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "24"}
    done = subprocess.run(
        [sys.executable, "-m", "moesaic", *arguments], capture_output=True, check=False, env=environment, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii() and b"\\u2026" in done.stdout


def test_python_m_moesaic_is_the_command() -> None:
    result = subprocess.run([sys.executable, "-m", "moesaic", "--version"], capture_output=True, text=True, check=True)
    assert result.stdout == f"moesaic {__version__}\n"
