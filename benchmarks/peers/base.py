"""What a contestant is: something that loads a layer and then runs batches through it, forward and backward.

Imports torch only, like `benchmarks.layer`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ..layer import LORA_NAMES, Batch, Case, Layer, nbytes

# "y", "dx", "dgates", and "d" + each of LORA_NAMES in the parameter's shape.
Results = dict[str, Tensor]


class Runner:
    """A layer as one contestant holds it."""

    def time(self, batch: Batch) -> tuple[float, float]:
        """Seconds of one forward and of its backward."""
        raise NotImplementedError

    def results(self, batch: Batch) -> Results:
        raise NotImplementedError

    def close(self) -> None:
        """Frees what garbage collection does not."""


class AutogradRunner(Runner):
    """forward(x, expert_idxs, gates) → y, differentiated by torch in x, gates and `parameters`.

    `views` turns the parameters' gradients, in their order, into those of LORA_NAMES.
    """

    def __init__(
        self,
        forward: Callable[[Tensor, Tensor, Tensor], Tensor],
        parameters: list[Tensor],
        views: Callable[[list[Tensor]], list[Tensor]] = list,
    ) -> None:
        self.forward, self.parameters, self.views = forward, parameters, views

    def _step(self, batch: Batch, mark: Callable[[], None]) -> tuple[Tensor, tuple[Tensor, ...]]:
        mark()
        y = self.forward(batch.x, batch.expert_idxs, batch.gates)
        mark()
        grads = torch.autograd.grad(y, [batch.x, batch.gates, *self.parameters], batch.dy)
        mark()
        return y, grads

    def time(self, batch: Batch) -> tuple[float, float]:
        clock = make_clock(batch.x.device)
        self._step(batch, clock.mark)
        return clock.intervals()

    def results(self, batch: Batch) -> Results:
        y, (dx, dgates, *grads) = self._step(batch, lambda: None)
        named = {f"d{name}": grad for name, grad in zip(LORA_NAMES, self.views(grads), strict=True)}
        return {"y": y.detach(), "dx": dx, "dgates": dgates, **named}


class _CpuClock:
    def __init__(self) -> None:
        self.times: list[float] = []

    def mark(self) -> None:
        self.times.append(time.perf_counter())

    def intervals(self) -> tuple[float, ...]:
        return tuple(b - a for a, b in zip(self.times, self.times[1:], strict=False))


class _CudaClock:
    """Events on the stream: the device's time. The host gets a head start of more than a layer's launches."""

    HEAD_START = 40_000_000  # clock cycles, some 20 milliseconds

    def __init__(self) -> None:
        torch.cuda.synchronize()
        torch.cuda._sleep(self.HEAD_START)
        self.events: list[torch.cuda.Event] = []

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.events.append(event)

    def intervals(self) -> tuple[float, ...]:
        torch.cuda.synchronize()
        pairs = zip(self.events, self.events[1:], strict=False)
        return tuple(a.elapsed_time(b) / 1e3 for a, b in pairs)


def make_clock(device: torch.device | str) -> _CpuClock | _CudaClock:
    return _CudaClock() if torch.device(device).type == "cuda" else _CpuClock()


class Contestant:
    """Named in `benchmarks.peers`. Subclasses import what they need inside their methods.

    The methods that end in `_here` are for the process that has what the contestant needs; the others may
    hand over to such a process.
    """

    name = ""
    devices = ("cpu", "cuda")
    python = sys.executable  # of the environment where it can be imported
    own = False  # whether it is what this repository is about
    stand_in: str | None = None  # who runs instead where torch's products in the layer's dtype are hopeless

    def missing_here(self, case: Case) -> str | None:
        """Why it cannot take part, or None. Imports everything that it needs."""
        return None

    def load_here(self, layer: Layer) -> Runner:
        """The runner holds on to what it needs of the layer, and to nothing else."""
        raise NotImplementedError

    def numbers(self, layer: Layer) -> dict[str, Tensor]:
        """The weights that it computes with, by projection: the layer's, or what rounding made of them."""
        return layer.weights

    def weight_bytes(self, layer: Layer) -> int:
        """Of all experts' weights as it keeps them."""
        return nbytes(*layer.weights.values())

    def operators(self) -> dict[str, Callable]:
        """Single operators it has, by the names and with the arguments of torch_moelora's schemas."""
        return {}

    def version(self) -> str:
        return f"torch {torch.__version__}"

    def missing(self, case: Case) -> str | None:
        return self.missing_here(case)

    def load(self, layer: Layer, threads: int, limit: float | None = None) -> Runner:
        """limit: seconds that loading, or a step, may take in a process of its own."""
        return self.load_here(layer)
