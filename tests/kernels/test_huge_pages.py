"""Memory that can lie on huge pages: private, from the beginning of a page, and zero where it should be."""

import mmap
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moesaic.kernels.huge_pages import empty_on_huge_pages, zeros_on_huge_pages


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux says what kind of memory it is")
@pytest.mark.parametrize("make", [empty_on_huge_pages, zeros_on_huge_pages])
def test_memory_for_huge_pages_is_of_the_kind_that_gets_them(make: Callable[[int, torch.device], Tensor]) -> None:
    data = make(8 << 20, torch.device("cpu"))
    middle = data.data_ptr() + data.nbytes // 2
    flags: dict[str, list[str]] = {}
    place = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            place = "here" if int(match[1], 16) <= middle < int(match[2], 16) else "elsewhere"
        elif line.startswith("VmFlags:"):
            flags[place] = line.split()[1:]
    # Shared memory gets small pages on most systems (shmem_enabled is "never").
    assert "sh" not in flags["here"]
    # Zeros are backed where they are used, so there may be more of them than memory, where the system lets anybody.
    if make is zeros_on_huge_pages and Path("/proc/sys/vm/overcommit_memory").read_text().strip() != "2":
        assert "nr" in flags["here"]


@pytest.mark.skipif(sys.platform == "win32", reason="zeros are torch's own there")
def test_zeros_beyond_the_addresses_that_there_are_lack_memory() -> None:
    with pytest.raises(MemoryError, match=rf"does not allocate {1 << 60} bytes \(Cannot allocate memory\)"):
        zeros_on_huge_pages(1 << 60, torch.device("cpu"))


@pytest.mark.parametrize("make", [empty_on_huge_pages, zeros_on_huge_pages])
@pytest.mark.parametrize("size", [256 << 10, (5 << 20) + 1])
def test_memory_for_huge_pages_begins_at_a_page(make: Callable[[int, torch.device], Tensor], size: int) -> None:
    kept = [make(size, torch.device("cpu")) for _ in range(3)]
    assert [data.data_ptr() % mmap.PAGESIZE for data in kept] == [0, 0, 0]
    assert all(data.shape == (size,) for data in kept)


def test_zeros_are_zeros_and_can_be_written() -> None:
    for size in (0, 1, 5 << 20):
        data = zeros_on_huge_pages(size, torch.device("cpu"))
        assert data.shape == (size,) and not data.any()
        assert bool(data.fill_(7).eq(7).all())
