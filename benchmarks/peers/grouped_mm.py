"""A composition of torch.nn.functional.grouped_mm: the base product and LoRA's two, no weight gradient."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..layer import LORA_NAMES, SCALING, Case, Layer
from .base import AutogradRunner, Contestant
from .glu import glu

ALIGNMENT = 16  # bytes: what the operator asks of every row


def _apply(layer: Layer, name: str, rows: Tensor, offs: Tensor, experts: Tensor) -> Tensor:
    """rows [S, K] in grouped order → [S, N]; `experts` [S] is whose row it is."""
    a, b = (layer.lora[f"{name}_lora_{suffix}"].to(rows.dtype) for suffix in "ab")
    base = F.grouped_mm(rows, layer.weights[name].transpose(1, 2), offs=offs)
    inner = F.grouped_mm(rows, a.transpose(1, 2), offs=offs)
    y = base + SCALING * F.grouped_mm(inner, b.transpose(1, 2), offs=offs)
    bias = layer.biases[name]
    return y if bias is None else y + bias[experts]


def make_forward(layer: Layer):
    shape = layer.shape
    ids = torch.arange(shape.experts, device=layer.weights["down"].device)

    def forward(x: Tensor, expert_idxs: Tensor, gates: Tensor) -> Tensor:
        experts, slots = torch.sort(expert_idxs.flatten(), stable=True)
        offs = torch.searchsorted(experts, ids, right=True, out_int32=True)
        tokens = slots // shape.top_k
        h = _apply(layer, "gate_up", x.index_select(0, tokens), offs, experts)
        y = _apply(layer, "down", glu(h, **shape.glu), offs, experts)
        weighted = y * gates.flatten()[slots].unsqueeze(1)
        # Slots of a token stand together again: a sum over them needs no atomics.
        in_slots = torch.empty_like(weighted).index_copy(0, slots, weighted)
        return in_slots.view(-1, shape.top_k, shape.hidden).sum(1)

    return forward


class GroupedMM(Contestant):
    name = "grouped-mm"
    stand_in = "grouped-mm-fp32"

    def missing_here(self, case: Case) -> str | None:
        if not hasattr(F, "grouped_mm"):
            return f"torch {torch.__version__} has no torch.nn.functional.grouped_mm"
        if case.device == "cuda" and case.dtype != "bf16":
            return "bf16 only"
        sizes = (case.shape.hidden, case.shape.inner, case.rank)
        if any(size * 2 % ALIGNMENT for size in sizes):
            return f"sizes and rank must be multiples of {ALIGNMENT // 2}"
        return None

    def load_here(self, layer: Layer) -> AutogradRunner:
        return AutogradRunner(make_forward(layer), [layer.lora[name] for name in LORA_NAMES])


CONTESTANTS = {"grouped-mm": GroupedMM()}
