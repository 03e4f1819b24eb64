"""Modules are loaded without a search for garbage, and searches come back; signals end a start."""

import gc
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moesaic.cli.start import loading_modules


@pytest.mark.parametrize("was_enabled", [True, False])
def test_garbage_is_looked_for_again_as_before(was_enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen: list[bool] = []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(True))
    if not was_enabled:
        gc.disable()
    try:
        with pytest.raises(ImportError), loading_modules():
            assert not gc.isenabled()
            monkeypatch.setitem(sys.modules, "a module", pytest)
            raise ImportError
        assert gc.isenabled() is was_enabled and len(frozen) == 1
        with loading_modules():
            pass  # what is there is the caller's
        assert len(frozen) == 1
    finally:
        gc.enable()


def test_a_command_looks_for_garbage_only_among_what_it_makes(trained_run: Path) -> None:
    code = """
import gc, sys
from moesaic.cli.main import main
try:
    main(["generate", sys.argv[1], "--prompt", "The", "--max-new-tokens", "2"])
finally:
    print(f"{gc.isenabled()} {gc.get_freeze_count() > 100_000} {len(gc.get_objects()) < 100_000}", file=sys.stderr)
"""
    result = subprocess.run(
        [sys.executable, "-c", code, str(trained_run)], capture_output=True, text=True, check=True, timeout=120
    )
    assert result.stderr.split()[-3:] == ["True", "True", "True"]


def test_ctrl_c_ends_the_process_while_modules_are_loaded_and_is_pythons_again() -> None:
    code = """
import signal, sys, threading
from moesaic.cli.start import loading_modules
signal.signal(signal.SIGINT, signal.default_int_handler)  # what is started in the background may ignore it
for error in (None, ImportError):
    try:
        with loading_modules():
            assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
            if error:
                raise error
    except ImportError:
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
thread = threading.Thread(target=lambda: loading_modules().__enter__())
thread.start(); thread.join()
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not a thread's to set
signal.signal(signal.SIGINT, signal.SIG_IGN)
with loading_modules():
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # a caller's own
assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
signal.signal(signal.SIGINT, signal.default_int_handler)
with loading_modules():
    class Freed:
        def __del__(self):  # where a KeyboardInterrupt would be ignored
            signal.raise_signal(signal.SIGINT)
    Freed()
print("still here")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (-signal.SIGINT, "", "")


def _becomes_first() -> bool:
    """Whether a process can be the first one of a namespace here, as in a container."""
    command = ["unshare", "--pid", "--fork", "--mount-proc", "true"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.skipif(not _becomes_first(), reason="needs unshare and the right to make namespaces")
@pytest.mark.parametrize(
    ("number", "before", "status"),
    [
        (signal.SIGTERM, "heed_termination()", 143),
        (signal.SIGINT, "loading = loading_modules(); loading.__enter__()", 130),
        (signal.SIGTERM, "heed_termination(); loading = loading_modules(); loading.__enter__()", 143),
        (signal.SIGTERM, "signal.signal(signal.SIGTERM, signal.SIG_IGN); heed_termination()", 0),
    ],
)
def test_a_containers_first_process_ends_by_signals_too(number: signal.Signals, before: str, status: int) -> None:
    """No default action ends a process with the id 1, so that `docker stop` during a start would wait and kill."""
    code = f"""
import os, signal, time
from moesaic.cli.start import heed_termination, loading_modules
assert os.getpid() == 1
signal.signal(signal.SIGINT, signal.default_int_handler)  # what is started in the background may ignore it
{before}
try:
    signal.raise_signal({number})
finally:
    print("unwound")
"""
    command = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (result.returncode, result.stderr) == (status, "")
    assert result.stdout == ("" if "loading" in before else "unwound\n")
