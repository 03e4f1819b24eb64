"""OpenMP's waiting is set before torch is loaded, a user's own setting stands, and threads use as many as torch."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from moesaic.control_groups import allowed_processors
from moesaic.kernels import limits, select, threads
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


@pytest.mark.parametrize(
    ("environment", "threads_of_each"),
    [
        ({}, "4"),
        ({"LOCAL_WORLD_SIZE": "3"}, "2"),
        ({"LOCAL_WORLD_SIZE": "100"}, "1"),
        ({"LOCAL_WORLD_SIZE": "1"}, None),
        ({"OMP_NUM_THREADS": "5"}, None),  # its user's
        ({"MKL_NUM_THREADS": "5"}, None),
        ({"TORCHELASTIC_RUN_ID": None}, None),  # of another starter
    ],
)
def test_torchruns_processes_share_the_cores(
    environment: dict[str, str | None], threads_of_each: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 cores with two hardware threads each, of which this container may use 12."""
    monkeypatch.setattr(threads, "usable_processors", lambda: 12)
    monkeypatch.setattr(threads, "allowed_processors", lambda: 12)
    monkeypatch.setattr(limits, "physical_cores", lambda text: 8)
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    torchrun = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    for name, value in {**torchrun, **environment}.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    before = os.environ.get("OMP_NUM_THREADS")
    assert threads.limit_threads() == (threads_of_each is not None)
    assert os.environ.get("OMP_NUM_THREADS") == (threads_of_each or before)


_REST_SCRIPT = """
import time
from pathlib import Path
import torch

def sleeps() -> dict[str, int]:
    found = {}
    for task in Path("/proc/self/task").iterdir():
        lines = (task / "status").read_text().splitlines()
        found[task.name] = next(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt"))
    return found

x = torch.ones(1 << 20)
x.add_(1)  # torch's own threads
before = set(sleeps())
from moesaic.kernels import select
library = select.cpu_library()
function = library.function("moesaic_lack_memory", "i")
deadline = time.monotonic() + 20
while len(sleeps()) < len(before) + WANTED and time.monotonic() < deadline:
    time.sleep(0.01)
first = sleeps()
for _ in range(30):
    assert function(torch.get_num_threads()) == 0  # a call of all threads that does nothing
    time.sleep(0.01)
last = sleeps()
workers = [name for name in before if name in first and last[name] - first[name] >= 15]
print(len(first) - len(before), torch.get_num_threads() - 1, len(workers))
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="what threads do is read from Linux's /proc")
@pytest.mark.skipif(not select.supported_instruction_sets(), reason="no x86 processor with AVX2")
@pytest.mark.skipif(allowed_processors() < 2, reason="one processor, and so one thread")
@pytest.mark.parametrize(("environment", "is_done"), [({}, True), ({"GOMP_SPINCOUNT": "20000000000"}, False)])
def test_threads_sleep_soon_though_torch_was_loaded_first(environment: dict[str, str], is_done: bool) -> None:
    """A thread that sleeps between calls gives its processor up of itself each time; one that spins does not."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "OMP_", "KMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", _REST_SCRIPT.replace("WANTED", "2" if is_done else "0")],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    started, num_workers, num_sleeping = map(int, done.stdout.split())
    assert started == (2 if is_done else 0)
    # The main thread sleeps between the calls in any case.
    assert num_sleeping >= (1 + num_workers if is_done else 0)
    assert is_done or num_sleeping <= 1


@pytest.mark.parametrize(
    ("environment", "num_threads", "is_done"),
    [
        ({}, 10_000, True),
        ({}, 0, False),  # of torch's threads fewer than processors
        ({"OMP_WAIT_POLICY": "active"}, 10_000, False),
        ({"GOMP_SPINCOUNT": "5"}, 10_000, False),
    ],
)
def test_a_thread_more_is_started_once_and_only_where_it_helps(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], num_threads: int, is_done: bool
) -> None:
    for name in threads._USER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(threads, "_is_resting", False)
    asked: list[int] = []

    def start(answer: int = 0) -> int:
        asked.append(answer)
        return answer

    assert not threads.rest_soon(lambda: start(1), num_threads=num_threads), "there is no thread to be had"
    assert threads.rest_soon(start, num_threads=num_threads) == is_done
    assert not threads.rest_soon(start, num_threads=num_threads)
    assert asked == ([1, 0] if is_done else [])


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
