"""Weights [E, N, K] as `tiles.grouped_gemm` contracts with them: the host describes one, the kernel asks for
tiles of it. How the numbers are stored is known here only.

A packed weight goes in as integers: its codes, E4M3 and E8M0 scales are bytes that integer operations make
into float32, so that every GPU (sm_80 has no E4M3) and the interpreter (which loses its NaN) compute the
same.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..formats import FORMATS, NESTED_RUN, PackedWeight, nested_values
from . import configs

RUN = tl.constexpr(NESTED_RUN)
NF4, FP4 = (tl.constexpr(FORMATS[name].codes) for name in ("nf4", "fp4"))


class Weight(NamedTuple):
    """data: a tensor, a descriptor of it, or of a packed weight (codes, scale, scale2, zero, table), bytes
    where they are not float32 or a half. strides: the tensor's three; of a packed weight `_layout`.

    kind: "" for a tensor, read by its strides; for a descriptor the order of its last two dimensions, "NK",
    or "KN" for the transpose; of a packed weight the format's name. turned: that is stored as [E, K, N].
    share: of a tile's successive columns, as stored, so many have one scale.
    """

    data: Tensor | TensorDescriptor | tuple
    strides: tuple[int, ...]
    kind: str
    turned: bool = False
    share: int = 1


def describe(w: Tensor | PackedWeight, config: configs.Gemm) -> Weight:
    """w [E, N, K]: a descriptor where the configuration asks for one and the copy engine can follow the
    strides.
    """
    if isinstance(w, PackedWeight):
        if w.format != "dense":
            return _describe_packed(w, config)
        w = w.codes
    for kind, t in (("NK", w), ("KN", w.transpose(1, 2))):
        aligned = t.data_ptr() % 16 == 0 and all(s > 0 and s * t.itemsize % 16 == 0 for s in t.stride()[:2])
        if config.descriptor and aligned and t.stride(2) == 1:
            block = (config.block_n, config.block_k) if kind == "NK" else (config.block_k, config.block_n)
            return Weight(TensorDescriptor.from_tensor(t, [1, *block]), w.stride(), kind)
    return Weight(w, w.stride(), "")


@functools.cache
def _nested_table(device: torch.device) -> Tensor:
    """The values of nested scales: copied to a device once, for a copy in every call would wait for it."""
    return nested_values(device)


def _describe_packed(w: PackedWeight, config: configs.Gemm) -> Weight:
    row = FORMATS[w.format]
    _, rows, columns = w.codes.shape
    columns *= row.per_byte
    scale = w.scale
    rows_each, columns_each = -(-rows // scale.shape[1]), -(-columns // scale.shape[2])
    if row.groups.kind == "grid":
        block = row.groups.least
        rows_each = 1 if scale.shape[1] == rows else block if scale.shape[1] > 1 else rows
        columns_each = block if scale.shape[2] > 1 else columns
    along = config.block_n if w.transposed else config.block_k
    share = along if columns_each >= columns else math.gcd(along, columns_each)
    part = 1 if row.scale2 != "parts" else rows // w.scale2.shape[1]
    none = (0, 0, 0)
    strides = (
        *w.codes.stride()[:2], *scale.stride(),
        *(none[:2] if w.scale2 is None else w.scale2.stride()),
        *(none if w.zero is None else w.zero.stride()),
        rows, columns, rows_each, columns_each, scale.shape[2], part,
    )  # fmt: skip
    codes, scale = (t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t for t in (w.codes, scale))
    data = (codes, scale, w.scale2, w.zero, _nested_table(w.device) if w.is_nested else None)
    return Weight(data, strides, w.format, w.transposed, share)


@triton.jit
def first_tile(
    w, strides, expert, start, N, KIND: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """What `tile` adds steps to: pointers [BLOCK_K, BLOCK_N] to the columns from `start` on, first BLOCK_K
    steps. 0 for a descriptor and for packed weights, which it reads by their indices.
    """
    if KIND == "":
        # Columns past the end wrap around: read without a mask, never stored. A minimum would hide from the
        # compiler that they are contiguous. int64: E·N·K, N·stride and K·stride.
        n = ((start + tl.arange(0, BLOCK_N)) % N).to(tl.int64)
        k = tl.arange(0, BLOCK_K).to(tl.int64)
        e = tl.maximum(expert, 0).to(tl.int64)
        at = w + e * strides[0] + n[None, :] * strides[1] + k[:, None] * strides[2]
    else:
        at = 0
    return at


@triton.jit
def e4m3_value(byte):
    """int32 bytes → float32; 0x7f and 0xff are NaN."""
    size = byte & 0x7F
    bits = tl.where(size == 0x7F, 0x7FC00000, (size << 20) + (120 << 23)) | (byte & 0x80) << 24
    subnormal = (byte & 7).to(tl.float32) * 0.001953125  # 2^-9
    return tl.where(size < 8, tl.where(byte < 128, subnormal, -subnormal), bits.to(tl.float32, bitcast=True))


@triton.jit
def e2m1_value(code):
    """int32 codes of 4 bits → float32."""
    size = code & 7
    bits = tl.where(size < 2, size * (126 << 23), (size << 22) + (126 << 23)) | (code & 8) << 28
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def e8m0_value(byte):
    """int32 exponents → float32: 2^(s - 127), the smallest a subnormal; 255 is NaN."""
    bits = tl.where(byte == 0, 0x00400000, tl.where(byte == 255, 0x7FC00000, byte << 23))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def quarter(code, a: tl.constexpr, b: tl.constexpr, c: tl.constexpr, d: tl.constexpr):
    """One of four by the two low bits."""
    odd = (code & 1) != 0
    return tl.where((code & 2) != 0, tl.where(odd, d, c), tl.where(odd, b, a))


@triton.jit
def table_value(code, T: tl.constexpr):
    """T[code] of 16 numbers, by selections: a load for every number would be fetched ahead to shared memory,
    four bytes for half a byte.
    """
    low = tl.where(
        (code & 4) != 0, quarter(code, T[4], T[5], T[6], T[7]), quarter(code, T[0], T[1], T[2], T[3])
    )
    c, d = quarter(code, T[12], T[13], T[14], T[15]), quarter(code, T[8], T[9], T[10], T[11])
    return tl.where((code & 8) != 0, tl.where((code & 4) != 0, c, d), low)


@triton.jit
def code_value(code, KIND: tl.constexpr):
    """int32 codes → float32, before zero and scale."""
    if KIND == "nf4":
        value = table_value(code, NF4)
    elif KIND == "fp4":
        value = table_value(code, FP4)
    elif KIND == "mxfp4" or KIND == "nvfp4":
        value = e2m1_value(code)
    elif KIND == "fp8":
        value = e4m3_value(code)
    else:
        tl.static_assert(KIND == "int4" or KIND == "int8")
        value = code.to(tl.float32)
    return value


@triton.jit
def scale_value(w, strides, e, row, column, kept, KIND: tl.constexpr):
    """float32 scales of the stored rows and columns, which broadcast; 0 where not kept. int64: all of
    them.
    """
    scale, scale2, table = w[1], w[2], w[4]
    block_row, block_column = row // strides[12], column // strides[13]
    at = scale + e * strides[2] + block_row * strides[3] + block_column * strides[4]
    stored = tl.load(at, mask=kept, other=0)
    if KIND == "mxfp4":
        value = e8m0_value(stored.to(tl.int32))
    elif KIND == "nvfp4":
        part_at = scale2 + e * strides[5] + (row // strides[15]) * strides[6]
        part = tl.load(part_at, mask=row < strides[10], other=0.0)
        value = e4m3_value(stored.to(tl.int32)) * part
    elif (KIND == "nf4" or KIND == "fp4") and scale.dtype.element_ty == tl.uint8:
        run = ((e * strides[10] + row) * strides[14] + block_column) // RUN
        factor = tl.load(scale2 + run * strides[5], mask=kept, other=0.0)
        offset = tl.load(scale2 + run * strides[5] + strides[6], mask=kept, other=0.0)
        value = tl.load(table + stored.to(tl.int32)) * factor + offset
    else:
        value = stored.to(tl.float32)
    return value


@triton.jit
def zero_value(w, strides, e, row, column, kept):
    """The int4 zero in float32, 8 where none is stored."""
    zero = w[3]
    if zero is None:
        value = tl.full((1, 1), 8.0, tl.float32)
    else:
        at = zero + e * strides[7] + (row // strides[12]) * strides[8] + (column // strides[13]) * strides[9]
        value = tl.load(at, mask=kept, other=0).to(tl.float32)
    return value


@triton.jit
def spread(t, lines: tl.constexpr, share: tl.constexpr, TURNED: tl.constexpr):
    """Each of t's columns as stored `share` times: [c, lines] → [c·share, lines]; of a turned weight
    [lines, c] → [lines, c·share].
    """
    if TURNED:
        wide = tl.broadcast_to(t[:, :, None], (lines, t.shape[1], share))
        out = wide.reshape(lines, t.shape[1] * share)
    else:
        wide = tl.broadcast_to(t[:, None, :], (t.shape[0], share, lines))
        out = wide.reshape(t.shape[0] * share, lines)
    return out


@triton.jit
def codes_tile(
    w, strides, e, n, k, kept, N, K, start, done, KIND: tl.constexpr, TURNED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """int32 codes [BLOCK_K, BLOCK_N]; a byte that holds two is read once."""
    codes = w[0] + e * strides[0]
    if KIND == "int8" or KIND == "fp8":
        at = k[:, None] * strides[1] + n[None, :] if TURNED else n[None, :] * strides[1] + k[:, None]
        out = tl.load(codes + at, mask=kept, other=0).to(tl.int32)
    else:
        if TURNED:
            byte = ((start + tl.arange(0, BLOCK_N // 2) * 2) % N // 2).to(tl.int64)
            at = k[:, None] * strides[1] + byte[None, :]
            byte_kept = k[:, None] < K
        else:
            byte = (done // 2 + tl.arange(0, BLOCK_K // 2)).to(tl.int64)
            at = n[None, :] * strides[1] + byte[:, None]
            byte_kept = byte[:, None] * 2 < K
        pair = tl.load(codes + at, mask=byte_kept, other=0).to(tl.int32)
        if KIND == "nf4" or KIND == "fp4":
            both = tl.join(pair >> 4, pair & 15)
        else:
            both = tl.join(pair & 15, pair >> 4)
        out = (both if TURNED else both.permute(0, 2, 1)).reshape(BLOCK_K, BLOCK_N)
    return out


@triton.jit
def packed_tile(
    w, strides, expert, start, done, N, K, dtype: tl.constexpr, KIND: tl.constexpr, TURNED: tl.constexpr,
    SHARE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(value - zero)·scale [BLOCK_K, BLOCK_N], rounded once to dtype; zeros for the steps from K on."""
    # Columns past the end wrap around, and get any scale: never stored. int64: E·N·K.
    e = tl.maximum(expert, 0).to(tl.int64)
    n = ((start + tl.arange(0, BLOCK_N)) % N).to(tl.int64)
    k = (done + tl.arange(0, BLOCK_K)).to(tl.int64)
    kept = k[:, None] < K
    codes = codes_tile(w, strides, e, n, k, kept, N, K, start, done, KIND, TURNED, BLOCK_N, BLOCK_K)
    values = code_value(codes, KIND)
    lines: tl.constexpr = BLOCK_K if TURNED else BLOCK_N
    if TURNED:
        row = k[:, None]
        column = ((start + tl.arange(0, BLOCK_N // SHARE) * SHARE) % N).to(tl.int64)[None, :]
        shared_kept = kept
    else:
        row = n[None, :]
        column = (done + tl.arange(0, BLOCK_K // SHARE) * SHARE).to(tl.int64)[:, None]
        shared_kept = column < K
    scale = scale_value(w, strides, e, row, column, shared_kept, KIND)
    if KIND == "int4":
        zero = zero_value(w, strides, e, row, column, shared_kept)
        zero = tl.broadcast_to(zero, scale.shape)
        values -= spread(zero, lines, SHARE, TURNED)
    values *= spread(scale, lines, SHARE, TURNED)
    return tl.where(kept, values, 0.0).to(dtype)


@triton.jit
def tile(
    w, at, strides, expert, start, done, N, K, dtype: tl.constexpr, KIND: tl.constexpr, TURNED: tl.constexpr,
    SHARE: tl.constexpr, WHOLE_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Wᵀ [BLOCK_K, BLOCK_N] of the columns from `start` on, from step `done` on; zeros for the steps from K
    on, of which there are none where WHOLE_K. A packed weight becomes `dtype`. at: what `first_tile` gives.
    """
    if KIND == "NK":
        values = w.load([expert, start, done]).reshape(BLOCK_N, BLOCK_K).T
    elif KIND == "KN":
        values = w.load([expert, done, start]).reshape(BLOCK_K, BLOCK_N)
    elif KIND != "":
        values = packed_tile(
            w, strides, expert, start, done, N, K, dtype, KIND, TURNED, SHARE, BLOCK_N, BLOCK_K
        )
    elif WHOLE_K:
        values = tl.load(at + tl.cast(done, tl.int64) * strides[2])
    else:
        kept = tl.arange(0, BLOCK_K)[:, None] < K - done
        values = tl.load(at + tl.cast(done, tl.int64) * strides[2], mask=kept, other=0.0)
    return values
