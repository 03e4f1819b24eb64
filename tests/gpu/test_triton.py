"""The kernels in Triton: computed in its interpreter, or on a GPU where there is one. `make triton` compiles them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

CASES = Path(__file__).with_name("kernel_cases.py")


@pytest.mark.slow
def test_they_compute_what_is_defined() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTEST_ADDOPTS"}
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", str(CASES), "-p", "no:cacheprovider"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and "passed" in result.stdout, result.stdout[-8000:] + result.stderr[-2000:]
