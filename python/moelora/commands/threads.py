"""How many CPU threads a run should have."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch
from torch import nn

from moelora.commands import depth
from moelora.errors import MoeloraError

ROUNDS = 3
SECONDS = 15.0  # spent on measuring, about: a step that takes longer is measured once
HOPELESS = 4.0  # times slower than the best: not measured again
WORTH = 1.1  # times faster that fewer threads must be
PIECE = 0.3  # seconds of a forward pass that are enough to compare by
PER_CPU = 4


def check(count: int) -> None:
    """Raises: MoeloraError for a number of threads that no machine like this one can use."""
    cpus = os.cpu_count() or 1
    if count > PER_CPU * cpus:
        raise MoeloraError(
            f"--threads is {count}, expected at most {PER_CPU * cpus}: this machine has {cpus} CPUs"
        )


def choose(step: Callable[[], object]) -> int:
    """Leaves torch with all its threads, half of them or one, whichever is fastest; returns how many.

    The operations of a small model are short: on a machine with other work its threads wait for each other
    longer than they compute. Hyperthreads can slow large ones down. What disturbs a measurement, files being
    written back for one, is over when the training runs: the best round counts, and the rounds take turns.
    """
    every = torch.get_num_threads()
    seconds: dict[int, list[float]] = {count: [] for count in (every, every // 2, 1) if count}
    if len(seconds) == 1:
        return every
    started = time.perf_counter()
    step()  # the first one also allocates
    for _ in range(ROUNDS):
        for count, spent in seconds.items():
            torch.set_num_threads(count)
            before = time.perf_counter()
            step()
            spent.append(time.perf_counter() - before)
        fastest = min(map(min, seconds.values()))
        seconds = {n: spent for n, spent in seconds.items() if min(spent) <= HOPELESS * fastest}
        if len(seconds) == 1 or time.perf_counter() - started > SECONDS:
            break
    fastest = min(map(min, seconds.values()))
    best = max(count for count, spent in seconds.items() if min(spent) <= WORTH * fastest)
    torch.set_num_threads(best)
    return best


def piece(model: nn.Module, forward: Callable[[], object]) -> Callable[[], object]:
    """The forward pass of a model through as many of its first layers as it does in some time: layers are
    alike, and all of a large model would take minutes.
    """
    layers = depth.layers(model)
    least = depth.least(layers)
    with depth.first(layers, least):
        forward()  # which also reads the weights
        started = time.perf_counter()
        forward()
        each = (time.perf_counter() - started) / least
    count = min(len(layers), max(least, int(PIECE / max(each, 1e-9))))

    def step() -> None:
        with depth.first(layers, count):
            forward()

    return step
