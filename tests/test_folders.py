"""A folder has one writer, however the last one ended."""

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moesaic.errors import ConfigError, FolderInUseError
from moesaic.folders import (
    FolderLock,
    check_can_be_written,
    is_being_written,
    load_json,
    run_name,
    split_run,
    write_whole,
    writing_remedy,
)

fcntl = pytest.importorskip("fcntl", reason="no locks of the system")

HOLDER = """
import sys, time
from pathlib import Path
from moesaic.folders import FolderLock

lock = FolderLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def test_another_process_is_named_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        # On some file systems the lock's device is not the folder's, and the process has no number then.
        with pytest.raises(FolderInUseError, match=rf"by (process {process.pid}|another process); .*; wait until"):
            FolderLock(tmp_path)
    finally:
        process.kill()
        process.communicate()
    FolderLock(tmp_path).release()


def test_it_is_let_go_by_release_by_with_and_with_its_last_reference(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    with pytest.raises(FolderInUseError):
        FolderLock(tmp_path)
    lock.release()
    lock.release()
    with FolderLock(tmp_path):
        pass
    lock = FolderLock(tmp_path)
    del lock
    with pytest.raises(ValueError, match="inside"), FolderLock(tmp_path):
        raise ValueError("inside")
    FolderLock(tmp_path).release()


def test_whether_it_is_held_can_be_seen_without_holding_it(tmp_path: Path) -> None:
    assert not is_being_written(tmp_path) and not is_being_written(tmp_path / "none")
    with FolderLock(tmp_path):
        assert is_being_written(tmp_path) and is_being_written(tmp_path)
    assert not is_being_written(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_who_only_looks_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looking = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    monkeypatch.setattr(time, "sleep", lambda seconds: fcntl.flock(looking, fcntl.LOCK_UN))
    with FolderLock(tmp_path):
        assert is_being_written(tmp_path)
    os.close(looking)


def test_a_folder_made_for_it_goes_where_nothing_was_written(tmp_path: Path) -> None:
    with FolderLock(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert list(tmp_path.iterdir()) == []
    with FolderLock(tmp_path / "a" / "b"):
        (tmp_path / "a" / "other").mkdir()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["other"]
    with FolderLock(tmp_path / "a" / "other"):
        pass
    assert (tmp_path / "a" / "other").is_dir()  # it was there before


def test_a_folder_that_is_removed_meanwhile_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process lets go of the folder that it made, between the opening of it and the lock."""
    folder, flock = tmp_path / "run", fcntl.flock
    calls: list[int] = []

    def slow(handle: int, operation: int) -> None:
        if not calls:
            folder.rmdir()
        calls.append(handle)
        flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", slow)
    with FolderLock(folder):
        assert len(calls) == 2 and folder.is_dir()
        monkeypatch.undo()
        with pytest.raises(FolderInUseError):
            FolderLock(folder)


def test_a_file_is_replaced_when_its_successor_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    write_whole(file, "old")
    fsync, synced = os.fsync, []

    def note(handle: int) -> None:
        synced.append((os.fstat(handle).st_ino, file.read_text()))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", note)
    write_whole(file, "ne\u0308w")
    assert synced == [(file.stat().st_ino, "old"), (tmp_path.stat().st_ino, "ne\u0308w")]

    def full(handle: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=os.strerror(28)):
        write_whole(file, "newer")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.json": "ne\u0308w"}


def test_a_pipe_and_a_folder_are_not_replaced_by_a_file(tmp_path: Path) -> None:
    pipe, link, folder = tmp_path / "pipe", tmp_path / "link", tmp_path / "folder"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    folder.mkdir()
    for path, reason in ((pipe, "no regular file"), (link, "no regular file"), (folder, "it is a folder")):
        with pytest.raises(FileExistsError, match=reason):
            write_whole(path, "content")
        with pytest.raises(ConfigError, match=rf"{reason}.*; a file's path is required; name another"):
            check_can_be_written(path)
    assert pipe.is_fifo() and link.is_symlink() and sorted(tmp_path.iterdir()) == [folder, link, pipe]


def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: int, operation: int) -> None:
        raise OSError(95, os.strerror(95))

    monkeypatch.setattr(fcntl, "flock", refuse)


def without_fcntl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)


@pytest.mark.parametrize(("lack", "warns"), [(without_locks, True), (without_fcntl, False)])
def test_a_system_without_locks_still_writes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    lack: Callable[[pytest.MonkeyPatch], None],
    warns: bool,
) -> None:
    lack(monkeypatch)
    with caplog.at_level("WARNING", "moesaic"), FolderLock(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()
    assert ("cannot be locked" in caplog.text) == warns


@pytest.mark.parametrize("is_there", [True, False])
def test_an_at_is_the_paths_own_where_it_is_there_else_it_parts_off_the_step(tmp_path: Path, is_there: bool) -> None:
    source = tmp_path / "a@b@7"
    if is_there:
        source.mkdir()
    assert split_run(source) == ((source, "") if is_there else (tmp_path / "a@b", "7"))
    assert split_run(tmp_path) == (tmp_path, "")


def test_a_run_is_called_as_its_folder_however_the_way_there_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "latest").symlink_to(tmp_path / "runs" / "first")
    monkeypatch.chdir(tmp_path / "runs" / "first")
    names = {source: run_name(source) for source in (".", "..", "../first/", "../first@80", ".@80", "../../latest")}
    assert names == {
        ".": "first", "..": "runs", "../first/": "first", "../first@80": "first", ".@80": "first",
        "../../latest": "latest",
    }  # fmt: skip


def test_a_link_where_a_file_is_written_first_is_neither_followed_nor_deleted(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    link = tmp_path / ".writing-out"
    link.symlink_to(tmp_path / "mine")
    with pytest.raises(FileExistsError, match="a link has the name under which it is written first"):
        write_whole(tmp_path / "out", "content")
    with pytest.raises(ConfigError, match=r"out cannot be written \(a link has the name .*\); .*; name another"):
        check_can_be_written(tmp_path / "out")
    assert link.is_symlink() and (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("text", [b"", b"{", b"[" * 100_000, b"\xff{}"])
def test_what_is_no_json_is_a_wrong_value_however_deep(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"."):
        load_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_text('{"a": ["é"]}', encoding="utf-8")
    assert load_json(tmp_path / "x.json") == {"a": ["é"]}


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "free some disk space"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "free some disk space"),
        (OSError(errno.EROFS, "Read-only file system"), "make its file system writable"),
        (PermissionError(errno.EACCES, "Permission denied"), "give this user the right to write there"),
        (OSError(errno.EFBIG, "File too large"), "raise the limit on a file's size"),
        (OSError(errno.EIO, "Input/output error"), "mend what the error says"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "free some disk space"),  # safetensors' own
        (RuntimeError("I/O error: Read-only file system (os error 30)"), "make its file system writable"),
    ],
)
def test_what_is_advised_fits_the_error(error: Exception, remedy: str) -> None:
    assert writing_remedy(error).startswith(remedy)
