"""The gated unit in plain torch, for contestants that bring none of their own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def glu(h: Tensor, act: str = "silu", alpha=1.0, limit=None, up_shift=0.0, interleaved=False) -> Tensor:
    g, u = (h[:, 0::2], h[:, 1::2]) if interleaved else h.chunk(2, dim=1)
    if limit is not None:
        g, u = g.clamp(max=limit), u.clamp(-limit, limit)
    if act == "silu":
        f = F.silu(g) if alpha == 1.0 else g * torch.sigmoid(alpha * g)
    else:
        f = F.gelu(g, approximate="tanh" if act == "gelu_tanh" else "none")
    return f * (u + up_shift) if up_shift else f * u
