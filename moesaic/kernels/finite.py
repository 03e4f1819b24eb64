"""Whether numbers are finite, without memory of their size."""

import torch
from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether all of a tensor's numbers are finite. `isfinite().all()` takes twenty times as long in bf16, or more."""
    return not tensor.numel() or all(bool(end.isfinite()) for end in torch.aminmax(tensor))  # NaN is both then
