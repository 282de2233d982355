"""A process that holds one contestant: for its peak memory, or because it needs an environment of its own.

Reads one JSON request a line on standard input and answers each with one line. Everything the contestant
prints goes to standard error.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import sys
import traceback

import torch

from . import memory, products
from .layer import DTYPES, Batch, Case, make_batch, make_layer
from .peers import find_contestant
from .peers.base import Runner


class Worker:
    """The contestant in this process; each method answers the request of its name."""

    def __init__(self) -> None:
        self.case: Case | None = None
        self.batches: dict[Case, Batch] = {}
        self.runner: Runner | None = None
        self.baseline = 0

    def load(self, contestant: str, case: dict, threads: int, keep_freed: bool = False) -> dict:
        """Also takes the baseline of `peak`: before the weights, less what they must take."""
        self.case = Case.from_json(case)
        torch.set_num_threads(threads)
        found = find_contestant(contestant)
        reason = found.missing_here(self.case)
        if reason:
            raise RuntimeError(reason)
        if keep_freed:
            memory.keep_freed(memory.spare_for([self.case.shape], DTYPES[self.case.dtype]))
        gc.collect()
        before = memory.resident()
        layer = make_layer(self.case)
        self.runner = found.load_here(layer)
        self.baseline = before + found.weight_bytes(layer) + layer.bias_bytes()
        return {}

    def _batch(self, case: dict) -> Batch:
        wanted = Case.from_json(case)
        if wanted not in self.batches:
            self.batches[wanted] = make_batch(wanted)
        return self.batches[wanted]

    def time(self, case: dict) -> dict:
        return {"seconds": self.runner.time(self._batch(case))}

    def results(self, case: dict, path: str) -> dict:
        torch.save(self.runner.results(self._batch(case)), path)
        return {}

    def begin_peak(self, case: dict) -> dict:
        self._batch(case)
        gc.collect()
        memory.reset_peak()
        return {}

    def peak(self) -> dict:
        """Most bytes beyond the weights since `begin_peak`."""
        return {"bytes": memory.peak_resident() - self.baseline}

    def product_rate(self, dtype: str) -> dict:
        torch.set_num_threads(1)
        return {"rate": products.rate(dtype)}


def end_with_parent() -> None:
    """Linux: killed when the parent ends, however it ends; this process may be stopped at that time."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def main() -> None:
    end_with_parent()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("do"))(**request)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
