"""A safetensors file written tensor by tensor, and piece by piece: memory stays near the largest piece.

The library's own save_file wants all tensors at once. Shapes are known beforehand, so the header can stand first.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.int8: "I8",
    torch.uint8: "U8",
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


class TensorWriter:
    """Writes the tensors of a layout in any order, each from its first element to its last. A context manager."""

    def __init__(self, path: Path, layout: Mapping[str, TensorLayout]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._places: dict[str, int] = {}
        offset = 0
        # By falling element size and then by name, as the library does, so that every tensor is aligned.
        for name in sorted(layout, key=lambda name: (-layout[name].dtype.itemsize, name)):
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
