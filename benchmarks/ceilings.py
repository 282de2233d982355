"""What this machine can do at most: multiply-add rate of a dtype, and bandwidth."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch

from .layer import DTYPES

GIB = 1 << 30


@dataclass
class Ceilings:
    """FLOP/s and B/s, with how each was measured."""

    rate: float
    bandwidth: float
    rate_by: str
    bandwidth_by: str

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def meanwhile(cls, found: list[Ceilings]) -> Ceilings:
        """Of short measurements: the best rate, which interruptions only lower, and the median bandwidth, of
        which others on the machine take their share for minutes.
        """
        return replace(
            found[0],
            rate=max(c.rate for c in found),
            bandwidth=statistics.median(c.bandwidth for c in found),
        )


def _best(work: Callable[[], None], seconds: float) -> float:
    """Shortest time of one call on the device, tried for that long."""
    work()
    torch.cuda.synchronize()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def measure_rate(dtype: str, device: str, threads: int, seconds: float) -> tuple[float, str]:
    """On the CPU that of the instruction set whose kernels the dtype gets: MOELORA_ISA may choose it."""
    if device == "cuda":
        n = 8192
        a = torch.randn(n, n).to(DTYPES[dtype]).cuda()
        b, out = a.T.contiguous(), torch.empty_like(a)
        best = _best(lambda: torch.mm(a, b, out=out), seconds)
        return 2 * n**3 / best, f"torch.mm of {n}³ in {dtype}"
    from torch_moelora import _C

    isa = _C.isa_report()["chosen"][dtype]
    rate = _C.measure_peak_rate(dtype, threads, seconds)
    return rate, f"multiply-adds of {isa} for {dtype} on registers, {threads} threads"


def measure_bandwidth(device: str, threads: int, seconds: float) -> tuple[float, str]:
    if device == "cuda":
        source = torch.empty(GIB // 4, device=device)
        target = torch.empty_like(source)
        best = _best(lambda: target.copy_(source), seconds)
        return 2 * GIB / best, "device copy of 1 GiB, read and write"
    from torch_moelora import _C

    return _C.measure_read_bandwidth(GIB, threads, seconds), f"read of 1 GiB, {threads} threads"


def measure(
    dtype: str, device: str, threads: int, rate: float | None, bandwidth: float | None, seconds: float = 1.0
) -> Ceilings:
    """What is given is not measured."""
    found = Ceilings(rate or 0.0, bandwidth or 0.0, "as given", "as given")
    if rate is None:
        found.rate, found.rate_by = measure_rate(dtype, device, threads, seconds)
    if bandwidth is None:
        found.bandwidth, found.bandwidth_by = measure_bandwidth(device, threads, seconds)
    return found
