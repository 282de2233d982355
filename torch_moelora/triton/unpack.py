"""Packed experts made dense, a few at a time, in a workspace that `tiles.grouped_gemm` then reads: each
number is unpacked once for all rows of its expert, and not at all where there are none. How the numbers are
stored is known here only.

Everything packed goes in as integers: codes, E4M3 and E8M0 scales are bytes that integer operations make into
float32, so that every GPU (sm_80 has no E4M3) and the interpreter (which loses its NaN) compute the same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import FORMATS, NESTED_RUN, PackedWeight, nested_values
from . import configs
from .route import Routing, edge

RUN = tl.constexpr(NESTED_RUN)
NF4, FP4 = (tl.constexpr(FORMATS[name].codes) for name in ("nf4", "fp4"))
# Bytes of dense experts at a time, but at least one expert. Enough of them to occupy a GPU.
WORKSPACE = 256 << 20


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
def codes_tile(codes, row, byte, kept, KIND: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """int32 codes [BLOCK_R, BLOCK_C]; a byte that holds two is read once."""
    stored = tl.load(codes + row + byte, mask=kept, other=0).to(tl.int32)
    if KIND == "int8" or KIND == "fp8":
        out = stored
    elif KIND == "nf4" or KIND == "fp4":
        out = tl.join(stored >> 4, stored & 15).reshape(BLOCK_R, BLOCK_C)
    else:
        out = tl.join(stored & 15, stored >> 4).reshape(BLOCK_R, BLOCK_C)
    return out


@triton.jit
def spread(t, SHARE: tl.constexpr):
    """[rows, c] → [rows, c·SHARE], each number SHARE times."""
    wide = tl.broadcast_to(t[:, :, None], (t.shape[0], t.shape[1], SHARE))
    return wide.reshape(t.shape[0], t.shape[1] * SHARE)


@triton.jit(do_not_specialize=["first", "S", "E"])
def unpack_experts(
    w, out, offsets, first, S, E, strides, KIND: tl.constexpr, SHARE: tl.constexpr, PER_BYTE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid: (experts · cdiv(rows, BLOCK_R) · cdiv(columns, BLOCK_C),). (value - zero)·scale of the experts
    from `first` on that have rows, rounded once; out is not written where they have none.

    w       (codes [E, rows, columns / PER_BYTE], scale, scale2, zero, table), `strides` as `_layout` has them
    out     [experts, rows, columns] contiguous
    offsets [E]
    """
    rows, columns = strides[10], strides[11]
    blocks_c = tl.cdiv(columns, BLOCK_C)
    blocks = tl.cdiv(rows, BLOCK_R) * blocks_c
    chosen = tl.program_id(0) // blocks
    within = tl.program_id(0) % blocks
    expert = first + chosen
    if edge(offsets, expert, S, E) > edge(offsets, expert - 1, S, E):
        # int64: E·rows·columns
        e = expert.to(tl.int64)
        row = (within // blocks_c * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None]
        start = within % blocks_c * BLOCK_C
        byte = (start // PER_BYTE + tl.arange(0, BLOCK_C // PER_BYTE)).to(tl.int64)[None, :]
        is_row = row < rows
        kept = is_row & (byte * PER_BYTE < columns)
        codes = w[0] + e * strides[0]
        values = code_value(codes_tile(codes, row * strides[1], byte, kept, KIND, BLOCK_R, BLOCK_C), KIND)
        column = (start + tl.arange(0, BLOCK_C // SHARE) * SHARE).to(tl.int64)[None, :]
        kept = is_row & (column < columns)
        scale = scale_value(w, strides, e, row, column, kept, KIND)
        if KIND == "int4":
            zero = tl.broadcast_to(zero_value(w, strides, e, row, column, kept), scale.shape)
            values -= spread(zero, SHARE)
        values *= spread(scale, SHARE)
        column = (start + tl.arange(0, BLOCK_C)).to(tl.int64)[None, :]
        at = out + (chosen.to(tl.int64) * rows + row) * columns + column
        tl.store(at, values.to(out.dtype.element_ty), mask=is_row & (column < columns))


@functools.cache
def _nested_table(device: torch.device) -> Tensor:
    """The values of nested scales: copied to a device once, for a copy in every call would wait for it."""
    return nested_values(device)


def _layout(w: PackedWeight, block_c: int) -> tuple[tuple[int, ...], int]:
    """Strides of codes (two), scale, scale2 and zero; rows and columns as stored, how many of them have one
    scale, scales in a row, rows of a part; and of a tile's successive columns, how many have one scale.
    """
    row, scale = FORMATS[w.format], w.scale
    _, rows, columns = w.codes.shape
    columns *= row.per_byte
    rows_each, columns_each = -(-rows // scale.shape[1]), -(-columns // scale.shape[2])
    if row.groups.kind == "grid":
        block = row.groups.least
        rows_each = 1 if scale.shape[1] == rows else block if scale.shape[1] > 1 else rows
        columns_each = block if scale.shape[2] > 1 else columns
    share = block_c if columns_each >= columns else math.gcd(block_c, columns_each)
    part = 1 if row.scale2 != "parts" else rows // w.scale2.shape[1]
    strides = (
        *w.codes.stride()[:2], *scale.stride(),
        *((0, 0) if w.scale2 is None else w.scale2.stride()),
        *((0, 0, 0) if w.zero is None else w.zero.stride()),
        rows, columns, rows_each, columns_each, scale.shape[2], part,
    )  # fmt: skip
    return strides, share


def chunks(w: PackedWeight, dtype: torch.dtype, routing: Routing) -> Iterator[tuple[int, Tensor]]:
    """(first expert, experts [·, N, K] from it on) until all are done. The memory is the same for all: what
    reads one must be launched before the next is asked for.
    """
    experts, rows, columns = w.codes.shape
    columns *= FORMATS[w.format].per_byte
    few = min(max(WORKSPACE // (rows * columns * dtype.itemsize), 1), experts)
    few = configs.cdiv(experts, configs.cdiv(experts, few))  # of about the same number
    out = torch.empty((few, rows, columns), dtype=dtype, device=w.device)
    block_r, block_c = configs.unpacking(configs.machine(w.device), columns)
    strides, share = _layout(w, block_c)
    codes, scale = (t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t for t in (w.codes, w.scale))
    data = (codes, scale, w.scale2, w.zero, _nested_table(w.device) if w.is_nested else None)
    blocks = configs.cdiv(rows, block_r) * configs.cdiv(columns, block_c)
    for first in range(0, experts, few):
        count = min(few, experts - first)
        unpack_experts[(count * blocks,)](
            data, out, routing.offsets, first, routing.rows, experts, strides,
            KIND=w.format, SHARE=share, PER_BYTE=FORMATS[w.format].per_byte, BLOCK_R=block_r, BLOCK_C=block_c,
        )  # fmt: skip
        yield first, (out.transpose(1, 2) if w.transposed else out)[:count]
