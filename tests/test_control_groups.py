"""What a container leaves of the machine counts: memory, and the processors' time."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moesaic import control_groups
from moesaic.control_groups import allowed_processors, memory_limit_bytes, usable_processors
from moesaic.data.prepare import _count_workers
from moesaic.kernels.limits import available_memory_bytes, describe_cpu

Write = Callable[[str, str], None]


@pytest.fixture
def write(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Write:
    """Write what the kernel would say: `own` is the process's groups, `groups/` what limits them."""
    monkeypatch.setattr(control_groups, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(control_groups, "_GROUPS", tmp_path / "groups")

    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    return write


def test_a_containers_memory_counts(write: Write) -> None:
    whole = available_memory_bytes()  # no groups at all
    assert whole > 10 << 20
    assert memory_limit_bytes() is None
    write("own", "0::/outer/inner\n")
    write("groups/outer/memory.max", "9000000\n")
    write("groups/outer/memory.current", "5000000\n")
    write("groups/outer/inner/memory.max", "max\n")
    write("groups/outer/inner/memory.current", "1000\n")
    assert available_memory_bytes() == 4_000_000  # of a parent
    assert memory_limit_bytes() == 9_000_000
    write("groups/outer/memory.stat", "anon 77\ninactive_file 500000\nactive_file 200000\n")
    assert available_memory_bytes() == 4_700_000  # files that are only cached make room
    write("groups/memory.max", "3000000\n")
    write("groups/memory.current", "2999999\n")
    assert available_memory_bytes() == 1  # the container's own, under whatever name
    assert memory_limit_bytes() == 3_000_000


def test_so_does_that_of_version_1(write: Write) -> None:
    write("own", "5:cpu,memory:/docker/x\n4:pids:/\n")
    write("groups/memory/docker/x/memory.limit_in_bytes", "2000000\n")
    write("groups/memory/docker/x/memory.usage_in_bytes", "2500000\n")
    assert available_memory_bytes() == 0
    write("groups/memory/docker/x/memory.stat", "inactive_file 9\ntotal_inactive_file 700000\n")
    assert available_memory_bytes() == 200_000
    write("groups/memory/docker/x/memory.limit_in_bytes", "9223372036854771712\n")  # none
    assert available_memory_bytes() > 10 << 20
    assert memory_limit_bytes() is None


def test_a_containers_share_of_the_processors_counts(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_groups, "allowed_processors", lambda: 12)
    assert usable_processors() == 12  # no groups at all
    write("own", "0::/outer/inner\n")
    write("groups/outer/inner/cpu.max", "max 100000\n")
    assert usable_processors() == 12
    write("groups/outer/cpu.max", "250000 100000\n")
    assert usable_processors() == 3  # of a parent, rounded up
    write("groups/outer/inner/cpu.max", "10000 50000\n")
    assert usable_processors() == 1  # a fifth of one
    write("groups/outer/inner/cpu.max", "9000000 100000\n")
    write("groups/cpu.max", "200000 100000\n")
    assert usable_processors() == 2  # the container's own, under whatever name
    assert describe_cpu().usable_threads == _count_workers(None) == 2
    write("own", "")  # nothing is said of where it is
    assert usable_processors() == 2


def test_so_does_its_share_of_version_1(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_groups, "allowed_processors", lambda: 12)
    write("own", "5:cpu,cpuacct:/docker/x\n4:pids:/\n")
    write("groups/cpu/docker/x/cpu.cfs_quota_us", "-1\n")
    write("groups/cpu/docker/x/cpu.cfs_period_us", "100000\n")
    assert usable_processors() == 12
    write("groups/cpu/docker/x/cpu.cfs_quota_us", "400000\n")
    assert usable_processors() == 4
    write("groups/cpu/docker/x/cpu.cfs_period_us", "0\n")  # no file of the kernel's
    assert usable_processors() == 12
    write("groups/cpu,cpuacct/docker/cpu.cfs_quota_us", "300000\n")  # without a link of the controller's own name
    write("groups/cpu,cpuacct/docker/cpu.cfs_period_us", "100000\n")
    assert usable_processors() == 3
    write("own", "4:pids:/\n0::/here\n")  # both versions, and the newer one has the processors
    write("groups/unified/here/cpu.max", "200000 100000\n")
    assert usable_processors() == 2


_SCRIPT = """
import os, sys
from pathlib import Path
from moesaic import control_groups
control_groups._OWN_GROUPS, control_groups._GROUPS = Path(sys.argv[1], "own"), Path(sys.argv[1], "groups")
{before}
from moesaic.kernels.threads import limit_threads
done = limit_threads()
assert "torch" not in sys.modules or {before!r}
import torch
print(done, os.environ.get("OMP_NUM_THREADS"), torch.get_num_threads())
"""


@pytest.mark.skipif(allowed_processors() < 2, reason="one processor, and so one thread in any case")
@pytest.mark.parametrize(
    ("quota", "before", "environment", "printed"),
    [
        ("100000", "", {}, "True 1 1"),
        ("max", "", {}, "False None"),
        ("9999900000", "", {}, "False None"),
        ("100000", "", {"OMP_NUM_THREADS": "2"}, "False 2 2"),
        ("100000", "", {"MKL_NUM_THREADS": "2"}, "False None"),
        ("100000", "import torch", {}, "False None"),
    ],
)
def test_torch_starts_no_more_threads_than_that(
    quota: str, before: str, environment: dict[str, str], printed: str, write: Write, tmp_path: Path
) -> None:
    write("own", "0::/\n")
    write("groups/cpu.max", f"{quota} 100000\n")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MKL_"))}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT.format(before=before), str(tmp_path)],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip().startswith(printed)
