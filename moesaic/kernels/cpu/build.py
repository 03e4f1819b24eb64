"""Compile the C++ kernels for this machine, once, and load them.

The sources are in the package. The first use compiles them with the machine's own compiler for one instruction set and
keeps the library in the user's cache folder under hashes of everything it depends on: one of the sources, the flags and
the OpenMP library of torch, whose threads the kernels use, and one of the compiler, so that what was built is found
where there is none. There is no Python or torch header in it: it compiles in seconds and one library serves every
Python. Which instruction set to use is decided in kernels/select.
"""

import ctypes
import errno
import functools
import hashlib
import itertools
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesaic.control_groups import usable_processors
from moesaic.errors import DeviceError
from moesaic.kernels.limits import cache_folder, describe_cpu
from moesaic.logs import logger

_SOURCE = Path(__file__).parent / "source"
# fp32 results must not depend on what a compiler likes to fuse.
_FLAGS = (
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-fno-math-errno",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
)
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mfma", "-mf16c", "-mavx2")
_KEPT_DAYS, _SCRATCH_KEPT_DAYS = 30, 1
_CHECKSUM = ".sha256"  # the suffix of the file beside a library or an object that says what it was when written
_NO_MEMORY = -(1 << 63)  # as source/export.h has it
_COMPILERS = ("c++", "g++", "clang++")
_VERSION_SECONDS = 30  # for `--version`, at every start: a mount that is dead, a wrapper that waits for a server

# What /proc/cpuinfo must name for an instruction set, the best first.
INSTRUCTION_SETS: dict[str, frozenset[str]] = {
    "amx": frozenset({"amx_tile", "amx_bf16", "amx_int8", "avx512f", "avx512_vnni", "avx512_bf16"}),
    "avx512": frozenset({"avx512f", "avx512_vnni"}),
    "avx2": frozenset({"avx2", "fma"}),
}
# What an image needs that is to run on any of these: (instruction set, whether with AVX-512's instructions for bf16).
BUILDS = (("amx", True), ("avx512", True), ("avx512", False), ("avx2", False))
# Not for users: what a machine does not have, in plain C++, so that tests reach it. The first are tiles beside the
# machine's own vectors; the others have vectors of AVX-512 too (emulated_avx512.h), and `make emulate` runs them.
EMULATED_TILES = "amx-emulated"
EMULATED: dict[str, tuple[str, ...]] = {
    EMULATED_TILES: ("-DMOESAIC_EMULATE_TILES",),
    "avx512-emulated": ("-DMOESAIC_EMULATE_AVX512",),
    "avx512-bf16-emulated": ("-DMOESAIC_EMULATE_AVX512", "-DMOESAIC_EMULATE_BF16"),
    "amx-avx512-emulated": ("-DMOESAIC_EMULATE_AVX512", "-DMOESAIC_EMULATE_BF16", "-DMOESAIC_EMULATE_TILES"),
}


@dataclass(frozen=True)
class Library:
    """A loaded set of kernels; num_threads is torch.get_num_threads."""

    instruction_set: str
    path: Path
    handle: ctypes.CDLL
    num_threads: Callable[[], int]

    def function(self, name: str, signature: str) -> Callable[..., int]:
        """Return an exported function taking what signature says: p pointer, i int64, f float, d double.

        It is to be called on the thread that asked for it, and raises MemoryError where it is refused memory.
        """
        # OpenMP counts for each thread apart, and torch tells it of torch.set_num_threads when a thread first asks.
        self.num_threads()
        return _function(self.handle, name, signature)


@functools.cache
def _function(handle: ctypes.CDLL, name: str, signature: str) -> Callable[..., int]:
    kinds: dict[str, Any] = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float, "d": ctypes.c_double}
    function = handle[name]  # a new object, not one shared through an attribute
    function.argtypes = [kinds[kind] for kind in signature]
    function.restype = ctypes.c_int64
    function.errcheck = _require_memory
    return function


def _require_memory(result: Any, function: Any, arguments: Any) -> Any:
    """Return what a function of the kernels returned."""
    if result == _NO_MEMORY:
        raise MemoryError(
            "the CPU kernels were refused the memory that they work in; room for it is required; use shorter or fewer "
            "sequences at a time, or raise the limit (ulimit -v, a container's)."
        )
    return result


def supported_instruction_sets() -> list[str]:
    """Return the instruction sets that this processor and operating system have, the best first."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return []
    found = set(describe_cpu().instruction_sets)
    return [name for name, needed in INSTRUCTION_SETS.items() if needed <= found]


def find_compiler() -> list[str] | None:
    """Return the command of a C++ compiler: what CXX says (a path, or words of a shell as "ccache g++"), else the first
    of the usual ones."""
    value = os.environ.get("CXX", "")
    try:
        named = [[value], shlex.split(value)] if value.strip() else [[name] for name in _COMPILERS]
    except ValueError:  # a quotation that does not end
        named = [[value]]
    return next(([path, *words[1:]] for words in named if (path := shutil.which(words[0]))), None)


def build(
    instruction_set: str,
    *,
    folder: Path | None = None,
    extra_flags: Sequence[str] = (),
    has_bf16: bool | None = None,
) -> Path:
    """Return the shared library for instruction_set, compiled now unless the cache folder has it.

    Without a compiler, or room: what any has built of the same sources. has_bf16: whether AVX-512's instructions for
    bf16 are used; None: where this processor has them.

    Raises: DeviceError without both, or with the compiler's message when it fails.
    """
    compiler = find_compiler() or []
    openmp = openmp_library()
    options = [word for word in compiler[1:] if word.startswith("-")]  # which make another library, as flags do
    flags = [*_FLAGS, *_instruction_flags(instruction_set, has_bf16), *extra_flags]
    included = (Path(path) for flag, path in itertools.pairwise(flags) if flag == "-include")
    common = _digest("\0".join([*flags, *options, *(path.read_text() for path in included)]).encode())
    sources = {source: common + _digest(_with_headers(source)) for source in sorted(_SOURCE.glob("*.cpp"))}
    folder = (folder or cache_folder()) / "kernels"
    stem = f"{instruction_set}-{_digest(''.join([str(openmp), *sources.values()]).encode())}"
    if not compiler:
        if (built := _built_before(folder, stem)) is not None:
            return built
        raise DeviceError(
            "the CPU kernels have to be compiled and there is no C++ compiler (c++, g++ or clang++, or what CXX names),"
            f" nor kernels in {folder}; one is required; install g++, have them compiled where this image is made "
            "(`moesaic doctor --build-all`), or go on with MOESAIC_KERNELS=reference."
        )
    try:
        version = _call([*compiler, "--version"], timeout_seconds=_VERSION_SECONDS).stdout
    except subprocess.TimeoutExpired:
        if (built := _built_before(folder, stem)) is not None:
            return built
        raise DeviceError(
            f"the C++ compiler {compiler[0]} did not say its version within {_VERSION_SECONDS} seconds; one that "
            "answers is required to compile the CPU kernels; name another with CXX, or go on with "
            "MOESAIC_KERNELS=reference."
        ) from None
    of_compiler = _digest("\0".join([*compiler, version]).encode())
    library = folder / f"{stem}-{of_compiler}.so"
    keys = {source: _digest((text + of_compiler).encode()) for source, text in sources.items()}
    try:
        if _is_whole(library):
            _mark_used(library)
            return library
        folder.mkdir(parents=True, exist_ok=True)
        return _compile(library, keys, instruction_set, [*compiler, *flags], openmp)
    except OSError as error:
        if (built := _built_before(folder, stem)) is not None:  # by another compiler, where nothing can be written
            return built
        raise DeviceError(
            f"the CPU kernels cannot be written to {folder} ({error.strerror or error}); a folder that can hold some "
            "megabytes is required; make room or name another with XDG_CACHE_HOME, or go on with "
            "MOESAIC_KERNELS=reference."
        ) from error


def _built_before(folder: Path, stem: str) -> Path | None:
    """Return the whole library of these sources that was used last, whichever compiler made it; None: there is none."""
    found: list[tuple[float, Path]] = []
    with suppress(OSError):  # a folder that may not be entered
        for path in folder.glob(f"{stem}-*.so"):
            with suppress(OSError):  # another user's
                if _is_whole(path):
                    found.append((path.stat().st_mtime, path))
    if not found:
        return None
    _, library = max(found)
    _mark_used(library)
    return library


def _mark_used(library: Path) -> None:
    """Note, once a day, that a library is used, which `_forget_old` goes by."""
    with suppress(OSError):  # another user's: who can delete them marks them too
        if library.stat().st_mtime < time.time() - 86400:
            for each in library.parent.glob(f"{library.stem}.*"):
                os.utime(each)


def _compile(
    library: Path, keys: dict[Path, str], instruction_set: str, command: list[str], openmp: Path | None
) -> Path:
    """Compile the sources that have no whole object file under their key yet, and link library; once at a time."""
    folder = library.parent
    with _alone(folder / f"{instruction_set}.lock"), tempfile.TemporaryDirectory(dir=folder) as scratch:
        if _is_whole(library):  # another process has built it while this one waited
            return library
        objects = {source: folder / f"{source.stem}-{instruction_set}-{key}.o" for source, key in keys.items()}
        if library.exists():
            logger.warning(f"{library} is not what was written there; compiling it again")
        # Some 60 to 70 s of one core's time (Emerald Rapids, g++ 12), shared by the cores there are.
        logger.info(f"compiling the CPU kernels for {instruction_set}: {len(keys)} files, once, about a minute")

        def compile_one(source: Path) -> Path:
            compiled = objects[source]
            if not _is_whole(compiled):
                part = Path(scratch) / compiled.name
                _run([*command, "-c", str(source)], part)
                _keep(part, compiled)
            return compiled

        with ThreadPoolExecutor(usable_processors()) as pool:
            inputs = list(pool.map(compile_one, keys))
        linked = Path(scratch) / library.name
        # Not by -Wl, which would part the folder's name at its commas.
        link = [str(openmp), *("-Xlinker", "-rpath", "-Xlinker", str(openmp.parent))] if openmp else ["-lgomp"]
        _run([*command, "-shared", *map(str, inputs), *link], linked)
        _keep(linked, library)
        _forget_old(folder)
    return library


def _is_whole(compiled: Path) -> bool:
    """Whether a file is there and is what was written: code that is cut off ends the process by a signal."""
    try:
        return compiled.with_suffix(_CHECKSUM).read_text() == _digest(compiled.read_bytes())
    except (FileNotFoundError, UnicodeDecodeError):
        return False


def _keep(part: Path, path: Path) -> None:
    """Put part in its place, and beside it what `_is_whole` knows it by."""
    checksum = part.with_suffix(_CHECKSUM)
    checksum.write_text(_digest(part.read_bytes()))
    _move(checksum, path.with_suffix(_CHECKSUM))
    _move(part, path)


def _move(part: Path, path: Path) -> None:
    """Put part in its place, whole or not at all, even if the machine loses power."""
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)


def load(instruction_set: str, *, extra_flags: Sequence[str] = ()) -> Library:
    """Build, load and check the kernels for instruction_set.

    Raises: DeviceError when they cannot be built or loaded, or fail their self-test.
    """
    import torch  # its OpenMP has to be in the process before ours is looked up

    if instruction_set == "amx" and not torch.cpu._init_amx():
        raise DeviceError(
            "this processor has AMX and the operating system refuses its use; Linux 5.16 or later is required; use "
            "MOESAIC_KERNELS=avx512."
        )
    path = build(instruction_set, extra_flags=extra_flags)
    if instruction_set == "amx":
        _try_elsewhere(path)
    try:
        handle = ctypes.CDLL(str(path))
    except OSError as error:
        remedy = "delete that file, so that they are compiled again"
        if "failed to map segment" in str(error):
            remedy = "raise the limit (ulimit -v)"
            if os.statvfs(path).f_flag & os.ST_NOEXEC:
                remedy = "name a folder that is not mounted noexec with XDG_CACHE_HOME"
        raise DeviceError(
            f"the CPU kernels {path} cannot be loaded ({error}); a library for this machine and room for it are "
            f"required; {remedy}, or go on with MOESAIC_KERNELS=reference."
        ) from error
    library = Library(instruction_set, path, handle, torch.get_num_threads)
    if failed := library.function("moesaic_self_test", "")():
        raise DeviceError(
            f"the CPU kernels for {instruction_set} fail their self-test (step {failed}) on this machine; right "
            "results are required; go on with MOESAIC_KERNELS=reference, and report it with `moesaic doctor --json`."
        )
    return library


def _try_elsewhere(path: Path) -> None:
    """Pass the self-test in a process of its own, once: where tiles are announced and do not work, it dies of a signal.

    Raises: DeviceError when it does.
    """
    passed, machine = path.with_suffix(".passed"), f"{describe_cpu().model}\n{platform.release()}\n"
    with suppress(OSError, UnicodeDecodeError):
        if passed.read_text() == machine:  # an image brings that of the machine that made it
            return
    script = (
        "import ctypes, sys, torch; torch.cpu._init_amx(); "
        "sys.exit(min(ctypes.CDLL(sys.argv[1]).moesaic_self_test(), 9))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise DeviceError(
            f"the CPU kernels for AMX fail their self-test on this machine (status {done.returncode} "
            f"{done.stderr[-500:]}); tiles that work are required; use MOESAIC_KERNELS=avx512, and report it with "
            "`moesaic doctor --json`."
        )
    with suppress(OSError):  # then it is tried again next time
        passed.write_text(machine)


def _instruction_flags(instruction_set: str, has_bf16: bool | None) -> list[str]:
    cpu = set(describe_cpu().instruction_sets)
    if instruction_set == "avx2":
        return ["-mavx2", "-mfma", "-mf16c"]
    bf16 = ["-mavx512bf16"] if ("avx512_bf16" in cpu if has_bf16 is None else has_bf16) else []
    if instruction_set == "avx512":
        return [*_AVX512, *bf16]
    if instruction_set == "amx":
        return [*_AVX512, *bf16, "-mamx-tile", "-mamx-bf16", "-mamx-int8"]
    # For tests alone, which wait longer for its compiler than for what it makes.
    emulated = ["-O1", *EMULATED[instruction_set]]
    if "-DMOESAIC_EMULATE_AVX512" in emulated:
        # GCC says of every function with such a vector how it would be passed elsewhere.
        quiet = ["-Wno-psabi", "-Wno-ignored-attributes"]
        return ["-mavx2", "-mfma", "-mf16c", *quiet, "-include", str(_SOURCE / "emulated_avx512.h"), *emulated]
    # Vectors of 16 numbers on processors without tiles; those that have them test these beside the real ones.
    if "avx512_vnni" in cpu and "amx_tile" not in cpu:
        return [*_AVX512, *bf16, *emulated]
    return ["-mavx2", "-mfma", "-mf16c", *emulated]


def openmp_library() -> Path | None:
    """Return the file of the OpenMP library that torch brings, whatever its name; None where it uses the system's."""
    import torch

    folder = Path(torch.__file__).parent
    for place in (folder / "lib", folder.parent / "torch.libs"):
        for pattern in ("libgomp*.so*", "libiomp5.so", "libomp.so"):
            for path in sorted(place.glob(pattern)):
                return path
    return None


def _call(
    command: list[str], *, timeout_seconds: float | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run the compiler, whatever it says.

    Raises: DeviceError where it does not start, subprocess.TimeoutExpired.
    """
    environment = {**os.environ, **variables}
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, env=environment,
            timeout=timeout_seconds,
        )  # fmt: skip
    except OSError as error:
        raise DeviceError(
            f"the C++ compiler {command[0]} cannot be run ({error.strerror or error}); one is required to compile the "
            "CPU kernels; name another with CXX, or go on with MOESAIC_KERNELS=reference."
        ) from None


def _run(command: list[str], output: Path) -> None:
    """Let the compiler write output.

    Raises: DeviceError when it does not, OSError where there is no room.
    """
    command = [*command, "-o", str(output)]
    # What it says is looked at below, and what it writes beside goes where the output goes.
    done = _call(command, LC_ALL="C", TMPDIR=str(output.parent))
    if not done.returncode and not output.exists():
        raise DeviceError(
            f"compiling the CPU kernels ended without an error and without a file ({' '.join(command)}); a C++17 "
            "compiler that writes what -o names is required; name one with CXX (g++ 11 or later), or go on with "
            "MOESAIC_KERNELS=reference."
        )
    if done.returncode and re.search(r"No space left on device|Disk quota exceeded", done.stderr):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # which `build` has words for
    if done.returncode:
        raise DeviceError(
            f"compiling the CPU kernels failed ({' '.join(command)}):\n{done.stderr[-4000:]}\nA C++17 compiler with "
            "AVX2 is required; install a newer g++ (11 or later), or go on with MOESAIC_KERNELS=reference."
        )


def _forget_old(folder: Path) -> None:
    """Delete what nobody has loaded for long, other versions' libraries say, and what builds that were killed left.

    A library in use keeps working without its file.
    """
    now = time.time()
    for path in (path for suffix in ("o", "so", "passed", "sha256") for path in folder.glob(f"*.{suffix}")):
        with suppress(OSError):  # another process did the same, or they are another user's
            if path.stat().st_mtime < now - _KEPT_DAYS * 86400:
                path.unlink()
    for path in folder.glob("tmp*/"):  # tempfile's names
        with suppress(OSError):
            if path.stat().st_mtime < now - _SCRATCH_KEPT_DAYS * 86400:
                shutil.rmtree(path)


def _with_headers(source: Path) -> bytes:
    """Return the text of a source and of all headers of ours that it includes, directly or not."""
    seen: dict[str, bytes] = {}
    waiting = [source.name]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen[name] = (_SOURCE / name).read_bytes()
            waiting += re.findall(r'^#include "(.+)"$', seen[name].decode(), re.MULTILINE)
    return b"".join(name.encode() + seen[name] for name in sorted(seen))


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Let one process at a time through, so that several that start together compile once."""
    import fcntl  # not on Windows, where there are no kernels

    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
