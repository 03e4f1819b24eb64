"""What a way to pack matrices in a checkpoint has to say, so that a source can hand them out as plain numbers."""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from moesaic.checkpoint.stream import TensorLayout
from moesaic.errors import ConversionError

SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A quantization_config's keys and what they may say; None: whatever it is, the tensors tell.
Known = Mapping[str, tuple[object, ...] | None]


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


def check_known(given: Mapping[str, Any], known: Known, where: str) -> None:
    """Raise ConversionError for keys, or values of keys, that could change what the numbers are."""
    unknown = sorted(given.keys() - known.keys())
    if unknown:
        raise ConversionError(
            f"{where} has keys that are not understood: {', '.join(unknown)}; {', '.join(known)} are known; remove "
            f"what changes nothing."
        )
    for key, allowed in known.items():
        value = given.get(key)
        # 4.0 is equal to 4, and 0 to False, and nobody writes either.
        if allowed is not None and not any(type(value) is type(each) and value == each for each in allowed):
            raise ConversionError(
                f"{where}: {key} is {value!r}; {' or '.join(map(repr, allowed))} is required; take the model as it was "
                f"before it was quantised, or dequantise it with the tool that made it."
            )
