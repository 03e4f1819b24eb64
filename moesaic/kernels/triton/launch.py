"""What a launch needs to know of the device."""

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

# Of an H100, where nothing is known: under Triton's interpreter.
_MULTIPROCESSORS, _SHARED_BYTES = 132, 227 << 10


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be that of x."""
    return torch.cuda.device(x.device) if torch.cuda.device_count() > 1 else nullcontext()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return how many programs run side by side at least."""
    if not torch.cuda.device_count():
        return _MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def shared_bytes(device: torch.device) -> int:
    """Return the shared memory that one program may have."""
    if not torch.cuda.device_count():
        return _SHARED_BYTES
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 64 << 10)


def stages(tile_bytes: int, device: torch.device) -> int:
    """Return how many tiles of a loop are on their way at once: what shared memory has room for, at most four."""
    return max(1, min(4, shared_bytes(device) // max(1, tile_bytes)))


def power_of_two(count: int) -> int:
    """Return the smallest power of two that is not below count."""
    return triton.next_power_of_2(max(1, count))
