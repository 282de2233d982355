"""Which way is faster, computing where the weights are or bringing them over: a rule from measured rates."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moelora.experts import Compute
from moelora.placement.beside.hot import BIASES, WEIGHTS
from moelora.placement.beside.link import Link
from moelora.placement.beside.order import mark, wait
from moelora.placement.spreading import of_experts
from torch_moelora.formats import PackedWeight

PROBE = 64 << 20  # bytes whose way is timed
ROWS = 64  # an expert, to time the host's arithmetic
MANY = 256  # and the accelerator's
TIMES = 3


class Rates(NamedTuple):
    """What a layer's places do in a second."""

    link: float  # bytes to the accelerator
    host_bytes: float  # of weights that the CPU reads, with a row for each expert
    host_flops: float
    device_flops: float

    def __str__(self) -> str:
        flops = f"{self.host_flops / 1e9:.0f} and {self.device_flops / 1e9:.0f} GF/s"
        return f"link {self.link / 1e9:.1f} GB/s, host {self.host_bytes / 1e9:.1f} GB/s, {flops}"


class Size(NamedTuple):
    """What of a layer the rule goes by."""

    experts: int
    weights: int  # numbers in an expert
    nbytes: int  # of all experts, as stored
    hidden: int

    @classmethod
    def of(cls, parameters: dict[str, Any]) -> Size:
        several = [parameters[name] for name in WEIGHTS]
        numbers = sum(math.prod(weight.shape[1:]) for weight in several)
        experts, _, hidden = several[0].shape
        return cls(experts, numbers, sum(weight.nbytes for weight in several), hidden)


def host_seconds(tokens: int, top_k: int, size: Size, rates: Rates) -> float:
    """A forward on the CPU: its arithmetic or the reading of the experts that are met, and the rows' way."""
    rows = tokens * top_k
    met = size.experts * (1 - (1 - 1 / size.experts) ** rows)
    arithmetic = 2 * rows * size.weights / rates.host_flops
    reading = met * size.nbytes / size.experts / rates.host_bytes
    return max(arithmetic, reading) + tokens * size.hidden * 6 / rates.link


def bring_seconds(tokens: int, top_k: int, size: Size, rates: Rates) -> float:
    """A forward with weights that are brought while the layer before computes: the longer of the two."""
    return max(size.nbytes / rates.link, 2 * tokens * top_k * size.weights / rates.device_flops)


def better(tokens: int, top_k: int, size: Size, rates: Rates) -> str:
    """`bring` or `compute`: for the same arguments the same, so a recomputed layer goes its forward's way."""
    brought = bring_seconds(tokens, top_k, size, rates)
    return "bring" if brought < host_seconds(tokens, top_k, size, rates) else "compute"


def turning_point(top_k: int, size: Size, rates: Rates) -> int | None:
    """The number of tokens from which on weights are brought; None if never up to a million."""
    low, high = 0, 1 << 20
    if better(high, top_k, size, rates) != "bring":
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if better(middle, top_k, size, rates) == "bring" else (middle, high)
    return high


def measure(link: Link, compute: Compute, parameters: dict[str, Any], dtype: torch.dtype) -> Rates:
    """Times a layer's own weights: a few experts of them, for well under a second."""
    size = Size.of(parameters)
    few = min(size.experts, 8)
    rest = {n: v for n, v in parameters.items() if n not in WEIGHTS + BIASES and "lora" not in n}
    here = {
        name: of_experts(parameters[name], list(range(few)))
        for name in WEIGHTS + BIASES
        if parameters.get(name) is not None
    }
    there = {name: weight.to(link.device) for name, weight in here.items()}
    staged = torch.zeros(min(PROBE, max(size.nbytes, 1)), dtype=torch.uint8)

    def run(rows: int, arguments: dict[str, Any], device: torch.device | str) -> Callable[[], Any]:
        ids = torch.arange(few, device=device).repeat(rows).unsqueeze(1)
        x = torch.ones(few * rows, size.hidden, dtype=dtype, device=device)
        gates = torch.ones(few * rows, 1, dtype=dtype, device=device)
        return lambda: compute(x, ids, gates, arguments | rest)

    with torch.no_grad():
        one = _seconds(run(1, here, "cpu"))
        some = _seconds(run(ROWS, here, "cpu"))
        many = _seconds(run(MANY, there, link.device), link)
        sent = _seconds(lambda: link.send(staged), link)
    flops = 2 * few * size.weights
    return Rates(
        link=staged.nbytes / sent,
        host_bytes=size.nbytes / size.experts * few / one,
        host_flops=flops * ROWS / some,
        device_flops=flops * MANY / many,
    )


def _seconds(run: Callable[[], Tensor | PackedWeight], link: Link | None = None) -> float:
    """The least of some times, after one that compiles and allocates."""
    found = []
    for _ in range(TIMES + 1):
        start = time.perf_counter()
        run()
        if link is not None:
            wait(mark(link.device))
        found.append(time.perf_counter() - start)
    return max(min(found[1:]), 1e-9)
