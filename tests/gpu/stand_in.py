"""A CUDA device that is not there: its tensors lie in memory, and mixing them with the processor's is an error.

`simulated()` makes "cuda" a device like any other. A tensor on it (`OnGpu`) says so, wraps one in memory, and every
operation of PyTorch on it is executed on that, after a check of what a GPU would refuse: operands of both sides (but
for numbers without dimensions, and integers as indices) and a generator of the other side. So all of our code for CUDA
runs, autograd included, with the processor's numbers. What CUDA's own kernels compute, and how fast, needs a GPU.

It takes a process of its own, started with what `build` returns loaded before PyTorch, which decides then which devices
there are.
"""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

SOURCE = Path(__file__).with_name("stand_in.cpp")
GPU = torch.device("cuda", 0)

_aten = torch.ops.aten
_MOVES = {_aten._to_copy.default, _aten.copy_.default}
_INDEXING = {
    _aten.index.Tensor, _aten._unsafe_index.Tensor, _aten.index_put.default, _aten.index_put_.default,
    _aten._index_put_impl_.default,
}  # fmt: skip
_Generator = torch.Generator
# By address, since PyTorch wraps a generator anew wherever it hands one on; kept, so that no address comes again.
_gpu_generators: dict[int, torch.Generator] = {}


def build(compiler: list[str], folder: Path) -> Path:
    """Return the library of what PyTorch itself asks of the device, compiled."""
    library, installed = folder / "stand_in.so", Path(torch.__file__).parent
    libraries = installed / "lib"
    command = [*compiler, "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{installed / 'include'}", str(SOURCE)]
    command += ["-o", str(library), f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-lc10", "-ltorch_cpu"]
    subprocess.run(command, check=True)
    return library


class OnGpu(Tensor):
    """A tensor of the device: its size, strides and dtype are those of `inner`, which is in memory."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnGpu":
        outer = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=GPU,
            requires_grad=inner.requires_grad,
        )
        outer.inner = inner
        return outer

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: None, size: Any, stride: Any) -> "OnGpu":
        return OnGpu(inner["inner"])

    def tolist(self) -> Any:
        """PyTorch refuses it for every tensor that wraps another."""
        return self.inner.tolist()

    def __repr__(self) -> str:
        return f"OnGpu({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _execute(operation, args, kwargs or {})


class _Simulation(TorchDispatchMode):
    """Sees operations without a tensor of the device too: those that make one."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _execute(operation, args, kwargs or {})


class _GeneratorOfEither(_Generator):
    """torch.Generator, which takes the device too."""

    def __new__(cls, device: str | torch.device = "cpu") -> torch.Generator:  # type: ignore[misc]
        generator = _Generator()
        if torch.device(device).type == "cuda":
            _gpu_generators[generator._cdata] = generator
        return generator


def _execute(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if operation is _aten._fused_sdp_choice.default:
        return 0  # attention in plain operations, since CUDA's other forms are not there
    if operation is _aten.is_pinned.default:
        return False
    if operation is _aten.mm.dtype:  # which the processor does not have; both are called below
        return _execute(_aten.mm.default, tuple(_execute(_aten.to.dtype, (each, args[2]), {}) for each in args[:2]), {})
    on_gpu = _result_is_on_gpu(operation, args, kwargs)
    asked = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    if asked.get("device") is not None and torch.device(asked["device"]).type == "cuda":
        asked["device"] = torch.device("cpu")
    result = operation(*_inner(args), **_inner(asked))
    if not on_gpu:
        return result
    wrapped = tree_map_only(Tensor, lambda tensor: tensor if isinstance(tensor, OnGpu) else OnGpu(tensor), result)
    return return_and_correct_aliasing(operation, args, kwargs, wrapped)


def _result_is_on_gpu(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Raises: RuntimeError where CUDA would."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    on_gpu = any(isinstance(tensor, OnGpu) for tensor in tensors)
    if on_gpu and operation not in _MOVES:
        others = [tensor for tensor in tensors if not isinstance(tensor, OnGpu) and tensor.dim()]
        if operation in _INDEXING and isinstance(args[0], OnGpu):
            others = [tensor for tensor in others if tensor.dtype not in (torch.int64, torch.bool)]
        is_written = operation._schema.is_mutable and type(args[0]) is Tensor
        if others or is_written:
            sizes = [(tuple(tensor.shape), tensor.device.type) for tensor in tensors]
            raise RuntimeError(f"{operation} of tensors on two devices: {sizes}")
    if kwargs.get("device") is not None:
        on_gpu = torch.device(kwargs["device"]).type == "cuda"
    elif operation is _aten.copy_.default:
        on_gpu = isinstance(args[0], OnGpu)
    generator = kwargs.get("generator")
    if generator is not None and (generator._cdata in _gpu_generators) != on_gpu:
        raise RuntimeError(f"{operation} with a generator of the other device")
    return on_gpu


def _inner(values: Any) -> Any:
    return tree_map_only(OnGpu, lambda tensor: tensor.inner, values)


@contextlib.contextmanager
def _launches() -> Iterator[None]:
    """Kernels of Triton's interpreter, where it is asked for, take the device's tensors."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def unwrapped(executor: Any, *args: Any, **kwargs: Any) -> None:
        launch(executor, *_inner(args), **_inner(kwargs))

    with mock.patch.object(GridExecutor, "__call__", unwrapped):
        yield


@contextlib.contextmanager
def simulated() -> Iterator[None]:
    """Inside, tensors are made on "cuda", and moved there and back."""
    free_and_total = (8 << 30, 8 << 30)
    with (
        _launches(),
        mock.patch("torch.cuda.is_available", lambda: True),
        mock.patch("torch.cuda._lazy_init", lambda: None),
        mock.patch("torch.cuda.synchronize", lambda device=None: None),
        mock.patch("torch.cuda.mem_get_info", lambda device=None: free_and_total),
        mock.patch("torch.cuda.get_device_capability", lambda device=None: (9, 0)),
        mock.patch("torch.cuda.memory_reserved", lambda device=None: 0),
        mock.patch("torch.cuda.memory_allocated", lambda device=None: 0),
        mock.patch("torch.Generator", _GeneratorOfEither),
        # In this thread, whose simulation it is.
        torch.autograd.set_multithreading_enabled(False),
        _Simulation(),
    ):
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(device="cuda"): made in memory, then moved
        try:
            yield
        finally:
            torch._C._set_only_lift_cpu_tensors(False)
