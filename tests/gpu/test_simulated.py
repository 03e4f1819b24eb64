"""Our code for CUDA on a device that is simulated, in a process of its own (`cases.py`).

It holds that every tensor is made where it is used and that the results are the processor's, which is what can be known
without a GPU. Where there is one, the tests that need it run on it. `make triton` runs it, with the kernels.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moesaic.kernels.select import find_compiler

from . import stand_in

CASES = Path(__file__).with_name("cases.py")
IS_ASKED_FOR = "MOESAIC_TEST_TRITON" in os.environ
takes_minutes = pytest.mark.skipif(not IS_ASKED_FOR, reason="it takes minutes; `make triton` runs it")
START = "import ctypes, sys; ctypes.CDLL(sys.argv[1]); import pytest; sys.exit(pytest.main(sys.argv[2:]))"


@takes_minutes
@pytest.mark.skipif(
    torch.version.cuda is not None or torch.version.hip is not None, reason="this PyTorch knows real GPUs"
)
@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
def test_what_runs_on_a_gpu_runs_on_a_simulated_one(tmp_path: Path) -> None:
    compiler = find_compiler()
    assert compiler is not None
    command = [
        sys.executable,
        "-c",
        START,
        str(stand_in.build(compiler, tmp_path)),
        str(CASES),
        "-p",
        "no:cacheprovider",
    ]
    environment = {key: value for key, value in os.environ.items() if key != "PYTEST_ADDOPTS"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and "passed" in result.stdout, result.stdout[-8000:] + result.stderr[-2000:]
