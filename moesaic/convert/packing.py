"""What a way to pack matrices in a checkpoint has to say, so that a source can hand them out as plain numbers."""

from collections.abc import Mapping
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from moesaic.checkpoint.stream import TensorLayout


class ReadTensor(Protocol):
    """Reads a tensor as it is stored, or the index-th of its first dimension."""

    def __call__(self, name: str, index: int | None = None, /) -> Tensor: ...


class Packing(Protocol):
    """How some of a checkpoint's matrices are packed. dtypes: what its tensors have beside those that others have."""

    dtypes: ClassVar[Mapping[str, torch.dtype]]

    def plain_layout(self, layout: Mapping[str, TensorLayout], where: str) -> dict[str, TensorLayout]:
        """Return a checkpoint's layout as `read` makes it. Raises: ConversionError for tensors that do not fit."""
        ...

    def read(self, name: str, index: int | None, layout: Mapping[str, TensorLayout], read: ReadTensor) -> Tensor:
        """Return a packed matrix, or the index-th of a stack. layout, read: of the tensors as they are stored."""
        ...


def describe(layout: TensorLayout | None) -> str:
    """Return what is said of a tensor, or of its absence, in an error."""
    return "is missing" if layout is None else f"is {str(layout.dtype).removeprefix('torch.')} {list(layout.shape)}"
