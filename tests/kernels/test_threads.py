"""OpenMP's waiting is set before torch is loaded, a user's own setting stands, and threads use as many as torch."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from moesaic.kernels import select
from moesaic.kernels.cpu import build

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


@pytest.mark.parametrize("num_threads", [1, 2, 3, 12])  # many count their barriers together
def test_memory_that_a_thread_is_refused_is_an_error_of_the_caller(compiled_kernels: str, num_threads: int) -> None:
    library = select.cpu_library()
    assert library is not None
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(num_threads)
        function = library.function("moesaic_lack_memory", "i")
        for member in {0, num_threads // 2, num_threads - 1}:
            with pytest.raises(MemoryError, match=r"refused the memory that they work in; .*; use shorter or fewer"):
                function(member)
        assert function(num_threads) == 0, "the next call finds a whole team"
    finally:
        torch.set_num_threads(before)


def test_every_function_of_the_library_catches_what_ctypes_would_not() -> None:
    for path in sorted((Path(build.__file__).parent / "source").glob("*.cpp")):
        functions = re.split(r"^MOESAIC_EXPORT ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
        for function in functions:
            assert re.match(r"int64_t [^{]+\) try \{$.*?^\} MOESAIC_NO_MEMORY$", function, re.DOTALL | re.MULTILINE), (
                path.name, function[:60]
            )  # fmt: skip
