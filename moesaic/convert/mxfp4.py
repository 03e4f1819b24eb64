"""MXFP4, as gpt-oss is published: stacks of matrices in blocks of 32 numbers of 4 bits, read as what they stand for.

Nothing is rounded: bf16 holds every such number. The format itself is kernels/mxfp4.py's.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from moesaic.checkpoint.stream import TensorLayout
from moesaic.errors import ConversionError
from moesaic.kernels.mxfp4 import LARGEST_SCALE

BLOCKS, SCALES = "_blocks", "_scales"
_BLOCK_BYTES = 16


def check_scales(scales: Tensor, where: str) -> Tensor:
    """Return a tensor's scales. Raises: ConversionError where some of its numbers would not be finite."""
    if scales.numel() and int(scales.max()) > LARGEST_SCALE:
        raise ConversionError(
            f"{where} holds a scale of {int(scales.max())}; at most {LARGEST_SCALE} is required, with which all "
            f"numbers are finite in bf16; fetch the file again."
        )
    return scales


def plain_layout(layout: Mapping[str, TensorLayout], where: str) -> dict[str, TensorLayout]:
    """Return a checkpoint's layout with each NAME_blocks (E, N, G, 16) and NAME_scales (E, N, G) as NAME (E, 32 G, N).

    So gpt-oss has its experts' matrices where they are not quantised.

    Raises: ConversionError where there are none, or one of a pair does not fit the other.
    """
    plain = dict(layout)
    names = [name.removesuffix(BLOCKS) for name in layout if name.endswith(BLOCKS)]
    if not names:
        raise ConversionError(
            f"{where} is said to be quantised (mxfp4) and holds no tensor {BLOCKS[1:]}; both or neither is required; "
            f"fetch it again, or remove quantization_config from its config.json if its tensors are not quantised."
        )
    for name in names:
        blocks, scales = plain.pop(name + BLOCKS), plain.pop(name + SCALES, None)
        is_pair = scales is not None and blocks.shape == (*scales.shape, _BLOCK_BYTES) and len(scales.shape) == 3
        if scales is None or not is_pair or {blocks.dtype, scales.dtype} != {torch.uint8} or name in layout:
            found = ", ".join(f"{name + part} {_describe(layout.get(name + part))}" for part in (BLOCKS, SCALES, ""))
            raise ConversionError(
                f"{where}: {found}; uint8 blocks (E, N, G, {_BLOCK_BYTES}) and scales (E, N, G), and nothing beside "
                f"them, are required; fetch the files again."
            )
        count, rows, groups = scales.shape
        plain[name] = TensorLayout(torch.bfloat16, (count, 2 * _BLOCK_BYTES * groups, rows))
    return plain


def _describe(layout: TensorLayout | None) -> str:
    return "is missing" if layout is None else f"is {str(layout.dtype).removeprefix('torch.')} {list(layout.shape)}"
