"""Gradients that sum over an expert's rows: scatter_lora_dab, scatter_lora_dw and scatter_lora_dbias.

dA and dB are sums of outer products of a rank-sized row and a wide one. An expert's rows are cut into chunks
that are summed side by side, and the chunks are added up in row order by a second pass: no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import checks
from ..calls import ScatterLoraDab, ScatterLoraDbias, ScatterLoraDw
from ..layouts import empty_gradient
from . import configs, tiles
from .route import Routing, Tiles, edge, routing
from .tiles import Rows, row_of, slots_of


@triton.jit
def chunk_of(index, tiles, starts, offsets, S, E, bound, LISTED: tl.constexpr):
    """Rows [first, last) of chunk `index`, which is a whole expert unless LISTED."""
    if LISTED:
        exists = index < tl.load(starts + E)
        first = tl.load(tiles + bound + index, mask=exists, other=0)
        last = tl.load(tiles + 2 * bound + index, mask=exists, other=0)
    else:
        first = edge(offsets, index - 1, S, E)
        last = tl.maximum(edge(offsets, index, S, E), first)
    return first, last


@triton.jit(do_not_specialize=["S", "E", "bound", "top_k", "blocks_p", "blocks_q"])
def row_products(
    p, q, gates, out, slots, tiles, starts, offsets, S, E, P, Q, p_width, bound, top_k, blocks_p, blocks_q,
    p_m, p_n, q_m, q_n, out_c, out_p, out_q,
    P_ROWS: tl.constexpr, Q_ROWS: tl.constexpr, LISTED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Grid: (chunks · blocks_q · blocks_p,). out[chunk, i, j] = Σ gate·p[row, i]·q[row, j] over its rows.

    p       [rows by P_ROWS, p_width], p_width ≥ P
    q       [rows by Q_ROWS, Q]
    gates   [S by slot], or None
    out     [chunks, P, Q]
    slots   [S]
    tiles   [3, bound] and starts [E + 2] as list_tiles writes them, where LISTED: those are the chunks
    offsets [E]: else there is one chunk an expert
    """
    ACC: tl.constexpr = tl.float64 if p.dtype.element_ty == tl.float64 else tl.float32
    chunk = tl.program_id(0) // (blocks_q * blocks_p)
    block_q = tl.program_id(0) // blocks_p % blocks_q
    first, last = chunk_of(chunk, tiles, starts, offsets, S, E, bound, LISTED)
    i = tl.program_id(0) % blocks_p * BLOCK_P + tl.arange(0, BLOCK_P)
    j = block_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    # Columns past the end wrap around: never stored. int64: columns·stride.
    p_at = p + (i % p_width).to(tl.int64) * p_n
    q_at = q + (j % Q).to(tl.int64) * q_n
    acc = tl.zeros((BLOCK_Q, BLOCK_P), dtype=ACC)
    for row in range(first, last, BLOCK_S):
        position = row + tl.arange(0, BLOCK_S)
        slot, real = slots_of(slots, position, last, S)
        p_row = row_of(position, last, slot, top_k, P_ROWS)
        q_row = row_of(position, last, slot, top_k, Q_ROWS)
        p_tile = tl.load(p_at[None, :] + p_row[:, None] * p_m, mask=real[:, None], other=0.0)  # [BS, BP]
        q_tile = tl.load(q_at[None, :] + q_row[:, None] * q_m, mask=real[:, None], other=0.0)  # [BS, BQ]
        if gates is not None:
            gate = tl.load(gates + slot, mask=real, other=0.0).to(ACC)  # [BS]
            p_tile = (p_tile.to(ACC) * gate[:, None]).to(p_tile.dtype)
        acc = tl.dot(q_tile.T, p_tile, acc, input_precision=PRECISION, out_dtype=ACC)  # [BQ, BP]
    if not LISTED or first < last:
        # int64: chunks·P·Q, and P·stride and Q·stride within one chunk
        out_at = out + chunk.to(tl.int64) * out_c + i[None, :].to(tl.int64) * out_p
        out_at += j[:, None].to(tl.int64) * out_q
        tl.store(out_at, acc.to(out.dtype.element_ty), mask=(i < P)[None, :] & (j < Q)[:, None])


@triton.jit(do_not_specialize=["S", "E", "bound", "top_k", "blocks"])
def row_sums(
    dy, gates, out, slots, tiles, starts, offsets, S, E, N, bound, top_k, blocks, dy_m, dy_n,
    DY_ROWS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid: (chunks · blocks,). out[chunk, n] = Σ gate·dy[row, n] over the chunk's rows.

    dy     [rows by DY_ROWS, N]
    gates  [S by slot], or None
    out    [chunks, N] contiguous; blocks = cdiv(N, BLOCK_N)
    slots  [S]; tiles [3, bound] and starts [E + 2] as list_tiles writes them; offsets [E]
    """
    ACC: tl.constexpr = out.dtype.element_ty
    chunk = tl.program_id(0) // blocks
    first, last = chunk_of(chunk, tiles, starts, offsets, S, E, bound, True)
    n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    dy_at = dy + n.to(tl.int64) * dy_n  # int64: N·stride
    acc = tl.zeros((BLOCK_N,), dtype=ACC)
    for row in range(first, last, BLOCK_S):
        position = row + tl.arange(0, BLOCK_S)
        slot, real = slots_of(slots, position, last, S)
        dy_row = row_of(position, last, slot, top_k, DY_ROWS)
        kept = real[:, None] & (n < N)[None, :]  # [BS, BN]
        tile = tl.load(dy_at[None, :] + dy_row[:, None] * dy_m, mask=kept, other=0.0).to(ACC)  # [BS, BN]
        if gates is not None:
            tile *= tl.load(gates + slot, mask=real, other=0.0).to(ACC)[:, None]
        acc += tl.sum(tile, axis=0)
    if first < last:
        tl.store(out + chunk.to(tl.int64) * N + n, acc, mask=n < N)  # int64: chunks·N


def _chunks(route: Routing) -> Tiles:
    """Chunks of about an expert's share of the rows, but enough of them for a GPU where experts are few."""
    return route.tiles(configs.bucket(route.rows // max(route.experts, 64), 128, 4096))


def _sum_chunks(parts: Tensor, chunks: Tiles, out: Tensor) -> Tensor:
    """parts [chunks, ·] → out [E, ·]."""
    experts, size = out.shape[0], out[0].numel()
    block = configs.line(configs.machine(out.device), size)
    blocks = configs.cdiv(size, block)
    tiles.sum_chunks[(experts * blocks,)](parts, chunks.starts, out, size, blocks, BLOCK=block)
    return out


def _products(
    p: Rows, q: Rows, out: Tensor, route: Routing, chunks: Tiles | None, gates: Tensor | None = None
) -> None:
    """out [chunks or E, P, Q] = Σ gate·p·qᵀ, with one chunk an expert where `chunks` is None."""
    columns_p, columns_q = out.shape[1:]
    dtype = p.tensor.dtype
    listed = (None, None, 0) if chunks is None else (chunks.map, chunks.starts, chunks.bound)

    def run(config: configs.Outer) -> None:
        block_p = configs.bucket(columns_p, 16, config.block_p)
        blocks = configs.cdiv(columns_p, block_p), configs.cdiv(columns_q, config.block_q)
        row_products[(out.shape[0] * blocks[0] * blocks[1],)](
            p.tensor, q.tensor, gates, out, route.slots, *listed[:2], route.offsets,
            route.rows, route.experts, columns_p, columns_q, p.tensor.shape[1], listed[2], route.top_k,
            *blocks, *p.tensor.stride(), *q.tensor.stride(), *out.stride(),
            P_ROWS=p.by, Q_ROWS=q.by, LISTED=chunks is not None, PRECISION=configs.precision(dtype),
            BLOCK_P=block_p, BLOCK_Q=config.block_q, BLOCK_S=config.block_s,
            num_warps=config.warps, num_stages=config.stages, maxnreg=config.registers,
        )  # fmt: skip

    per_expert = route.rows // route.experts
    run(configs.choose("outer", out.device, dtype, columns_q, columns_p, 0, per_expert, run))


def scatter_lora_dab(call: ScatterLoraDab) -> tuple[Tensor, Tensor]:
    """dA = Σ (scaling·gate·dy·B)ᵀ·x and dB = Σ dyᵀ·(scaling·gate·x·Aᵀ)."""
    checks.scatter_lora_dab(call)
    return lora_gradient(call, routing(call))


def dy_times_b(call: ScatterLoraDab, route: Routing) -> Tensor:
    """scaling·gate·dy·B in grouped order, rounded once."""
    dy, gates = call.dy, call.gates
    b = tiles.packed(call.lora_b, dy.dtype, 2).transpose(1, 2)
    gates = None if gates is None else gates.contiguous()
    rank, tile_list = call.lora_b.shape[2], _rank_tiles(dy, route)
    return tiles.rank_product(tiles.rows_of_dy(call), b, rank, route, tile_list, call.scaling, gates)


def _rank_tiles(rows: Tensor, route: Routing) -> Tiles:
    machine = configs.machine(rows.device)
    return route.tiles(configs.rank_rows(machine, rows.dtype, route.per_expert))


def lora_gradient(call: ScatterLoraDab, route: Routing, dyb: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(da, db). scaling and gate are in the rank-sized factors, before their one rounding.

    dyb: what `dy_times_b` gives, if it is there.
    """
    x, lora_a, lora_b = call.x, call.lora_a, call.lora_b
    if dyb is None and route.rows:
        dyb = dy_times_b(call, route)
    da = torch.empty(lora_a.shape, dtype=lora_a.dtype, device=lora_a.device)
    db = empty_gradient(lora_b)
    if route.rows == 0:
        return da.zero_(), db.zero_()
    (_, rank, k), n = lora_a.shape, lora_b.shape[1]
    wide_x, wide_dy = tiles.rows_of_x(call), tiles.rows_of_dy(call)
    gates = None if call.gates is None else call.gates.contiguous()
    a = tiles.packed(lora_a, x.dtype, 1)
    xa = tiles.rank_product(wide_x, a, rank, route, _rank_tiles(x, route), call.scaling, gates)
    chunks = _chunks(route)
    parts = torch.empty((chunks.bound, rank, k), dtype=tiles.accumulator(x.dtype), device=x.device)
    _products(Rows(dyb, "position"), wide_x, parts, route, chunks)
    _sum_chunks(parts, chunks, da)
    parts = torch.empty((chunks.bound, n, rank), dtype=tiles.accumulator(x.dtype), device=x.device)
    _products(Rows(xa, "position"), wide_dy, parts.transpose(1, 2), route, chunks)
    by_expert = db if db.is_contiguous() else torch.empty(db.shape, dtype=db.dtype, device=db.device)
    _sum_chunks(parts, chunks, by_expert)
    return da, db if db is by_expert else db.copy_(by_expert)


def scatter_lora_dw(call: ScatterLoraDw) -> Tensor:
    """dW[e] = Σ (gate·dy)ᵀ·x: one program a tile of dW and all rows of its expert."""
    checks.scatter_lora_dw(call)
    route = routing(call)
    x, gates = call.x, call.gates
    shape = (route.experts, call.dy.shape[1], x.shape[1])
    if route.rows == 0:
        return x.new_zeros(shape)
    dw = torch.empty(shape, dtype=x.dtype, device=x.device)
    wide_x, wide_dy = tiles.rows_of_x(call), tiles.rows_of_dy(call)
    _products(wide_dy, wide_x, dw, route, None, None if gates is None else gates.contiguous())
    return dw


def scatter_lora_dbias(call: ScatterLoraDbias) -> Tensor:
    """dbias[e] = Σ gate·dy, by chunks as dA and dB."""
    checks.scatter_lora_dbias(call)
    route = routing(call)
    dy, gates, n = call.dy, call.gates, call.dy.shape[1]
    dbias = torch.empty((route.experts, n), dtype=dy.dtype, device=dy.device)
    if route.rows == 0:
        return dbias.zero_()
    chunks = _chunks(route)
    parts = torch.empty((chunks.bound, n), dtype=tiles.accumulator(dy.dtype), device=dy.device)
    block = configs.bucket(n, 16, 128)
    blocks = configs.cdiv(n, block)
    row_sums[(chunks.bound * blocks,)](
        dy, None if gates is None else gates.contiguous(), parts, route.slots, chunks.map, chunks.starts,
        route.offsets, route.rows, route.experts, n, chunks.bound, route.top_k, blocks, *dy.stride(),
        DY_ROWS=tiles.rows_of_dy(call).by, BLOCK_S=32, BLOCK_N=block,
        num_warps=4, maxnreg=configs.registers(8),
    )  # fmt: skip
    return _sum_chunks(parts, chunks, dbias)
