"""Safetensors files read and written tensor by tensor, and piece by piece: memory stays near the largest piece.

The library's own save_file wants all tensors at once; shapes are known beforehand, so the header can stand first. Its
readers map the whole file, whose pages then count as the process's memory; here they are read as ordinary files are.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO, RawIOBase
from math import prod
from mmap import mmap
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moesaic.checkpoint.store import update_digest
from moesaic.errors import CheckpointError

DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F64": torch.float64,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}
# Of numbers that mean something only beside their scales: a reader has to be asked for them.
FP8_DTYPES = {"F8_E4M3": torch.float8_e4m3fn}
# What else the format has: written as anything is, and no reader here asks for it.
_OTHER_DTYPES = {
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in (DTYPES | FP8_DTYPES | _OTHER_DTYPES).items()}

# What the writer's threads take at a time: some milliseconds of hashing.
_BUFFER_BYTES, _NUM_BUFFERS = 8 << 20, 4
# Of memory and of places in a file, for writing past the page cache; the pages of a cache and of most disks.
_ALIGNMENT = 4096
# Files that are as large leave the page cache alone. Smaller ones are read again before it has lost them.
_LARGE_BYTES = 1 << 30


@dataclass(frozen=True)
class TensorLayout:
    """A tensor as it will be: its dtype and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class TensorStream:
    """Tensors on their way into a file: pieces (name, tensor), once, as file_order has the names.

    The pieces of one tensor come one after another, from its first element to its last; they need not all be in memory.
    """

    layout: Mapping[str, TensorLayout]
    pieces: Iterator[tuple[str, Tensor]]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "TensorStream":
        """Return the stream of tensors that are in memory."""
        layout = {name: TensorLayout(each.dtype, tuple(each.shape)) for name, each in tensors.items()}
        return cls(layout, ((name, tensors[name]) for name in file_order(layout)))

    def drop(self) -> None:
        """Take all that is left of the pieces, and keep nothing."""
        for _ in self.pieces:
            pass


class TensorReader:
    """Reads the tensors of a file, whole or some rows of them. A context manager.

    is_read_once: of a large file, what has been read need not stay in the page cache. dtypes: those that are known, by
    their names in the file.

    Raises: CheckpointError for a file that is no safetensors file, is truncated, or holds another dtype.
    """

    def __init__(self, path: Path, *, is_read_once: bool = False, dtypes: Mapping[str, torch.dtype] = DTYPES) -> None:
        self.path = path
        try:
            if not path.is_file():  # to open a pipe would be to wait for ever
                raise OSError("no ordinary file")
            with path.open("rb"):
                pass  # the library says of what may not be read that it is not there
            with safe_open(path, framework="pt"):
                pass  # the library checks that the header is sound and the file as long as it says
            self._file = path.open("rb", buffering=0)
            # A page for what follows is then one that was just in use: fresh ones cost a virtual machine a copy's time.
            self._is_dropped = is_read_once and path.stat().st_size >= _LARGE_BYTES and hasattr(os, "posix_fadvise")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({error}); a whole safetensors file is required (nothing else is ever loaded: "
                f"a pickle could run code); fetch it again, or save it as safetensors."
            ) from None
        size = int.from_bytes(self._file.read(8), "little")
        try:
            header = json.loads(self._file.read(size), object_pairs_hook=without_doubles)
        except ValueError as error:
            self._file.close()
            raise CheckpointError(
                f"{path} cannot be read (in its header, {error}); each tensor has to stand once; fetch it again."
            ) from None
        header.pop("__metadata__", None)
        self.layout: dict[str, TensorLayout] = {}
        self._starts: dict[str, int] = {}
        for name, each in header.items():
            if each["dtype"] not in dtypes:
                self._file.close()
                raise CheckpointError(
                    f"{path}: {name} is of dtype {each['dtype']}; one of {', '.join(dtypes)} is required; convert the "
                    f"checkpoint to bf16 first."
                )
            self.layout[name] = TensorLayout(dtypes[each["dtype"]], tuple(each["shape"]))
            self._starts[name] = 8 + size + each["data_offsets"][0]

    def read(self, name: str, index: int | None = None) -> Tensor:
        """Return a tensor, or the index-th of its first dimension."""
        layout = self.layout[name]
        if index is None:
            return self._read(layout.dtype, layout.shape, self._starts[name])
        part = TensorLayout(layout.dtype, layout.shape[1:])
        return self._read(part.dtype, part.shape, self._starts[name] + index * part.num_bytes)

    def read_numbers(self, name: str, start: int, stop: int) -> Tensor:
        """Return numbers (stop - start,) of a tensor, all its dimensions taken as one."""
        dtype = self.layout[name].dtype
        return self._read(dtype, (stop - start,), self._starts[name] + start * dtype.itemsize)

    def _read(self, dtype: torch.dtype, shape: tuple[int, ...], place: int) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype)
        if tensor.numel() == 0:
            return tensor
        view = tensor.view(-1).view(torch.uint8).numpy().data
        self._file.seek(place)
        if not fill(view, self._file):
            raise CheckpointError(f"{self.path} ends before its tensors do; it is truncated; fetch it again.")
        if self._is_dropped:
            os.posix_fadvise(self._file.fileno(), place, len(view), os.POSIX_FADV_DONTNEED)
        return tensor

    def __enter__(self) -> "TensorReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of a JSON text's pairs. Raises: ValueError for a key that stands twice: either could be meant."""
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands twice")
    return values


def file_order(layout: Mapping[str, TensorLayout]) -> list[str]:
    """Return the names as they stand in a file.

    By falling element size and then by name, as the library does, so that every tensor is aligned.
    """
    return sorted(layout, key=lambda name: (-layout[name].dtype.itemsize, name))


def fill(view: memoryview, file: RawIOBase) -> bool:
    """Read from an unbuffered file, which may give less at a time, until view is full; False if the file ends first."""
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            return False
        done += count
    return True


class TensorWriter:
    """Writes the tensors of a layout in any order, each from its first element to its last. A context manager.

    order: the names as they stand in the file; written so, the disk sees one stream. is_hashed: take the file's SHA-256
    while it is written; what is written in another order is read back for it at the end. The file is on the disk when
    the context ends. Raises: OSError.
    """

    def __init__(self, path: Path, layout: Mapping[str, TensorLayout], *, is_hashed: bool = False) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._places: dict[str, int] = {}
        offset = 0
        self.order = file_order(layout)
        for name in self.order:
            each = layout[name]
            header[name] = {
                "dtype": _NAMES[each.dtype],
                "shape": list(each.shape),
                "data_offsets": [offset, offset + each.num_bytes],
            }
            self._places[name] = offset
            offset += each.num_bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        text = len(text).to_bytes(8, "little") + text
        self._layout = dict(layout)
        self._written = dict.fromkeys(layout, 0)
        self._start = len(text)
        self._file = _StreamedFile(path, len(text) + offset, is_hashed=is_hashed)
        self._file.write(0, memoryview(text))

    @property
    def sha256(self) -> str:
        """The hash of a file that was to be hashed and is complete."""
        return self._file.sha256

    def append(self, name: str, piece: Tensor) -> None:
        """Write the next elements of a tensor, in row-major order."""
        layout, done = self._layout[name], self._written[name]
        assert piece.dtype == layout.dtype, (name, piece.dtype, layout.dtype)
        assert done + piece.nbytes <= layout.num_bytes, (name, piece.shape, layout.shape)
        if piece.numel() == 0:
            return
        data = piece.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        self._file.write(self._start + self._places[name] + done, data)
        self._written[name] = done + piece.nbytes

    def write(self, pieces: Iterable[tuple[str, Tensor]]) -> None:
        """Append all of them."""
        for name, piece in pieces:
            self.append(name, piece)

    def __enter__(self) -> "TensorWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self._file.abandon()
            return
        self._file.finish()
        missing = [name for name, layout in self._layout.items() if self._written[name] != layout.num_bytes]
        assert not missing, missing


class _StreamedFile:
    """A new file whose parts come in any order, each once. Those that follow one another from its start are a stream.

    A stream is gathered in a few buffers, which one thread writes and another hashes while the next is filled. At the
    first part that stands elsewhere the stream ends: that part and all later ones are written where they belong as they
    come, and read back for the hash. A large file's stream goes past the page cache where the system has a way: a copy
    and a page per 4 KiB less, and whatever the cache holds stays there.
    """

    def __init__(self, path: Path, num_bytes: int, *, is_hashed: bool) -> None:
        self._path = path
        self._is_direct = num_bytes >= _LARGE_BYTES
        self._file = _open_new(path, is_direct=self._is_direct)
        size = min(_BUFFER_BYTES, -(-num_bytes // _ALIGNMENT) * _ALIGNMENT)
        # Mappings begin where a page does: a device can read from them by itself.
        self._buffers = [memoryview(mmap(-1, size)) for _ in range(min(_NUM_BUFFERS, -(-num_bytes // size)))]
        self._work: list[list[Future[None]]] = [[] for _ in self._buffers]
        self._current = self._filled = 0
        self._handed_over = 0  # bytes of the stream that are, or are being, written and hashed
        self._is_stream = True
        self._digest = hashlib.sha256() if is_hashed else None
        self._is_finished = False
        # One thread each: both have to go in order.
        self._writing, self._hashing = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    @property
    def sha256(self) -> str:
        assert self._digest is not None and self._is_finished, self._path
        return self._digest.hexdigest()

    def write(self, place: int, data: memoryview) -> None:
        """Write bytes at a place in the file."""
        if self._is_stream and place != self._handed_over + self._filled:
            self._end_stream()
        if not self._is_stream:
            _write_all(self._file, place, data)
            return
        done = 0
        while done < len(data):
            buffer = self._buffers[self._current]
            count = min(len(data) - done, len(buffer) - self._filled)
            buffer[self._filled : self._filled + count] = data[done : done + count]
            self._filled += count
            done += count
            if self._filled == len(buffer):
                self._hand_over()

    def finish(self) -> None:
        """Complete the file and its hash, and put it on the disk."""
        try:
            self._end_stream()
            if self._digest is not None:
                with self._path.open("rb", buffering=0) as file:
                    file.seek(self._handed_over)
                    update_digest(self._digest, file)
            os.fsync(self._file.fileno())
        finally:
            self.abandon()
        self._is_finished = True

    def abandon(self) -> None:
        """Stop the threads and close the file as it is."""
        for each in (self._writing, self._hashing):
            each.shutdown(wait=True, cancel_futures=True)
        self._file.close()

    def _hand_over(self) -> None:
        view = self._buffers[self._current][: self._filled]
        work = self._work[self._current]
        work.append(self._writing.submit(self._write_stream, self._handed_over, view))
        if self._digest is not None:
            work.append(self._hashing.submit(self._digest.update, view))
        self._handed_over += self._filled
        self._filled = 0
        self._current = (self._current + 1) % len(self._buffers)
        self._await(self._current)

    def _await(self, buffer: int) -> None:
        work = self._work[buffer]
        try:
            while work:
                work.pop(0).result()
        finally:
            work.clear()  # an error kept in there would keep this frame, and its callers' tensors

    def _end_stream(self) -> None:
        if not self._is_stream:
            return
        if self._filled:
            self._hand_over()
        for buffer in range(len(self._buffers)):
            self._await(buffer)
        self._is_stream = False
        self._go_through_cache()

    def _write_stream(self, place: int, view: memoryview) -> None:
        if len(view) % _ALIGNMENT:  # the last of the stream
            self._go_through_cache()
        try:
            _write_all(self._file, place, view)
        except OSError as error:
            if not self._is_direct or error.errno != errno.EINVAL:
                raise
            self._go_through_cache()  # a file system may open a file so and then not write it so
            _write_all(self._file, place, view)

    def _go_through_cache(self) -> None:
        if self._is_direct:
            self._file.close()
            self._file = self._path.open("r+b", buffering=0)
            self._is_direct = False


def _open_new(path: Path, *, is_direct: bool) -> FileIO:
    """Open an empty file for writing; past the page cache if asked and where the system and the file system can."""
    direct = getattr(os, "O_DIRECT", 0) if is_direct else 0
    try:
        return open(path, "wb", buffering=0, opener=lambda name, flags: os.open(name, flags | direct, 0o666))
    except OSError as error:
        if not direct or error.errno != errno.EINVAL:
            raise
        return path.open("wb", buffering=0)


def _write_all(file: FileIO, place: int, view: memoryview) -> None:
    file.seek(place)
    done = 0
    while done < len(view):  # an unbuffered file may take less at a time
        done += file.write(view[done:])
