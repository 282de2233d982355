"""Plain activations of experts without a gate."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import ACTS

PLAIN = {"relu": F.relu, "relu2": lambda t: F.relu(t).square()}


def plain_activation(h: Tensor, act: str, alpha: float) -> Tensor:
    """Elementwise `act` of h [rows, I].

    `glu` beside a constant 1 where it has the function: torch's own give an element other bits in a vector
    than behind the last whole one, and where that is depends on the batch and the number of threads.
    """
    if act not in (*ACTS, *PLAIN):
        names = ", ".join((*ACTS, *PLAIN))
        raise RuntimeError(f"moe_mlp: act must be one of {names} when gated is False, got {act}")
    if act != "silu" and alpha != 1:
        raise RuntimeError(f"moe_mlp: alpha must be 1 when act is {act}, got {alpha}")
    if act in PLAIN:
        return PLAIN[act](h)
    return torch.ops.moelora.glu(F.pad(h, (0, h.shape[1]), value=1.0), act, alpha)
