"""Large memory on huge pages, for weights, keys and values. What malloc's memory lies on is allocator.py's business."""

import ctypes
import mmap
import sys

import torch
from torch import Tensor

HUGE_PAGE_BYTES = 2 << 20
_FROM_A_PAGE_BYTES = 256 << 10
_MADV_HUGEPAGE = 14
_MAP_NORESERVE = 0x4000  # a name of Python 3.13 and later


def empty_on_huge_pages(num_bytes: int, device: torch.device) -> Tensor:
    """Return uint8 memory that the kernel backs with huge pages where it can: fewer of its tables to walk.

    From 256 KiB on, which no first-level cache holds, it begins at a page, as a mapped file does: bf16 weights at any
    other place made a decode 2 to 3 % slower.
    """
    spare = mmap.PAGESIZE if num_bytes >= _FROM_A_PAGE_BYTES else 0
    memory = torch.empty(num_bytes + spare, dtype=torch.uint8, device=device)
    start = -memory.data_ptr() % mmap.PAGESIZE if spare else 0
    data = memory[start : start + num_bytes]
    _advise_huge_pages(data)
    return data


def zeros_on_huge_pages(num_bytes: int, device: torch.device) -> Tensor:
    """Return uint8 zeros as empty_on_huge_pages; on the CPU they take memory only where they are first used.

    Raises: MemoryError where the system refuses so many addresses.
    """
    if device.type != "cpu" or not num_bytes or sys.platform == "win32":
        return torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    # Private: shared memory, which is Python's default, has small pages on most systems.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (_MAP_NORESERVE if sys.platform == "linux" else 0)
    try:
        pages = mmap.mmap(-1, num_bytes, flags=flags)
    except OSError as error:
        raise MemoryError(f"the system does not allocate {num_bytes} bytes ({error.strerror})") from None
    data = torch.frombuffer(pages, dtype=torch.uint8)
    _advise_huge_pages(data)
    return data


def _advise_huge_pages(data: Tensor) -> None:
    start = -(-data.data_ptr() // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    length = (data.data_ptr() + data.nbytes - start) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    if data.device.type == "cpu" and length > 0 and sys.platform == "linux":
        # Advice only: without it everything works, on small pages.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_HUGEPAGE)
