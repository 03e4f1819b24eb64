"""The remedy for page faults of large CPU allocations: keep freed blocks in the process, on huge pages.

glibc gives a large block back to the kernel when it is freed, so every training step faults its activations in again,
4 KiB at a time, each page zeroed by the kernel. The remedy is two mallopt settings (no block is mmapped on its own, the
heap is never trimmed) and huge pages for the heap. It is part of the program, so that no user needs to know of it.
What lives here is this process's malloc; torch and the GPU's caching allocator are not touched, nor even imported.

Measured on 2 cores of an AMD EPYC VM (glibc 2.41, Linux 6.18, torch 2.13, huge pages "madvise"), medians in ms over the
undisturbed ones of 3 to 5 runs. (1) x + y of 32 MiB fp32; (2) SiLU, GELU and products, forward and backward;
(3) three MLPs and a cross-entropy over 8192 tokens, bf16 autocast, forward and backward; then page faults, peak MB:

    |                                   | (1)       | (2)       | (3)       | faults | peak MB     |
    | glibc's defaults                  | 8.7 - 9.8 | 146 - 167 | 426 - 467 | 4.1 M  | 986 - 1010  |
    | huge pages alone (GLIBC_TUNABLES) | 2.5 - 3.8 | 50 - 66   | 267 - 316 | 0.20 M | 987 - 1005  |
    | the two mallopt settings          | 1.2 - 3.1 | 29 - 47   | 221 - 276 | 0.27 M | 1126 - 1175 |
    | tune_allocator                    | 1.8 - 2.9 | 28 - 45   | 217 - 242 | 0.02 M | 1119 - 1176 |
    | the same by environment           | 1.0 - 2.2 | 28 - 31   | 236 - 241 | 0.02 M | 1138 - 1177 |

Choices. M_MMAP_MAX = 0 rather than a large M_MMAP_THRESHOLD: as fast, no limit of 2 GiB - 1 on a block, and older glibc
(before about 2.35) refuses thresholds above 32 MiB. No M_TOP_PAD: without trimming it gained nothing. Trimming is off,
so the peak stays resident (13 to 18 % above the default's peak here, by fragmentation); `malloc_trim(0)` still gives
memory back. Threads other than the main one map blocks beyond 64 MiB whatever is set; autograd's backward on the CPU
runs in the thread that called it, so training in the main thread has the full benefit. madvise on single tensors gained
PyTorch's products nothing (a matrix-vector product over 512 MiB: 24.0 GB/s without, 23.7 with it); packed weights and
the key/value cache ask for it themselves.
"""

import ctypes
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moesaic.kernels.limits import available_memory_bytes

# Numbers of <malloc.h> and <sys/mman.h>; they are part of glibc's and Linux's ABI.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_MADV_HUGEPAGE = 14
# Of the heap, what torch and the like take as they are loaded: small objects, which gain nothing from huge pages. In a
# virtual machine that gives its free memory back to the host those are dear at first: 20 ms each instead of 0.3.
_MODULES_BYTES = 128 << 20

# A user who sets this, to any value, keeps malloc as it is.
MARKER = "MOESAIC_ALLOCATOR"
# What a user may have set on purpose; any of them means that the allocator is his.
_USER_VARIABLES = (
    "MALLOC_MMAP_MAX_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "MALLOC_ARENA_MAX",
)
_USER_TUNABLES = ("mmap_max", "mmap_threshold", "trim_threshold", "top_pad")


@dataclass(frozen=True)
class AllocatorReport:
    """What `tune_allocator` did.

    is_tuned: freed large blocks stay in the process, by what was done here.
    applied, refused: settings that took effect, and those that could not, each with its reason.
    huge_page_bytes: heap reserved for huge pages; address space only, no memory until it is used.
    explanation: one sentence for people.
    """

    is_tuned: bool
    applied: tuple[str, ...]
    refused: tuple[str, ...]
    huge_page_bytes: int
    explanation: str


def tune_allocator() -> AllocatorReport:
    """Keep freed large blocks in this process and put its heap on huge pages; calling it again changes little.

    What it left on small pages for modules that were to come is on huge ones then, as far as it is free. For library
    users and the command line alike; the earlier the better, since blocks that exist stay as they are. On musl, macOS
    and Windows, and where the user has configured malloc himself, it does nothing and says so.
    """
    obstacle = _obstacle(os.environ)
    if obstacle:
        return AllocatorReport(False, (), (), 0, obstacle)
    libc = _libc()
    applied, refused = [], []
    for name, parameter, value in (("M_MMAP_MAX", _M_MMAP_MAX, 0), ("M_TRIM_THRESHOLD", _M_TRIM_THRESHOLD, -1)):
        if libc.mallopt(parameter, value) == 1:
            applied.append(f"{name}={value}")
        else:
            refused.append(f"{name}={value}: mallopt refused it")
    huge_page_bytes, reason = (0, "the mallopt settings were refused") if refused else _reserve_huge_pages(libc)
    if huge_page_bytes:
        applied.append(f"huge pages for the next {huge_page_bytes / 2**30:.1f} GiB of heap")
    else:
        refused.append(f"huge pages: {reason}")
    is_tuned = "M_MMAP_MAX=0" in applied
    explanation = f"malloc set by moesaic: {', '.join(applied) or 'nothing'}"
    return AllocatorReport(is_tuned, tuple(applied), tuple(refused), huge_page_bytes, explanation)


def give_back_freed_memory() -> None:
    """Give what has been freed back to the system, tuned or not; without glibc nothing is done.

    For after something large that does not come again, such as packing a model; it is faulted in anew when needed, and
    what tune_allocator reserved on huge pages at the heap's end is on small ones then.
    """
    if glibc_version() is not None and _foreign_malloc() is None:
        _libc().malloc_trim(0)


def large_blocks_stay() -> bool | None:
    """Return whether a freed block of 64 MiB stays in this process, or None where that cannot be seen.

    Seen from where malloc places such a block, in the heap or in a mapping of its own, and from whether the heap
    reaches as far once it is freed. Ask in the main thread.
    """
    if glibc_version() is None or _foreign_malloc() is not None:
        return None
    libc, size = _libc(), 64 << 20
    block = libc.malloc(size)
    if not block:
        return None
    libc.free(block)
    heap = _heap_range()
    return heap is not None and heap[0] <= block and block + size <= heap[1]


def glibc_version() -> str | None:
    """Return for example "2.41", or None where the C library is not glibc (musl, macOS, Windows)."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        text = os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (ValueError, OSError):  # musl does not know the name
        return None
    name, _, version = text.partition(" ")
    return version if name == "glibc" else None


def huge_pages_mode() -> str | None:
    """Return the kernel's mode of transparent huge pages: "always", "madvise" or "never"; None where it has none."""
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(encoding="ascii")
    except OSError:
        return None
    _, bracket, rest = text.partition("[")
    return rest.partition("]")[0] if bracket else None


def _obstacle(environment: Mapping[str, str]) -> str | None:
    """Return why malloc should not be tuned by us, or None."""
    if glibc_version() is None:
        return f"malloc left as it is: the remedy is for glibc on Linux (this is {sys.platform}, without glibc)"
    if MARKER in environment:
        return f"malloc left as it is: {MARKER}={environment[MARKER]} opts out"
    own = [name for name in _USER_VARIABLES if name in environment]
    own += [
        f"GLIBC_TUNABLES glibc.malloc.{name}"
        for name in _USER_TUNABLES
        if f"glibc.malloc.{name}=" in environment.get("GLIBC_TUNABLES", "")
    ]
    if own:
        return f"malloc left as you set it ({', '.join(own)})"
    foreign = _foreign_malloc()
    if foreign:
        return f"malloc left as it is: {foreign} replaces glibc's allocator"
    return None


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.mallopt.argtypes = [ctypes.c_int, ctypes.c_int]
    return libc


def _foreign_malloc() -> str | None:
    """Return the allocator that is preloaded in front of glibc's, as LD_PRELOAD names it, or None."""
    try:
        glibc = ctypes.CDLL("libc.so.6")
    except OSError:
        return None
    in_use = ctypes.cast(ctypes.CDLL(None).malloc, ctypes.c_void_p).value
    own = ctypes.cast(glibc.malloc, ctypes.c_void_p).value
    return None if in_use == own else os.environ.get("LD_PRELOAD", "") or "another library"


def _heap_range() -> tuple[int, int] | None:
    """Return the addresses of the main heap; parts of it with different advice are separate lines of the map."""
    starts, ends = [], []
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        if line.endswith("[heap]"):
            start, _, end = line.split(" ", 1)[0].partition("-")
            starts.append(int(start, 16))
            ends.append(int(end, 16))
    return (min(starts), max(ends)) if starts else None


def _reserve_huge_pages(libc: ctypes.CDLL) -> tuple[int, str]:
    """Grow the heap's address space by half of the free memory and ask for huge pages there, behind what torch takes
    where it is yet to be loaded.

    Returns the bytes reserved and, when there are none, the reason. The block is freed at once and, trimming being off,
    stays in the heap, where later blocks are cut from it; its pages cost memory only when they are first written.
    """
    mode = huge_pages_mode()
    if mode != "madvise":
        return 0, {"always": "on for the whole process already", None: "this kernel has none"}.get(
            mode, f"switched off by the kernel (transparent_hugepage/enabled is {mode})"
        )
    if _overcommit_mode() == 2:
        # Strict accounting would charge the reservation to everybody at once.
        return 0, "vm.overcommit_memory is 2, where a reservation would count as memory"
    if _address_space_is_limited():
        return 0, "the process's address space is limited (ulimit -v), and a reservation would take much of it"
    page = _huge_page_bytes()
    size = available_memory_bytes() // 2 // page * page
    modules = 0 if "torch" in sys.modules else _MODULES_BYTES
    block = libc.malloc(modules + size) if size else None
    if not block:
        return 0, f"malloc gave no {(modules + size) / 2**30:.1f} GiB of address space (ulimit -v?)"
    start = -(-(block + modules) // page) * page
    length = (block + modules + size) // page * page - start
    heap = _heap_range()
    in_heap = heap is not None and heap[0] <= block < heap[1]
    refused = not in_heap or libc.madvise(start, length, _MADV_HUGEPAGE) != 0
    libc.free(block)
    if not in_heap:
        return 0, "the heap does not grow in this thread; call tune_allocator in the main thread"
    return (0, "madvise refused them") if refused else (length, "")


def _address_space_is_limited() -> bool:
    import resource  # Linux alone gets here

    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


def _overcommit_mode() -> int:
    try:
        return int(Path("/proc/sys/vm/overcommit_memory").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0


def _huge_page_bytes() -> int:
    try:
        return int(Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 2 << 20
