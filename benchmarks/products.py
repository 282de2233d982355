"""How fast torch's own products are in a dtype: where a CPU lacks the instructions, some take hundreds of
times as long as in fp32.
"""

from __future__ import annotations

import time

import torch

from .layer import DTYPES

ROWS, SIZE = 64, 512  # of one expert's rows; its weight is SIZE × SIZE
SECONDS = 0.05
HOPELESS = 10  # times slower than fp32's


def why_not(dtype: str, rates: dict[str, float]) -> str | None:
    """Why nobody would use torch's products in `dtype` here, or None. rates: of it and of fp32, in FLOP/s."""
    if rates[dtype] * HOPELESS >= rates["fp32"]:
        return None
    half, full = (f"{float(f'{rates[name] / 1e9:.2g}'):g} GF/s in {name}" for name in (dtype, "fp32"))
    return f"torch.mm of {ROWS} rows does {half} on one core here, {full}"


def rate(dtype: str) -> float:
    """FLOP/s of the slower of the two products that a layer needs: with a weight's transpose, as forward, and
    with the weight itself, as backward. Best of SECONDS each.
    """
    gen = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(n, SIZE, generator=gen).to(DTYPES[dtype]) for n in (ROWS, SIZE))
    slowest = 0.0
    for right in (weight.T, weight):
        best, end = float("inf"), time.perf_counter() + SECONDS
        while best == float("inf") or time.perf_counter() < end:
            start = time.perf_counter()
            rows @ right
            best = min(best, time.perf_counter() - start)
        slowest = max(slowest, best)
    return 2 * ROWS * SIZE**2 / slowest
