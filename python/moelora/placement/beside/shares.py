"""What one place computes of a layer: forward with a graph of its own, which the backward follows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler import record_function

from moelora.experts import Compute


class Kept:
    """What autograd saves of a share, taken out of its graph to be saved by that of the model.

    Hooks for what is saved, those of checkpointing and of offloading, are a thread's, and checkpointing
    computes anew for every pass of autograd that asks: another thread must not ask, nor a share's own pass
    within the model's.
    """

    def __init__(self) -> None:
        self._boxes: list[list[Tensor | None]] = []

    @staticmethod
    def wanted() -> bool:
        """Whether there are such hooks."""
        return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None

    def hooks(self) -> AbstractContextManager:
        """For the forward, in whichever thread."""
        return torch.autograd.graph.saved_tensors_hooks(self._put, lambda box: box[0])

    def _put(self, t: Tensor) -> list[Tensor | None]:
        self._boxes.append([t.detach()])
        return self._boxes[-1]

    def take(self) -> list[Tensor]:
        """All of it, in the order of the forward: no longer in the graph."""
        found = [box[0] for box in self._boxes]
        self.give([None] * len(found))
        return found

    def give(self, tensors: Sequence[Tensor | None]) -> None:
        """Back again, for a backward. `take` empties it anew."""
        for box, t in zip(self._boxes, tensors, strict=True):
            box[0] = t

    def __len__(self) -> int:
        return len(self._boxes)


class Share:
    """A place's part of a layer's sum.

    out: [T, H]. `gradients` is what the place makes of out's, with its own kernels and on its own device.
    Where `rest` says `sum_fp32`, because out is a part of a sum, so is x's gradient.
    """

    def __init__(
        self,
        compute: Compute,
        inputs: dict[str, Tensor | None],
        ids: Tensor,
        rest: dict[str, Any],
        needed: set[str],
        others: Sequence[Tensor] = (),
    ) -> None:
        """inputs: by their names in `moe_mlp`, x and gates among them. needed: those to differentiate in.
        others: leaves that `compute` itself reads, needed too.
        """
        self._leaves = {
            name: None if t is None else t.detach().requires_grad_(name in needed)
            for name, t in inputs.items()
        }
        self._others, self.needed = list(others), [name for name in inputs if name in needed]
        x, gates = self._leaves["x"], self._leaves["gates"]
        if rest.get("sum_fp32") and x.requires_grad and x.dtype.itemsize == 2:
            x.grad_dtype = torch.float32
        parameters = {n: t for n, t in self._leaves.items() if n not in ("x", "gates")} | rest
        self._label = f"moelora share on {x.device.type}"  # in a profiler's trace
        with torch.set_grad_enabled(bool(needed or others)), record_function(self._label):
            self._out = compute(x, ids, gates, parameters)
        self.out = self._out.detach()
        self.apart = self._on_host_alone()  # whether any thread can do its backward

    def _on_host_alone(self) -> bool:
        """Whether its backward meets no other device, whose thread of autograd's may be waiting for it."""
        nodes = [self._out.grad_fn] if self._out.grad_fn is not None else []
        met = set(nodes)
        for node in nodes:  # grows
            if any(one.device.type != "cpu" for one in node._input_metadata):
                return False
            following = {after for after, _ in node.next_functions if after is not None} - met
            met |= following
            nodes += following
        return True

    def gradients(self, dy: Tensor, retain: bool) -> dict[str | int, Tensor | None]:
        """By the names of `needed`, and of the others by their numbers."""
        inputs = [self._leaves[name] for name in self.needed] + self._others
        if not inputs or not self._out.requires_grad:
            return {}
        with record_function(f"{self._label}, backward"):
            found = torch.autograd.grad(
                self._out, inputs, dy.to(self._out.dtype), retain_graph=retain, allow_unused=True
            )
        return dict(zip([*self.needed, *range(len(self._others))], found, strict=True))


def as_on(device: torch.device, run: Callable[[], Share]) -> Share:
    """`run` for the host, under autocast as `device` has it now."""
    kind = device.type
    if not torch.is_autocast_enabled(kind):
        return run()
    with torch.autocast("cpu", torch.get_autocast_dtype(kind), cache_enabled=False):
        return run()
