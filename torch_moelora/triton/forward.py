"""scatter_lora: y = x·W[e]ᵀ + scaling·(x·A[e]ᵀ)·B[e]ᵀ (+ bias[e]), by slot, grouped, or summed with gates."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..calls import ScatterLora
from ..layouts import sum_dtype
from . import configs, tiles
from .route import routing
from .tiles import Rows


def scatter_lora(call: ScatterLora) -> Tensor:
    """A rank-sized product, the grouped GEMM with the LoRA as more steps, and with gates a sum over top_k.

    A token's rows stay in the accumulators' dtype until they are summed, so that y is rounded once.
    """
    checks.scatter_lora(call)
    route = routing(call)
    x, weight, lora_a, lora_b = call.x, checks.weight_of(call), call.lora_a, call.lora_b
    _, n, k = weight.shape
    y_dtype = sum_dtype(x.dtype, call.sum_fp32 and call.gates is not None)
    if route.rows == 0:
        return x.new_zeros(0, n, dtype=y_dtype)
    rank = 0 if lora_a is None else lora_a.shape[1]
    rows = tiles.rows_of_x(call)
    gates = None if call.gates is None else call.gates.contiguous()
    sums = gates is not None and route.top_k > 1

    def run(config: configs.Gemm) -> Tensor:
        tile_list = route.tiles(config.block_m)
        xa = b = None
        if lora_a is not None:
            a = tiles.packed(lora_a, x.dtype, 1)
            xa = tiles.rank_product(rows, a, rank, route, tile_list, call.scaling)
            b = tiles.packed(lora_b, x.dtype, 2)
        dtype = tiles.accumulator(x.dtype) if sums else y_dtype
        out = torch.empty((route.rows, n), dtype=dtype, device=x.device)
        y = Rows(out, "position" if call.y_grouped else "slot")
        tiles.gemm(rows, weight, y, route, tile_list, config, xa=xa, b=b, bias=call.bias, gates=gates)
        return tiles.summed(out, route.rows // route.top_k, route.top_k, y_dtype) if sums else out

    shape = (x.device, x.dtype, k, n, rank)
    return run(configs.choose("gemm", *shape, route.per_expert, run, search=not route.invariant))
