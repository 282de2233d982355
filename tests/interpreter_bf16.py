"""bf16 in Triton's interpreter, which stores it as uint16 and would multiply the bit patterns: products of
the values, and rounding to nearest even, as the hardware has them.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def widen(bits: np.ndarray) -> np.ndarray:
    """bf16 bit patterns → fp32 values."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """fp32 values → bf16 bit patterns, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def install() -> None:
    """Teaches the interpreter; products and conversions only, which is all that the kernels do in bf16."""
    builder = interpreter.InterpreterBuilder
    plain_dot, plain_cast = builder.create_dot, builder.cast_impl

    def create_dot(self, a, b, *rest):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (interpreter.TensorHandle(widen(t.data), tl.float32) for t in (a, b))
        return plain_dot(self, a, b, *rest)

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return interpreter.TensorHandle(narrow(src.data), tl.bfloat16)
        if src.dtype.scalar == tl.bfloat16 and dst_type.scalar == tl.float32:
            return interpreter.TensorHandle(widen(src.data), tl.float32)
        return plain_cast(self, src, dst_type)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl
