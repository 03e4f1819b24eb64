"""NVFP4, MXFP4 and MXFP8 of single matrices: small floats with a scale for each few columns, read as bf16.

So compressed-tensors and NVIDIA's ModelOpt write them. A matrix (N, K) has G scales a row, each of K / G columns: its
numbers are value * scale, and in NVFP4, whose scales are FP8, times another of the whole matrix. gpt-oss's stacks in
MXFP4 are mxfp4.py's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moesaic.checkpoint.stream import FP8_DTYPES, TensorLayout
from moesaic.convert.packing import ReadTensor, describe
from moesaic.kernels.mxfp4 import decode, powers

# Of a matrix, what is made fp32 at a time.
_ROWS = 1024
_WEIGHT, _PACKED, _SCALE = ".weight", ".weight_packed", ".weight_scale"
# compressed-tensors divides the scales of a matrix by its number, ModelOpt multiplies them.
_DIVISOR, _FACTOR = ".weight_global_scale", ".weight_scale_2"


@dataclass(frozen=True)
class BlockFloatPacking:
    """Matrices of small floats. A Packing (packing.py).

    bits: 4, two numbers (e2m1) a byte, that of the low bits first, or 8 (e4m3). group_size: columns of a scale.
    scale_dtype: float8_e4m3fn with a scale of the matrix (NVFP4), or uint8, powers of two (MX).
    """

    kind: str
    bits: int
    group_size: int
    scale_dtype: torch.dtype
    dtypes: ClassVar[Mapping[str, torch.dtype]] = FP8_DTYPES

    @property
    def lacking(self) -> str:
        return f"{_PACKED[1:]} of uint8" if self.bits == 4 else f"{_WEIGHT[1:]} of float8_e4m3fn"

    def find(self, layout: Mapping[str, TensorLayout]) -> list[str]:
        values = (_PACKED, _WEIGHT) if self.bits == 4 else (_WEIGHT,)
        dtype = torch.uint8 if self.bits == 4 else torch.float8_e4m3fn
        stems = [
            name.removesuffix(suffix)
            for name, each in layout.items()
            for suffix in values
            if name.endswith(suffix) and each.dtype is dtype
        ]
        return [f"{stem}{_WEIGHT}" for stem in stems if f"{stem}{_SCALE}" in layout]

    def parts(self, name: str, layout: Mapping[str, TensorLayout]) -> list[str]:
        stem = name.removesuffix(_WEIGHT)
        values = _PACKED if f"{stem}{_PACKED}" in layout else _WEIGHT
        others = (_DIVISOR, _FACTOR) if self._has_scale_of_matrix else ()
        return [each for each in (stem + suffix for suffix in (values, _SCALE, *others)) if each in layout]

    def shape(self, name: str, layout: Mapping[str, TensorLayout], read: ReadTensor) -> tuple[int, int] | None:
        values, scales, *of_matrix = (layout[each] for each in self.parts(name, layout))
        if len(values.shape) != 2 or len(scales.shape) != 2 or scales.dtype is not self.scale_dtype:
            return None
        rows, columns = values.shape[0], values.shape[1] * 8 // self.bits
        fits = (
            scales.shape == (rows, columns // self.group_size)
            and columns % self.group_size == 0
            and len(of_matrix) == int(self._has_scale_of_matrix)
            and all(each.dtype is torch.float32 and each.shape in ((), (1,)) for each in of_matrix)
        )
        return (rows, columns) if fits else None

    def misfit(self, name: str, layout: Mapping[str, TensorLayout], read: ReadTensor) -> str:
        stem = name.removesuffix(_WEIGHT)
        found = ", ".join(f"{each[len(stem) + 1 :]} {describe(layout[each])}" for each in self.parts(name, layout))
        values = "uint8 (N, K / 2)" if self.bits == 4 else "float8_e4m3fn (N, K)"
        scales = f"{str(self.scale_dtype).removeprefix('torch.')} {_SCALE[1:]} (N, K / {self.group_size})"
        others = f", and one of {_DIVISOR[1:]} and {_FACTOR[1:]}, fp32 (1)," if self._has_scale_of_matrix else ""
        return f"{stem}: {found}; {values} and {scales}{others} are required"

    def read(self, name: str, index: int | None, layout: Mapping[str, TensorLayout], read: ReadTensor) -> Tensor:
        values_name, scales_name, *of_matrix = self.parts(name, layout)
        values, scales = read(values_name), read(scales_name)
        factors = powers(scales) if self.scale_dtype is torch.uint8 else scales.float()
        for each in of_matrix:
            factor = read(each).reshape(())
            factors = factors / factor if each.endswith(_DIVISOR) else factors * factor
        matrix = _dequantize(values, factors)
        return matrix if index is None else matrix[index]

    @property
    def _has_scale_of_matrix(self) -> bool:
        return self.scale_dtype is torch.float8_e4m3fn


NVFP4 = BlockFloatPacking("NVFP4", 4, 16, torch.float8_e4m3fn)
MXFP4 = BlockFloatPacking("MXFP4", 4, 32, torch.uint8)
MXFP8 = BlockFloatPacking("MXFP8", 8, 32, torch.uint8)


def _dequantize(values: Tensor, factors: Tensor) -> Tensor:
    """Return the bf16 nearest to values (N, K / 2) uint8, or (N, K) FP8, times factors (N, G), of the fp32 product."""
    per_byte = 2 if values.dtype is torch.uint8 else 1
    out = torch.empty(values.shape[0], values.shape[1] * per_byte, dtype=torch.bfloat16)
    for start in range(0, len(values), _ROWS):
        rows = slice(start, start + _ROWS)
        wide = decode(values[rows]).float() if values.dtype is torch.uint8 else values[rows].float()
        if factors.shape[1]:
            wide.unflatten(1, (factors.shape[1], -1)).mul_(factors[rows, :, None])
        out[rows] = wide
    return out
