"""scatter_lora(glu(h)): the gated unit with the projection that follows it, as one step of autograd.

It keeps h [S, 2I] and not glu(h) [S, I], which the backward computes again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import autograd
from .autocast import follow
from .batch_invariance import as_in_forward, flag_for_backward
from .calls import Glu, GluBackward, ScatterLora, derive


class _GluScatterLora(torch.autograd.Function):
    """Takes the fields of a `ScatterLora` whose x is h, and glu's options behind them."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args) -> Tensor:
        call, options = _split(args)
        return torch.ops.moelora.scatter_lora(*call._replace(x=torch.ops.moelora.glu(call.x, *options)))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        call, ctx.options = _split(inputs)
        ctx.needs, ctx.batch_invariant = autograd.needs_of(ctx.needs_input_grad), flag_for_backward()
        ctx.dtypes = autograd.dtypes_of(call)
        kept = autograd.read_by_gradients(call, ctx.needs)
        # h is read wherever glu(h) would be, and by glu's own gradient.
        autograd.save(ctx, kept._replace(x=call.x if ctx.needs.x else kept.x))

    @staticmethod
    def backward(ctx, dy):
        call = autograd.saved(ctx)
        glu = Glu(call.x, *ctx.options)
        with as_in_forward(ctx.batch_invariant):
            inner = call._replace(x=torch.ops.moelora.glu(*glu) if ctx.needs.rows else None)
            grads = autograd.scatter_lora_gradients(dy, inner, ctx.needs, ctx.dtypes)
            if ctx.needs.x:
                grads["x"] = torch.ops.moelora.glu_backward(*derive(GluBackward, glu, dy=grads["x"]))
        return *autograd.in_order(ScatterLora, grads), *(None for _ in ctx.options)


def _split(args: tuple) -> tuple[ScatterLora, tuple]:
    fields = len(ScatterLora._fields)
    return ScatterLora(*args[:fields]), args[fields:]


def glu_scatter_lora(call: ScatterLora, options: tuple) -> Tensor:
    """`scatter_lora` with glu(h, *options) for its x, where the x of `call` is h [S, 2I]."""
    if torch.is_grad_enabled():
        autograd.refuse_packed_gradients("scatter_lora", call)
    device = call.x.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        # Here and not in the operator's own autocast kernel: the backward must see the tensors that were
        # used.
        call = follow(device, call)
    # No file of TorchScript takes a step that is Python's, and torch 2.13 cannot trace one without gradients.
    if torch.jit.is_tracing() or (torch.compiler.is_compiling() and not torch.is_grad_enabled()):
        return torch.ops.moelora.scatter_lora(*call._replace(x=torch.ops.moelora.glu(call.x, *options)))
    return _GluScatterLora.apply(*call, *options)
