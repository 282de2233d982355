"""Plain activations of experts without a gate, in torch's own functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def plain_activation(h: Tensor, act: str, alpha: float) -> Tensor:
    """Elementwise `act` of h."""
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
