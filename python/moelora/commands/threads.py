"""How many threads a small model should have."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

ROUNDS = 3


def choose(step: Callable[[], object]) -> int:
    """Leaves torch with all its threads or with one, whichever runs `step` faster, and returns how many.

    The operations of a small model are short: on a machine with other work its threads wait for each other
    longer than they compute.
    """
    every = torch.get_num_threads()
    if every == 1:
        return 1
    seconds = {every: [], 1: []}
    step()
    for _ in range(ROUNDS):
        for count, spent in seconds.items():
            torch.set_num_threads(count)
            started = time.perf_counter()
            step()
            spent.append(time.perf_counter() - started)
    best = min(seconds, key=lambda count: sum(seconds[count]))
    torch.set_num_threads(best)
    return best
