"""GGUF files as sources of tensors, through the `gguf` package, and what model a file's metadata describes.

Quantised tensors are dequantised as they are read. The tables of keys and tensor names are in gguf_families.py. What
the byte-level BPE in a file's metadata becomes, and what becomes of ours, is gguf_tokenizer.py's business.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.checkpoint.stream import TensorLayout, fill
from moesaic.config.model import ModelConfig
from moesaic.convert.families import MULTI_TOKEN
from moesaic.convert.gguf_families import (
    EMBEDDING,
    GGUF_FAMILIES,
    NEXTN,
    SHARED_GATE,
    VOCAB_SIZE,
    keys_of_tensors,
)
from moesaic.convert.gguf_file import GgufContents, GgufTensor, names_of_parts, read_contents
from moesaic.convert.gguf_tokenizer import read_tokenizer
from moesaic.convert.keys import Keys, read_config
from moesaic.convert.tensors import TensorRule
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import ConversionError

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What holds every number of these quantised kinds; the others become fp32.
_EXACT = {"MXFP4": torch.bfloat16}


@dataclass
class GgufFile:
    """A GGUF file, or the first of several parts, as a source of tensors; quantised ones come as fp32, MXFP4 as bf16.

    Raises: ConversionError for a file that is none, or is truncated, and for parts that do not belong together.
    """

    path: Path
    metadata: dict[str, Any] = field(init=False)
    layout: Mapping[str, TensorLayout] = field(init=False)
    num_parts: int = field(init=False)

    def __post_init__(self) -> None:
        self._gguf = require_gguf()
        self._kinds = {each.value: each for each in self._gguf.GGMLQuantizationType}
        self._stack = ExitStack()
        self._tensors: dict[str, tuple[GgufTensor, FileIO]] = {}
        try:
            self.metadata = self._open(self.path).metadata
            self.num_parts = self._open_other_parts()
        except BaseException:
            self._stack.close()
            raise
        self.layout = {
            name: TensorLayout(_dtype(self._kinds[each.kind].name), _shape(name, each.shape))
            for name, (each, _) in self._tensors.items()
        }

    def _open_other_parts(self) -> int:
        """Return how many parts there are, this one among them."""
        try:
            names = names_of_parts(self.path.name, self.metadata)
        except ValueError as error:
            raise ConversionError(
                f"{self.path} is a part of a model ({error}); the first part, called as it was published, beside the "
                f"others is required; give that one."
            ) from None
        for number, path in enumerate(map(self.path.with_name, names)):
            if number == 0:
                continue
            if not path.is_file():
                raise ConversionError(
                    f"{path.parent} has no {path.name}; all {len(names)} parts of the model are required; fetch it too."
                )
            part = self._open(path).metadata
            said = part.get("split.no"), part.get("split.count")
            if said != (number, len(names)):
                raise ConversionError(
                    f"{path} says that it is number {said[0]!r}, counted from 0, of {said[1]!r} parts, where number "
                    f"{number} of {len(names)} is required; parts of one model belong together; fetch it again."
                )
            other = [key for key, value in part.items() if self.metadata.get(key, value) != value]
            if unlike := [key for key in other if not key.startswith("split.")]:
                raise ConversionError(
                    f"{path} says {unlike[0]} otherwise than {self.path.name}; parts of one model, which say the same "
                    f"where they say it, are required; fetch them again."
                )
        due = self.metadata.get("split.tensors.count", len(self._tensors))
        if len(names) > 1 and due != len(self._tensors):
            raise ConversionError(
                f"{self.path} and its other parts hold {len(self._tensors)} tensors, where split.tensors.count is "
                f"{due!r}; all parts of one model are required; fetch them again."
            )
        return len(names)

    def _open(self, path: Path) -> GgufContents:
        """Open a file and take its tensors in."""
        sizes = {each.value: self._gguf.GGML_QUANT_SIZES[each] for each in self._kinds.values()}
        try:
            contents = read_contents(path, sizes)
            file = self._stack.enter_context(path.open("rb", buffering=0))
        except (OSError, ValueError) as error:
            raise ConversionError(
                f"{path} cannot be read as GGUF ({error}); a whole GGUF file of version 2 or 3 is required; fetch it "
                f"again."
            ) from None
        if double := contents.tensors.keys() & self._tensors.keys():
            raise ConversionError(
                f"{path} holds {min(double)}, which stands in an earlier part too; each tensor in one part is "
                f"required; fetch the parts again."
            )
        self._tensors |= {name: (each, file) for name, each in contents.tensors.items()}
        return contents

    def read(self, name: str, index: int | None = None) -> Tensor:
        tensor, file = self._tensors[name]
        kind, shape, start = self._kinds[tensor.kind], self.layout[name].shape, tensor.start
        num_bytes = tensor.num_bytes
        if index is not None:
            shape, num_bytes = shape[1:], num_bytes // shape[0]
            start += index * num_bytes
        data = torch.empty(num_bytes, dtype=torch.uint8)
        file.seek(start)
        if not fill(data.numpy().data, file):
            raise ConversionError(
                f"{file.name} ends before {name} does; the file as it was opened is required; fetch it again."
            )
        if kind.name in _PLAIN:
            return data.view(_PLAIN[kind.name]).view(shape)
        rows = data.numpy().reshape(*shape[:-1], shape[-1] // tensor.block * tensor.block_bytes)
        try:
            return torch.from_numpy(self._gguf.quants.dequantize(rows, kind)).to(_dtype(kind.name))
        except NotImplementedError:
            raise ConversionError(
                f"{self.path}: {name} is of type {kind.name}, which the gguf package does not dequantise; F32, F16, "
                f"BF16, MXFP4, Q4_0 to Q8_0, or a K, IQ or TQ type is required; take another file of the model."
            ) from None

    def tokenizer(self) -> Tokenizer:
        return read_tokenizer(self.metadata, str(self.path))

    def __enter__(self) -> "GgufFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def _dtype(kind: str) -> torch.dtype:
    return _PLAIN.get(kind) or _EXACT.get(kind, torch.float32)


def _shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (1, *shape) if name.endswith(SHARED_GATE) and len(shape) == 1 else shape


def read_gguf_config(source: GgufFile) -> tuple[str, ModelConfig, tuple[TensorRule, ...], dict[str, str]]:
    """Return the family's name, the model, the table of its tensors, and those it does not use, with the reason.

    Raises: ConversionError for an architecture or a value that has no table here.
    """
    architecture = source.metadata.get("general.architecture")
    keys = {
        name.removeprefix(f"{architecture}."): value
        for name, value in source.metadata.items()
        if name.startswith(f"{architecture}.")
    }
    family = next((each for each in GGUF_FAMILIES if each.is_form_of(architecture, keys)), None)
    if EMBEDDING not in source.layout:
        raise ConversionError(
            f"{source.path} holds {len(source.layout)} tensors and no {EMBEDDING}; a whole language model is required; "
            f"fetch it again, or name its file."
        )
    if family is None:
        known = ", ".join(dict.fromkeys(each.architecture for each in GGUF_FAMILIES))
        raise ConversionError(
            f"{source.path} is of architecture {architecture!r}{' with experts' if keys.get('expert_count') else ''}; "
            f"one of {known} is required; import the model's Hugging Face folder instead."
        )
    if "rope_freqs.weight" in source.layout:
        raise ConversionError(
            f"{source.path} holds rope_freqs.weight, llama3 scaling worked into numbers; which scaling that was cannot "
            f"be told from them; import the model's Hugging Face folder instead."
        )
    keys |= {VOCAB_SIZE: source.layout[EMBEDDING].shape[0], **keys_of_tensors(source.layout)}
    config = read_config(family.keys, Keys(keys, f"{source.path} ({architecture})"), frozenset())
    later = tuple(f"blk.{config.num_layers + index}." for index in range(keys.get(NEXTN, 0)))
    left_out = {name: MULTI_TOKEN for name in source.layout if name.startswith(later)}
    return family.name, config, family.tensors, left_out


def require_gguf() -> Any:
    """Return the gguf package. Raises: ConversionError when it is not installed."""
    try:
        import gguf
        import gguf.quants
    except ImportError:
        raise ConversionError(
            "GGUF files are read and written through the gguf package, which is not installed; run pip install "
            "'moesaic[gguf]'."
        ) from None
    return gguf
