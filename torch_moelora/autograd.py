"""Gradients of the operators.

Saved for the backward are the arguments themselves (x, weight, LoRA, gates, indices), never the output. What
no argument asks for (`ctx.needs_input_grad`) is neither saved nor computed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Needs(NamedTuple):
    """Which arguments of `scatter_lora` need a gradient."""

    x: bool
    weight: bool
    lora_a: bool
    lora_b: bool
    bias: bool
    gates: bool

    @property
    def lora(self) -> bool:
        return self.lora_a or self.lora_b

    @property
    def dx(self) -> bool:
        """Gates' gradients come out of the same accumulators as x's."""
        return self.x or self.gates

    @property
    def rows(self) -> bool:
        """Whether x itself takes part in some gradient."""
        return self.weight or self.lora or self.gates


class Call(NamedTuple):
    """The arguments of one `scatter_lora` call, in the order of its schema."""

    x: Tensor | None
    weight: Tensor | None
    slots: Tensor
    offsets: Tensor
    top_k: int
    lora_a: Tensor | None
    lora_b: Tensor | None
    scaling: float
    bias: Tensor | None
    gates: Tensor | None
    x_grouped: bool
    y_grouped: bool


def scatter_lora_gradients(dy: Tensor, call: Call, needs: Needs, bias_dtype: torch.dtype | None) -> Needs:
    """Gradients of the arguments that `needs` names (None for the others), as a `Needs` of tensors.

    x may be None unless `needs.rows`, weight unless `needs.dx`.
    """
    ops = torch.ops.moelora
    dx = dgates = dw = da = db = dbias = None
    routing = (call.slots, call.offsets, call.top_k)
    lora = (call.lora_a, call.lora_b, call.scaling)
    orders = (call.x_grouped, call.y_grouped)
    if needs.dx and needs.lora:
        dx, dgates, da, db = ops.scatter_lora_backward(
            dy, call.x, call.weight, *routing, *lora, call.bias, call.gates, *orders, needs.gates
        )
    elif needs.dx:
        x = call.x if needs.gates else None
        dx, dgates = ops.scatter_lora_dx(dy, call.weight, *routing, *lora, call.bias, call.gates, x, *orders)
    elif needs.lora:
        da, db = ops.scatter_lora_dab(dy, call.x, *routing, *lora, call.gates, *orders)
    if needs.weight:
        dw = ops.scatter_lora_dw(dy, call.x, *routing, call.gates, *orders)
    if needs.bias:
        dbias = ops.scatter_lora_dbias(dy, *routing, call.gates, call.y_grouped).to(bias_dtype)
    return Needs(
        x=dx if needs.x else None,
        weight=dw,
        lora_a=da if needs.lora_a else None,
        lora_b=db if needs.lora_b else None,
        bias=dbias,
        gates=dgates.to(call.gates.dtype) if needs.gates else None,
    )


def _scatter_lora_setup(ctx, inputs, output) -> None:
    call = Call(*inputs)
    # The dispatcher leaves out trailing arguments that equal their defaults; none of those needs a gradient.
    need = (*ctx.needs_input_grad, *[False] * len(inputs))
    needs = Needs(*(need[Call._fields.index(name)] for name in Needs._fields))
    with_lora = needs.dx or needs.lora
    ctx.save_for_backward(
        call.x if needs.rows else None,
        call.weight if needs.dx else None,
        call.slots,
        call.offsets,
        call.lora_a if with_lora else None,
        call.lora_b if with_lora else None,
        call.bias if needs.gates else None,
        call.gates,
    )
    ctx.needs = needs
    ctx.scalars = (call.top_k, call.scaling, call.x_grouped, call.y_grouped)
    ctx.bias_dtype = None if call.bias is None else call.bias.dtype


def _scatter_lora_backward(ctx, dy):
    x, weight, slots, offsets, lora_a, lora_b, bias, gates = ctx.saved_tensors
    top_k, scaling, *orders = ctx.scalars
    call = Call(x, weight, slots, offsets, top_k, lora_a, lora_b, scaling, bias, gates, *orders)
    d = scatter_lora_gradients(dy, call, ctx.needs, ctx.bias_dtype)
    return d.x, d.weight, None, None, None, d.lora_a, d.lora_b, None, d.bias, d.gates, None, None


def _glu_setup(ctx, inputs, output) -> None:
    h, *ctx.options = inputs
    ctx.save_for_backward(h)


def _glu_backward(ctx, dy):
    (h,) = ctx.saved_tensors
    return torch.ops.moelora.glu_backward(dy, h, *ctx.options), *(None for _ in ctx.options)


def _first_order_only(name: str):
    def backward(ctx, *grads):
        raise RuntimeError(
            f"{name}: moelora operators can be differentiated once only, and this is a second time "
            "(a gradient taken with create_graph=True was differentiated)"
        )

    return backward


def register(lib: torch.library.Library) -> None:
    """Registers the backward formulas, and the error of the backward operators' own backward, with `lib`."""
    formulas = {
        "scatter_lora": (_scatter_lora_backward, _scatter_lora_setup),
        "glu": (_glu_backward, _glu_setup),
    }
    for name, (backward, setup) in formulas.items():
        torch.library.register_autograd(f"{lib.ns}::{name}", backward, setup_context=setup, lib=lib)
    for name in (
        "scatter_lora_dx",
        "scatter_lora_dab",
        "scatter_lora_backward",
        "scatter_lora_dw",
        "scatter_lora_dbias",
        "glu_backward",
    ):
        torch.library.register_autograd(f"{lib.ns}::{name}", _first_order_only(name), lib=lib)
