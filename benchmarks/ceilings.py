"""What this machine can do at most: multiply-add rate of a dtype, and bandwidth."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

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


def machine_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    model = "CPU"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = (line for line in cpuinfo.read_text().splitlines() if line.startswith("model name"))
        model = next(names, ": CPU").split(":", 1)[1].strip()
    return f"{model}, {os.cpu_count()} cores"


def _best(work: Callable[[], None], seconds: float, synchronize: Callable[[], None]) -> float:
    """Shortest time of one call, tried for that long."""
    work()
    synchronize()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        work()
        synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def _native(name: str) -> Callable | None:
    """A measurement in the extension, where it has one."""
    try:
        from torch_moelora import _C
    except ImportError:
        return None
    return getattr(_C, name, None)


def _torch_rate(dtype: str, device: str, seconds: float) -> tuple[float, str]:
    n = 8192 if device == "cuda" else 2048
    a = torch.randn(n, n).to(DTYPES[dtype]).to(device)
    b, out = a.T.contiguous(), torch.empty_like(a)
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    best = _best(lambda: torch.mm(a, b, out=out), seconds, synchronize)
    return 2 * n**3 / best, f"torch.mm of {n}³ in {dtype}"


def measure_rate(dtype: str, device: str, threads: int, seconds: float) -> tuple[float, str]:
    native = _native("measure_dot_rate") if device == "cpu" else None
    if native is None:
        rate, by = _torch_rate(dtype, device, seconds)
        return rate, by if device == "cuda" else f"{by}: an estimate from below"
    return native(dtype, threads, seconds), f"the kernel for {dtype} on cached operands, {threads} threads"


def measure_bandwidth(device: str, threads: int, seconds: float) -> tuple[float, str]:
    if device == "cuda":
        source = torch.empty(GIB // 4, device=device)
        target = torch.empty_like(source)
        best = _best(lambda: target.copy_(source), seconds, torch.cuda.synchronize)
        return 2 * GIB / best, "device copy of 1 GiB, read and write"
    native = _native("measure_read_bandwidth")
    if native is not None:
        return native(GIB, threads, seconds), f"read of 1 GiB, {threads} threads"
    source = torch.zeros(GIB // 8, dtype=torch.int64)
    best = _best(lambda: source.max(), seconds, lambda: None)
    return GIB / best, "torch reduction over 1 GiB: an estimate from below"


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
