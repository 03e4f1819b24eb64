"""MXFP4, as gpt-oss is published: stacks of matrices in blocks of 32 numbers of 4 bits, read as what they stand for.

Nothing is rounded: bf16 holds every such number.
"""

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from moesaic.checkpoint.stream import TensorLayout
from moesaic.errors import ConversionError

BLOCKS, SCALES = "_blocks", "_scales"
_BLOCK_BYTES = 16
# e2m1; the fourth bit is the sign.
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# 6 * 2^(253 - 127) is more than bf16 holds, and 255 stands for no number.
_LARGEST_SCALE = 252


def dequantize(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return the bf16 numbers (..., G * 32) of blocks (..., G, 16) uint8 and scales (..., G) uint8.

    Two numbers a byte, that of the low bits first, times 2^(scale - 127).

    Source: OCP Microscaling Formats (MX) Specification 1.0, sections 5.3 and 6.3.
    """
    pairs = _pairs().index_select(0, blocks.flatten().int())
    numbers = pairs.view(torch.bfloat16).view(*scales.shape, 2 * _BLOCK_BYTES)
    # A power of two is its exponent's bits, but for the smallest, 2^-127, which has none.
    powers = scales.to(torch.int16).mul_(128).masked_fill_(scales == 0, 64).view(torch.bfloat16)
    return numbers.mul_(powers[..., None]).flatten(-2)


@cache
def _pairs() -> Tensor:
    """The two bf16 numbers of each byte, as one int32: (256,)."""
    positive = torch.tensor(_MAGNITUDES, dtype=torch.bfloat16)
    values = torch.cat([positive, -positive])
    return torch.stack([values.repeat(16), values.repeat_interleave(16)], -1).view(torch.int32).flatten()


def check_scales(scales: Tensor, where: str) -> Tensor:
    """Return a tensor's scales. Raises: ConversionError where some of its numbers would not be finite."""
    if scales.numel() and int(scales.max()) > _LARGEST_SCALE:
        raise ConversionError(
            f"{where} holds a scale of {int(scales.max())}; at most {_LARGEST_SCALE} is required, with which all "
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
