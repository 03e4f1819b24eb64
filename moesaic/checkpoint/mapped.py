"""A safetensors file whose tensors are used where they lie: mapped into memory, so that opening it reads nothing but
its header, and all processes that have it open share one copy in the kernel's page cache.

Every tensor starts on a page; entries named `padding.N` fill the gaps, so that any reader of safetensors knows the
file. Blocks of the size of huge pages are written at their own multiples, which lets a file system with large folios
(ext4 since Linux 6.16, XFS, btrfs) map them as huge pages. The header carries a caller's key, its own SHA-256 and each
tensor's: the first two are checked whenever the file is opened, the last by `check` alone, since it reads everything.
"""

import hashlib
import json
import mmap
import platform
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from io import RawIOBase
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.checkpoint.stream import DTYPES, without_doubles
from moesaic.errors import CheckpointError

PAGE_BYTES = 4096
_BLOCK_BYTES = 8 << 20  # a multiple of every huge page's size
_MAX_HEADER_BYTES = 100_000_000  # as the safetensors library has it
_PADDING = "padding."
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class MappedFile:
    """tensors: on the file's pages, in the order of the file; to write into one ends the process. digests: their
    SHA-256 when they were written.
    """

    path: Path
    tensors: dict[str, Tensor]
    digests: dict[str, str]

    def check(self) -> None:
        """Read every tensor. Raises: CheckpointError when one is not what was written."""
        for name, tensor in self.tensors.items():
            if hashlib.sha256(_bytes_of(tensor)).hexdigest() != self.digests[name]:
                raise CheckpointError(
                    f"{self.path}: {name} does not have the SHA-256 that it was written with; the file is corrupt; "
                    f"delete it, so that it is made again."
                )


def mapped_size(layout: Mapping[str, Tensor]) -> int:
    """Return about how many bytes a file of such tensors has, without reading them."""
    return sum(-(-tensor.nbytes // PAGE_BYTES) * PAGE_BYTES for tensor in layout.values()) + PAGE_BYTES


def write_mapped(
    file: RawIOBase, layout: Mapping[str, Tensor], tensors: Iterable[tuple[str, Tensor]], *, key: str
) -> None:
    """Write tensors into a new file that is open for writing, from its first byte on.

    layout: their names, shapes and dtypes, in the order in which they come; on the meta device, say. key: what the file
    was made of; open_mapped wants to see the same. Raises: OSError, and what making the tensors raises.
    """
    header: dict[str, Any] = {"__metadata__": {"key": key, "tensors": "", "header": ""}}
    place = 0
    for name, tensor in layout.items():
        assert not name.startswith(_PADDING), name
        end = place + tensor.nbytes
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [place, end],
        }  # fmt: skip
        place = -(-end // PAGE_BYTES) * PAGE_BYTES
        if place > end:
            gap = {"dtype": "U8", "shape": [place - end], "data_offsets": [end, place]}
            header[f"{_PADDING}{len(header)}"] = gap
    digests = dict.fromkeys(layout, "0" * 64)
    size = len(_encode(header, digests))
    blocks = _Blocks(file)
    blocks.write(bytes(size))  # the header comes last: a file that was not finished has none
    source = iter(tensors)
    for name, wanted in layout.items():
        digests[name] = _write_next(blocks, source, name, wanted)
    another = next(source, None)
    assert another is None, another
    blocks.finish()
    file.seek(0)
    text = _encode(header, digests)
    assert len(text) == size, (len(text), size)
    _write_all(file, text)


def _write_next(blocks: "_Blocks", tensors: Iterator[tuple[str, Tensor]], name: str, wanted: Tensor) -> str:
    """Write the next tensor, which is kept no longer, and return its SHA-256."""
    given, tensor = next(tensors)
    assert (given, tensor.shape, tensor.dtype) == (name, wanted.shape, wanted.dtype), (given, name, tensor.shape)
    data = _bytes_of(tensor)
    blocks.write(data)
    blocks.write(bytes(-len(data) % PAGE_BYTES))
    return hashlib.sha256(data).hexdigest()


def open_mapped(path: Path, *, key: str) -> MappedFile:
    """Map a file that write_mapped wrote with this key.

    Raises: CheckpointError for a file that is missing, truncated, damaged in its header, or made of something else.
    """
    try:
        if path.exists() and not path.is_file():  # to open a pipe would be to wait for ever
            raise ValueError("it is no ordinary file")
        with path.open("rb", buffering=0) as file:
            size = path.stat().st_size
            header, start = _read_header(file, size)
            metadata = header.pop("__metadata__")
            if metadata["key"] != key:
                raise ValueError("it was made of other weights, or by another version")
            digests = json.loads(metadata["tensors"])
            views = dict(_views(header, _map(file, size)[start:]))
            if views.keys() != digests.keys():
                raise ValueError("its tensors are not those that its header counts")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be mapped ({error}); a whole file, made of these very weights, is required; delete it, so "
            f"that it is made again."
        ) from None
    return MappedFile(path, views, digests)


def _map(file: RawIOBase, size: int) -> Tensor:
    """Return the file (size,) uint8, mapped."""
    mapping = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # advice: where it is not known, pages are small and read ahead as ever
            mapping.madvise(mmap.MADV_HUGEPAGE)
            if reads_by_huge_pages():
                # A fault then reads its 2 MiB and not the next ones, which are another expert's more often than not:
                # where memory is short, a third to a half less is read, and kept, for nothing.
                mapping.madvise(mmap.MADV_RANDOM)
    with warnings.catch_warnings():
        # It says that torch has no tensors that cannot be written; this memory cannot, whoever tries.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(mapping, dtype=torch.uint8)  # keeps the mapping


def reads_by_huge_pages() -> bool:
    """Whether a fault in a mapping that asks for huge pages reads one whole, whatever else is advised: Linux 5.18."""
    version = re.match(r"(\d+)\.(\d+)", platform.release())
    return sys.platform == "linux" and version is not None and (int(version[1]), int(version[2])) >= (5, 18)


def _views(header: Mapping[str, Any], data: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a header with what holds their bytes. Raises: ValueError where they do not fill it."""
    place = 0
    for name, entry in header.items():
        dtype, shape, (first, last) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        if first != place or last - first != prod(shape) * dtype.itemsize or last > len(data):
            raise ValueError(f"{name} is not where its header says, or the file is truncated")
        place = last
        if not name.startswith(_PADDING):
            yield name, data[first:last].view(dtype).view(shape)
    if place != len(data):
        raise ValueError(f"{place} bytes of tensors are required and there are {len(data)}")


def _read_header(file: RawIOBase, size: int) -> tuple[dict[str, Any], int]:
    """Return a file's header and where the tensors start. Raises: ValueError, KeyError, TypeError where it is none."""
    length = int.from_bytes(file.read(8) or b"", "little")
    if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
        raise ValueError(f"its {size} bytes hold no header")
    header = json.loads(file.read(length) or b"", object_pairs_hook=without_doubles)
    digest = header["__metadata__"]["header"]
    header["__metadata__"]["header"] = ""
    if hashlib.sha256(_json(header)).hexdigest() != digest:
        raise ValueError("its header is not what was written")
    return header, 8 + length


def _encode(header: dict[str, Any], digests: Mapping[str, str]) -> bytes:
    """Return the header as it stands in the file, of a length that depends on no digest's value."""
    metadata = {**header["__metadata__"], "tensors": json.dumps(digests)}
    own = hashlib.sha256(_json({**header, "__metadata__": metadata})).hexdigest()
    text = _json({**header, "__metadata__": {**metadata, "header": own}})
    text += b" " * (-(8 + len(text)) % PAGE_BYTES)
    return len(text).to_bytes(8, "little") + text


def _json(values: dict[str, Any]) -> bytes:
    return json.dumps(values, separators=(",", ":")).encode()


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data


def _write_all(file: RawIOBase, data: memoryview | bytes) -> None:
    view = memoryview(data)
    while len(view):
        view = view[file.write(view) or 0 :]


class _Blocks:
    """Writes a stream in blocks, each at a multiple of its size, whatever the sizes of the parts."""

    def __init__(self, file: RawIOBase) -> None:
        self._file, self._block, self._used = file, bytearray(_BLOCK_BYTES), 0

    def write(self, data: memoryview | bytes) -> None:
        view = memoryview(data)
        while len(view):
            count = min(len(view), _BLOCK_BYTES - self._used)
            self._block[self._used : self._used + count] = view[:count]
            self._used += count
            view = view[count:]
            if self._used == _BLOCK_BYTES:
                self.finish()

    def finish(self) -> None:
        _write_all(self._file, memoryview(self._block)[: self._used])
        self._used = 0
