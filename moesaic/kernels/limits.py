"""What this machine can do at most: its memory bandwidth and matrix rates, measured, and what its CPU has.

Limits are the yardstick of every "share of the limit". They are measured, once per machine, never assumed from a name:
with our own C++ where it runs (source/limits.cpp: plain reads of huge pages, products that never leave the registers or
tiles) and with torch's operations, and the better of the two is the limit.
What an operation must move or do, and how near to the limit it comes, is not here (bench/ and plan/).
"""

import hashlib
import json
import math
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from moesaic.control_groups import memory_room_bytes, read_text, usable_processors
from moesaic.errors import DeviceError
from moesaic.folders import load_json
from moesaic.logs import logger

if TYPE_CHECKING:
    import torch

    from moesaic.kernels.cpu.build import Library

# Square matrices, from small (a machine without bf16 instructions must not stall) to what a GPU needs to fill up.
_CPU_SIZES = (512, 1024, 2048, 4096)
_CUDA_SIZES = (1024, 2048, 4096, 8192)
# What part of the time torch gets for reading memory, bf16, fp32 and int8 products, and our own C++ for the same.
_TORCH_SHARES = (0.15, 0.30, 0.20, 0.10)
_NATIVE_SHARES = (0.10, 0.05, 0.05, 0.05)
# Counts the ways in which the rates have been measured: those of an earlier one do not stand beside these.
_METHOD = 3
# Below this share of the processor's time a measurement says more about the other programs than about the machine.
_UNDISTURBED_SHARE = 0.8
_SMALLEST_BUFFER_BYTES = 512 << 20
_LARGEST_BUFFER_BYTES = 2 << 30
# What one task of the C++ reads.
_READ_BLOCK_BYTES = 4 << 20
# A call of the C++ lasts at least this long, so that starting the threads does not count.
_SHORTEST_CALL_SECONDS = 2e-3

# Names as /proc/cpuinfo spells them (x86 flags, Arm features): what matters for matrix and vector work, in this order.
_INSTRUCTION_SETS = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "avx_vnni",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "amx_fp16",
    "asimd",
    "sve",
    "sve2",
    "bf16",
    "i8mm",
)
_BF16_INSTRUCTION_SETS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The best rates that were reached on one device, and beside them what torch alone reached.

    kernels: the instruction set of the C++ that took part, "reference" where torch was alone. buffer_bytes: the memory
    that was read for the bandwidth.
    Units: bytes per second of reading memory; operations per second of products, a multiplication and an addition
    being two. int8 is None where there is no product of bytes (some GPUs).
    """

    device: str
    name: str
    threads: int
    torch_version: str
    kernels: str
    buffer_bytes: int
    bandwidth_bytes_per_second: float
    bf16_flops_per_second: float
    fp32_flops_per_second: float
    int8_operations_per_second: float | None
    torch_bandwidth_bytes_per_second: float
    torch_bf16_flops_per_second: float
    torch_fp32_flops_per_second: float
    torch_int8_operations_per_second: float | None


@dataclass(frozen=True, kw_only=True)
class Cpu:
    """The processor: cores are physical ones (None where unknown), usable_threads what this process may run at once."""

    model: str
    cores: int | None
    logical_cores: int
    usable_threads: int
    instruction_sets: tuple[str, ...]

    @property
    def has_bf16(self) -> bool:
        """Whether products of bf16 have instructions of their own; without them fp32 is usually faster."""
        return bool(_BF16_INSTRUCTION_SETS.intersection(self.instruction_sets))


def measure_limits(
    *, device: str = "cpu", seconds: float = 1.5, reuse: bool = True, folder: Path | None = None
) -> Limits:
    """Return the limits of a device ("cpu", "cuda" or "cuda:1"): an earlier measurement's, or measured now.

    A measurement takes about `seconds` (twice that on a busy machine) and up to 2 GiB. It is kept in folder (the user's
    cache folder) per processor, number of threads, version of torch and instruction set of the C++ kernels; one that
    other programs disturbed is not kept, and says so. With reuse=False it is measured again, and the better of the
    earlier and the new rates stand: load can only make a limit look lower than it is.

    Raises: DeviceError for a device that torch does not have here, or kernels that cannot be had.
    """
    import torch

    _check_device(device)
    identity = _identity(device)
    path = _kept_at(folder, identity)
    earlier = None if path is None else _read(path, identity)
    if earlier is not None and reuse:
        return earlier
    with torch.inference_mode():
        measured = _measure(device, seconds)
        rates = measured.rates
        if measured.processor_share < _UNDISTURBED_SHARE:
            measured = _measure(device, seconds)
            rates = _better(rates, measured.rates)
    if earlier is not None:
        rates = _better(rates, {name: getattr(earlier, name) for name in rates})
    limits = Limits(
        device=str(identity["device"]),
        name=str(identity["name"]),
        threads=int(identity["threads"]),
        torch_version=str(identity["torch_version"]),
        kernels=str(identity["kernels"]),
        buffer_bytes=measured.buffer_bytes,
        **rates,  # type: ignore[arg-type]  # None for int8 only
    )
    if measured.processor_share < _UNDISTURBED_SHARE:
        logger.warning(
            f"the machine is busy: moesaic had {measured.processor_share:.0%} of the processor while it measured the "
            "machine's limits, so they may be too low and are not kept; `moesaic doctor --measure` measures them when "
            "the machine is quiet"
        )
    elif path is not None:
        _write(path, limits)
    return limits


def _kept_at(folder: Path | None, identity: dict[str, str | int]) -> Path | None:
    """Return where the limits of this machine are kept, None for a user who has no folder for them."""
    try:
        return (folder or cache_folder()) / f"limits-{_digest(identity | {'method': _METHOD})}.json"
    except DeviceError as error:
        logger.warning("the machine's limits are measured every time: %s", error)
        return None


def describe_cpu() -> Cpu:
    """Return what the operating system and torch say about this machine's processor."""
    text = read_text(Path("/proc/cpuinfo"))
    logical = os.cpu_count() or 1
    named = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return Cpu(
        model=named.group(1).strip() if named else platform.processor() or platform.machine() or "unknown",
        cores=physical_cores(text),
        logical_cores=logical,
        usable_threads=usable_processors(),
        instruction_sets=_instruction_sets(text),
    )


def cache_folder() -> Path:
    """Return the folder for what moesaic may keep between runs and can make anew: the platform's user cache.

    Raises: DeviceError when nothing names one.
    """
    variable, in_home = {
        "win32": ("LOCALAPPDATA", "AppData/Local"),
        "darwin": (None, "Library/Caches"),
    }.get(sys.platform, ("XDG_CACHE_HOME", ".cache"))
    if variable is not None and (named := os.environ.get(variable)):
        return Path(named) / "moesaic"
    try:
        return Path.home() / in_home / "moesaic"
    except RuntimeError as error:
        raise DeviceError(
            "this user has no home folder, where moesaic keeps what it compiles and measures; one that can be "
            f"written is required; name it with {variable or 'HOME'}."
        ) from error


def _check_device(device: str) -> None:
    import torch

    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise DeviceError(f"device {device!r} has no limits to measure; cpu, cuda or cuda:N is required; use cpu.")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"device {device!r} is not on this machine; torch sees {torch.cuda.device_count()} CUDA devices; use cpu, "
            "or see what `moesaic doctor` says."
        )


def _identity(device: str) -> dict[str, str | int]:
    """Return what a measurement holds for; a difference in any of these makes it another measurement."""
    import torch

    from moesaic.kernels.select import REFERENCE, cpu_kernels

    if device.startswith("cuda"):
        name, threads, kernels = torch.cuda.get_device_name(device), 0, REFERENCE
    else:
        cpu = describe_cpu()
        name, threads = f"{cpu.model} ({' '.join(cpu.instruction_sets)})", torch.get_num_threads()
        kernels = cpu_kernels().name
    return {
        "device": device.partition(":")[0],
        "name": name,
        "threads": threads,
        "torch_version": torch.__version__,
        "kernels": kernels,
    }


def _digest(identity: dict[str, str | int]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _read(path: Path, identity: dict[str, str | int]) -> Limits | None:
    """Return an earlier measurement; a file that cannot be one is said and measured anew."""
    try:
        values = load_json(path)
        if not isinstance(values, dict) or set(values) != {field.name for field in fields(Limits)}:
            raise ValueError("its keys are not those of a measurement")
        for key, value in values.items():
            if key in identity and value != identity[key]:
                raise ValueError(f"its {key} is {value!r}")
            if key not in identity and not _is_plausible(key, value):
                raise ValueError(f"its {key} is {value!r}")
        return Limits(**values)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning(f"{path} is not a measurement of this machine ({error}); measuring again")
        return None


def _write(path: Path, limits: Limits) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Another process may write the same file: each its own, the last rename stands.
        part = path.with_suffix(f".{os.getpid()}.part")
        try:
            part.write_text(json.dumps(asdict(limits), indent=2) + "\n", encoding="utf-8")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        logger.warning(f"the measured limits could not be kept in {path} ({error}); the next run measures them again")


def _is_plausible(key: str, value: object) -> bool:
    if value is None:
        return key in ("int8_operations_per_second", "torch_int8_operations_per_second")
    kind = int if key == "buffer_bytes" else float
    return type(value) is kind and 0 < value < math.inf


@dataclass(frozen=True)
class _Measurement:
    """The rates by their names in Limits, and the smallest share of the processor that one on all threads had."""

    rates: dict[str, float | None]
    buffer_bytes: int
    processor_share: float


@dataclass(frozen=True)
class _Rate:
    """Bytes or operations per second; None where there is no such operation."""

    per_second: float | None
    processor_share: float


def _best(rates: Iterable[float | None]) -> float | None:
    return max((rate for rate in rates if rate is not None), default=None)


def _better(first: dict[str, float | None], second: dict[str, float | None]) -> dict[str, float | None]:
    return {name: _best((first[name], second[name])) for name in first}


def _measure(device: str, seconds: float) -> _Measurement:
    import torch

    from moesaic.kernels import products
    from moesaic.kernels.select import cpu_library

    bandwidth, bf16, fp32, int8 = (seconds * share for share in _TORCH_SHARES)
    buffer = streamed_buffer(device)
    by_torch = {
        "bandwidth_bytes_per_second": _measure_sum(buffer, bandwidth),
        "bf16_flops_per_second": _measure_products(device, torch.bfloat16, seconds=bf16),
        "fp32_flops_per_second": _measure_products(device, torch.float32, seconds=fp32),
        "int8_operations_per_second": _measure_byte_products(device, seconds=int8),
    }
    library = None if device.startswith("cuda") else cpu_library()
    by_kernels = {} if library is None else _measure_kernels(library, buffer, seconds)
    on_all_threads = by_torch.copy()
    # Where torch has no bf16 products worth the name, those and its products of bytes take one thread.
    if products.is_widened(torch.device(device), torch.bfloat16):
        del on_all_threads["bf16_flops_per_second"], on_all_threads["int8_operations_per_second"]
    return _Measurement(
        rates={
            **{
                name: _best(source[name].per_second for source in (by_torch, by_kernels) if name in source)
                for name in by_torch
            },
            **{f"torch_{name}": rate.per_second for name, rate in by_torch.items()},
        },
        buffer_bytes=buffer.nbytes,
        processor_share=min(rate.processor_share for rate in (*on_all_threads.values(), *by_kernels.values())),
    )


def streamed_buffer(device: str) -> "torch.Tensor":
    """Return fp32 ones, more than the caches hold, on the CPU in huge pages of their own."""
    import torch

    from moesaic.kernels.huge_pages import zeros_on_huge_pages

    if device.startswith("cuda"):
        size = min(_LARGEST_BUFFER_BYTES, torch.cuda.mem_get_info(device)[0] // 8)
        return torch.ones(max(size // 4, 1), dtype=torch.float32, device=device)  # (size / 4,) fp32
    wanted = max(_SMALLEST_BUFFER_BYTES, 4 * _last_level_cache_bytes())
    blocks = min(wanted, _LARGEST_BUFFER_BYTES, available_memory_bytes() // 8) // _READ_BLOCK_BYTES
    pages = zeros_on_huge_pages(max(blocks, 1) * _READ_BLOCK_BYTES, torch.device("cpu"))
    return pages.view(torch.float32).fill_(1.0)  # untouched, they would all be one page of zeros


def _measure_sum(buffer: "torch.Tensor", seconds: float) -> _Rate:
    """Time summing fp32 numbers: the fastest read that torch has."""
    timing = _time(buffer.sum, device=str(buffer.device), seconds=seconds)
    return _Rate(buffer.nbytes / timing.fastest_seconds, timing.processor_share)


def _measure_byte_products(device: str, *, seconds: float) -> _Rate:
    import torch

    try:
        return _measure_products(device, torch.int8, seconds=seconds)
    except RuntimeError:  # a GPU whose library has none
        return _Rate(None, 1.0)


def _measure_products(device: str, dtype: "torch.dtype", *, seconds: float) -> _Rate:
    """Time square products: the sizes that the time allows, then the best of them again."""
    import torch

    sizes = _CUDA_SIZES if device.startswith("cuda") else _CPU_SIZES
    end = time.perf_counter() + seconds
    best, best_call, best_size, predicted = 0.0, None, 0, 0.0
    for size in sizes:
        # Making the matrices, one run to warm up and two to time.
        if best and 4 * predicted > end - time.perf_counter():
            break
        left, right = (
            torch.randn(size, size, dtype=torch.float32, device=device).to(dtype) for _ in range(2)
        )  # (size, size)
        multiply, sums = (torch._int_mm, torch.int32) if dtype == torch.int8 else (torch.mm, dtype)
        call = partial(multiply, left, right, out=torch.empty_like(left, dtype=sums))
        timing = _time(call, device=device, seconds=seconds / (2 * len(sizes)))
        predicted = 8 * timing.fastest_seconds
        if 2 * size**3 / timing.fastest_seconds > best:
            best, best_call, best_size = 2 * size**3 / timing.fastest_seconds, call, size
    assert best_call is not None, sizes
    timing = _time(best_call, device=device, seconds=end - time.perf_counter())
    return _Rate(max(best, 2 * best_size**3 / timing.fastest_seconds), timing.processor_share)


def _measure_kernels(library: "Library", buffer: "torch.Tensor", seconds: float) -> dict[str, _Rate]:
    """Time source/limits.cpp."""
    bandwidth, *products = (seconds * share for share in _NATIVE_SHARES)
    read = library.function("moesaic_limit_read", "pi")
    timing = _time(lambda: read(buffer.data_ptr(), buffer.nbytes), device="cpu", seconds=bandwidth)
    rates = {"bandwidth_bytes_per_second": _Rate(buffer.nbytes / timing.fastest_seconds, timing.processor_share)}
    names = ("bf16_flops", "fp32_flops", "int8_operations")
    for name, duration in zip(names, products, strict=True):
        function = library.function(f"moesaic_limit_{name.partition('_')[0]}", "i")
        rounds = 1
        # By the shorter of two calls at least: a single one may have been long for another program's sake.
        while _time(partial(function, rounds), device="cpu", seconds=0.0).fastest_seconds < _SHORTEST_CALL_SECONDS:
            rounds *= 2
        operations = function(rounds)
        timing = _time(partial(function, rounds), device="cpu", seconds=duration)
        rates[f"{name}_per_second"] = _Rate(operations / timing.fastest_seconds, timing.processor_share)
    return rates


@dataclass(frozen=True)
class _Timing:
    """The shortest call, and the share of the threads' time that the process really ran (1 for a GPU)."""

    fastest_seconds: float
    processor_share: float


def _time(call: Callable[[], object], *, device: str, seconds: float) -> _Timing:
    """Time at least two calls, repeated for about `seconds`, after one to warm up."""
    import torch

    is_cuda = device.startswith("cuda")

    def wait() -> None:
        if is_cuda:
            torch.cuda.synchronize(device)

    call()
    wait()
    times: list[float] = []
    start, processor_start = time.perf_counter(), time.process_time()
    now = start
    while len(times) < 2 or now < start + seconds:
        before = time.perf_counter()
        call()
        wait()
        now = time.perf_counter()
        times.append(now - before)
    threads = min(torch.get_num_threads(), describe_cpu().usable_threads)
    processor_share = (time.process_time() - processor_start) / (max(now - start, 1e-9) * threads)
    return _Timing(min(times), 1.0 if is_cuda else min(processor_share, 1.0))


def _last_level_cache_bytes() -> int:
    text = read_text(Path("/sys/devices/system/cpu/cpu0/cache/index3/size")).strip()
    match = re.fullmatch(r"(\d+)([KMG]?)", text)
    return int(match.group(1)) << {"": 0, "K": 10, "M": 20, "G": 30}[match.group(2)] if match else 0


def available_memory_bytes(device: "torch.device | None" = None) -> int:
    """Return what can be allocated now without swapping; 4 GiB where the system does not say.

    The limits of the process's control groups, as of a container, count. On a GPU: of its own.
    """
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    match = re.search(r"^MemAvailable:\s*(\d+) kB", read_text(Path("/proc/meminfo")), re.MULTILINE)
    available = int(match.group(1)) << 10 if match else 4 << 30
    room = memory_room_bytes()
    return available if room is None else min(available, room)


def physical_cores(cpuinfo: str) -> int | None:
    """Return how many cores the text of /proc/cpuinfo has, None where it does not say."""
    cores = set()
    for block in cpuinfo.split("\n\n"):
        ids = dict(re.findall(r"^(physical id|core id)\s*:\s*(\d+)$", block, re.MULTILINE))
        if "core id" in ids:
            cores.add((ids.get("physical id", "0"), ids["core id"]))
    return len(cores) or None


def _instruction_sets(cpuinfo: str) -> tuple[str, ...]:
    line = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    if line:
        flags = set(line.group(1).split())
        return tuple(name for name in _INSTRUCTION_SETS if name in flags)
    # No /proc (macOS, Windows): torch knows at least which of its own kernels it chose.
    import torch

    capability = torch.backends.cpu.get_cpu_capability().lower()
    return {"default": (), "no avx": (), "avx512": ("avx2", "fma", "avx512f"), "avx2": ("avx2", "fma")}.get(
        capability, (capability,)
    )
