"""What the control groups that this process is in, a container's say, leave it of the machine. Imports no torch."""

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

_OWN_GROUPS, _GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def usable_processors() -> int:
    """Return how many threads can run at once: the processors that are allowed, or a container's share of their time.

    A quota of 2.5 processors is three threads: two would leave a fifth of it, three wait for a sixth of the time.
    """
    return max(1, min([allowed_processors(), *map(math.ceil, _processor_quotas())]))


def allowed_processors() -> int:
    """Return how many processors this process may run on, whatever its share of their time is."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_limit_bytes() -> int | None:
    """Return the least memory that a control group of this process may have, None where none is limited."""
    return min((limit for _, limit, _ in _memory_limits()), default=None)


def memory_room_bytes() -> int | None:
    """Return what the memory limits leave now, None where there are none.

    Files in the page cache make room whether or not they were read twice, as in MemAvailable.
    """
    room = []
    for folder, limit, version in _memory_limits():
        used = read_text(folder / ("memory.current" if version == 2 else "memory.usage_in_bytes")).strip()
        if used.isdigit():
            name = ("" if version == 2 else "total_") + r"(?:in)?active_file"
            cached = re.findall(rf"^{name} (\d+)", read_text(folder / "memory.stat"), re.MULTILINE)
            room.append(max(0, limit - int(used) + sum(map(int, cached))))
    return min(room, default=None)


def read_text(path: Path) -> str:
    """Return a file of the kernel's, or nothing where this system does not have it."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _processor_quotas() -> Iterator[float]:
    """Yield each limit on processor time, in processors."""
    for folder, version in _folders("cpu"):
        if version == 2:
            quota, _, period = read_text(folder / "cpu.max").strip().partition(" ")
        else:
            quota, period = (read_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
        if quota.isdigit() and period.isdigit() and int(period):  # "max" and -1 are none
            yield int(quota) / int(period)


def _memory_limits() -> Iterator[tuple[Path, int, int]]:
    """Yield (folder, limit in bytes, version) of each group whose memory is limited."""
    for folder, version in _folders("memory"):
        limit = read_text(folder / ("memory.max" if version == 2 else "memory.limit_in_bytes")).strip()
        # Version 1 writes the largest number of pages for "none".
        if limit.isdigit() and int(limit) < 1 << 60:
            yield folder, int(limit), version


def _folders(controller: str) -> Iterator[tuple[Path, int]]:
    """Yield (folder, version) of the groups, this process's and those around it, that may limit what is controlled."""
    names = {(_GROUPS, 2): "", (_GROUPS / "unified", 2): "", (_GROUPS / controller, 1): ""}
    for line in read_text(_OWN_GROUPS).splitlines():
        number, _, rest = line.partition(":")
        controllers, _, name = rest.partition(":")
        if number == "0" and not controllers:
            names |= {(_GROUPS, 2): name, (_GROUPS / "unified", 2): name}
        elif controller in controllers.split(","):
            names |= {(_GROUPS / controller, 1): name, (_GROUPS / controllers, 1): name}
    for (root, version), name in names.items():
        # In a container the name may be the host's, and the container's own group stands at the root.
        inner = root / name.lstrip("/")
        folders = {root, inner, *(parent for parent in inner.parents if parent.is_relative_to(root))}
        yield from ((folder, version) for folder in sorted(folders))
