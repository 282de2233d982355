"""What Triton's interpreter lacks for these tests: bf16 arithmetic, a check that no kernel touches memory
outside its tensors, other orders of the programs, and some speed.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from torch_moelora import batch_invariance
from torch_moelora.triton import configs


def widen(bits: np.ndarray) -> np.ndarray:
    """bf16 bit patterns → fp32 values."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """fp32 values → bf16 bit patterns, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def install_bf16() -> None:
    """The interpreter keeps bf16 as uint16, multiplies the patterns and truncates: products of the values,
    and rounding to nearest even, instead. Products and conversions are all that the kernels do in bf16.
    """
    builder = interpreter.InterpreterBuilder
    plain_dot, plain_cast = builder.create_dot, builder.cast_impl

    def create_dot(self, a, b, *rest, **options):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (interpreter.TensorHandle(widen(t.data), tl.float32) for t in (a, b))
        return plain_dot(self, a, b, *rest, **options)

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return interpreter.TensorHandle(narrow(src.data), tl.bfloat16)
        if src.dtype.scalar == tl.bfloat16 and dst_type.scalar == tl.float32:
            return interpreter.TensorHandle(widen(src.data), tl.float32)
        return plain_cast(self, src, dst_type)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl


def install_rows() -> None:
    """BLAS sums a row by its place in the tile, as no GPU does: a row at a time where bits are compared."""
    builder = interpreter.InterpreterBuilder
    plain_dot = builder.create_dot

    def create_dot(self, a, b, d, *rest, **options):
        if not batch_invariance.is_batch_invariant() or a.dtype.primitive_bitwidth == 8:
            return plain_dot(self, a, b, d, *rest, **options)
        b = b.data.astype(d.data.dtype)
        rows = np.matmul(a.data.astype(b.dtype)[..., None, :], b[..., None, :, :])
        return interpreter.TensorHandle(rows[..., 0, :] + d.data, d.dtype.scalar)

    builder.create_dot = create_dot


def install_scalars() -> None:
    """A scalar is an array with one dimension, of which numpy ≥ 2.4 makes no int for Triton 3.6."""
    plain = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        plain(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch


class Bounds:
    """The storages of the running kernel's tensors."""

    def __init__(self) -> None:
        self.starts = self.ends = np.zeros(0, np.uint64)

    def enter(self, args) -> None:
        flat = [part for a in args for part in (a if isinstance(a, tuple) else (a,))]
        bases = [getattr(a, "base", a) for a in flat]  # a descriptor's tensor
        storages = [t.untyped_storage() for t in bases if hasattr(t, "untyped_storage")]
        ranges = sorted((s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages)
        self.starts = np.array([start for start, _ in ranges], np.uint64)
        self.ends = np.array([end for _, end in ranges], np.uint64)

    def check(self, what: str, pointers: np.ndarray, mask: np.ndarray, itemsize: int) -> None:
        touched = np.broadcast_to(pointers, np.broadcast_shapes(pointers.shape, mask.shape))
        touched = touched[np.broadcast_to(mask, touched.shape)]
        if touched.size == 0:
            return
        owner = np.searchsorted(self.starts, touched, side="right") - 1
        inside = (owner >= 0) & (touched + np.uint64(itemsize) <= self.ends[owner])
        assert inside.all(), f"{what} outside of the kernel's tensors: {(~inside).sum()} of {touched.size}"


def install_bounds() -> None:
    """Every load and store from here on is checked."""
    bounds, builder, executor = Bounds(), interpreter.InterpreterBuilder, interpreter.GridExecutor
    plain_call = executor.__call__
    plain_load, plain_store = builder.create_masked_load, builder.create_masked_store

    def call(self, *args, **kwargs):
        bounds.enter([*args, *kwargs.values()])
        return plain_call(self, *args, **kwargs)

    def load(self, ptrs, mask, *rest, **options):
        bounds.check("load", ptrs.data, mask.data, ptrs.get_element_ty().primitive_bitwidth // 8)
        return plain_load(self, ptrs, mask, *rest, **options)

    def store(self, ptrs, value, mask, *rest, **options):
        bounds.check("store", ptrs.data, mask.data, ptrs.get_element_ty().primitive_bitwidth // 8)
        return plain_store(self, ptrs, value, mask, *rest, **options)

    executor.__call__ = call
    builder.create_masked_load, builder.create_masked_store = load, store


def check_sums(on: bool) -> None:
    """Whether an integer sum or product that overflows raises."""
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=on)


class Kept:
    """What undoes the interpreter's changes to `triton.language` after a launch: nothing."""

    def restore(self) -> None:
        pass


def install_speed() -> None:
    """The interpreter exchanges `triton.language` for its own at every launch and every call of a device
    function: once for each file of kernels is enough where nothing is compiled. After a launch it copies its
    tensors back, CPU tensors onto themselves. And it does each integer sum again in 64 bits.
    """
    check_sums(False)
    plain_patch, patched = interpreter._patch_lang, set()

    def patch(function):
        if id(function.__globals__) not in patched:
            patched.add(id(function.__globals__))
            plain_patch(function)
        return Kept()

    interpreter._patch_lang = patch
    interpreter.GridExecutor._restore_args_dev = lambda self, *args: None


def other_programs(monkeypatch, count: int) -> None:
    """From here on persistent kernels have `count` programs, and all run in the other order if it is even."""
    builder = interpreter.InterpreterBuilder
    plain = builder.set_grid_idx

    def backwards(self, x, y, z):
        plain(self, self.grid_dim[0] - 1 - x, y, z)

    if count % 2 == 0:
        monkeypatch.setattr(builder, "set_grid_idx", backwards)
    machine = configs.Machine("interpreter", count, "interpreter")
    monkeypatch.setattr(configs, "machine", lambda device: machine)


def install() -> None:
    """Once per process."""
    install_rows()
    install_bf16()
    install_scalars()
    install_bounds()
    install_speed()
