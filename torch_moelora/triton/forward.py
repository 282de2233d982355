"""scatter_lora: y = x·W[e]ᵀ + scaling·(x·A[e]ᵀ)·B[e]ᵀ (+ bias[e]), by slot, grouped, or summed with gates."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from . import configs, tiles
from .route import routing
from .tiles import Rows


def scatter_lora(
    x, weight, sorted_scattered_idxs, expert_offsets, top_k, lora_a=None, lora_b=None, scaling=1.0,
    bias=None, gates=None, x_grouped=False, y_grouped=False,
) -> Tensor:  # fmt: skip
    """A rank-sized product, the grouped GEMM with the LoRA as more steps, and with gates a sum over top_k.

    A token's rows stay in the accumulators' dtype until they are summed, so that y is rounded once.
    """
    checks.scatter_lora(
        x, weight, sorted_scattered_idxs, expert_offsets, top_k, lora_a, lora_b, scaling, bias, gates,
        x_grouped, y_grouped,
    )  # fmt: skip
    route = routing(sorted_scattered_idxs, expert_offsets, top_k)
    n = weight.shape[1]
    if route.rows == 0:
        return x.new_zeros(0, n)
    rank = 0 if lora_a is None else lora_a.shape[1]
    rows = tiles.rows_of_x(x, x_grouped)
    gates = None if gates is None else gates.contiguous()
    sums = gates is not None and top_k > 1

    def run(config: configs.Gemm) -> Tensor:
        tile_list = route.tiles(config.block_m)
        xa = b = None
        if lora_a is not None:
            a = tiles.packed(lora_a, x.dtype, 1)
            xa = tiles.rank_product(rows, a, rank, route, tile_list, scaling)
            b = tiles.packed(lora_b, x.dtype, 2)
        dtype = tiles.accumulator(x.dtype) if sums else x.dtype
        y = Rows(
            torch.empty((route.rows, n), dtype=dtype, device=x.device), "position" if y_grouped else "slot"
        )
        tiles.gemm(rows, weight, y, route, tile_list, config, xa=xa, b=b, bias=bias, gates=gates)
        return tiles.summed(y.tensor, route.rows // top_k, top_k, x.dtype) if sums else y.tensor

    per_expert = route.rows // route.experts
    return run(configs.choose("gemm", x.device, x.dtype, weight.shape[2], n, rank, per_expert, run))
