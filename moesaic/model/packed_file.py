"""The file of a run's packed weights: written once, so that every later start maps it instead of packing.

It lies beside the checkpoint it was made of and goes when that goes; where the run cannot be written to, in the user's
cache folder. What it was made of is its key: a file with another one is made again. How such a file looks is
checkpoint/mapped.py's business, what it holds model/pack.py's.
"""

import hashlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import FrameType
from typing import Literal

from torch import Tensor

from moesaic.checkpoint.mapped import mapped_size, open_mapped, write_mapped
from moesaic.checkpoint.quantized import KEY as QUANTIZATION
from moesaic.checkpoint.store import CheckpointInfo
from moesaic.config.model import ModelConfig
from moesaic.errors import CheckpointError, DeviceError
from moesaic.folders import writing_name, writing_path
from moesaic.kernels.allocator import give_back_freed_memory
from moesaic.kernels.limits import available_memory_bytes, cache_folder
from moesaic.kernels.panels import LAYOUT_VERSION
from moesaic.logs import logger
from moesaic.model.pack import fill_packed, packed_tensors
from moesaic.model.transformer import Transformer

# write: map the file, and write it where there is none; read: map it where there is one, and write one only where the
# model does not fit into memory; off: neither.
PackedFilePolicy = Literal["write", "read", "off"]
# A smaller model is packed in a second or two, and not worth a file.
SMALLEST_BYTES = 64 << 20
# Left free on the disk.
_SPARE_BYTES = 1 << 30
_KEPT_DAYS = 60


@dataclass(frozen=True)
class PackedFile:
    """Where a checkpoint's packed weights may lie, the best place first, and the key that says what they were made of.

    precision: "bf16", "int8" for matrices that are rounded when they are loaded, "stored" for a quantised run.
    """

    places: tuple[Path, ...]
    key: str

    @classmethod
    def of(cls, info: CheckpointInfo, config: ModelConfig, *, precision: str) -> "PackedFile":
        made_of = {
            "layout": LAYOUT_VERSION,
            "precision": precision,
            "weights": info.files.get("model.safetensors"),
            "quantization": info.metadata.get(QUANTIZATION),
            "model": config.to_dict(),
        }
        key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
        beside = info.path / f"packed-{precision}.safetensors"
        try:
            return cls((beside, cache_folder() / "packed" / f"{key[:32]}.safetensors"), key)
        except DeviceError:  # a user without a home folder has no cache
            return cls((beside,), key)


def load_packed(
    file: PackedFile,
    shell: Transformer,
    pack: Callable[[], Transformer],
    parts: Callable[[], Iterator[tuple[str, Tensor]]],
    *,
    policy: PackedFilePolicy,
) -> Transformer:
    """Return the shell filled from the file, which is written from parts() if policy says so, or what pack() gives.

    What does not fit into memory runs from a file or not at all, so one is written then unless policy is "off". Several
    processes that want to write at once wait for the first, and map what it wrote.
    """
    wanted = packed_tensors(shell)
    size = mapped_size(wanted)
    if policy == "off" or size < SMALLEST_BYTES:
        return pack()
    told: set[str] = set()
    for place in file.places:
        if (tensors := _open(place, file.key, wanted, told)) is not None:
            return _filled(shell, tensors)
    room = available_memory_bytes()
    for place in file.places if policy == "write" or size > room else ():
        try:
            with _turn_to_write(place) as writing:
                tensors = _open(place, file.key, wanted, told)
                if tensors is None:
                    writing.truncate(0)  # what a killed writer left
                    _check_space(place.parent, size)
                    logger.info(
                        "Packing the weights, and keeping them in %s (%.1f GB), so that the next start takes seconds.",
                        place, size / 1e9,
                    )  # fmt: skip
                    _write(writing, place, wanted, parts(), file.key)
                    tensors = _open(place, file.key, wanted, told)
            for in_cache in file.places[1:]:
                _forget_old(in_cache.parent)
            if tensors is not None:
                give_back_freed_memory()
                return _filled(shell, tensors)
        except OSError as error:
            logger.warning("Packed weights cannot be kept in %s: %s.", place.parent, error.strerror or error)
    if size > room:
        logger.warning(
            "Packing the weights in memory, where they take %.1f GB and %.1f GB are free; make room for their file.",
            size / 1e9, room / 1e9,
        )  # fmt: skip
    return pack()


def _filled(shell: Transformer, tensors: dict[str, Tensor]) -> Transformer:
    model = fill_packed(shell, tensors)
    model.mapped_bytes = mapped_size(tensors)
    read_ahead_where_short([model])
    return model


def read_ahead_where_short(models: Iterable[Transformer], other_bytes: int = 0) -> None:
    """Have mapped models read their experts ahead where all of them, and what else is to come, exceed the memory.

    For whoever runs several models, or has much memory yet to take. What does not fit stays so: nothing is taken back.
    """
    mapped = {model for model in models if model.mapped_bytes}
    if mapped and sum(model.mapped_bytes for model in mapped) + other_bytes > available_memory_bytes():
        for model in mapped:
            model.reads_ahead = True


def _open(place: Path, key: str, wanted: dict[str, Tensor], told: set[str]) -> dict[str, Tensor] | None:
    """Return a file's tensors, None where there is no file or not the one that is wanted.

    told: what has been said of such files, and is not said again.
    """
    try:
        if not place.exists():
            return None
    except OSError:  # in a folder of another user; that nothing can be kept there is said where it is to be written
        return None
    try:
        tensors = open_mapped(place, key=key).tensors
        wrong = [name for name in wanted.keys() | tensors.keys() if not _is_alike(wanted.get(name), tensors.get(name))]
        if wrong:
            raise CheckpointError(f"{place} holds other tensors than the model ({sorted(wrong)[:3]}).")
    except CheckpointError as error:
        if str(error) not in told:
            logger.warning("Passing over a file of packed weights: %s", error)
            told.add(str(error))
        return None
    with suppress(OSError):  # of use in the cache alone, which forgets what nobody has used for long
        os.utime(place)
    return tensors


def _is_alike(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and one.shape == other.shape and one.dtype == other.dtype


def _write(
    writing: FileIO, place: Path, layout: dict[str, Tensor], tensors: Iterator[tuple[str, Tensor]], key: str
) -> None:
    """Write the file under its temporary name, read it back, and give it its own.

    Raises: OSError, and what making the tensors raises.
    """
    temporary = writing_path(place)
    try:
        write_mapped(writing, layout, tensors, key=key)
        os.fsync(writing.fileno())
        try:
            open_mapped(temporary, key=key).check()
        except CheckpointError as error:
            raise OSError(str(error)) from None
        temporary.replace(place)
    except BaseException:
        with suppress(OSError):
            writing.truncate(0)  # whoever waits for it finds it empty and tries as well
            temporary.unlink()
        raise
    with suppress(OSError):  # some file systems know no modes
        # To be cut short in place, by a `cp` over it say, would end every process that has it mapped.
        os.fchmod(writing.fileno(), os.fstat(writing.fileno()).st_mode & 0o444)


@contextmanager
def _turn_to_write(place: Path) -> Iterator[FileIO]:
    """Give the file to write, under its temporary name, to one process at a time.

    The lock is on the file itself: when its writer has renamed it, those who waited have to open the next one. What a
    process that was killed has left is taken over, or deleted where it is of another file. Raises: OSError where no
    file can be written or locked.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = writing_path(place)
    while True:
        writing = FileIO(os.open(temporary, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
        with writing:
            _lock(writing, place)
            try:
                is_current = os.path.samestat(os.fstat(writing.fileno()), temporary.stat())
            except FileNotFoundError:
                is_current = False
            if is_current:
                _forget_unfinished(place.parent, besides=temporary)
                try:
                    with _deleted_at_termination(writing, temporary):
                        yield writing
                finally:
                    _delete_own(writing, temporary)  # it was not needed, or not finished
                return


@contextmanager
def _deleted_at_termination(file: FileIO, path: Path) -> Iterator[None]:
    """Let the signals that end the process, where nobody has them handled, delete the file first: it may be large."""

    def end(number: int, _: FrameType | None) -> None:
        _delete_own(file, path)
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

    handled = []
    if threading.current_thread() is threading.main_thread():  # only there may handlers be set
        numbers = (getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP"))
        handled = [each for each in numbers if each is not None and signal.getsignal(each) is signal.SIG_DFL]
    for number in handled:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in handled:
            if signal.getsignal(number) is end:
                signal.signal(number, signal.SIG_DFL)


def _delete_own(file: FileIO, path: Path) -> None:
    """Delete an open file, unless its name is another's by now."""
    with suppress(OSError):
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):
            path.unlink()


def _forget_unfinished(folder: Path, *, besides: Path) -> None:
    """Delete what processes that were killed have left of other files; those of a process that writes are locked."""
    for path in folder.glob(writing_name(Path("*.safetensors")).name):
        if path == besides or path.is_symlink() or not path.is_file():
            continue
        with suppress(OSError), path.open("r+b", buffering=0) as file:
            _lock(file, path, waits=False)
            _delete_own(file, path)


def _lock(file: FileIO, place: Path, *, waits: bool = True) -> None:
    try:
        import fcntl
    except ImportError:  # Windows has no such lock, and no kernels to pack for
        raise OSError("this system cannot lock files") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not waits:
            raise
        logger.info("Another process is writing %s; waiting for it.", place)
        fcntl.flock(file, fcntl.LOCK_EX)


def _check_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size + _SPARE_BYTES:
        raise OSError(f"{size / 1e9:.1f} GB and a spare one are required, and {free / 1e9:.1f} GB are free")


def _forget_old(folder: Path) -> None:
    """Delete what nobody has used for long from the cache; a process that has a file mapped keeps it."""
    oldest = time.time() - _KEPT_DAYS * 86400
    for path in folder.glob("*.safetensors"):
        with suppress(OSError):
            if path.stat().st_mtime < oldest:
                path.unlink()
