"""Where tensors lie, as C++ code takes it, and objects that remember it."""

from functools import cached_property
from typing import Any

from torch import Tensor


def address_of(tensor: Tensor | None) -> int | None:
    """Return where a tensor's data begins; None, which C++ sees as null, where there is none."""
    return None if tensor is None else tensor.data_ptr()


class RemembersAddresses:
    """What it has cached holds addresses of its tensors, and stays behind when it is copied or pickled."""

    def __getstate__(self) -> dict[str, Any]:
        def is_cached(name: str) -> bool:
            return isinstance(getattr(type(self), name, None), cached_property)

        return {name: value for name, value in vars(self).items() if not is_cached(name)}
