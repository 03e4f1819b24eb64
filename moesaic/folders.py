"""Folders that we write: how one is named, one process at a time writes it, and its files are replaced whole."""

import errno
import json
import os
import re
import shutil
import time
import weakref
from pathlib import Path
from shlex import quote
from types import TracebackType
from typing import Any

from moesaic.errors import ConfigError, FolderInUseError
from moesaic.logs import logger

# Seconds to wait for who only looks whether somebody has the lock (is_being_written).
_WAITS = (0.001, 0.005, 0.02, 0.05)


class FolderLock:
    """One writer's hold on a folder, which is made where there is none. Use it with `with`, or release it.

    The lock is the system's, so it goes when the process does, however it ends. A folder that was made for it and is
    still empty at the release is removed: what is refused leaves nothing behind.

    Raises: FolderInUseError when another writer holds the folder; OSError when it cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        made = [each for each in (folder, *folder.parents) if not each.exists()]
        self._finalizer = weakref.finalize(self, _let_go, _lock(folder), made)
        self._finalizer.atexit = False  # a forked child that ends would remove what its parent made

    def release(self) -> None:
        self._finalizer()

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def is_being_written(folder: Path) -> bool:
    """Whether a writer holds the lock of a folder; False where the system has no locks, or does not let us look."""
    try:
        import fcntl
    except ImportError:
        return False
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
    return False


def split_run(source: str | Path) -> tuple[Path, str]:
    """Return the folder and the step, "" for none, that RUN or RUN@step names. A path may hold an @ of its own."""
    name, separator, step = str(source).rpartition("@")
    return (Path(name), step) if separator and not Path(source).exists() else (Path(source), "")


def run_name(source: str) -> str:
    """Return what the run that RUN or RUN@step names is called: its folder's name, however the way there is written."""
    return Path(os.path.abspath(split_run(source)[0])).name  # noqa: PTH100 - resolve() would follow a link


def foreign_model(path: Path) -> str | None:
    """Return what to say of a model in another layout that was given where a run is meant; None where it is none."""
    if path.suffix == ".gguf" and path.is_file():
        layout = "a GGUF file"
    elif _has_model_type(path / "config.json"):
        layout = "a model in Hugging Face's layout"
    else:
        return None
    return (
        f"{path} is {layout}; a run is required; make one of it with `moesaic convert import {quote(str(path))} RUN`."
    )


def writing_name(path: Path) -> Path:
    """Return the path that a file or a folder has before its own, whatever is there."""
    return path.with_name(f".writing-{path.name}")


def load_json(path: Path) -> Any:
    """Return what a JSON file in UTF-8 holds.

    Raises: OSError; ValueError for what is none, or is nested more deeply than Python reads it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def load_own_json(path: Path) -> Any:
    """Return what load_json does, of a file that we wrote: unlike a user's it is no pipe. Raises: as load_json does."""
    if path.exists() and not path.is_file():  # to open a pipe would be to wait for ever
        raise ValueError("it is no ordinary file")
    return load_json(path)


def writing_path(path: Path) -> Path:
    """Return where a file or a folder is written before it takes its name; a process that is killed leaves it there.

    Raises: FileExistsError for a link there, which is none of ours: what it leads to would be overwritten.
    """
    temporary = writing_name(path)
    if temporary.is_symlink():
        raise FileExistsError(errno.EEXIST, "a link has the name under which it is written first", str(temporary))
    return temporary


def check_can_be_written(path: Path) -> None:
    """Make a file's folder; what takes long should not end with a path that never was one.

    Raises: ConfigError where no file can be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        reason = _unlike_a_file(path)
        if reason is None:
            probe = writing_path(path)
            probe.touch()
            probe.unlink()
    except OSError as error:
        reason = error.strerror or str(error)
    if reason is not None:
        raise ConfigError(f"{path} cannot be written ({reason}); a file's path is required; name another.")


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace a file by one with this content: whatever happens, it is the old one or, on the disk, the new one.

    Raises: OSError, and then nothing has changed: for a folder, a pipe or a device too.
    """
    reason = _unlike_a_file(path)
    if reason is not None:
        raise FileExistsError(errno.EEXIST, reason, str(path))
    temporary = writing_path(path)
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(temporary)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def writing_remedy(error: Exception) -> str:
    """Return what lets be written what ended in this error: an OSError, or safetensors' own, which has it in words."""
    in_words = re.search(r"\(os error (\d+)\)", str(error))
    number = error.errno if isinstance(error, OSError) else int(in_words[1]) if in_words else None
    if number in (errno.EACCES, errno.EPERM):
        return "give this user the right to write there"
    if number == errno.EROFS:
        return "make its file system writable"
    if number == errno.EFBIG:
        return "raise the limit on a file's size (ulimit -f, or the file system's own)"
    if number in (errno.ENOSPC, errno.EDQUOT):
        return "free some disk space"
    return "mend what the error says"


def empty_folder(folder: Path) -> None:
    """Delete whatever a folder holds, and no more: a link, not what it leads to."""
    for each in folder.iterdir():
        if each.is_dir() and not each.is_symlink():
            shutil.rmtree(each)
        else:
            each.unlink()


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    if os.name != "posix" and path.is_dir():  # which Windows cannot open
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unlike_a_file(path: Path) -> str | None:
    """Return what is at a path that is no file and would have to go for one, None where one can be."""
    if not path.exists() or path.is_file():
        return None
    return "it is a folder" if path.is_dir() else "it is no regular file, which writing would replace"


def _has_model_type(config: Path) -> bool:
    try:
        values = load_json(config) if config.is_file() else None
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and "model_type" in values


def _lock(folder: Path) -> int | None:
    """Return the handle that holds the lock; None where the system has none."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            import fcntl
        except ImportError:  # Windows: there two writers of one folder are not detected
            return None
        try:
            handle = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # just removed by the process that had made it
            continue
        try:
            for wait in (*_WAITS, None):
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if wait is None:
                        raise
                    time.sleep(wait)
            if folder.exists() and os.path.samestat(os.fstat(handle), folder.stat()):
                return handle
        except BlockingIOError:
            other = _holder(handle)
            os.close(handle)
            raise FolderInUseError(
                f"{folder} is being written by {f'process {other}' if other else 'another process'}; one at a time "
                f"may; wait until it has ended, or name another folder."
            ) from None
        except OSError as error:  # some network file systems
            logger.warning("%s cannot be locked (%s); let only one process write there.", folder, error)
            return handle
        os.close(handle)


def _let_go(handle: int | None, made: list[Path]) -> None:
    for folder in made:
        try:
            folder.rmdir()
        except OSError:  # it holds something by now
            break
    if handle is not None:
        os.close(handle)


def _holder(handle: int) -> int | None:
    """Return the process that holds a lock; None where the system does not say (only Linux does)."""
    status = os.fstat(handle)
    name = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    try:
        lines = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in lines:  # 1: FLOCK  ADVISORY  WRITE 708 08:01:2634 0 EOF
        fields = line.split()
        if fields[1] == "FLOCK" and fields[5] == name and int(fields[4]) > 0:
            return int(fields[4])
    return None
