"""The grouped GEMM that the forward, dX and both rank-sized products share, and what else several operators
need: how rows are found, how a row tile is placed, sums of partial results in a fixed order.

Words: a *position* is a row's place in grouped order, its *slot* the place in slot order, its *token*
slot // top_k. `ROWS` says by which of the three a tensor is indexed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import PackedWeight
from . import configs, unpack, weights
from .route import Routing, Tiles

# Ranks are padded to a multiple: the least that a matrix instruction contracts, and whole 32-byte lines.
RANK_STEP = 16


class Rows(NamedTuple):
    """A 2-D tensor of rows, any strides, and what finds a row in it: "position", "slot" or "token"."""

    tensor: Tensor
    by: str


def rows_of_x(call: NamedTuple) -> Rows:
    return Rows(call.x, "position" if call.x_grouped else "token")


def rows_of_dy(call: NamedTuple) -> Rows:
    grouped = "position" if call.y_grouped else "slot"
    return Rows(call.dy, grouped if call.gates is None else "token")


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums of products of `dtype` are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@triton.jit
def slots_of(slots, position, last, S):
    """Slots of the rows at `position` and which of them are real: before `last`, and pointing into S rows.

    The slot of a row that is not real is some slot all the same, so that it can be read without a mask.
    """
    slot = tl.load(slots + tl.minimum(position, last - 1))
    real = (position < last) & (slot >= 0) & (slot < S)
    return tl.where((slot >= 0) & (slot < S), slot, 0).to(tl.int32), real


@triton.jit
def row_of(position, last, slot, top_k, ROWS: tl.constexpr):
    """Row index, int64: times a stride it passes 2³¹."""
    if ROWS == "position":
        row = tl.minimum(position, last - 1)
    elif ROWS == "slot":
        row = slot
    else:
        row = slot // top_k
    return row.to(tl.int64)


@triton.jit
def halves(acc):
    """The left and right columns of [BM, BN]."""
    return tl.split(acc.reshape(acc.shape[0], 2, acc.shape[1] // 2).permute(0, 2, 1))


@triton.jit
def quarters(acc):
    """[BM, BN] → four times [BM, BN / 4], from left to right."""
    left, right = halves(acc)
    q0, q1 = halves(left)
    q2, q3 = halves(right)
    return q0, q1, q2, q3


@triton.jit
def against(acc, start, end, row_at, real, stride):
    """⟨acc, other⟩ [BM] over the columns from `start` on that are before `end`; rows of other at `row_at`."""
    n = start + tl.arange(0, acc.shape[1])
    at = row_at[:, None] + n.to(tl.int64)[None, :] * stride  # int64: N·stride
    other = tl.load(at, mask=real[:, None] & (n < end)[None, :], other=0.0)  # [BM, BN]
    return tl.sum(acc * other.to(acc.dtype), axis=1)


@triton.jit
def finish(
    acc, start, expert, y_row, o_row, real, gate, y, bias, other, scale, N, y_m, bias_strides, other_strides,
    SCALED: tl.constexpr,
):  # fmt: skip
    """Accumulators [BM, BN] of columns start.. → y. Returns ⟨row, other⟩ [BM], before scale, bias, gate."""
    n = start + tl.arange(0, acc.shape[1])
    n_at = n.to(tl.int64)  # int64: N·stride
    end = tl.where(expert < 0, 0, N)  # for the rows of sentinels nothing is read
    product = tl.zeros((acc.shape[0],), dtype=acc.dtype)
    if other is not None:
        product += against(acc, start, end, other + o_row * other_strides[0], real, other_strides[1])
    if SCALED:
        acc *= tl.full((), scale, acc.dtype)
    if bias is not None:
        bias_at = bias + tl.maximum(expert, 0).to(tl.int64) * bias_strides[0]  # int64: E·stride
        bias_at += n_at * bias_strides[1]
        acc += tl.load(bias_at, mask=n < end, other=0.0).to(acc.dtype)[None, :]
    if gate is not None:
        acc *= gate.to(acc.dtype)[:, None]
    stored = real[:, None] & (n < N)[None, :]  # [BM, BN]
    tl.store(y + y_row[:, None] * y_m + n_at[None, :], acc.to(y.dtype.element_ty), mask=stored)
    return product


@triton.jit(do_not_specialize=["S", "E", "bound", "top_k", "first", "after"])
def grouped_gemm(
    x, w, y, xa, b, bias, gates, other, partial, slots, tiles, starts,
    S, E, K, N, R, bound, top_k, first, after, y_m, scale: "fp64",  # noqa: F821, UP037
    x_strides, w_strides, b_strides, bias_strides, other_strides,
    X_ROWS: tl.constexpr, Y_ROWS: tl.constexpr, OTHER_ROWS: tl.constexpr,
    WEIGHT: tl.constexpr, PRECISION: tl.constexpr, WHOLE_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Grid: (programs,); each takes every programs-th tile of [row tile, column block] of the experts from
    `first` to before `after`, E being that of sentinels.

    y[row] = gate · (scale·(x[row] · w[e]ᵀ + xa[row] · b[e]ᵀ) + bias[e]); rows of sentinels are zero.
    scale counts where SCALED: the rank-sized products, which leave their accumulators scaled.

    x       [rows by X_ROWS, K]
    w       [after - first, N, K], as `weights.describe` gives it, WEIGHT too
    y       [S by Y_ROWS, N], rows y_m apart
    xa      [S by position, R] contiguous, or None; BLOCK_R divides R
    b       [E, N, R], or None
    bias    [E, N], or None
    gates   [S by slot], or None
    other   [rows by OTHER_ROWS, N], or None: partial gets ⟨row before its gate and bias, other⟩ per block
    partial [cdiv(N, BLOCK_N), S by slot], or None
    slots   [S]; tiles [3, bound] and starts [E + 2] as list_tiles writes them
    """
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    blocks_n = tl.cdiv(N, BLOCK_N)
    step = tl.cast(BLOCK_K, tl.int64)  # int64: K·stride
    before = tl.load(starts + first)
    tiles_m = tl.load(starts + after) - before
    # int32 will do: a tile is BLOCK_M·BLOCK_N elements of y, which is in memory.
    for index in range(tl.program_id(0), tiles_m * blocks_n, tl.num_programs(0)):
        # GROUP_M row tiles side by side, then the next column block: they share w[e] in L2.
        group = index // (GROUP_M * blocks_n)
        height = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
        within = index - group * GROUP_M * blocks_n
        tile = group * GROUP_M + within % height
        block_n = within // height

        tile += before
        expert = tl.load(tiles + tile)
        start = block_n * BLOCK_N
        # 0 for the rows of sentinels, of which nothing is read or multiplied.
        steps_k, steps_r = tl.where(expert < 0, 0, K), tl.where(expert < 0, 0, R)
        last = tl.load(tiles + 2 * bound + tile)
        position = tl.load(tiles + bound + tile) + tl.arange(0, BLOCK_M)
        slot, real = slots_of(slots, position, last, S)
        k = tl.arange(0, BLOCK_K)
        x_row = row_of(position, last, slot, top_k, X_ROWS)
        # int64: K·stride
        x_at = x + x_row[:, None] * x_strides[0] + k[None, :].to(tl.int64) * x_strides[1]
        own = expert - first
        w_at = weights.first_tile(w, w_strides, own, start, N, WEIGHT, BLOCK_N, BLOCK_K)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
        for done in range(0, steps_k, BLOCK_K):
            if WHOLE_K:  # noqa: SIM108
                x_tile = tl.load(x_at)  # [BM, BK]
            else:
                x_tile = tl.load(x_at, mask=k[None, :] < K - done, other=0.0)  # [BM, BK]
            # [BK, BN]
            w_tile = weights.tile(
                w, w_at, w_strides, own, start, done, K, WEIGHT, WHOLE_K, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION, out_dtype=ACC)
            x_at += step * x_strides[1]
        if xa is not None:
            r = tl.arange(0, BLOCK_R)
            # int64: S·R
            xa_at = xa + tl.minimum(position, last - 1)[:, None].to(tl.int64) * R + r[None, :]
            b_at = weights.first_tile(b, b_strides, expert, start, N, "", BLOCK_N, BLOCK_R)
            for done in tl.range(0, steps_r, BLOCK_R, num_stages=1):
                b_tile = weights.tile(
                    b, b_at, b_strides, expert, start, done, R, "", True, BLOCK_N, BLOCK_R
                )  # fmt: skip
                # [BM, BR], [BR, BN]
                acc = tl.dot(tl.load(xa_at + done), b_tile, acc, input_precision=PRECISION, out_dtype=ACC)

        # A quarter of the columns at a time: addresses and operands need registers, too.
        q0, q1, q2, q3 = quarters(acc)
        y_row = row_of(position, last, slot, top_k, Y_ROWS)
        o_row = row_of(position, last, slot, top_k, OTHER_ROWS)
        gate = None
        if gates is not None:
            # A sentinel's gate may hold anything; its row is zero.
            gate = tl.load(gates + slot, mask=real & (position < tl.where(expert < 0, 0, last)), other=0.0)
        product = tl.zeros((BLOCK_M,), dtype=ACC)
        for part in tl.static_range(4):
            product += finish(
                (q0, q1, q2, q3)[part], start + part * (BLOCK_N // 4), expert,
                y_row, o_row, real, gate, y, bias, other, scale, N, y_m, bias_strides, other_strides, SCALED,
            )  # fmt: skip
        if partial is not None:
            tl.store(partial + block_n.to(tl.int64) * S + slot, product, mask=real)  # int64: blocks·S


@triton.jit(do_not_specialize=["rows", "top_k"])
def sum_slots(parts, out, rows, top_k, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Grid: (cdiv(rows, BLOCK_M) · cdiv(N, BLOCK_N),). A token's rows, summed in slot order.

    parts [rows · top_k, N] contiguous
    out   [rows, N] contiguous
    """
    blocks_n = tl.cdiv(N, BLOCK_N)
    m = tl.program_id(0) // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    kept = (m < rows)[:, None] & (n < N)[None, :]
    m = m.to(tl.int64)  # int64: S·N
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=parts.dtype.element_ty)
    for j in range(0, top_k):
        acc += tl.load(parts + (m * top_k + j)[:, None] * N + n[None, :], mask=kept, other=0.0)  # [BM, BN]
    tl.store(out + m[:, None] * N + n[None, :], acc.to(out.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=["E", "blocks"])
def sum_chunks(parts, starts, out, size, blocks, BLOCK: tl.constexpr):
    """Grid: (E · blocks,). An expert's chunks, summed in row order; zeros for an expert without any.

    parts  [chunks, size] contiguous
    starts [E + 2]: number of chunks before each expert
    out    [E, size] contiguous; blocks = cdiv(size, BLOCK)
    """
    expert = tl.program_id(0) // blocks
    i = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), dtype=parts.dtype.element_ty)
    wide = tl.cast(size, tl.int64)  # int64: chunks·size
    for chunk in range(tl.load(starts + expert), tl.load(starts + expert + 1)):
        acc += tl.load(parts + chunk * wide + i, mask=i < size, other=0.0)
    tl.store(out + expert * wide + i, acc.to(out.dtype.element_ty), mask=i < size)


def gemm(
    x: Rows, w: Tensor | PackedWeight, y: Rows, routing: Routing, tiles: Tiles, config: configs.Gemm, **added
) -> None:  # fmt: skip
    """Launches `grouped_gemm`, which has the shapes; w is [E, N, K]. added: as `_launch` has it."""
    if isinstance(w, PackedWeight) and w.format != "dense":
        parts = unpack.chunks(w, x.tensor.dtype, routing)
    else:
        parts = [(0, w.codes if isinstance(w, PackedWeight) else w)]
    for first, part in parts:
        _launch(x, part, y, routing, tiles, config, first, **added)


def _launch(
    x: Rows, w: Tensor, y: Rows, routing: Routing, tiles: Tiles, config: configs.Gemm, first: int, *,
    scale: float | None = None, xa: Tensor | None = None, b: Tensor | None = None, bias: Tensor | None = None,
    gates: Tensor | None = None, other: Rows | None = None, partial: Tensor | None = None,
) -> None:  # fmt: skip
    """The experts from `first` on whose weights w holds; with the last of all go the rows of sentinels."""
    count, n, k = w.shape
    after = first + count + (first + count == routing.experts)
    rank = 0 if b is None else b.shape[2]
    block_r = 32 if rank and rank % 32 == 0 else RANK_STEP
    programs = configs.machine(x.tensor.device).processors * config.per_sm
    weight = weights.describe(w, config)
    grouped_gemm[(min(programs, tiles.bound * configs.cdiv(n, config.block_n)),)](
        x.tensor, weight.data, y.tensor, xa, b, bias, gates, other and other.tensor, partial,
        routing.slots, tiles.map, tiles.starts,
        routing.rows, routing.experts, k, n, rank, tiles.bound, routing.top_k, first, after,
        y.tensor.stride(0), 1.0 if scale is None else scale,
        x.tensor.stride(), weight.strides, None if b is None else b.stride(),
        None if bias is None else bias.stride(), None if other is None else other.tensor.stride(),
        X_ROWS=x.by, Y_ROWS=y.by, OTHER_ROWS=other.by if other else "",
        WEIGHT=weight.kind, PRECISION=configs.precision(x.tensor.dtype), WHOLE_K=k % config.block_k == 0,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, BLOCK_R=block_r,
        GROUP_M=config.group_m, SCALED=scale is not None,
        num_warps=config.warps, num_stages=config.stages, maxnreg=config.registers,
    )  # fmt: skip


def packed(lora: Tensor, dtype: torch.dtype, rank_dim: int) -> Tensor:
    """A LoRA parameter as the matrix units want it, its rank a multiple of RANK_STEP: in place if it is so
    and can be read in whole lines, else a copy padded with zeros.

    PEFT's B has the expert as its fastest dimension: a tile read in place would fetch a line per element,
    again for every row tile. The copy is rank-sized, and fp32 masters need the rounding anyway.
    """
    rank = lora.shape[rank_dim]
    if lora.dtype == dtype and 1 in lora.stride()[1:] and rank % RANK_STEP == 0:
        return lora
    if lora.stride(0) == 0 and lora.shape[0] > 1:  # one adapter for all experts
        return packed(lora[:1], dtype, rank_dim).expand(lora.shape[0], -1, -1)
    shape = list(lora.shape)
    shape[rank_dim] = configs.cdiv(rank, RANK_STEP) * RANK_STEP
    allocate = torch.empty if shape[rank_dim] == rank else torch.zeros
    out = allocate(shape, dtype=dtype, device=lora.device)
    out.narrow(rank_dim, 0, rank).copy_(lora)
    return out


def rank_product(
    x: Rows, a: Tensor, rank: int, routing: Routing, tiles: Tiles, scale: float, gates: Tensor | None = None
) -> Tensor:
    """scale·gate·(x · a[e]ᵀ) in grouped order: [S, R] in x's dtype, rounded once. a is [E, R, K], packed: of
    its R rows, and of the result's R columns, those from `rank` on are zeros.
    """
    padded = a.shape[1] != rank
    out = (torch.zeros if padded else torch.empty)(
        (routing.rows, a.shape[1]), dtype=x.tensor.dtype, device=a.device
    )
    config = configs.rank_product(configs.machine(a.device), x.tensor.dtype, rank, tiles.rows)
    # The zeros are not computed: an Inf in x would make them NaN.
    gemm(x, a[:, :rank], Rows(out, "position"), routing, tiles, config, scale=scale, gates=gates)
    return out


def summed(parts: Tensor, rows: int, top_k: int, dtype: torch.dtype) -> Tensor:
    """parts [rows · top_k, N] by slot → [rows, N] in `dtype`."""
    n = parts.shape[1]
    out = torch.empty((rows, n), dtype=dtype, device=parts.device)
    block_m, block_n = configs.elementwise(configs.machine(parts.device), n, parts.dtype)
    grid = (configs.cdiv(rows, block_m) * configs.cdiv(n, block_n),)
    sum_slots[grid](parts, out, rows, top_k, n, BLOCK_M=block_m, BLOCK_N=block_n)
    return out
