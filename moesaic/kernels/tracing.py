"""What torch.compile does not look into: functions that call C++ with addresses and are not operators of PyTorch's, and
loops that it would compile anew for all that they depend on.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch._compile import _disable_dynamo
from torch.compiler import is_dynamo_compiling

_P = ParamSpec("_P")
_R = TypeVar("_R")


def untraced(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Make torch.compile break its graph where function is called, and run what is in it as if nothing was compiled.

    As torch.compiler.disable, which would load torch's compiler, sympy and triton in every start; this leaves it to the
    first call that is traced, when they are there.
    """
    outside = _disable_dynamo(function)

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        return outside(*args, **kwargs) if is_dynamo_compiling() else function(*args, **kwargs)

    return call
