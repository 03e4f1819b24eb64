"""The kernels in Triton: computed in its interpreter, or on a GPU where there is one, and compiled for several."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

HERE = Path(__file__).parent


def run(*command: str, **environment: str) -> None:
    inherited = {key: value for key, value in os.environ.items() if key != "PYTEST_ADDOPTS"}
    result = subprocess.run(
        [sys.executable, *command], env=inherited | environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0 and "passed" in result.stdout, result.stdout[-8000:] + result.stderr[-2000:]


@pytest.mark.slow
def test_they_compute_what_is_defined() -> None:
    environment = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    run("-m", "pytest", str(HERE / "kernel_cases.py"), "-p", "no:cacheprovider", **environment)
