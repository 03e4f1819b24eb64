"""Which kernels are used, why, and what is said where they cannot be had."""

import ctypes
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from moesaic.errors import DeviceError
from moesaic.kernels import select
from moesaic.kernels.cpu import build

SUPPORTED = build.supported_instruction_sets()
needs_kernels = pytest.mark.skipif(not SUPPORTED, reason="the C++ kernels need an x86 processor with AVX2")
needs_compiler = pytest.mark.skipif(build.find_compiler() is None, reason="there is no C++ compiler")


@pytest.fixture(autouse=True)
def anew():  # type: ignore[no-untyped-def]
    """A choice holds for the process; these tests want each made again."""
    yield
    select._select.cache_clear()
    select._select_for_cuda.cache_clear()


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(DeviceError, match="=sse is not known; one of auto, reference"), select.forced("sse"):
        pass


def test_what_the_processor_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "supported_instruction_sets", lambda: ["avx2"])
    select._select.cache_clear()
    with pytest.raises(DeviceError, match="this processor has avx2; use auto"), select.forced("amx"):
        pass


def test_nothing_is_no_choice() -> None:
    with select.forced("") as selection:
        assert selection == select._select("auto")


@pytest.mark.parametrize(("value", "options"), [("{} -DNOTHING", ["-DNOTHING"]), ("'{}' a 'b c'", ["a", "b c"])])
def test_the_compiler_may_be_named_with_options(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str, options: list[str]
) -> None:
    compiler = tmp_path / "my-g++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", value.format(compiler))
    assert build.find_compiler() == [str(compiler), *options]


def test_a_compiler_whose_path_has_a_space_is_one_word(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "my g++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert build.find_compiler() == [str(compiler)]
    monkeypatch.setenv("CXX", "g++ -DX='a")
    assert build.find_compiler() is None


@needs_kernels
@needs_compiler
def test_the_kernels_are_built_by_a_command_of_several_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wrapper = tmp_path / "wrapper"
    wrapper.write_text('#!/bin/sh\necho called >> "$(dirname "$0")/calls"\nexec "$@"\n')
    wrapper.chmod(0o755)
    command = build.find_compiler()
    assert command is not None
    source = tmp_path / "source"
    source.mkdir()
    (source / "one.cpp").write_text('extern "C" int one() { return 1; }\n')
    monkeypatch.setattr(build, "_SOURCE", source)
    monkeypatch.setenv("CXX", shlex.join([str(wrapper), *command]))
    assert build.build("avx2", folder=tmp_path).exists()
    assert (tmp_path / "calls").read_text().count("called") == 3  # its version, one source, the library


def test_forcing_ends_with_the_block() -> None:
    before = select.cpu_kernels().name
    with select.forced("reference") as selection:
        assert selection.library is None and select.cpu_library() is None
        assert os.environ[select.VARIABLE] == "reference"
    assert select.cpu_kernels().name == before


def test_other_processors_take_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.platform, "machine", lambda: "aarch64")
    select._select.cache_clear()
    with select.forced("auto") as selection:
        assert selection.name == "reference" and "x86" in selection.reason


@needs_kernels
def test_without_a_compiler_pytorch_is_used_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    select._select.cache_clear()
    with caplog.at_level("WARNING", "moesaic"), select.forced("auto") as selection:
        assert selection.name == "reference" and "no C++ compiler" in selection.reason
    assert "install g++" in caplog.text


@needs_kernels
def test_a_failing_compiler_is_quoted_and_pytorch_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = tmp_path / "broken-c++"
    compiler.write_text("#!/bin/sh\necho 'error: unrecognized option' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    select._select.cache_clear()
    with caplog.at_level("WARNING", "moesaic"), select.forced("auto") as selection:
        assert selection.name == "reference" and f"{SUPPORTED[0]} failed: compiling the CPU k" in selection.reason
    assert "unrecognized option" in caplog.text and "MOESAIC_KERNELS=reference" in caplog.text
    with pytest.raises(DeviceError, match="unrecognized option"), select.forced(SUPPORTED[0]):
        pass


@needs_kernels
@pytest.mark.skipif(len(SUPPORTED) < 2, reason="more than one set of instructions is required")
def test_what_holds_for_every_set_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(name: str) -> None:
        raise DeviceError("the cache cannot be written; a folder is required; name one.")

    monkeypatch.setattr(select, "_load", refuse)
    select._select.cache_clear()
    with caplog.at_level("WARNING", "moesaic"), select.forced("auto") as selection:
        pass
    select._select.cache_clear()
    assert caplog.text.count("the cache cannot be written") == 1
    assert f"{SUPPORTED[0]} failed: the cache cannot be written; {SUPPORTED[1]} failed too" in selection.reason


@needs_kernels
@pytest.mark.parametrize(
    ("program", "message"), [(b"\0\1", "cannot be run .*CXX"), (b"#!/no/such/shell\n", "cannot be run")]
)
def test_a_compiler_that_does_not_start_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: bytes, message: str
) -> None:
    compiler = tmp_path / "no-c++"
    compiler.write_bytes(program)
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(DeviceError, match=message):
        build.build(SUPPORTED[0], folder=tmp_path)


@needs_kernels
def test_a_compiler_may_say_what_is_no_unicode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "latin-c++"
    compiler.write_bytes(b"#!/bin/sh\necho 'err\xe9' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(DeviceError, match="compiling the CPU kernels failed"):
        build.build(SUPPORTED[0], folder=tmp_path)


@needs_kernels
@pytest.mark.parametrize("script", ["", 'case "$*" in *-shared*) ;; *) for last; do :; done; echo > "$last";; esac\n'])
def test_a_compiler_that_writes_nothing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str) -> None:
    """No object files, or these and no library."""
    compiler = tmp_path / "empty-c++"
    compiler.write_text("#!/bin/sh\n" + script)
    compiler.chmod(0o755)
    monkeypatch.chdir(tmp_path)  # where the script leaves a file when it is asked for its version
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(DeviceError, match=r"without a file .*empty-c.*is required; name one with CXX"):
        build.build(SUPPORTED[0], folder=tmp_path)


@needs_kernels
@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_folder_that_cannot_be_written_is_an_error_with_a_remedy() -> None:
    with pytest.raises(DeviceError, match="XDG_CACHE_HOME"):
        build.build(SUPPORTED[0], folder=Path("/proc/nothing"))


@pytest.fixture
def one_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder of kernels that compile in a moment, one() is 7."""
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(Path(build.__file__).parent / "source" / "export.h", source)
    (source / "value.h").write_text("#define VALUE 7\n")
    text = '#include "export.h"\n#include "value.h"\nMOESAIC_EXPORT long one() { return VALUE; }\n'
    (source / "one.cpp").write_text(text)
    monkeypatch.setattr(build, "_SOURCE", source)
    return source


@needs_kernels
@needs_compiler
def test_the_cache_is_used_and_old_files_go(one_source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    folder.mkdir()
    old = [folder / name for name in ("avx2-0123.so", "avx2-0123.sha256", "tmpold0123", "tmpnew4567")]
    for path in old[:2]:
        path.write_bytes(b"")
    for path, days in zip(old, (31, 31, 2, 0.5), strict=True):
        if path.name.startswith("tmp"):  # of a build that was killed
            path.mkdir()
            (path / "one.o").write_bytes(b"part")
        os.utime(path, (time.time() - days * 86400,) * 2)
    first = build.build(SUPPORTED[0], folder=tmp_path)
    assert [path.exists() for path in old] == [False, False, False, True]
    written = first.stat().st_mtime_ns
    assert build.build(SUPPORTED[0], folder=tmp_path) == first and first.stat().st_mtime_ns == written
    (one_source / "unused.h").write_text("#define OTHER 1\n")
    assert build.build(SUPPORTED[0], folder=tmp_path) == first
    (one_source / "value.h").write_text("#define VALUE 8\n")
    second = build.build(SUPPORTED[0], folder=tmp_path)
    assert second != first and first.exists()


def another_compiler(command: list[str], folder: Path) -> Path:
    """A compiler of another name that does the same."""
    path = folder / "another-g++"
    path.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
    path.chmod(0o755)
    return path


@needs_kernels
@needs_compiler
def test_what_any_compiler_built_is_used_without_one(
    one_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = build.find_compiler()
    assert command is not None
    first = build.build(SUPPORTED[0], folder=tmp_path)
    monkeypatch.setenv("CXX", str(another_compiler(command, tmp_path)))
    second = build.build(SUPPORTED[0], folder=tmp_path)
    monkeypatch.setenv("CXX", shlex.join([*command, "-march=native"]))
    special = build.build(SUPPORTED[0], folder=tmp_path)
    assert len({first, second, special}) == 3
    waiting = tmp_path / "waiting-g++"
    waiting.write_text("#!/bin/sh\nexec sleep 60\n")
    waiting.chmod(0o755)
    monkeypatch.setattr(build, "_VERSION_SECONDS", 0.1)
    with monkeypatch.context() as patch:
        patch.setenv("CXX", str(waiting))
        assert build.build(SUPPORTED[0], folder=tmp_path) in (first, second)
        with pytest.raises(DeviceError, match=r"waiting-g\+\+ did not say its version within 0.1 seconds"):
            build.build(SUPPORTED[0], folder=tmp_path / "empty")
    os.utime(first, (time.time() - 100,) * 2)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "")
        patch.delenv("CXX")
        assert build.find_compiler() is None
        assert build.build(SUPPORTED[0], folder=tmp_path) == second  # the last one, without options of its own
        second.write_bytes(second.read_bytes()[:-1])
        assert build.build(SUPPORTED[0], folder=tmp_path) == first  # of those that are whole
        (one_source / "value.h").write_text("#define VALUE 8\n")
        with pytest.raises(DeviceError, match=r"no C.. compiler .*; install g.., have them compiled where this image"):
            build.build(SUPPORTED[0], folder=tmp_path)


@needs_kernels
@needs_compiler
def test_what_another_compiler_built_is_used_where_nothing_can_be_written(
    one_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> Path:
        raise PermissionError(13, "Permission denied")

    command = build.find_compiler()
    assert command is not None
    first = build.build(SUPPORTED[0], folder=tmp_path)
    monkeypatch.setenv("CXX", str(another_compiler(command, tmp_path)))
    monkeypatch.setattr(build, "_compile", refuse)
    assert build.build(SUPPORTED[0], folder=tmp_path) == first
    first.unlink()
    with pytest.raises(DeviceError, match="cannot be written to"):
        build.build(SUPPORTED[0], folder=tmp_path)


@needs_kernels
def test_tiles_are_tried_once_on_each_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if request.config.getoption("--sanitize"):
        pytest.skip("under the sanitizers nothing is tried in a process of its own")
    tried: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        tried.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    library = tmp_path / "amx-0.so"
    for count in (1, 1):
        build._try_elsewhere(library)
        assert len(tried) == count
    monkeypatch.setattr(build.platform, "release", lambda: "another")
    build._try_elsewhere(library)  # an image brings what its maker's machine passed
    assert len(tried) == 2


@needs_kernels
@needs_compiler
def test_what_is_included_by_a_flag_is_part_of_what_a_build_is_known_by(one_source: Path, tmp_path: Path) -> None:
    built = []
    for value in (1, 2, 1):
        (one_source / "emulated_avx512.h").write_text(f"static const int emulated = {value};\n")
        built.append(build.build("avx512-emulated", folder=tmp_path))
    assert built[0] != built[1] and built[0] == built[2]


@needs_kernels
@needs_compiler
def test_builds_for_other_processors_are_known_apart(one_source: Path, tmp_path: Path) -> None:
    built = [build.build(name, folder=tmp_path, has_bf16=has_bf16) for name, has_bf16 in build.BUILDS]
    assert len(set(built)) == len(built)
    own = [build.build(name, folder=tmp_path) for name in SUPPORTED]
    assert set(own) <= set(built), "what an image has is not what this processor looks for"


@needs_kernels
@needs_compiler
def test_without_a_compiler_the_best_that_was_built_is_used(
    one_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(select, "rest_soon", lambda function, *, num_threads: False)
    monkeypatch.setattr(select, "load", build.load)  # without a sanitizer's flags
    text = '#include "export.h"\nMOESAIC_EXPORT long moesaic_self_test() { return 0; }\n'
    (one_source / "test.cpp").write_text(text + "MOESAIC_EXPORT long moesaic_rest_soon() { return 0; }\n")
    build.build("avx2")
    monkeypatch.setattr(select, "supported_instruction_sets", lambda: ["amx", "avx2"])
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    select._select.cache_clear()
    with caplog.at_level("WARNING", "moesaic"), select.forced("auto") as selection:
        assert selection.name == "avx2"
        assert selection.reason == "the best of amx, avx2; amx is not built"
    assert "for amx are not built" in caplog.text and "doctor --build-all" in caplog.text


@needs_kernels
@needs_compiler
@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        ("one.so: failed to map segment from shared object", r"; raise the limit \(ulimit -v\), or go on with"),
        ("one.so: undefined symbol: two", "; delete that file, so that they are compiled again, or go on with"),
    ],
)
def test_a_library_that_cannot_be_loaded_says_what_to_do(
    one_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str, remedy: str
) -> None:
    def refuse(path: str) -> None:
        raise OSError(error)

    monkeypatch.setattr(build, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(build, "_try_elsewhere", lambda path: None)
    monkeypatch.setattr(ctypes, "CDLL", refuse)
    with pytest.raises(DeviceError, match=rf"cannot be loaded \({error}\); .* room for it are required{remedy}"):
        build.load(SUPPORTED[0])


@needs_kernels
@needs_compiler
def test_a_folder_whose_libraries_may_not_be_run_is_said(
    one_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str) -> None:
        raise OSError("one.so: failed to map segment from shared object")

    monkeypatch.setattr(build, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(build, "_try_elsewhere", lambda path: None)
    monkeypatch.setattr(ctypes, "CDLL", refuse)
    mounted = os.statvfs_result([*tuple(os.statvfs(tmp_path))[:8], os.ST_NOEXEC, 255])
    monkeypatch.setattr(os, "statvfs", lambda path: mounted)
    with pytest.raises(DeviceError, match="name a folder that is not mounted noexec with XDG_CACHE_HOME, or go on"):
        build.load(SUPPORTED[0])


@pytest.mark.skipif(os.name != "posix", reason="the compiler here is a shell script")
def test_a_disk_that_is_full_for_the_compiler_is_no_fault_of_the_compilers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'error: cannot write: No space left on device' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(DeviceError, match=r"cannot be written to .* \(No space left on device\); .* make room or name"):
        build.build("avx2", folder=tmp_path / "cache")


@needs_kernels
@needs_compiler
def test_a_library_that_is_loaded_stays_however_old_it_is(
    one_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "cache_folder", lambda: tmp_path)
    (one_source / "test.cpp").write_text('#include "export.h"\nMOESAIC_EXPORT long moesaic_self_test() { return 0; }\n')

    def build_another(number: int) -> Path:
        (one_source / "value.h").write_text(f"#define VALUE {number}\n")
        return build.build(SUPPORTED[0])

    used = build.load(SUPPORTED[0]).path
    unused = build_another(8)
    for path in (tmp_path / "kernels").iterdir():
        os.utime(path, (time.time() - 31 * 86400,) * 2)
    (one_source / "value.h").write_text("#define VALUE 7\n")
    assert build.load(SUPPORTED[0]).path == used
    build_another(9)  # and old files go
    assert used.exists() and used.with_suffix(".sha256").exists() and not unused.exists()


@needs_kernels
@needs_compiler
@pytest.mark.parametrize("damage", ["cut", "zeros", "empty", "no checksum", "no text"])
def test_a_damaged_library_is_compiled_again(
    one_source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    library = build.build(SUPPORTED[0], folder=tmp_path)
    whole = library.read_bytes()
    checksum, (compiled,) = library.with_suffix(".sha256"), library.parent.glob("*.o")
    if damage == "no checksum":
        checksum.unlink()
    elif damage == "no text":
        checksum.write_bytes(b"\xff")
    else:
        kept = {"cut": len(whole) // 2, "zeros": 4096, "empty": 0}[damage]
        library.write_bytes(whole[:kept] + bytes(len(whole) - kept if damage == "zeros" else 0))
    compiled.write_bytes(b"")  # as the loss of power that cut one file would
    with caplog.at_level("WARNING", "moesaic"):
        again = build.build(SUPPORTED[0], folder=tmp_path)
    assert again == library and ctypes.CDLL(str(again)).one() == 7
    assert "compiling it again" in caplog.text
    written = again.stat().st_mtime_ns
    assert build.build(SUPPORTED[0], folder=tmp_path).stat().st_mtime_ns == written


@needs_kernels
@needs_compiler
def test_a_damaged_object_is_compiled_again(one_source: Path, tmp_path: Path) -> None:
    library = build.build(SUPPORTED[0], folder=tmp_path)
    (compiled,) = library.parent.glob("*.o")
    compiled.write_bytes(compiled.read_bytes()[:64])
    library.unlink()  # as the next version's library would be linked from the objects that did not change
    assert ctypes.CDLL(str(build.build(SUPPORTED[0], folder=tmp_path))).one() == 7


GPU = torch.device("cuda", 0)


def test_a_gpu_without_kernels_computes_with_pytorchs_operations_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(select.VARIABLE, "auto")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    selection = select.cuda_kernels(torch.device("cuda"))
    if select.importlib.util.find_spec("triton") is not None:
        assert "capability 8.0 or higher" in selection.reason
    assert selection.name == select.REFERENCE and not select.uses_triton(GPU) and not select.has_kernels(GPU)
    assert "PyTorch's slower operations are used on cuda" in caplog.text
    select._select_for_cuda.cache_clear()
    monkeypatch.setattr(select.importlib.util, "find_spec", lambda name: None)
    assert select.cuda_kernels(GPU) == select.CudaSelection(select.REFERENCE, "triton is not installed")


def test_kernels_that_fail_their_self_test_on_a_gpu_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    self_test = pytest.importorskip("moesaic.kernels.triton.self_test", reason="triton is not installed")
    monkeypatch.setenv(select.VARIABLE, "auto")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def fail(device: torch.device) -> str:
        raise RuntimeError("a driver says\nno")

    monkeypatch.setattr(self_test, "run_self_test", fail)
    assert select.cuda_kernels(GPU) == select.CudaSelection("reference", "triton's kernels do not work here (no)")
    select._select_for_cuda.cache_clear()
    monkeypatch.setattr(self_test, "run_self_test", lambda device: "triton 3")
    assert select.uses_triton(GPU) and select.cuda_kernels(GPU).reason == "triton 3"
    with select.forced(select.REFERENCE):
        assert not select.uses_triton(GPU)
