"""The kernels in Triton: in its interpreter, or on a GPU where there is one. `make triton` runs all of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moesaic.kernels.select import find_compiler

from . import stand_in
from .test_simulated import IS_ASKED_FOR, START, takes_minutes

pytest.importorskip("triton", reason="triton is not installed")

HERE = Path(__file__).parent
HAS_GPU = torch.cuda.is_available()


def run(*arguments: str, interpreted: bool) -> None:
    """Run Python with these arguments, which start pytest."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTEST_ADDOPTS"}
    environment["TRITON_INTERPRET"] = "1" if interpreted else "0"
    command = [sys.executable, *arguments, "-p", "no:cacheprovider"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and "passed" in result.stdout, result.stdout[-8000:] + result.stderr[-2000:]


def test_they_pass_their_self_test() -> None:
    run("-m", "pytest", str(HERE / "kernel_cases.py"), "-k", "self_test", interpreted=not HAS_GPU)


@pytest.mark.skipif(not (IS_ASKED_FOR or HAS_GPU), reason="it takes a minute; `make triton` runs it")
def test_they_compute_what_is_defined() -> None:
    run("-m", "pytest", str(HERE / "kernel_cases.py"), interpreted=not HAS_GPU)


@takes_minutes
@pytest.mark.skipif(torch.version.cuda is not None or torch.version.hip is not None, reason="no device is simulated")
def test_they_compute_whole_models(tmp_path: Path) -> None:
    compiler = find_compiler()
    assert compiler is not None, "a C++ compiler is required"
    library = str(stand_in.build(compiler, tmp_path))
    run("-c", START, library, str(HERE / "triton_cases.py"), interpreted=True)


@takes_minutes
def test_they_compile_for_gpus_that_are_not_here() -> None:
    run("-m", "pytest", str(HERE / "compile_cases.py"), interpreted=False)
