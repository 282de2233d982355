"""scatter_lora_dx: the same grouped GEMM on dy and Wᵀ, with the gates' gradients out of its accumulators."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import checks
from ..calls import ScatterLoraDx
from ..layouts import sum_dtype
from . import configs, tiles
from .route import Routing, Tiles, routing
from .tiles import Rows, row_of, slots_of


@triton.jit(do_not_specialize=["S", "E", "bound", "top_k", "blocks"])
def sum_dgates(
    partial, dy, bias, dgates, slots, tiles, starts, S, E, N, bound, top_k, blocks,
    dy_m, dy_n, bias_e, bias_n, DY_ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid: (bound,). dgates[slot] = Σ over column blocks of partial[block, slot] + ⟨dy[row], bias[e]⟩.

    partial [blocks, S by slot]
    dy      [rows by DY_ROWS, N]
    bias    [E, N], or None
    dgates  [S by slot]
    slots   [S]; tiles [3, bound] and starts [E + 2] as list_tiles writes them
    """
    tile = tl.program_id(0)
    if tile < tl.load(starts + E + 1):
        expert = tl.load(tiles + tile)
        last = tl.load(tiles + 2 * bound + tile)
        position = tl.load(tiles + bound + tile) + tl.arange(0, BLOCK_M)
        slot, real = slots_of(slots, position, last, S)
        acc = tl.zeros((BLOCK_M,), dtype=partial.dtype.element_ty)
        wide = tl.cast(S, tl.int64)  # int64: blocks·S
        for block in range(0, blocks):
            acc += tl.load(partial + block * wide + slot)  # [BM]
        if bias is not None:
            dy_row = row_of(position, last, slot, top_k, DY_ROWS)
            for base in range(0, tl.where(expert >= 0, N, 0), BLOCK_N):
                n = base + tl.arange(0, BLOCK_N)
                n_at = n.to(tl.int64)  # int64: N·stride
                dy_at = dy + dy_row[:, None] * dy_m + n_at[None, :] * dy_n
                bias_at = bias + expert.to(tl.int64) * bias_e + n_at * bias_n  # int64: E·stride
                dy_tile = tl.load(dy_at, mask=(n < N)[None, :], other=0.0).to(acc.dtype)  # [BM, BN]
                bias_row = tl.load(bias_at, mask=n < N, other=0.0).to(acc.dtype)  # [BN]
                acc += tl.sum(dy_tile * bias_row[None, :], axis=1)
        tl.store(dgates + slot, acc, mask=real)


def _dgates(partial: Tensor, dy: Rows, bias: Tensor | None, route: Routing, tile_list: Tiles) -> Tensor:
    """partial [column blocks, S] → [T, top_k]."""
    top_k = route.top_k
    out = torch.empty((route.rows // top_k, top_k), dtype=partial.dtype, device=partial.device)
    sum_dgates[(tile_list.bound,)](
        partial, dy.tensor, bias, out, route.slots, tile_list.map, tile_list.starts,
        route.rows, route.experts, dy.tensor.shape[1], tile_list.bound, top_k, partial.shape[0],
        *dy.tensor.stride(), *((None, None) if bias is None else bias.stride()),
        DY_ROWS=dy.by, BLOCK_M=tile_list.rows, BLOCK_N=32,
    )  # fmt: skip
    return out


def scatter_lora_dx(call: ScatterLoraDx) -> tuple[Tensor, Tensor]:
    """dx = gate·(dy·W + (scaling·dy·B)·A): `grouped_gemm` with W, A and B transposed by their strides."""
    checks.scatter_lora_dx(call)
    return input_gradient(call, routing(call))


def input_gradient(call: ScatterLoraDx, route: Routing, dyb: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(dx, dgates). dyb: scaling·dy·B in grouped order, as `tiles.rank_product` gives it, if it is there."""
    dy, lora_a = call.dy, call.lora_a
    weight = checks.weight_of(call)
    n, k = weight.shape[1:]
    top_k, given_dyb = route.top_k, dyb
    accumulators = tiles.accumulator(dy.dtype)
    with_dgates = call.gates is not None and call.x is not None
    dx_dtype = sum_dtype(dy.dtype, call.sum_fp32 and not call.x_grouped)
    if route.rows == 0:
        return dy.new_zeros(0, k, dtype=dx_dtype), dy.new_zeros(
            (0, top_k) if with_dgates else 0, dtype=accumulators
        )
    rank = 0 if lora_a is None else lora_a.shape[1]
    rows = tiles.rows_of_dy(call)
    flat_gates = None if call.gates is None else call.gates.contiguous()
    sums = not call.x_grouped and top_k > 1

    def run(config: configs.Gemm) -> tuple[Tensor, Tensor]:
        tile_list = route.tiles(config.block_m)
        dyb, a, other, partial = given_dyb, None, None, None
        if lora_a is not None:
            if dyb is None:
                b = tiles.packed(call.lora_b, dy.dtype, 2).transpose(1, 2)
                dyb = tiles.rank_product(rows, b, rank, route, tile_list, call.scaling)
            a = tiles.packed(lora_a, dy.dtype, 1).transpose(1, 2)
        if with_dgates:
            other = tiles.rows_of_x(call)
            blocks = configs.cdiv(k, config.block_n)
            partial = torch.empty((blocks, route.rows), dtype=accumulators, device=dy.device)
        dtype = accumulators if sums else dx_dtype
        out = torch.empty((route.rows, k), dtype=dtype, device=dy.device)
        tiles.gemm(
            rows, weight.turned(), Rows(out, "position" if call.x_grouped else "slot"),
            route, tile_list, config, xa=dyb, b=a, gates=flat_gates, other=other, partial=partial,
        )  # fmt: skip
        dx = tiles.summed(out, route.rows // top_k, top_k, dx_dtype) if sums else out
        if not with_dgates:
            return dx, dy.new_empty(0, dtype=accumulators)
        return dx, _dgates(partial, rows, call.bias, route, tile_list)

    shape = (dy.device, dy.dtype, n, k, rank)
    return run(configs.choose("gemm", *shape, route.per_expert, run, search=not route.invariant))
