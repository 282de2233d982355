"""Pieces of `functional.moe_mlp`: the gated unit with the projection that follows it, and plain
activations.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .autocast import follow
from .autograd import Call, Needs, scatter_lora_gradients


class _GluThenScatterLora(torch.autograd.Function):
    """scatter_lora(glu(h)), which keeps h [S, 2I] and not glu(h) [S, I]: the backward computes that again."""

    @staticmethod
    def forward(
        ctx, h, options, weight, slots, offsets, top_k, lora_a, lora_b, scaling, bias, gates
    ) -> Tensor:
        x = torch.ops.moelora.glu(h, *options)
        call = Call(x, weight, slots, offsets, top_k, lora_a, lora_b, scaling, bias, gates, True, False)
        ctx.save_for_backward(h, weight, slots, offsets, lora_a, lora_b, bias, gates)
        ctx.options, ctx.top_k, ctx.scaling = options, top_k, scaling
        return torch.ops.moelora.scatter_lora(*call)

    @staticmethod
    def backward(ctx, dy):
        h, weight, slots, offsets, lora_a, lora_b, bias, gates = ctx.saved_tensors
        need_h, _, need_w, _, _, _, need_a, need_b, _, need_bias, need_gates = ctx.needs_input_grad
        needs = Needs(need_h, need_w, need_a, need_b, need_bias, need_gates)
        x = torch.ops.moelora.glu(h, *ctx.options) if needs.rows else None
        call = Call(
            x, weight, slots, offsets, ctx.top_k, lora_a, lora_b, ctx.scaling, bias, gates, True, False
        )
        d = scatter_lora_gradients(dy, call, needs, None if bias is None else bias.dtype)
        dh = torch.ops.moelora.glu_backward(d.x, h, *ctx.options) if need_h else None
        return dh, None, d.weight, None, None, None, d.lora_a, d.lora_b, None, d.bias, d.gates


def glu_then_scatter_lora(
    h: Tensor, options: tuple, weight, slots, offsets, top_k, lora_a, lora_b, scaling, bias, gates
) -> Tensor:
    """glu with `options`, then scatter_lora with x_grouped: h [S, 2I] → [T, N]."""
    if h.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(h.device.type):
        # Here and not in the operator's own autocast kernel: the backward must see the tensors that were
        # used.
        h, weight, lora_a, lora_b, bias, gates = follow(h.device.type, h, weight, lora_a, lora_b, bias, gates)
    return _GluThenScatterLora.apply(
        h, options, weight, slots, offsets, top_k, lora_a, lora_b, scaling, bias, gates
    )


def plain_activation(h: Tensor, act: str, alpha: float) -> Tensor:
    """Elementwise `act` of h, for experts without a gate."""
    if act == "silu" and alpha != 1:
        wide = h if h.dtype == torch.float64 else h.float()
        return (wide * torch.sigmoid(alpha * wide)).to(h.dtype)
    functions = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
        "relu": F.relu,
        "relu2": lambda t: F.relu(t).square(),
    }
    if act not in functions:
        names = ", ".join(functions)
        raise RuntimeError(f"moe_mlp: act must be one of {names} when gated is False, got {act}")
    if alpha != 1:
        raise RuntimeError(f"moe_mlp: alpha must be 1 when act is {act}, got {alpha}")
    return functions[act](h)
