"""The GGUF container, read: metadata, and where the bytes of each tensor are. What the keys mean is in gguf.py.

The gguf package's own reader believes every count in the file and makes an object of every number; a count that is
damaged would have it fill the memory. Here each length is held against what the file still has before anything is read.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4
# What a tampered file could make us hold: the largest vocabularies in use take a quarter of it.
_MAX_METADATA_BYTES = 64 << 20

# What the key of their number holds.
_MAX_PARTS = (1 << 16) - 1

# Value types of the format, by their numbers.
_SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8",
            12: "<f8"}  # fmt: skip
_STRING, _ARRAY, _UINT32 = 8, 9, 4


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor is. shape: as NumPy has it, the last dimension contiguous. kind: its type, as the format counts.

    block: so many numbers of the last dimension take block_bytes.
    """

    shape: tuple[int, ...]
    kind: int
    block: int
    block_bytes: int
    start: int

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) // self.block * self.block_bytes


@dataclass(frozen=True)
class GgufContents:
    """metadata: every value by its key, lists as lists. tensors: by name, in the file's order."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_contents(path: Path, sizes: Mapping[int, tuple[int, int]]) -> GgufContents:
    """Return what a file holds. sizes: of each kind of tensor, how many numbers are a block, and its bytes.

    Raises: ValueError, saying what is wrong, for a file that is none, is truncated, or contradicts itself; OSError.
    """
    with path.open("rb") as file:
        end = path.stat().st_size
        cursor = _Cursor(file, min(end, _MAX_METADATA_BYTES))
        if cursor.take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = cursor.number("<u4")
        if version not in _VERSIONS:
            raise ValueError(f"it is of version {version}, or of another byte order")
        num_tensors, num_keys = cursor.number("<u8"), cursor.number("<u8")
        metadata: dict[str, Any] = {}
        alignment = _DEFAULT_ALIGNMENT
        for _ in range(num_keys):
            name, kind = cursor.text(), cursor.number("<u4")
            if name in metadata:
                raise ValueError(f"the key {name} stands twice")
            metadata[name] = cursor.value(kind)
            if name == "general.alignment":
                alignment = metadata[name]
                if kind != _UINT32 or alignment == 0 or alignment & (alignment - 1):
                    raise ValueError(f"general.alignment is {alignment!r}, no power of two")
        infos = [_read_info(cursor, sizes) for _ in range(num_tensors)]
        begin = -(-cursor.place // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    place = ("the header", begin)
    for name, offset, info in sorted(infos, key=lambda each: (each[1], each[2].num_bytes)):
        tensor = GgufTensor(info.shape, info.kind, info.block, info.block_bytes, begin + offset)
        if name in tensors:
            raise ValueError(f"the tensor {name} stands twice")
        if offset % alignment or tensor.start < place[1]:
            raise ValueError(f"the tensor {name} begins inside {place[0]}, or is not aligned to {alignment} bytes")
        if tensor.start + tensor.num_bytes > end:
            raise ValueError(
                f"the tensor {name} ends at byte {tensor.start + tensor.num_bytes} and the file at {end}; it is cut off"
            )
        tensors[name] = tensor
        place = (name, tensor.start + tensor.num_bytes)
    return GgufContents(metadata, {name: tensors[name] for name, _, _ in infos})


def names_of_parts(name: str, metadata: Mapping[str, Any]) -> list[str]:
    """Return the names of the files that a model is in, of what the first one is called and says.

    Tools that split a model write a number into the name of each part, and put what describes it into the first.

    Raises: ValueError for a part that is not the first, or is not called as parts are.
    """
    count = metadata.get("split.count", 1)
    if type(count) is not int:
        raise ValueError(f"split.count is {count!r}, no number of files")
    if count > _MAX_PARTS:
        raise ValueError(f"split.count is {count}; at most {_MAX_PARTS} parts are possible")
    if count < 2:
        return [name]
    number = metadata.get("split.no")
    if number != 0:
        raise ValueError(f"split.no is {number!r}: of {count} parts, the first, 0, is the one to name")
    end = f"-00001-of-{count:05d}.gguf"
    if not name.endswith(end):
        raise ValueError(f"it is the first of {count} parts, and is not called ...{end}, so that the others are found")
    return [f"{name.removesuffix(end)}-{part:05d}-of-{count:05d}.gguf" for part in range(1, count + 1)]


def _read_info(cursor: "_Cursor", sizes: Mapping[int, tuple[int, int]]) -> tuple[str, int, GgufTensor]:
    name, num_dimensions = cursor.text(), cursor.number("<u4")
    if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
        raise ValueError(f"the tensor {name} has {num_dimensions} dimensions")
    shape = tuple(cursor.number("<u8") for _ in range(num_dimensions))[::-1]
    kind, offset = cursor.number("<u4"), cursor.number("<u8")
    if kind not in sizes:
        raise ValueError(f"the tensor {name} is of type {kind}, which is not known")
    block, block_bytes = sizes[kind]
    if shape[-1] % block:
        raise ValueError(f"the tensor {name} has rows of {shape[-1]} numbers, no whole blocks of {block}")
    return name, offset, GgufTensor(shape, kind, block, block_bytes, 0)


class _Cursor:
    """Reads forward, and never past `limit`."""

    def __init__(self, file: BinaryIO, limit: int) -> None:
        self._file, self._limit = file, limit
        self.place = 0

    def take(self, count: int) -> bytes:
        if count > self._limit - self.place:
            raise ValueError(
                f"{count} bytes are due at byte {self.place} of the header, which can reach to {self._limit}; it is "
                f"cut off, or a length in it is wrong"
            )
        data = self._file.read(count)
        if len(data) != count:
            raise ValueError(f"it ends at byte {self.place + len(data)}")
        self.place += count
        return data

    def number(self, dtype: str) -> Any:
        return np.frombuffer(self.take(np.dtype(dtype).itemsize), dtype)[0].item()

    def text(self) -> str:
        return self.take(struct.unpack("<Q", self.take(8))[0]).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise ValueError(f"a value is of type {kind}, which is not known")
        inner, count = self.number("<u4"), self.number("<u8")
        if inner in _SCALARS:
            dtype = np.dtype(_SCALARS[inner])
            return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
        if inner != _STRING:
            raise ValueError(f"an array holds values of type {inner}; numbers or texts are required")
        return [self.text() for _ in range(count)]  # each takes eight bytes at least, so a wrong count ends soon
