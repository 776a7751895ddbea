"""Triton's interpreter keeps bf16 as raw uint16: it truncates where the GPU rounds, and calculates with the bits.

:func:`install` mends the first and forbids the second: a kernel that does arithmetic on bf16, instead of widening right
after the load, fails; a tensor core's product of bf16 numbers is one of fp32 numbers there. And Triton 3.6's takes an
array of one number for a number, which numpy from 2.4 on does not. For tests only.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def widened(bits: np.ndarray) -> np.ndarray:
    """bf16 bits as float32, exactly."""
    return (np.ascontiguousarray(bits).view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def rounded(values: np.ndarray) -> np.ndarray:
    """float32 as bf16 bits, to the nearest and to even, as the GPU's cvt.rn does."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    nearest = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), nearest)


def _is_bf16(kind) -> bool:
    return kind.scalar == tl.bfloat16


def install() -> None:
    """Change the interpreter of this process."""
    if getattr(InterpreterBuilder, "rounds_bfloat16", False):
        return
    cast, to_float = InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp
    binary, unary = InterpreterBuilder.binary_op, InterpreterBuilder.unary_op
    dot = InterpreterBuilder.create_dot

    def mended_cast(self, source, kind):
        if _is_bf16(source.dtype):
            source = TensorHandle(widened(source.data), tl.float32)
            return source if kind.scalar == tl.float32 else mended_cast(self, source, kind)
        if _is_bf16(kind):
            return TensorHandle(rounded(source.data.astype(np.float32)), tl.bfloat16)
        return cast(self, source, kind)

    def mended_to_float(self, source, kind, rounding):
        if _is_bf16(source.dtype) or _is_bf16(kind):
            return mended_cast(self, source, kind)
        return to_float(self, source, kind, rounding)

    def refuse(*handles):
        if any(_is_bf16(h.dtype) for h in handles):
            raise TypeError("arithmetic on bfloat16 in a kernel: widen it right after the load")

    def mended_dot(self, left, right, *rest):
        wide = (TensorHandle(widened(h.data), tl.float32) if _is_bf16(h.dtype) else h for h in (left, right))
        return dot(self, *wide, *rest)

    def strict_binary(self, left, right, operation):
        refuse(left, right)
        return binary(self, left, right, operation)

    def strict_unary(self, argument, operation):
        refuse(argument)
        return unary(self, argument, operation)

    patch_tensor = interpreter._patch_lang_tensor

    def mended_tensor(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = mended_tensor
    InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp = mended_cast, mended_to_float
    InterpreterBuilder.binary_op, InterpreterBuilder.unary_op = strict_binary, strict_unary
    InterpreterBuilder.create_dot = mended_dot
    InterpreterBuilder.rounds_bfloat16 = True
