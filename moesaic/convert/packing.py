"""What a way to pack matrices in a checkpoint has to say, and a checkpoint's tensors with those unpacked."""

from collections.abc import Mapping, Sequence
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
    """A way to pack matrices, each in tensors of its own.

    lacking: what a checkpoint without such a matrix does not hold. dtypes: what its tensors have beside those that
    others have. layout, read: of the tensors as they are stored.
    """

    dtypes: ClassVar[Mapping[str, torch.dtype]]

    @property
    def kind(self) -> str: ...

    @property
    def lacking(self) -> str: ...

    def find(self, layout: Mapping[str, TensorLayout]) -> list[str]:
        """Return the names, as `read` takes them, of what seems to be packed so."""
        ...

    def parts(self, name: str, layout: Mapping[str, TensorLayout]) -> list[str]:
        """Return the tensors that a matrix is made of, those that there are."""
        ...

    def shape(self, name: str, layout: Mapping[str, TensorLayout], read: ReadTensor) -> tuple[int, ...] | None:
        """Return the shape of the matrix, or of the stack, that the parts make, None where they make none."""
        ...

    def misfit(self, name: str, layout: Mapping[str, TensorLayout], read: ReadTensor) -> str:
        """Return what an error says of parts that make no matrix: what there is, and what is required."""
        ...

    def read(self, name: str, index: int | None, layout: Mapping[str, TensorLayout], read: ReadTensor) -> Tensor:
        """Return a matrix, or the index-th of a stack, in bf16. Raises: ConversionError for numbers that none has."""
        ...


class PackedTensors:
    """A checkpoint's tensors, with its packed matrices as bf16. layout: of what `read` returns.

    A matrix is of the first kind that its parts fit. Raises: ConversionError where there is no packed matrix, where
    parts fit nothing, and where a matrix stands beside its parts.
    """

    def __init__(
        self, kinds: Sequence[Packing], stored: Mapping[str, TensorLayout], read: ReadTensor, where: str
    ) -> None:
        self._stored, self._read = stored, read
        candidates: dict[str, list[Packing]] = {}
        for kind in kinds:
            for name in kind.find(stored):
                candidates.setdefault(name, []).append(kind)
        if not candidates:
            raise ConversionError(
                f"{where} is said to be quantised ({', '.join(dict.fromkeys(each.kind for each in kinds))}) and holds "
                f"no {' and no '.join(dict.fromkeys(each.lacking for each in kinds))}; both or neither is required; "
                f"fetch it again, or remove quantization_config from its config.json if its tensors are not quantised."
            )
        self._kinds: dict[str, Packing] = {}
        layout = dict(stored)
        for name, found in candidates.items():
            kind, shape = self._fitting(name, found, where)
            for part in kind.parts(name, stored):
                layout.pop(part, None)
            if name in layout:
                raise self._misfit(name, kind, where)
            self._kinds[name] = kind
            layout[name] = TensorLayout(torch.bfloat16, shape)
        self.layout: Mapping[str, TensorLayout] = layout

    def __contains__(self, name: str) -> bool:
        """Whether a tensor is stored in another form than `read` returns."""
        return name in self._kinds

    def read(self, name: str, index: int | None = None) -> Tensor:
        """Return a tensor, or the index-th of its first dimension."""
        kind = self._kinds.get(name)
        return self._read(name, index) if kind is None else kind.read(name, index, self._stored, self._read)

    def _fitting(self, name: str, kinds: list[Packing], where: str) -> tuple[Packing, tuple[int, ...]]:
        """Return the kind whose matrix the parts are, and its shape. Raises: ConversionError where none or any is."""
        shapes = [(kind, kind.shape(name, self._stored, self._read)) for kind in kinds]
        fitting = [(kind, shape) for kind, shape in shapes if shape is not None]
        if not fitting:
            raise self._misfit(name, kinds[0], where)
        # As FP8 of one block, whose scale could be the matrix's.
        if len(fitting) > 1:
            first, *others = (kind.read(name, None, self._stored, self._read) for kind, _ in fitting)
            if not all(torch.equal(first, each) for each in others):
                raise ConversionError(
                    f"{where}: {name} could be packed in {len(fitting)} of the ways that the config names, with other "
                    f"numbers; one is required; take the model as it was before it was quantised."
                )
        return fitting[0]

    def _misfit(self, name: str, kind: Packing, where: str) -> ConversionError:
        return ConversionError(f"{where}: {kind.misfit(name, self._stored, self._read)}; fetch the files again.")


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
