"""The allocator's remedy holds in a fresh process, respects the user's own settings, and never loops."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from moesaic.kernels import allocator
from moesaic.kernels.allocator import (
    MARKER,
    glibc_version,
    tune_allocator,
)

needs_glibc = pytest.mark.skipif(glibc_version() is None, reason="the remedy is for glibc on Linux")


def clean_environment(**more: str) -> dict[str, str]:
    dropped = ("MALLOC_", "GLIBC_TUNABLES", MARKER)
    return {**{key: value for key, value in os.environ.items() if not key.startswith(dropped)}, **more}


def run_python(code: str, *arguments: str, **environment: str) -> Any:
    """Run code in a process of its own, since malloc's settings belong to a process; it prints one JSON value."""
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=clean_environment(**environment),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(result.stdout)


TUNE = """
import json, re, sys
from dataclasses import asdict
from moesaic.kernels.allocator import tune_allocator, large_blocks_stay
before = large_blocks_stay()
first, second = tune_allocator(), tune_allocator()
print(json.dumps({
    "before": before, "after": large_blocks_stay(), "first": asdict(first), "second": asdict(second),
    "peak_kib": int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]),
    "torch": "torch" in sys.modules,
}))
"""


@needs_glibc
def test_freed_blocks_stay_after_tuning_and_tuning_costs_no_memory() -> None:
    seen = run_python(TUNE)
    assert seen["before"] is False
    assert seen["after"] is True
    assert seen["first"]["is_tuned"]
    assert seen["first"]["applied"][:2] == seen["second"]["applied"][:2] == ["M_MMAP_MAX=0", "M_TRIM_THRESHOLD=-1"]
    # The reservation of gigabytes for huge pages is address space only: Python alone is about 15 MB.
    assert seen["peak_kib"] < 64 << 10
    assert not seen["torch"]


@needs_glibc
@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, False),
        ({"MALLOC_MMAP_MAX_": "0"}, False),  # in the heap, whose end is given back
        ({"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "17179869184"}, True),
    ],
)
def test_whether_blocks_stay_is_seen_where_the_user_set_it(variables: dict[str, str], expected: bool) -> None:
    code = "import json; from moesaic.kernels import allocator; print(json.dumps(allocator.large_blocks_stay()))"
    assert run_python(code, **variables) is expected


@needs_glibc
@pytest.mark.skipif(
    allocator.huge_pages_mode() != "madvise"
    or allocator._overcommit_mode() == 2
    or allocator._address_space_is_limited(),
    reason="no huge pages can be had here",
)
@pytest.mark.parametrize(("is_loaded", "on_small_pages"), [(False, 128 << 20), (True, 0)])
def test_huge_pages_begin_behind_what_modules_take(is_loaded: bool, on_small_pages: int) -> None:
    code = """
import json, re, sys
if sys.argv[-1] == "loaded":
    sys.modules["torch"] = None
from moesaic.kernels import allocator
end = allocator._heap_range()[1]
size = allocator.tune_allocator().huge_page_bytes
starts, start = [], None
for line in open("/proc/self/smaps"):
    if line.endswith("[heap]\\n"):
        start = int(line.partition("-")[0], 16)
    elif line.startswith("VmFlags:"):
        starts += [start] if start is not None and "hg" in line.split() else []
        start = None
print(json.dumps([size, min(starts) - end]))
"""
    size, before = run_python(code, "loaded" if is_loaded else "not")
    assert size > 0
    assert 0 <= before - on_small_pages + (1 << 20) < 2 * allocator._huge_page_bytes()


@needs_glibc
def test_every_command_has_it() -> None:
    code = """
import json
from contextlib import suppress
from moesaic.cli.main import main
from moesaic.kernels.allocator import large_blocks_stay
with suppress(SystemExit):
    main(["no-such-verb"])
print(json.dumps(large_blocks_stay()))
"""
    assert run_python(code) is True


@needs_glibc
def test_freed_memory_is_given_back_when_asked_for() -> None:
    code = """
import ctypes, json, re
from moesaic.kernels.allocator import give_back_freed_memory, tune_allocator
def resident(): return int(re.search(r"VmRSS:\\s*(\\d+)", open("/proc/self/status").read())[1])
tune_allocator()
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.memset.restype = ctypes.c_void_p
size = ctypes.c_size_t(128 << 20)
block = ctypes.c_void_p(libc.malloc(size))
libc.memset(block, 1, size)
libc.free(block)
kept = resident()
give_back_freed_memory()
print(json.dumps([kept, resident()]))
"""
    kept, left = run_python(code)
    assert kept > 128 << 10 > left + (64 << 10), (kept, left)


@needs_glibc
def test_a_freed_tensor_is_not_faulted_in_again() -> None:
    code = """
import json, resource, sys
import torch
if sys.argv[-1] != "default":
    from moesaic.kernels.allocator import tune_allocator
    tune_allocator()
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
x = torch.ones(8 << 20)
x + x; x + x
start = faults()
for _ in range(8): x + x
print(json.dumps(faults() - start))
"""
    # 32 MiB are 8,192 pages of 4 KiB: by default every one of the 8 results faults them in, tuned none does.
    assert run_python(code) < 1000


@needs_glibc
@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"MALLOC_TOP_PAD_": "1048576"}, "MALLOC_TOP_PAD_"),
        ({"MALLOC_MMAP_THRESHOLD_": "1048576"}, "MALLOC_MMAP_THRESHOLD_"),
        ({"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=1048576"}, "glibc.malloc.trim_threshold"),
        ({MARKER: "off"}, f"{MARKER}=off opts out"),
    ],
)
def test_what_the_user_set_is_left_alone(environment: dict[str, str], named: str) -> None:
    seen = run_python(TUNE, **environment)
    assert seen["after"] is False
    assert not seen["first"]["is_tuned"]
    assert named in seen["first"]["explanation"]


@pytest.mark.parametrize("platform", ["darwin", "win32", "linux"])
def test_without_glibc_nothing_is_done_and_said(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def musl(name: str) -> str:
        raise ValueError(f"unrecognized configuration name {name}")

    monkeypatch.setattr(allocator.sys, "platform", platform)
    monkeypatch.setattr(allocator.os, "confstr", musl, raising=False)
    monkeypatch.delenv(MARKER, raising=False)
    report = tune_allocator()
    assert not report.is_tuned and not report.applied and not report.huge_page_bytes
    assert "glibc" in report.explanation
    assert allocator.large_blocks_stay() is None


@needs_glibc
def test_a_setting_that_glibc_refuses_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def mallopt(self, parameter: int, value: int) -> int:
            return 0

    for name in (MARKER, *allocator._USER_VARIABLES, "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(allocator, "_libc", Refusing)
    report = tune_allocator()
    assert not report.is_tuned and not report.applied
    assert any(line.startswith("M_MMAP_MAX=0: ") for line in report.refused)


@needs_glibc
@pytest.mark.parametrize(
    ("mode", "overcommit", "reason"),
    [("never", 0, "switched off"), ("always", 0, "already"), (None, 0, "has none"), ("madvise", 2, "overcommit")],
)
def test_huge_pages_that_cannot_be_had_are_explained(
    mode: str | None, overcommit: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allocator, "huge_pages_mode", lambda: mode)
    monkeypatch.setattr(allocator, "_overcommit_mode", lambda: overcommit)
    size, said = allocator._reserve_huge_pages(allocator._libc())
    assert size == 0
    assert reason in said


@needs_glibc
def test_nothing_is_reserved_of_an_address_space_that_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    monkeypatch.setattr(allocator, "huge_pages_mode", lambda: "madvise")
    monkeypatch.setattr(allocator, "_overcommit_mode", lambda: 0)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (7 << 30, resource.RLIM_INFINITY))
    size, said = allocator._reserve_huge_pages(allocator._libc())
    assert size == 0 and "ulimit -v" in said
