"""Which implementation of the operations this process uses: chosen once for a device, with the reason.

On the CPU the C++ kernels where the processor, a compiler and their self-test allow it, on CUDA those in Triton where
it is installed and their self-test allows it, else PyTorch's operations. The launcher may say otherwise with
MOESAIC_KERNELS: auto, reference, or an instruction set of the CPU (amx, avx512, avx2); one that cannot be had is an
error.
"""

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from textwrap import shorten

import torch

from moesaic.environment import environment
from moesaic.errors import DeviceError
from moesaic.kernels.cpu.build import (
    EMULATED,
    INSTRUCTION_SETS,
    Library,
    build,
    find_compiler,
    load,
    supported_instruction_sets,
)
from moesaic.kernels.threads import rest_soon
from moesaic.logs import logger

VARIABLE = "MOESAIC_KERNELS"
REFERENCE = "reference"
TRITON = "triton"


@dataclass(frozen=True)
class Selection:
    """library: the C++ kernels, None for PyTorch's operations; reason: why these."""

    library: Library | None
    reason: str

    @property
    def name(self) -> str:
        return REFERENCE if self.library is None else self.library.instruction_set


def cpu_kernels() -> Selection:
    """Return what CPU tensors are computed with; the first call may compile for a minute.

    Raises: DeviceError when MOESAIC_KERNELS asks for what this machine cannot do.
    """
    return _select(os.environ.get(VARIABLE) or "auto")


def required_cpu_library() -> Library:
    """Return the C++ kernels, for what exists in no other form and is called where they are."""
    library = cpu_library()
    assert library is not None, "this operator exists in C++ only, and there is no CPU library"
    return library


def cpu_library() -> Library | None:
    """Return the C++ kernels, or None where PyTorch's operations are used.

    Raises: RuntimeError inside forward-mode differentiation: they have no tangents, and torch would take them for 0.
    """
    library = cpu_kernels().library
    if library is not None and getattr(torch.autograd.forward_ad, "_current_level", -1) >= 0:
        raise RuntimeError(
            "forward-mode differentiation (torch.func.jvp, dual_level) was asked of moesaic's kernels, which have "
            "gradients but no tangents; reverse mode is required; use torch.autograd.grad or backward()."
        )
    return library


@dataclass(frozen=True)
class CudaSelection:
    """name: triton or reference, of PyTorch's operations; reason: why these."""

    name: str
    reason: str


def uses_triton(device: torch.device) -> bool:
    """Whether tensors there are computed with the kernels in Triton; the first call for a device may compile."""
    return device.type == "cuda" and cuda_kernels(device).name == TRITON


def has_kernels(device: torch.device) -> bool:
    """Whether there are kernels of ours for packed weights there, and not PyTorch's operations alone."""
    return cpu_library() is not None if device.type == "cpu" else uses_triton(device)


def cuda_kernels(device: torch.device) -> CudaSelection:
    """Return what tensors of a CUDA device are computed with."""
    if (os.environ.get(VARIABLE) or "auto") == REFERENCE:
        return CudaSelection(REFERENCE, f"{VARIABLE}=reference")
    if device.index is None:
        current = torch.cuda.current_device() if torch.cuda.device_count() > 1 else 0
        device = torch.device(device.type, current)
    return _select_for_cuda(device)


@functools.cache
def _select_for_cuda(device: torch.device) -> CudaSelection:
    if importlib.util.find_spec("triton") is None:
        reason = "triton is not installed"
    elif torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        reason = "kernels in triton are for compute capability 8.0 or higher, and this GPU has less"
    else:
        try:
            from moesaic.kernels.triton.self_test import run_self_test

            return CudaSelection(TRITON, run_self_test(device))
        # Whatever a driver, a compiler or a version says no with: there is another way.
        except Exception as error:
            said = str(error).strip().splitlines() or [type(error).__name__]
            reason = f"triton's kernels do not work here ({said[-1]})"
    logger.warning("%s, so that PyTorch's slower operations are used on %s; see `moesaic doctor`", reason, device)
    return CudaSelection(REFERENCE, reason)


# All that torch.compiler.assume_constant_result does, which would load torch's compiler, sympy and triton first: 0.9 s
# of processor time in every start, 150 MB of memory. The tests of one graph under torch.compile hold it.
cpu_library._dynamo_marked_constant = True  # type: ignore[attr-defined]
uses_triton._dynamo_marked_constant = True  # type: ignore[attr-defined]


@contextmanager
def forced(choice: str) -> Iterator[Selection]:
    """Use choice (a value of MOESAIC_KERNELS) inside the block, in this process and the ones it starts.

    Raises: DeviceError when it cannot be had.
    """
    with environment(VARIABLE, choice):
        yield cpu_kernels()


@functools.cache
def _select(choice: str) -> Selection:
    if choice == REFERENCE:
        return Selection(None, f"{VARIABLE}=reference")
    supported = supported_instruction_sets()
    if choice != "auto":
        names = [*INSTRUCTION_SETS, *EMULATED]
        if choice not in names:
            known = ", ".join(["auto", REFERENCE, *INSTRUCTION_SETS])
            raise DeviceError(f"{VARIABLE}={choice} is not known; one of {known} is required; use auto.")
        if choice not in supported and not (choice in EMULATED and supported):
            here = ", ".join(supported) or "none that the kernels are written for"
            raise DeviceError(
                f"{VARIABLE}={choice} was asked for and this processor has {here}; use auto, which takes the best."
            )
        return Selection(_load(choice), f"{VARIABLE}={choice}")
    if not supported:
        return Selection(None, "the kernels are for x86 processors with AVX2, and this is none")
    usable = supported
    if find_compiler() is None:
        usable = [name for name in supported if _is_built(name)]
        if not usable:
            logger.warning(
                "there is no C++ compiler, and no CPU kernels of moesaic's are built, so that PyTorch's slower "
                "operations are used; install g++ to have them"
            )
            return Selection(None, "no C++ compiler (c++, g++ or clang++, or what CXX names), and none are built")
        if usable[0] != supported[0]:
            logger.warning(
                f"moesaic's CPU kernels for {supported[0]} are not built and there is no C++ compiler, so that those "
                f"for {usable[0]} are used; install g++, or build them where this image is made (`moesaic doctor "
                "--build-all`)"
            )
    failures = [f"; {name} is not built" for name in supported if name not in usable]
    told: set[str] = set()
    for name in usable:
        try:
            return Selection(_load(name), f"the best of {', '.join(supported)}" + "".join(failures))
        except DeviceError as error:
            message = str(error)
            if message in told:
                failures.append(f"; {name} failed too")
                continue
            told.add(message)
            logger.warning(message)
            failures.append(f"; {name} failed: {shorten(message.partition(';')[0], 100, placeholder='...')}")
    return Selection(None, "no set of kernels works here: " + "".join(failures).strip("; "))


def _is_built(instruction_set: str) -> bool:
    """Whether the kernels for instruction_set are there, where there is no compiler."""
    try:
        build(instruction_set)
    except DeviceError:
        return False
    return True


def _load(instruction_set: str) -> Library:
    library = load(instruction_set)
    rest_soon(library.function("moesaic_rest_soon", ""), num_threads=torch.get_num_threads())
    return library
