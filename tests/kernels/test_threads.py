"""OpenMP's waiting is set before torch is loaded, a user's own setting stands, and threads use as many as torch."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from moesaic.kernels import select

_SCRIPT = """
import os, sys
{before}
from moesaic.kernels.threads import spin_briefly
done = spin_briefly()
assert "torch" not in sys.modules or {before!r}
print(done, os.environ.get("GOMP_SPINCOUNT"))
"""


@pytest.mark.parametrize(
    ("before", "environment", "printed"),
    [
        ("", {}, "True 1000"),
        ("", {"GOMP_SPINCOUNT": "7"}, "False 7"),
        ("", {"OMP_WAIT_POLICY": "active"}, "False None"),
        ("import torch", {}, "False None"),
    ],
)
def test_is_set_once_and_only_in_time(before: str, environment: dict[str, str], printed: str) -> None:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "OMP_", "KMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT.format(before=before)],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == printed


def test_a_new_thread_uses_as_many_as_torch_was_told(compiled_kernels: str) -> None:
    library = select.cpu_library()
    assert library is not None
    before = torch.get_num_threads()
    wanted = (os.cpu_count() or 1) + 1  # not what OpenMP would use by itself

    def ask() -> int:
        library.function("moesaic_self_test", "")
        return library.handle.omp_get_max_threads()  # of the calling thread, as the kernels ask

    try:
        torch.set_num_threads(wanted)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(ask).result() == wanted
    finally:
        torch.set_num_threads(before)
