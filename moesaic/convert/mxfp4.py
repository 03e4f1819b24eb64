"""MXFP4, as gpt-oss is published: stacks of matrices in blocks of 32 numbers of 4 bits, read as what they stand for.

Nothing is rounded: bf16 holds every such number. The format itself is kernels/mxfp4.py's.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from moesaic.checkpoint.stream import TensorLayout
from moesaic.convert.packing import Known, Packing, ReadTensor, check_known, describe
from moesaic.errors import ConversionError
from moesaic.kernels.mxfp4 import LARGEST_SCALE, dequantize

BLOCKS, SCALES = "_blocks", "_scales"
_BLOCK_BYTES = 16
_KEYS: Known = {"quant_method": None, "modules_to_not_convert": None}


class Mxfp4Packing:
    """Stacks in MXFP4: each NAME_blocks (E, N, G, 16) and NAME_scales (E, N, G) stands for NAME (E, 32 G, N).

    So gpt-oss has its experts' matrices where they are not quantised. A Packing (packing.py).
    """

    kind: ClassVar[str] = "mxfp4"
    lacking: ClassVar[str] = f"tensor {BLOCKS[1:]}"
    dtypes: ClassVar[Mapping[str, torch.dtype]] = {}

    def find(self, layout: Mapping[str, TensorLayout]) -> list[str]:
        return [name.removesuffix(BLOCKS) for name in layout if name.endswith(BLOCKS)]

    def parts(self, name: str, layout: Mapping[str, TensorLayout]) -> list[str]:
        return [name + part for part in (BLOCKS, SCALES) if name + part in layout]

    def shape(self, name: str, layout: Mapping[str, TensorLayout], read: ReadTensor) -> tuple[int, ...] | None:
        blocks, scales = layout[name + BLOCKS], layout.get(name + SCALES)
        if scales is None or {blocks.dtype, scales.dtype} != {torch.uint8} or len(scales.shape) != 3:
            return None
        count, rows, groups = scales.shape
        return (count, 2 * _BLOCK_BYTES * groups, rows) if blocks.shape == (*scales.shape, _BLOCK_BYTES) else None

    def misfit(self, name: str, layout: Mapping[str, TensorLayout], read: ReadTensor) -> str:
        found = ", ".join(f"{name + part} {describe(layout.get(name + part))}" for part in (BLOCKS, SCALES, ""))
        return (
            f"{found}; uint8 blocks (E, N, G, {_BLOCK_BYTES}) and scales (E, N, G), and nothing beside them, are "
            f"required"
        )

    def read(self, name: str, index: int | None, layout: Mapping[str, TensorLayout], read: ReadTensor) -> Tensor:
        """Return a stack, or a matrix of one, in bf16. Raises: ConversionError where some numbers are not finite."""
        blocks, scales = read(name + BLOCKS, index), read(name + SCALES, index)
        if scales.numel() and int(scales.max()) > LARGEST_SCALE:
            raise ConversionError(
                f"{name} holds a scale of {int(scales.max())}; at most {LARGEST_SCALE} is required, with "
                f"which all numbers are finite in bf16; fetch the file again."
            )
        return dequantize(blocks, scales).mT


def read_mxfp4(given: Mapping[str, Any], where: str) -> tuple[Packing, ...]:
    """Return what a quantization_config of MXFP4 says. Raises: ConversionError for what is not known."""
    check_known(given, _KEYS, f"{where}: quantization_config")
    return (Mxfp4Packing(),)
