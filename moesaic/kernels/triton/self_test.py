"""Whether the kernels compute here what they are defined to: a layer of experts of small whole numbers, once a process.

It finds what a machine lacks (a C compiler, which triton needs too, a driver, a GPU that knows bf16) before a model
does.
"""

import torch
import triton

from moesaic.errors import DeviceError
from moesaic.kernels.quantized import QuantizedWeight
from moesaic.kernels.triton import products


def run_self_test(device: torch.device) -> str:
    """Return which triton passed.

    Raises: DeviceError for other numbers than expected, and what triton raises.
    """
    for precision in ("bf16", "int8"):
        x = torch.zeros(3, 64, dtype=torch.float32, device=device)
        x[:, 0] = torch.arange(1.0, 4.0, device=device)
        numbers = torch.zeros(1, 32, 64, dtype=torch.int8, device=device)
        numbers[0, :, 0] = torch.arange(32, device=device).to(torch.int8)
        weight = numbers.to(torch.bfloat16)
        quantized = QuantizedWeight(numbers, torch.ones(1, 32, dtype=torch.float32, device=device), 8, None)
        y = products.linear(x, weight if precision == "bf16" else quantized, None, out_dtype=torch.float32)
        expected = x[:, :1] * torch.arange(32.0, device=device)
        if not torch.allclose(y, expected, rtol=1e-5):
            raise DeviceError(
                f"{precision} products of triton's kernels are off by {float((y - expected).abs().max()):.3g}; their "
                f"definition's numbers are required; set MOESAIC_KERNELS=reference, and report it."
            )
    return f"triton {triton.__version__}"
