"""Interleaved timing: A B C A B C…, so that a machine that slows down slows everyone."""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import numpy as np

Sample = tuple[float, ...]  # seconds of consecutive phases: (forward, backward), or one alone


@dataclass
class Timing:
    """Seconds. Median, and the spread as shortest and quartiles, of the sum of the phases."""

    median: float
    minimum: float
    first_quartile: float
    third_quartile: float
    phases: list[float]  # median of each
    repeats: int

    @classmethod
    def of(cls, samples: list[Sample]) -> Timing:
        total = np.sum(samples, axis=1)
        q1, median, q3 = (float(q) for q in np.quantile(total, (0.25, 0.5, 0.75)))
        phases = [float(p) for p in np.median(samples, axis=0)]
        return cls(median, float(total.min()), q1, q3, phases, len(samples))


def interleave(
    entries: dict[Hashable, Callable[[], Sample]],
    repeats: int,
    warmups: int,
    after_turn: Callable[[], None] = lambda: None,
    lost: Callable[[Hashable, RuntimeError], None] | None = None,
) -> dict[Hashable, Timing]:
    """Times every entry `repeats` times in turn, after `warmups` turns that do not count.

    after_turn is called after every turn that counts. An entry that raises RuntimeError has no further turns
    and no timing: `lost` is told, where there is one.
    """
    samples: dict[Hashable, list[Sample]] = {key: [] for key in entries}
    gc.collect()
    gc.disable()  # a collection would land on whoever happens to be running
    try:
        for turn in range(warmups + repeats):
            for key in list(samples):
                try:
                    sample = entries[key]()
                except RuntimeError as error:
                    if lost is None:
                        raise
                    del samples[key]
                    lost(key, error)
                    continue
                if turn >= warmups:
                    samples[key].append(sample)
            if turn >= warmups:
                after_turn()
    finally:
        gc.enable()
    return {key: Timing.of(taken) for key, taken in samples.items()}
