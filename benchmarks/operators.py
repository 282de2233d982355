"""The single operators, called as the layer calls them, and what each costs at least."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .layer import SCALING, Batch, Layer, nbytes
from .peers.base import make_clock

Outputs = Tensor | tuple[Tensor, ...]


@dataclass
class Call:
    """One operator with the arguments of its schema. flops: of the base product; dab has only its own."""

    operator: str
    args: tuple
    kwargs: dict
    flops: int
    moved: int  # bytes read or written at least

    def run(self, implementation: Callable[..., Outputs]) -> Outputs:
        return implementation(*self.args, **self.kwargs)


class _Problem:
    """Intermediate values of the right shapes and sizes; nothing is computed from anything."""

    def __init__(self, layer: Layer, batch: Batch) -> None:
        from torch_moelora import reference

        self.layer, self.shape = layer, layer.shape
        self.batch = batch
        slots, offsets = reference.flatten_sort_count(batch.expert_idxs, self.shape.experts)
        self.route = (slots, offsets, self.shape.top_k)
        self.rows = slots.numel()
        self.active = int(batch.expert_idxs.unique().numel())
        gen = torch.Generator().manual_seed(batch.case.seed + 3)
        self.h, self.inner, self.dinner, self.dh = (
            torch.randn(self.rows, columns, generator=gen).to(batch.x.dtype).to(batch.x.device)
            for columns in (2 * self.shape.inner, self.shape.inner, self.shape.inner, 2 * self.shape.inner)
        )

    def lora(self, name: str) -> dict[str, Tensor]:
        a, b = (self.layer.lora[f"{name}_lora_{suffix}"].detach() for suffix in "ab")
        return {"lora_a": a, "lora_b": b, "scaling": SCALING}

    def product(self, operator: str, name: str, given: Tensor, made: int, extra: dict) -> Call:
        """scatter_lora or scatter_lora_dx: `made` values are written."""
        n, k = self.shape.projections[name]
        size = given.element_size()
        moved = self.active * n * k * size + nbytes(given) + made * size
        kwargs = {**self.lora(name), "bias": self.layer.biases[name], **extra}
        args = (given, self.layer.weights[name], *self.route)
        return Call(operator, args, kwargs, 2 * self.rows * n * k, moved)

    def dab(self, name: str, dy: Tensor, x: Tensor, extra: dict) -> Call:
        n, k = self.shape.projections[name]
        lora = self.lora(name)
        moved = nbytes(dy, x) + 2 * nbytes(lora["lora_a"], lora["lora_b"])
        flops = 4 * self.rows * self.layer.case.rank * (n + k)
        return Call("scatter_lora_dab", (dy, x, *self.route), {**lora, **extra}, flops, moved)

    def backward(self, name: str, dy: Tensor, x: Tensor, extra: dict) -> Call:
        """scatter_lora_dx and scatter_lora_dab in one; flops as for the first."""
        n, k = self.shape.projections[name]
        lora = self.lora(name)
        moved = self.active * n * k * dy.element_size() + nbytes(dy, x, x)
        moved += 2 * nbytes(lora["lora_a"], lora["lora_b"])
        args = (dy, x, self.layer.weights[name], *self.route)
        kwargs = {**lora, "bias": self.layer.biases[name], **extra}
        return Call("scatter_lora_backward", args, kwargs, 2 * self.rows * n * k, moved)


def make_calls(layer: Layer, batch: Batch) -> dict[str, Call]:
    """Part of the table → call."""
    p = _Problem(layer, batch)
    shape, idxs = p.shape, batch.expert_idxs
    x, dy, gates = batch.x.detach(), batch.dy, batch.gates.detach()
    from_token, to_token = {"y_grouped": True}, {"x_grouped": True, "gates": gates}
    per_row, per_token = p.rows * 2 * shape.inner, batch.case.tokens * shape.hidden
    inner = p.rows * shape.inner
    gates_too = {**to_token, "x": p.inner}
    route = Call("flatten_sort_count", (idxs, shape.experts), {}, 0, 2 * nbytes(idxs))
    return {
        "flatten_sort_count": route,
        "scatter_lora gate_up": p.product("scatter_lora", "gate_up", x, per_row, from_token),
        "glu": Call("glu", (p.h,), shape.glu, 0, nbytes(p.h, p.inner)),
        "scatter_lora down": p.product("scatter_lora", "down", p.inner, per_token, to_token),
        "scatter_lora_dx down": p.product("scatter_lora_dx", "down", dy, inner, gates_too),
        "scatter_lora_dab down": p.dab("down", dy, p.inner, to_token),
        "scatter_lora_backward down": p.backward("down", dy, p.inner, to_token),
        "glu_backward": Call("glu_backward", (p.dinner, p.h), shape.glu, 0, nbytes(p.dinner, p.h, p.dh)),
        "scatter_lora_dx gate_up": p.product("scatter_lora_dx", "gate_up", p.dh, per_token, from_token),
        "scatter_lora_dab gate_up": p.dab("gate_up", p.dh, x, from_token),
        "scatter_lora_backward gate_up": p.backward("gate_up", p.dh, x, from_token),
    }


def step(call: Call, implementation: Callable[..., Outputs], device: torch.device) -> tuple[float, ...]:
    """Seconds of one call."""
    clock = make_clock(device)
    clock.mark()
    with torch.no_grad():
        call.run(implementation)
    clock.mark()
    return clock.intervals()


@torch.no_grad()
def outputs(call: Call, implementation: Callable[..., Outputs]) -> dict[str, Tensor]:
    """By position, without what is empty."""
    found = call.run(implementation)
    found = found if isinstance(found, tuple | list) else (found,)
    return {f"output {i}": value for i, value in enumerate(found) if value.numel()}


@torch.no_grad()
def expected(call: Call, layer: Layer) -> dict[str, Tensor]:
    from torch_moelora import reference

    implementation = reference.REFERENCE[call.operator]
    if call.operator == "flatten_sort_count":
        return outputs(call, implementation)
    dtype = torch.float64 if layer.weights["down"].dtype == torch.float32 else torch.float32
    return outputs(call, lambda *args, **kwargs: implementation(*args, **kwargs, dtype=dtype))
