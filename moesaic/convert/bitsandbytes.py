"""bitsandbytes: matrices of 4-bit codes in blocks of their flat numbers, or of int8 by rows, read as bf16."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from moesaic.checkpoint.stream import TensorLayout, without_doubles
from moesaic.convert.packing import Known, Packing, ReadTensor, check_known, describe

_STATES = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")
_SCALES, _CODE = ".absmax", ".quant_map"
_NESTED_SCALES, _NESTED_CODE = ".nested_absmax", ".nested_quant_map"
# What a tampered file could make us read: a description has some hundred bytes.
_MAX_STATE_BYTES = 1 << 16
# Numbers, and rows, that are made fp32 at a time.
_NUMBERS = 1 << 22
_ROWS = 1024
# The library has blocks of 64 to 4096 numbers.
_LARGEST_BLOCK = 4096
_LARGEST_OFFSET = 1e38
_ROW_SCALES, _ROW_FORMAT = "SCB", "weight_format"
_KEYS: Known = {
    "quant_method": None,
    "load_in_4bit": None,
    "load_in_8bit": None,
    "_load_in_4bit": None,
    "_load_in_8bit": None,
    "bnb_4bit_quant_storage": (None, "uint8"),
    "bnb_4bit_quant_type": (None, "nf4", "fp4"),
    "bnb_4bit_compute_dtype": None,
    "bnb_4bit_use_double_quant": None,
    "llm_int8_enable_fp32_cpu_offload": None,
    "llm_int8_has_fp16_weight": (None, False),
    "llm_int8_skip_modules": None,
    "llm_int8_threshold": None,
}


@dataclass(frozen=True)
class _State:
    """What is written beside the codes of a matrix. nested: block size and offset of the scales' own codes."""

    shape: tuple[int, int]
    block_size: int
    nested: tuple[int, float] | None


class CodedPacking:
    """Matrices NAME of 4-bit codes, uint8, two a byte, that of the high bits first. A Packing (packing.py).

    NAME.quant_map (16,) says what codes stand for, NAME.absmax the scale of each block of the flat numbers: in fp32, or
    as codes themselves. NAME.quant_state.bitsandbytes__nf4 is a JSON text.
    """

    kind: ClassVar[str] = "bitsandbytes, 4 bits"
    lacking: ClassVar[str] = "tensor quant_state.bitsandbytes__nf4 or fp4"
    dtypes: ClassVar[Mapping[str, torch.dtype]] = {}

    def find(self, layout: Mapping[str, TensorLayout]) -> list[str]:
        return list(
            dict.fromkeys(name.removesuffix(each) for name in layout for each in _STATES if name.endswith(each))
        )

    def parts(self, name: str, layout: Mapping[str, TensorLayout]) -> list[str]:
        suffixes = ("", _SCALES, _CODE, _NESTED_SCALES, _NESTED_CODE, *_STATES)
        return [name + suffix for suffix in suffixes if name + suffix in layout]

    def shape(self, name: str, layout: Mapping[str, TensorLayout], read: ReadTensor) -> tuple[int, int] | None:
        parts = {each.removeprefix(name): layout[each] for each in self.parts(name, layout)}
        state = _read_state(name, parts, read)
        if state is None:
            return None
        numbers = math.prod(state.shape)
        num_scales = -(-numbers // state.block_size)
        due = {
            "": (torch.uint8, -(-numbers // 2)),
            _SCALES: (torch.float32 if state.nested is None else torch.uint8, num_scales),
            _CODE: (torch.float32, 16),
        }
        if state.nested is not None:
            due[_NESTED_SCALES] = (torch.float32, -(-num_scales // state.nested[0]))
            due[_NESTED_CODE] = (torch.float32, 256)
        found = {suffix: (each.dtype, math.prod(each.shape)) for suffix, each in parts.items() if suffix not in _STATES}
        return state.shape if found == due else None

    def misfit(self, name: str, layout: Mapping[str, TensorLayout], read: ReadTensor) -> str:
        found = ", ".join(
            f"{each[len(name) + 1 :] or 'it'} {describe(layout[each])}" for each in self.parts(name, layout)
        )
        return (
            f"{name}: {found}; as bitsandbytes saves them, uint8 (N K / 2), absmax (N K / block size), fp32 quant_map "
            f"(16), and where absmax is uint8, fp32 nested_absmax and nested_quant_map (256), with the sizes that "
            f"quant_state says, are required"
        )

    def read(self, name: str, index: int | None, layout: Mapping[str, TensorLayout], read: ReadTensor) -> Tensor:
        parts = {each.removeprefix(name): layout[each] for each in self.parts(name, layout)}
        state = _read_state(name, parts, read)
        assert state is not None  # what has no shape is not read
        scales = read(name + _SCALES).flatten()
        if state.nested is not None:
            block_size, offset = state.nested
            codes, largest = read(name + _NESTED_CODE).flatten(), read(name + _NESTED_SCALES).flatten()
            scales = codes[scales.int()] * largest.repeat_interleave(block_size)[: len(scales)] + offset
        count = math.prod(state.shape)
        numbers = _decode(read(name).flatten(), read(name + _CODE).flatten(), scales, state.block_size, count)
        matrix = numbers.view(state.shape)
        return matrix if index is None else matrix[index]


class RowsPacking:
    """Matrices NAME.weight (N, K) int8 with NAME.SCB (N,), 127 times a row's scale. A Packing (packing.py)."""

    kind: ClassVar[str] = "bitsandbytes, 8 bits"
    lacking: ClassVar[str] = "tensor SCB"
    dtypes: ClassVar[Mapping[str, torch.dtype]] = {}

    def find(self, layout: Mapping[str, TensorLayout]) -> list[str]:
        stems = [name.removesuffix(_ROW_SCALES) for name in layout if name.endswith(f".{_ROW_SCALES}")]
        return [f"{stem}weight" for stem in stems]

    def parts(self, name: str, layout: Mapping[str, TensorLayout]) -> list[str]:
        stem = name.removesuffix("weight")
        return [each for each in (name, stem + _ROW_SCALES, stem + _ROW_FORMAT) if each in layout]

    def shape(self, name: str, layout: Mapping[str, TensorLayout], read: ReadTensor) -> tuple[int, int] | None:
        values, stem = layout.get(name), name.removesuffix("weight")
        scales, written = layout[stem + _ROW_SCALES], layout.get(stem + _ROW_FORMAT)
        if values is None or values.dtype is not torch.int8 or len(values.shape) != 2:
            return None
        # Of its formats, row by row is the one that is written.
        is_number = written is not None and written.shape in ((), (1,)) and not written.dtype.is_floating_point
        is_by_rows = written is None or (is_number and int(read(stem + _ROW_FORMAT)) == 0)
        fits = is_by_rows and scales.dtype is torch.float32 and scales.shape == values.shape[:1]
        return (values.shape[0], values.shape[1]) if fits else None

    def misfit(self, name: str, layout: Mapping[str, TensorLayout], read: ReadTensor) -> str:
        stem = name.removesuffix("weight")
        found = ", ".join(f"{each.removeprefix(stem)} {describe(layout[each])}" for each in self.parts(name, layout))
        return f"{stem[:-1]}: {found}; int8 weight (N, K), fp32 SCB (N) and weight_format 0, by rows, are required"

    def read(self, name: str, index: int | None, layout: Mapping[str, TensorLayout], read: ReadTensor) -> Tensor:
        values, scales = read(name, index), read(name.removesuffix("weight") + _ROW_SCALES, index)[..., None]
        if index is not None:
            values, scales = values[None], scales[None]
        out = torch.empty(values.shape, dtype=torch.bfloat16)
        for into, some, factors in zip(out.split(_ROWS), values.split(_ROWS), scales.split(_ROWS), strict=True):
            into.copy_(some.float().mul_(factors).mul_(1 / 127))
        return out if index is None else out[0]


def read_bitsandbytes(given: Mapping[str, Any], where: str) -> tuple[Packing, ...]:
    """Return what a quantization_config of bitsandbytes says. Raises: ConversionError for what is not known."""
    check_known(given, _KEYS, f"{where}: quantization_config")
    return CodedPacking(), RowsPacking()


def _read_state(name: str, parts: Mapping[str, TensorLayout], read: ReadTensor) -> _State | None:
    """Return what the JSON text beside a matrix says, None where it is none or says what cannot be."""
    found = [suffix for suffix in _STATES if suffix in parts]
    layout = parts[found[0]]
    if len(found) != 1 or layout.dtype is not torch.uint8 or math.prod(layout.shape) > _MAX_STATE_BYTES:
        return None
    try:
        text = bytes(read(name + found[0]).flatten().tolist()).decode()
        given = json.loads(text, object_pairs_hook=without_doubles)
        rows, columns = given["shape"]
        sizes = [rows, columns, given["blocksize"]]
        is_nested = _NESTED_SCALES in parts
        offset = given["nested_offset"] if is_nested else 0.0
        sizes += [given["nested_blocksize"]] if is_nested else []
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    # JSON has integers that no float holds.
    is_number = type(offset) in (int, float) and not abs(offset) > _LARGEST_OFFSET
    if not is_number or not all(type(size) is int and size > 0 for size in sizes):
        return None
    block_size, *nested_size = (min(size, rows * columns) for size in sizes[2:])  # what is over holds nothing
    if max([block_size, *nested_size]) > _LARGEST_BLOCK:
        return None
    return _State((rows, columns), block_size, (nested_size[0], float(offset)) if is_nested else None)


def _decode(values: Tensor, code: Tensor, scales: Tensor, block_size: int, count: int) -> Tensor:
    """Return the bf16 nearest to what the first codes stand for, times each block's scale, in fp32: (count,)."""
    pairs = torch.stack([code.repeat_interleave(16), code.repeat(16)], -1)  # of every byte
    out = torch.empty(count, dtype=torch.bfloat16)
    step = 2 * max(1, _NUMBERS // block_size) * block_size  # whole blocks, and whole bytes
    for start in range(0, count, step):
        stop = min(start + step, count)
        numbers = pairs.index_select(0, values[start // 2 : -(-stop // 2)].int()).flatten()[: stop - start]
        of_blocks = scales[start // block_size : -(-stop // block_size)].repeat_interleave(block_size)
        out[start:stop] = numbers.mul_(of_blocks[: stop - start])
    return out
