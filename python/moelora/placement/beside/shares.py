"""What one place computes of a layer: forward with a graph of its own, which the backward follows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler import record_function

from moelora.experts import Compute
from moelora.placement.beside.worker import bound


class Share:
    """A place's part of a layer's sum.

    out: [T, H]. `gradients` is what the place makes of out's, with its own kernels and on its own device.
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
        parameters = {n: t for n, t in self._leaves.items() if n not in ("x", "gates")} | rest
        self._label = f"moelora share on {x.device.type}"  # in a profiler's trace
        with torch.set_grad_enabled(bool(needed or others)), record_function(self._label):
            self._out = compute(x, ids, gates, parameters)
        self.out = self._out.detach()
        self.apart = not bound() and self._on_host_alone()  # whether any thread can do its backward

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
