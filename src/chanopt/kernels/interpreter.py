"""Repairs of Triton's interpreter (3.6 and 3.7), which runs kernels on a CPU under TRITON_INTERPRET=1.

Its `tl.dot` multiplies the bit patterns of bfloat16 numbers, and ignores the precision that float32 products are asked
for. Tests and `benchmarks/gpu.py --interp` call :func:`repair` before they run a kernel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import triton.language as tl
from triton.runtime import interpreter

# TF32 keeps 10 of float32's 23 bits of mantissa.
_DROPPED = 13


def tf32(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Float32 numbers rounded to TF32, to nearest even.

    >>> tf32(np.float32([1.0, 1 + 2**-10, 1 + 2**-11, 1 + 3 * 2**-11])).tolist() == [1, 1 + 2**-10, 1, 1 + 2**-9]
    True
    """
    bits = values.view(np.uint32).astype(np.uint64)
    bits += (1 << (_DROPPED - 1)) - 1 + ((bits >> _DROPPED) & 1)
    return (bits & (0xFFFFFFFF << _DROPPED)).astype(np.uint32).view(np.float32)


def repair() -> None:
    """Make the interpreter's `tl.dot` right in bfloat16, and round to TF32 where that is asked for."""
    builder: Any = interpreter.InterpreterBuilder
    original = builder.create_dot
    if getattr(builder, "chanopt_repaired", False):
        return

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        wide = [_wide(operand, str(precision).upper()) for operand in (a, b)]
        if all(operand is None for operand in wide):
            return original(self, a, b, d, precision, imprecise)
        left, right = (w if w is not None else operand.data for w, operand in zip(wide, (a, b), strict=True))
        return interpreter.TensorHandle(np.matmul(left, right, dtype=d.data.dtype) + d.data, d.dtype.scalar)

    builder.create_dot = create_dot
    builder.chanopt_repaired = True


def _wide(operand: Any, precision: str) -> npt.NDArray[np.float32] | None:
    """The numbers that the hardware multiplies, where they differ from what the interpreter holds."""
    if operand.dtype.scalar == tl.bfloat16:
        return (operand.data.astype(np.uint32) << 16).view(np.float32)
    if operand.dtype.scalar == tl.float32 and "TF32" in precision and "X3" not in precision:
        return tf32(np.ascontiguousarray(operand.data, dtype=np.float32))
    return None
