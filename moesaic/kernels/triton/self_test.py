"""Whether the kernels compute here what they are defined to: small whole numbers, once a process.

It finds what a machine lacks (a C compiler, which triton needs too, a driver, a kernel that does not fit) before a
model does.
"""

import torch
import triton
from torch import Tensor

from moesaic.errors import DeviceError
from moesaic.kernels.paged_attention import PagedBatch
from moesaic.kernels.quantized import QuantizedWeight
from moesaic.kernels.triton import attention, products, rows

# 4 bits each.
_ZERO_OF_INT4, _ONE_OF_INT4, _ONE_OF_MXFP4 = 8, 9, 2


def run_self_test(device: torch.device) -> str:
    """Return which triton passed.

    Raises: DeviceError for other numbers than expected, and what triton raises.
    """
    x = torch.zeros(3, 64, dtype=torch.float32, device=device)
    x[:, 0] = torch.arange(1.0, 4.0, dtype=torch.float32, device=device)
    rising = torch.arange(32, device=device)
    numbers = torch.zeros(1, 32, 64, dtype=torch.int8, device=device)
    numbers[0, :, 0] = rising.to(torch.int8)
    ones = torch.ones(1, 32, dtype=torch.float32, device=device)
    nibbles = torch.full((1, 32, 32), _ZERO_OF_INT4 * 17, dtype=torch.uint8, device=device)
    nibbles[0, :, 0] = _ONE_OF_INT4 + _ZERO_OF_INT4 * 16
    steps = (rising % 16).to(torch.int8)[None, :, None]
    mxfp4 = torch.zeros(1, 32, 32, dtype=torch.uint8, device=device)
    mxfp4[0, :, 0] = _ONE_OF_MXFP4
    powers = torch.full((1, 32, 2), 127, dtype=torch.uint8, device=device)
    weights: dict[str, tuple[Tensor | QuantizedWeight, Tensor]] = {
        "bf16 products": (numbers.to(torch.bfloat16), rising),
        "int8 products": (QuantizedWeight(numbers, ones, 8, None), rising),
        "int4 products": (QuantizedWeight(nibbles, ones, 4, 64, steps), rising % 16),
        "MXFP4 products": (QuantizedWeight(mxfp4, powers, 4, 32), ones[0]),
    }
    for name, (weight, factors) in weights.items():
        _compare(name, products.linear(x, weight, None, out_dtype=torch.float32), x[:, :1] * factors)
    ids, _ = rows.choose(x, None, None, top_k=1, scoring="softmax", renormalize=False, scale=1.0, output_scale=None)
    _compare("choices of experts", ids.float(), torch.zeros(3, 1, dtype=torch.float32, device=device))
    _compare("norms", rows.norm(torch.full_like(x, 2.0), ones[0].repeat(2), None, 0.0), torch.ones_like(x))
    # Of equal keys the values' mean: 1 of 0, 0.5 of 0 and 1.
    heads = torch.zeros(2, 1, 64, dtype=torch.bfloat16, device=device)
    values = torch.zeros(1, 32, 1, 64, dtype=torch.bfloat16, device=device)
    values[0, 0], values[0, 1] = 1.0, 0.0
    batch = PagedBatch(*(torch.tensor(each, dtype=torch.int32) for each in ([0, 2], [2], [[0]])))
    attended = attention.attend(
        heads, torch.zeros_like(values), values, None, batch, dim=64, kv_heads=1, block_size=32, scale=1.0,
        window=None, sinks=None,
    )  # fmt: skip
    _compare("attention", attended[:, 0, 0], torch.tensor([1.0, 0.5], dtype=torch.float32, device=device))
    return f"triton {triton.__version__}"


def _compare(name: str, made: Tensor, expected: Tensor) -> None:
    if not torch.allclose(made.float(), expected.float(), rtol=1e-4):
        raise DeviceError(
            f"{name} of triton's kernels are off by {float((made.float() - expected).abs().max()):.3g}; their "
            f"definition's numbers are required; set MOESAIC_KERNELS=reference, and report it."
        )
