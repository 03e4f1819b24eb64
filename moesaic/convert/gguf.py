"""GGUF files as sources of tensors, through the `gguf` package, and what model a file's metadata describes.

Quantised tensors are dequantised as they are read. The tables of keys and tensor names are in gguf_families.py. What
the byte-level BPE in a file's metadata becomes, and what becomes of ours, is gguf_tokenizer.py's business.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
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
from moesaic.convert.gguf_file import read_contents
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
    """A GGUF file as a source of tensors; quantised ones come as fp32, those in MXFP4 as bf16.

    Raises: ConversionError for a file that is none, or is truncated.
    """

    path: Path
    metadata: dict[str, Any] = field(init=False)
    layout: Mapping[str, TensorLayout] = field(init=False)

    def __post_init__(self) -> None:
        self._gguf = require_gguf()
        self._kinds = {each.value: each for each in self._gguf.GGMLQuantizationType}
        sizes = {each.value: self._gguf.GGML_QUANT_SIZES[each] for each in self._kinds.values()}
        try:
            contents = read_contents(self.path, sizes)
            self._file = self.path.open("rb", buffering=0)
        except (OSError, ValueError) as error:
            raise ConversionError(
                f"{self.path} cannot be read as GGUF ({error}); a whole GGUF file of version 2 or 3 is required; fetch "
                f"it again."
            ) from None
        self.metadata, self._tensors = contents.metadata, contents.tensors
        self.layout = {
            name: TensorLayout(_dtype(self._kinds[each.kind].name), _shape(name, each.shape))
            for name, each in self._tensors.items()
        }

    def read(self, name: str, index: int | None = None) -> Tensor:
        tensor = self._tensors[name]
        kind, shape, start = self._kinds[tensor.kind], self.layout[name].shape, tensor.start
        num_bytes = tensor.num_bytes
        if index is not None:
            shape, num_bytes = shape[1:], num_bytes // shape[0]
            start += index * num_bytes
        data = torch.empty(num_bytes, dtype=torch.uint8)
        self._file.seek(start)
        if not fill(data.numpy().data, self._file):
            raise ConversionError(
                f"{self.path} ends before {name} does; the file as it was opened is required; fetch it again."
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
        self._file.close()


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
