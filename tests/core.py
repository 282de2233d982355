"""The native core, and numpy arrays for it: bf16 is uint16; inputs end where their allocation ends, outputs
lie between guard bytes.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import numpy as np

DTYPES = {"bf16": np.uint16, "fp16": np.float16, "fp32": np.float32, "fp64": np.float64}
# Unit roundoff.
ROUNDOFF = {"bf16": 2.0**-8, "fp16": 2.0**-11, "fp32": 2.0**-24, "fp64": 2.0**-53}

_GUARD, _POISON = 0xA5, 0xFF  # poison is a NaN in every float type
_GUARD_BYTES = 256


def _load() -> ModuleType:
    """The installed module, or the one in the folder that MOELORA_TEST_CORE names (another build)."""
    folder = os.environ.get("MOELORA_TEST_CORE")
    if not folder:
        from torch_moelora import _C

        return _C
    (path,) = Path(folder).glob("_C.*.so")
    spec = importlib.util.spec_from_file_location("_C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


core = _load()
# Where wide ones are emulated, the others are those that the runs beside it test.
KERNEL_SETS = [k for k in core.kernel_sets() if not core.wide_emulated or k.isa not in ("avx2", "portable")]


def accumulator(compute: str) -> str:
    return "fp64" if compute == "fp64" else "fp32"


def to_storage(values: np.ndarray, dtype: str) -> np.ndarray:
    """Rounded to nearest, ties to even."""
    if dtype != "bf16":
        with np.errstate(over="ignore"):
            return values.astype(DTYPES[dtype])
    bits = np.array(values, np.float32, order="C").view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), bits >> 16 | 0x40, rounded).astype(np.uint16)


def to_float(values: np.ndarray) -> np.ndarray:
    """Exact, in fp64."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return values.astype(np.float64)


def random(rng: np.random.Generator, shape: tuple, dtype: str) -> np.ndarray:
    return to_storage(rng.standard_normal(shape).astype(np.float32).astype(np.float64), dtype)


def _filled(byte: int, dtype: np.dtype) -> np.generic:
    """A number all of whose bytes are `byte`."""
    return np.frombuffer(bytes([byte] * dtype.itemsize), dtype)[0]


def placed(values: np.ndarray, pitch: int = 0, step: int = 1, offset: int = 0) -> np.ndarray:
    """The same values behind other strides: `step` elements between columns (it may be negative), `pitch`
    more than needed between rows. NaN lies between them and in the `offset` elements before; nothing follows.
    """
    rows, columns = values.shape if values.ndim == 2 else (1, values.shape[0])
    span = (columns - 1) * abs(step) + 1 if columns else 0
    flat = np.full(
        offset + (rows - 1) * (span + pitch) + span if rows else offset, _filled(_POISON, values.dtype)
    )
    first = offset + (0 if step > 0 else span - 1)
    size = flat.itemsize
    view = np.lib.stride_tricks.as_strided(
        flat[first if first < flat.size else 0 :], (rows, columns), ((span + pitch) * size, step * size)
    )
    view[...] = values
    return view if values.ndim == 2 else view[0]


class Output:
    """A poisoned array, rows `pitch` elements more than needed apart, between guard bytes."""

    def __init__(self, shape: tuple, dtype: str, pitch: int = 0, offset: int = 1):
        kind = np.dtype(DTYPES[dtype])
        rows = int(np.prod(shape[:-1], dtype=np.int64))
        line = (shape[-1] + pitch) * kind.itemsize
        start = _GUARD_BYTES + offset * kind.itemsize
        self.bytes = np.full(start + rows * line + _GUARD_BYTES, _GUARD, np.uint8)
        strides = [kind.itemsize]
        for n in reversed(shape[1:]):
            strides.append(line if len(strides) == 1 else strides[-1] * n)
        self.array = np.ndarray(shape, kind, self.bytes, start, tuple(reversed(strides)))
        self.array[...] = _filled(_POISON, kind)

    def fill(self, values: np.ndarray) -> np.ndarray:
        self.array[...] = values
        return self.array

    def check(self) -> np.ndarray:
        """The array, once nothing around it has changed."""
        values = self.array.copy()
        self.array[...] = _filled(_GUARD, self.array.dtype)
        assert (self.bytes == _GUARD).all(), "bytes outside the output were written"
        self.array[...] = values
        return values


def same_bits(out: np.ndarray, expected: np.ndarray) -> bool:
    """Equal in every bit, but for the payload of a NaN."""
    bits = [np.ascontiguousarray(a).view(f"u{out.itemsize}") for a in (out, expected)]
    both_nan = np.isnan(to_float(out)) & np.isnan(to_float(expected))
    return out.dtype == expected.dtype and bool((both_nan | (bits[0] == bits[1])).all())
