"""A loop over experts in plain torch: LoRA as two small products beside the base one, no weight gradient.

What one writes by hand, written well: rows are sorted once, and parameters are split with `unbind`, whose
backward is one copy (indexing `a[e]` would make a gradient as large as `a` for each expert).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..layer import LORA_NAMES, SCALING, Layer
from .base import AutogradRunner, Contestant
from .glu import glu
from .loop_operators import OPERATORS


class _Projection:
    def __init__(self, layer: Layer, name: str) -> None:
        self.weights = layer.weights[name].unbind(0)
        bias = layer.biases[name]
        self.biases = [None] * layer.shape.experts if bias is None else bias.unbind(0)
        self.a, self.b = layer.lora[f"{name}_lora_a"], layer.lora[f"{name}_lora_b"]
        self.scaling = SCALING

    def factors(self, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """A and B of each expert; a step casts them once."""
        return self.a.to(dtype).unbind(0), self.b.to(dtype).unbind(0)

    def apply(self, rows: Tensor, e: int, a: Tensor, b: Tensor) -> Tensor:
        y = F.linear(rows, self.weights[e], self.biases[e])
        return torch.addmm(y, rows @ a.T, b.T, alpha=self.scaling)


def make_forward(layer: Layer):
    up, down = _Projection(layer, "gate_up"), _Projection(layer, "down")
    shape = layer.shape

    def forward(x: Tensor, expert_idxs: Tensor, gates: Tensor) -> Tensor:
        slots = torch.argsort(expert_idxs.flatten(), stable=True)
        counts = torch.bincount(expert_idxs.flatten(), minlength=shape.experts).tolist()
        tokens = slots // shape.top_k
        rows = x.index_select(0, tokens).split(counts)
        (up_a, up_b), (down_a, down_b) = up.factors(x.dtype), down.factors(x.dtype)
        parts = []
        for e, count in enumerate(counts):
            if count:
                inner = glu(up.apply(rows[e], e, up_a[e], up_b[e]), **shape.glu)
                parts.append(down.apply(inner, e, down_a[e], down_b[e]))
        weighted = torch.cat(parts) * gates.flatten()[slots].unsqueeze(1)
        return torch.zeros_like(x).index_add(0, tokens, weighted)

    return forward


class Loop(Contestant):
    name = "loop"
    stand_in = "loop-fp32"

    def load_here(self, layer: Layer) -> AutogradRunner:
        return AutogradRunner(make_forward(layer), [layer.lora[name] for name in LORA_NAMES])

    def operators(self) -> dict[str, Callable]:
        return OPERATORS


CONTESTANTS = {"loop": Loop()}
