"""FP8: matrices of 8-bit floats (e4m3) with a scale for each block, row or matrix, read as the bf16 nearest to them.

So DeepSeek-V3, MiniMax-M2 and others are published, in the layout that transformers calls `fp8`, and GLM-4.5 in that of
compressed-tensors. bf16 is what the models were before, and what their makers' own tools turn them back into.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from moesaic.checkpoint.stream import FP8_DTYPES, TensorLayout
from moesaic.convert.packing import SCALE_DTYPES, Known, Packing, ReadTensor, check_known, describe
from moesaic.errors import ConversionError

# A matrix NAME has NAME_scale_inv in the one layout, and NAME_scale in the other; a number is multiplied by either.
_SCALES = ("_scale_inv", "_scale")
# Of a matrix, what is made fp32 at a time.
_ROWS = 1024
_KEYS: Known = {
    "quant_method": None,
    "activation_scheme": ("dynamic", "static"),
    "fmt": (None, "e4m3", "float8_e4m3fn"),
    "weight_block_size": None,
    "modules_to_not_convert": None,
    "ignored_layers": None,
    "modules_to_convert": None,
    "scale_fmt": None,
    "expert_dtype": (None, "fp8"),
    "dequantize": None,
}

Block = tuple[int | None, int | None]  # rows and columns that share a scale, None: all of a matrix's


@dataclass(frozen=True)
class Fp8Packing:
    """Matrices in FP8 whose blocks have a scale each. A Packing (packing.py)."""

    block: Block
    kind: ClassVar[str] = "FP8"
    lacking: ClassVar[str] = "tensor of float8_e4m3fn"
    dtypes: ClassVar[Mapping[str, torch.dtype]] = FP8_DTYPES

    def find(self, layout: Mapping[str, TensorLayout]) -> list[str]:
        return [name for name, each in layout.items() if each.dtype is torch.float8_e4m3fn and not is_scale(name)]

    def parts(self, name: str, layout: Mapping[str, TensorLayout]) -> list[str]:
        return [each for each in (name, _scales_name(name, layout)) if each in layout]

    def shape(self, name: str, layout: Mapping[str, TensorLayout], read: ReadTensor) -> tuple[int, ...] | None:
        shape, scales = layout[name].shape, layout.get(_scales_name(name, layout))
        fits = scales is not None and scales.dtype in SCALE_DTYPES and scales.shape in self._grids(shape)
        return shape if fits else None

    def misfit(self, name: str, layout: Mapping[str, TensorLayout], read: ReadTensor) -> str:
        grids = self._grids(layout[name].shape)
        found = ", ".join(f"{each} {describe(layout.get(each))}" for each in (name, _scales_name(name, layout)))
        return f"{found}; scales {list(grids[0]) if grids else 'of a matrix'} in fp32, bf16 or fp16 are required"

    def divides(self, layout: Mapping[str, TensorLayout]) -> bool:
        """Whether all blocks of a checkpoint's matrices are whole; transformers reads others with other bounds."""
        shapes = [layout[name].shape for name in self.find(layout)]
        blocks = [(shape, self._block(*shape[-2:])) for shape in shapes]
        return all(shape[-2] % height == 0 and shape[-1] % width == 0 for shape, (height, width) in blocks)

    def read(self, name: str, index: int | None, layout: Mapping[str, TensorLayout], read: ReadTensor) -> Tensor:
        """Return a matrix, or the index-th of a stack, in bf16. layout, read: of the tensors as they are stored."""
        scales = _scales_name(name, layout)
        if index is not None and len(layout[name].shape) == 2:  # rows of one matrix, as a stack of biases is
            return self.dequantize(read(name), read(scales))[index]
        return self.dequantize(read(name, index), read(scales, index))

    def dequantize(self, values: Tensor, scales: Tensor) -> Tensor:
        """Return the bf16 nearest to FP8 values (..., N, K) times their scales, rounded from the fp32 product.

        scales: (..., ceil(N / rows), ceil(K / columns)) of blocks, or a number.
        """
        *_, rows, columns = values.shape
        height, width = self._block(rows, columns)
        grid = scales.float().reshape(self._grids(tuple(values.shape))[0])
        out = torch.empty(values.shape, dtype=torch.bfloat16)
        step = max(1, _ROWS // max(1, math.prod(values.shape[:-2])))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            factors = grid.index_select(-2, torch.arange(start, stop) // height)
            if factors.shape[-1] > 1:
                factors = factors.repeat_interleave(width, -1)[..., :columns]
            out[..., start:stop, :] = values[..., start:stop, :].float().mul_(factors)
        return out

    def _block(self, rows: int, columns: int) -> tuple[int, int]:
        height, width = self.block
        return max(1, min(rows, height or rows)), max(1, min(columns, width or columns))

    def _grids(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Return the shapes that the scales of a matrix, or of a stack, may have; none for what is neither."""
        if len(shape) < 2:
            return ()
        height, width = self._block(*shape[-2:])
        grid = (*shape[:-2], -(-shape[-2] // height), -(-shape[-1] // width))
        if len(shape) > 2:
            return (grid,)
        if self.block == (None, None):
            return (grid, (1,), ())
        # ModelOpt has a row's as (N,), and a block's as (N / rows, 1, K / columns, 1).
        return (grid, grid[:1]) if self.block == (1, None) else (grid, (grid[0], 1, grid[1], 1))


def read_fp8(given: Mapping[str, Any], where: str) -> tuple[Packing, ...]:
    """Return what a quantization_config of quant_method `fp8` says. Raises: ConversionError for what is not known."""
    check_known(given, _KEYS, f"{where}: quantization_config")
    block = given.get("weight_block_size")
    return (Fp8Packing((None, None) if block is None else block_of(block, f"{where}: weight_block_size")),)


def block_of(given: object, where: str) -> Block:
    """Return the rows and columns that a config says share a scale. Raises: ConversionError for what are none."""
    sizes = given if isinstance(given, list) else []
    if len(sizes) != 2 or not all(type(each) is int and each > 0 for each in sizes):
        raise ConversionError(
            f"{where} is {given!r}; a list of two sizes, rows and columns, is required; mend the config."
        )
    return sizes[0], sizes[1]


def is_scale(name: str) -> bool:
    """Whether a tensor is named as one of scales is: those of NVFP4 are FP8 themselves."""
    return name.endswith(_SCALES)


def _scales_name(name: str, layout: Mapping[str, TensorLayout]) -> str:
    return next((name + suffix for suffix in _SCALES if name + suffix in layout), name + _SCALES[0])
