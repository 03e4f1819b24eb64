"""Modules are loaded without a search for garbage, and searches come back."""

import gc
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
