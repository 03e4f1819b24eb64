"""Safetensors files read and written tensor by tensor, and piece by piece: memory stays near the largest piece.

The library's own save_file wants all tensors at once; shapes are known beforehand, so the header can stand first. Its
readers map the whole file, whose pages then count as the process's memory; here they are read as ordinary files are.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from io import RawIOBase
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moesaic.errors import CheckpointError

_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in _NAMES.items()}


@dataclass(frozen=True)
class TensorLayout:
    """A tensor as it will be: its dtype and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class TensorReader:
    """Reads the tensors of a file, whole or some rows of them. A context manager.

    Raises: CheckpointError for a file that is no safetensors file, is truncated, or holds a dtype torch has not.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if not path.is_file():  # to open a pipe would be to wait for ever
                raise OSError("no ordinary file")
            with safe_open(path, framework="pt"):
                pass  # the library checks that the header is sound and the file as long as it says
            self._file = path.open("rb", buffering=0)
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
            if each["dtype"] not in DTYPES:
                self._file.close()
                raise CheckpointError(
                    f"{path}: {name} is of dtype {each['dtype']}; one of {', '.join(DTYPES)} is required; convert the "
                    f"checkpoint to bf16 first."
                )
            self.layout[name] = TensorLayout(DTYPES[each["dtype"]], tuple(each["shape"]))
            self._starts[name] = 8 + size + each["data_offsets"][0]

    def read(self, name: str, index: int | None = None) -> Tensor:
        """Return a tensor, or the index-th of its first dimension."""
        layout = self.layout[name]
        if index is None:
            return self._read(layout.dtype, layout.shape, self._starts[name])
        part = TensorLayout(layout.dtype, layout.shape[1:])
        return self._read(part.dtype, part.shape, self._starts[name] + index * part.num_bytes)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows (stop - start, last dimension) of a tensor, all its dimensions but the last taken as one.

        Of a vector or a scalar, its elements (stop - start,).
        """
        layout = self.layout[name]
        inner = layout.shape[-1:] if len(layout.shape) > 1 else ()
        width = TensorLayout(layout.dtype, inner).num_bytes
        return self._read(layout.dtype, (stop - start, *inner), self._starts[name] + start * width)

    def _read(self, dtype: torch.dtype, shape: tuple[int, ...], place: int) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype)
        if tensor.numel() == 0:
            return tensor
        view = tensor.view(-1).view(torch.uint8).numpy().data
        self._file.seek(place)
        if not fill(view, self._file):
            raise CheckpointError(f"{self.path} ends before its tensors do; it is truncated; fetch it again.")
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

    order: the names as they stand in the file; written so, the disk sees one stream.
    """

    def __init__(self, path: Path, layout: Mapping[str, TensorLayout]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._places: dict[str, int] = {}
        offset = 0
        # By falling element size and then by name, as the library does, so that every tensor is aligned.
        self.order = sorted(layout, key=lambda name: (-layout[name].dtype.itemsize, name))
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
        self._layout = dict(layout)
        self._written = dict.fromkeys(layout, 0)
        self._start = 8 + len(text)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def append(self, name: str, piece: Tensor) -> None:
        """Write the next elements of a tensor, in row-major order."""
        layout, done = self._layout[name], self._written[name]
        assert piece.dtype == layout.dtype, (name, piece.dtype, layout.dtype)
        assert done + piece.nbytes <= layout.num_bytes, (name, piece.shape, layout.shape)
        if piece.numel() == 0:
            return
        self._file.seek(self._start + self._places[name] + done)
        self._file.write(piece.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        self._written[name] = done + piece.nbytes

    def __enter__(self) -> "TensorWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None:
            missing = [name for name, layout in self._layout.items() if self._written[name] != layout.num_bytes]
            assert not missing, missing
