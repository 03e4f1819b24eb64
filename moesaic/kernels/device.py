"""Which device to compute on."""

import torch

from moesaic.errors import DeviceError


def select_device(name: str = "auto") -> torch.device:
    """Return the device that "auto", "cpu" or "cuda" means here; auto is CUDA where there is one.

    Raises: DeviceError when CUDA is asked for and not there, or the name is another.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise DeviceError(f"device {name!r} is not known; auto, cpu or cuda is required; use one of these.")
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise DeviceError(
            "device cuda was asked for and PyTorch sees no CUDA device; a GPU and a CUDA build of PyTorch are "
            "required; run `moesaic doctor`, or use --device cpu."
        )
    return torch.device("cuda" if has_cuda and name != "cpu" else "cpu")
