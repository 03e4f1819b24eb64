"""Triton's interpreter on the processor, with bf16 as a GPU has it.

By itself it cuts fp32 off to bf16 instead of rounding it, takes the bits of bf16 operands of a dot product for whole
numbers, and integers made bf16 for bits. TRITON_INTERPRET=1 has to be set before triton is imported, so what uses this
is started in a process of its own.
"""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def mend() -> None:
    builder = interpreter.InterpreterBuilder
    plain_dot, plain_cast = builder.create_dot, builder.cast_impl

    def widened(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        bits = operand.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, total: Any, *others: Any) -> Any:
        return plain_dot(self, widened(a), widened(b), total, *others)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if target.scalar == tl.bfloat16 and source.dtype.scalar != tl.bfloat16:
            numbers = torch.from_numpy(np.ascontiguousarray(source.data, dtype=np.float32))
            bits = numbers.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
            return interpreter.TensorHandle(bits, tl.bfloat16)
        return plain_cast(self, widened(source), target)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl
