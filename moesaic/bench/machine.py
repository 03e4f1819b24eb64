"""What this machine has, what moesaic makes of it, and what to do about what is missing.

Each part is asked of the operating system, of torch or of pip's records, never assumed, and nothing needs a network.
How fast the machine is, kernels/limits measures; how it is printed, cli/doctor says.
"""

import ast
import json
import os
import pkgutil
import platform
import re
import shlex
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.control_groups import memory_limit_bytes, memory_room_bytes, read_text
from moesaic.errors import DeviceError

if TYPE_CHECKING:
    from moesaic.kernels.cpu.build import Library

# `make quickstart` stays below this.
_QUICKSTART_BYTES = 2_500_000_000
# Modules of kernels/ that are not operations.
_NOT_OPERATIONS = {
    "addresses", "allocator", "cpu", "device", "finite", "gradient", "huge_pages", "limits", "mxfp4", "panels",
    "reference", "select", "threads", "tracing", "triton",
}  # fmt: skip
# A longer look than training's own takes.
_MEASURE_SECONDS = 8.0


def examine(*, measure: bool = False, build: bool = False, build_all: bool = False) -> dict[str, Any]:
    """Return everything that `moesaic doctor` prints, as JSON-able values.

    The CPU kernels are compiled where that has not been done; build does it for every instruction set of the machine,
    build_all for other machines' too.
    Its key problems is a list of {problem, remedy, is_fatal}; an empty one means that nothing needs doing.

    Raises: DeviceError when the kernels are to be built and cannot be.
    """
    from moesaic import __version__
    from moesaic.kernels.limits import describe_cpu

    cpu = describe_cpu()
    # Before torch allocates anything: the state that `moesaic train` will have.
    allocator = _examine_allocator()
    torch, cuda = _examine_torch()
    built = _build(everywhere=build_all) if (build or build_all) and torch["is_usable"] else []
    cpu_kernels, library = _examine_cpu_kernels() if torch["is_usable"] else (None, None)
    findings: dict[str, Any] = {
        "moesaic": {"version": __version__, "folder": str(Path(__file__).resolve().parents[1])},
        "python": {"version": platform.python_version(), "executable": sys.executable, "platform": platform.platform()},
        "torch": torch,
        "cpu": {
            "model": cpu.model,
            "cores": cpu.cores,
            "logical_cores": cpu.logical_cores,
            "usable_threads": cpu.usable_threads,
            "instruction_sets": list(cpu.instruction_sets),
            "has_bf16": cpu.has_bf16,
        },
        "memory": _examine_memory(),
        "allocator": allocator,
        "cuda": cuda,
        "compiler": _find_compiler(),
        "extras": _examine_extras(),
        "cpu_kernels": cpu_kernels,
        "built": built,
        "kernels": _examine_kernels(library),
        "limits": _measure(cuda, has_cpu=not cpu_kernels["error"]) if measure and cpu_kernels else [],
    }
    findings["problems"] = _find_problems(findings)
    return findings


def _examine_torch() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of torch's is missing
        return {"is_usable": False, "version": None, "build": None, "threads": None, "error": str(error)}, []
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    if torch.version.hip:
        build = f"ROCm {torch.version.hip}"
    from moesaic.kernels.select import cuda_kernels

    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        kernels = cuda_kernels(torch.device("cuda", index))
        devices.append(
            {
                "name": properties.name,
                "memory_bytes": properties.total_memory,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "kernels": kernels.name,
                "kernels_reason": kernels.reason,
            }
        )
    described = {
        "is_usable": True,
        "version": torch.__version__,
        "build": build,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "has_onednn": torch.backends.mkldnn.is_available(),
    }
    return described, devices


def _examine_memory() -> dict[str, int | None]:
    """Return bytes: of the machine, available to this process now, and the container's limit where there is one."""
    values = dict(re.findall(r"^(\w+):\s*(\d+) kB", read_text(Path("/proc/meminfo")), re.MULTILINE))
    total = int(values["MemTotal"]) << 10 if "MemTotal" in values else None
    if total is None and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = memory_limit_bytes()
    if limit is not None and total is not None and limit >= total:
        limit = None
    rooms = [int(values["MemAvailable"]) << 10] if "MemAvailable" in values else []
    if (room := memory_room_bytes()) is not None:
        rooms.append(room)
    return {"total_bytes": total, "available_bytes": min(rooms, default=None), "limit_bytes": limit}


def _examine_allocator() -> dict[str, Any]:
    from moesaic.kernels.allocator import glibc_version, huge_pages_mode, large_blocks_stay, tune_allocator

    report = tune_allocator()
    version = glibc_version()
    return {
        "library": f"glibc {version}" if version else "not glibc",
        "huge_pages": huge_pages_mode(),
        "is_tuned": report.is_tuned,
        "freed_blocks_stay": large_blocks_stay(),
        "huge_page_bytes": report.huge_page_bytes,
        "explanation": report.explanation,
        "refused": list(report.refused),
    }


def _find_compiler() -> dict[str, str] | None:
    """Return the compiler that builds the CPU kernels, and what it says of itself."""
    from moesaic.kernels.cpu.build import find_compiler

    command = find_compiler()
    if command is None:
        return None
    path = shlex.join(command)
    try:
        result = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"path": path, "version": f"does not start ({error})"}
    lines = (result.stdout or result.stderr).strip().splitlines()
    return {"path": path, "version": lines[0] if lines else "says no version"}


def _build(*, everywhere: bool) -> list[dict[str, Any]]:
    """Compile and try the kernels for every instruction set of this machine; return how long each took to compile.

    everywhere: then compile them for other x86 machines. error: what is wrong with those that do not load or fail their
    self-test, else None. is_tried: whether they have been, which those for other machines cannot be.
    Raises: DeviceError where they cannot be compiled.
    """
    from moesaic.kernels.cpu.build import BUILDS, build, load, supported_instruction_sets

    built: dict[str, dict[str, Any]] = {}
    for name in supported_instruction_sets():
        start = time.perf_counter()
        path = build(name)
        seconds, error = time.perf_counter() - start, None
        try:
            load(name)
        except DeviceError as failure:
            error = str(failure)
        built[str(path)] = {"instruction_set": name, "seconds": seconds, "error": error, "is_tried": True}
    for name, has_bf16 in BUILDS if everywhere and built else ():  # elsewhere than on x86 no compiler knows them
        start = time.perf_counter()
        path = build(name, has_bf16=has_bf16)
        seconds = time.perf_counter() - start
        built.setdefault(str(path), {"instruction_set": name, "seconds": seconds, "error": None, "is_tried": False})
    return [each | {"library": path} for path, each in built.items()]


def _examine_cpu_kernels() -> tuple[dict[str, Any], "Library | None"]:
    """Return what is chosen for CPU tensors and why, and the loaded library, None where PyTorch computes."""
    from moesaic.kernels.cpu.build import openmp_library, supported_instruction_sets
    from moesaic.kernels.limits import cache_folder
    from moesaic.kernels.select import cpu_kernels

    openmp = openmp_library()
    try:
        folder = cache_folder() / "kernels"
    except DeviceError:  # no home folder, which the error below or a build says
        folder = None
    described: dict[str, Any] = {
        "supported": supported_instruction_sets(),
        "name": None,
        "reason": None,
        "error": None,
        "library": None,
        "library_bytes": None,
        "has_passed_self_test": None,
        "openmp": str(openmp) if openmp else "the system's",
        "cache_folder": None if folder is None else str(folder),
    }
    library = None
    try:
        selection = cpu_kernels()
    except DeviceError as error:
        described["error"] = str(error)
    else:
        library = selection.library
        described.update(name=selection.name, reason=selection.reason)
        if library is not None:  # no library is handed out that has not passed
            size = library.path.stat().st_size
            described.update(library=str(library.path), library_bytes=size, has_passed_self_test=True)
    try:
        files = [path for path in (() if folder is None else folder.iterdir()) if path.is_file()]
        described["cache_bytes"] = sum(path.stat().st_size for path in files)
        described["cache_builds"] = sum(path.suffix == ".so" for path in files)
    except FileNotFoundError:  # nothing has been compiled
        described.update(cache_bytes=0, cache_builds=0)
    except OSError:  # it may not be entered, which a build says when it tries
        described.update(cache_bytes=None, cache_builds=None)
    return described, library


def _examine_extras() -> list[dict[str, Any]]:
    """Return moesaic's optional extras: the packages of each, the missing ones, and the command that brings them."""
    try:
        distribution = metadata.distribution("moesaic")
    except metadata.PackageNotFoundError:
        return []
    packages: dict[str, list[str]] = {name: [] for name in distribution.metadata.get_all("Provides-Extra") or []}
    for requirement in distribution.requires or []:
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)", requirement)
        name = re.match(r"[A-Za-z0-9._-]+", requirement)
        if extra and name and name.group() != "moesaic":
            packages.setdefault(extra.group(1), []).append(name.group())
    source = _editable_folder(distribution)
    return [
        {
            "name": extra,
            "packages": names,
            "missing": [name for name in names if not _is_installed(name)],
            "command": f"{sys.executable} -m pip install "
            + (f"-e '{source}[{extra}]'" if source else f"'moesaic[{extra}]'"),
        }
        # An extra that holds others may name a package several times.
        for extra, names in ((extra, list(dict.fromkeys(names))) for extra, names in packages.items())
    ]


def _editable_folder(distribution: metadata.Distribution) -> str | None:
    """Return the checkout that an editable installation points to; pip must be given the same one again."""
    record = json.loads(distribution.read_text("direct_url.json") or "{}")
    if not record.get("dir_info", {}).get("editable"):
        return None
    from urllib.parse import urlparse
    from urllib.request import url2pathname

    return url2pathname(urlparse(record["url"]).path)


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _examine_kernels(library: "Library | None") -> list[dict[str, str]]:
    """Return every operation of kernels/ and what computes it on CPU tensors.

    That is C++ where the operation's module names functions that the loaded library has; where a case is not theirs
    (an odd dtype, another device), PyTorch computes it there too.
    """
    import moesaic.kernels

    folder = Path(moesaic.kernels.__path__[0])
    names = sorted(module.name for module in pkgutil.iter_modules([str(folder)]))
    described = []
    for name in names:
        if name in _NOT_OPERATIONS:
            continue
        functions = _library_functions(folder, name)
        has_all = library is not None and functions and all(hasattr(library.handle, each) for each in functions)
        implementation = f"C++ for {library.instruction_set}" if library is not None and has_all else "PyTorch"
        described.append({"operation": name, "implementation": implementation})
    return described


def _library_functions(folder: Path, name: str) -> set[str]:
    """Return the C++ library's functions that a module of kernels/ names, or a module of cpu/ that it imports."""
    path = folder / f"{name.replace('.', '/')}.py"
    if not path.exists():
        return set()
    functions: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and re.fullmatch(r"moesaic_[a-z0-9_]+", str(node.value)):
            functions.add(str(node.value))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("moesaic.kernels.cpu"):
            base = (node.module or "").removeprefix("moesaic.kernels.")
            for module in (base, *(f"{base}.{alias.name}" for alias in node.names)):
                if module != "cpu.build":
                    functions |= _library_functions(folder, module)
    return functions


def _measure(cuda: list[dict[str, Any]], *, has_cpu: bool) -> list[dict[str, Any]]:
    from dataclasses import asdict

    from moesaic.kernels.limits import measure_limits

    devices = [*(["cpu"] if has_cpu else []), *(f"cuda:{index}" for index in range(len(cuda)))]
    return [
        {**asdict(measure_limits(device=device, seconds=_MEASURE_SECONDS, reuse=False)), "device": device}
        for device in devices
    ]


def _find_problems(findings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what is wrong, worst first, each with what to do."""
    from moesaic.report.quantities import counted

    torch, cpu, memory, allocator = (findings[key] for key in ("torch", "cpu", "memory", "allocator"))
    kernels = findings["cpu_kernels"]
    is_choice_ours = os.environ.get("MOESAIC_KERNELS", "") in ("", "auto")
    problems: list[dict[str, Any]] = []

    def add(problem: str, remedy: str, *, is_fatal: bool = False) -> None:
        problems.append({"problem": problem, "remedy": remedy, "is_fatal": is_fatal})

    if not torch["is_usable"]:
        add(
            f"torch cannot be imported: {torch['error']}",
            f"{sys.executable} -m pip install --force-reinstall torch (a CPU-only Linux machine can take the smaller "
            "build: add --index-url https://download.pytorch.org/whl/cpu)",
            is_fatal=True,
        )
    elif torch["build"] != "CPU" and not findings["cuda"]:
        add(
            f"torch is a {torch['build']} build and sees no GPU; training runs on the CPU",
            "where there should be one, see what nvidia-smi (or rocm-smi) says and whether CUDA_VISIBLE_DEVICES is "
            "empty; where there is none, nothing needs doing",
        )
    if torch["is_usable"] and torch["threads"] > cpu["usable_threads"]:
        add(
            f"torch uses {counted(torch['threads'], 'thread')} on {counted(cpu['usable_threads'], 'processor')}, "
            "which slows every operation",
            f"export OMP_NUM_THREADS={cpu['usable_threads']}",
        )
    elif (
        torch["is_usable"]
        and not findings["cuda"]
        and torch["threads"] < (cpu["cores"] or 1)
        and (torch["threads"] < cpu["usable_threads"])
    ):
        add(
            f"torch uses {counted(torch['threads'], 'thread')} of {counted(cpu['usable_threads'], 'processor')}",
            "unset OMP_NUM_THREADS and MKL_NUM_THREADS, unless that is meant",
        )
    if kernels and kernels["error"]:
        add(
            f"the CPU kernels that were asked for cannot be had: {kernels['error']}",
            "unset MOESAIC_KERNELS",
            is_fatal=True,
        )
    elif kernels and kernels["supported"] and not kernels["library"] and is_choice_ours:
        remedy = "see what `moesaic doctor --build` says"
        if kernels["cache_folder"] is None:
            remedy = "name a folder for them with XDG_CACHE_HOME; this user has no home folder"
        elif findings["compiler"] is None:
            remedy = "install a compiler (g++ 11 or later; apt install g++)"
        add(f"PyTorch's slower operations are used instead of the CPU kernels: {kernels['reason']}", remedy)
    elif is_choice_ours and kernels and kernels["library"] and kernels["name"] != kernels["supported"][0]:
        remedy = "see what `moesaic doctor --build` says"
        if findings["compiler"] is None:
            remedy = (
                "install a compiler (g++ 11 or later; apt install g++), or have the kernels compiled where this image "
                "is made (`moesaic doctor --build-all`)"
            )
        add(f"slower CPU kernels are used than this processor could: {kernels['name']}, {kernels['reason']}", remedy)
    for built in findings["built"]:
        if built["error"] is not None:
            add(
                f"the CPU kernels for {built['instruction_set']} were compiled and do not work: {built['error']}",
                "leave MOESAIC_KERNELS unset, which passes over them",
            )
    # Elsewhere than on Linux the processor's flags are not known well enough to say this.
    has_library = kernels and kernels["library"]
    if not findings["cuda"] and not cpu["has_bf16"] and not has_library and sys.platform.startswith("linux"):
        add(
            f"{cpu['model']} has no instructions for bf16, so training in bf16 may be slower than in fp32",
            "time a short run of either, and train with --set precision=fp32 where that is faster",
        )
    room = memory["available_bytes"]
    if room is not None and room < _QUICKSTART_BYTES:
        add(
            f"{gigabytes(room)} of memory are available; the quickstart takes up to {gigabytes(_QUICKSTART_BYTES)}",
            "close other programs, or raise the container's memory limit",
        )
    if allocator["freed_blocks_stay"] is False:
        add(
            f"large blocks are faulted in again at every step ({allocator['explanation']})",
            "unset MOESAIC_ALLOCATOR and the MALLOC_ and GLIBC_TUNABLES variables, unless they are meant",
        )
    elif allocator["is_tuned"] and allocator["huge_pages"] == "never":
        add(
            "the kernel's huge pages are switched off; reading weights is slower with small pages",
            "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
        )
    if not findings["extras"]:
        add(
            "moesaic runs from a folder and is not installed, so its extras cannot be listed",
            f"{sys.executable} -m pip install -e '{Path(findings['moesaic']['folder']).parent}'",
        )
    return sorted(problems, key=lambda each: not each["is_fatal"])


def gigabytes(size: int | None) -> str:
    """Return bytes in words."""
    return "unknown" if size is None else f"{size / 1e9:.1f} GB"
