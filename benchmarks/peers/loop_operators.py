"""The operators one by one as a loop of torch.mm over experts, with the arguments of their schemas."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from .glu import glu


def _segments(expert_offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """Each expert with rows, and where they stand in grouped order."""
    start = 0
    for e, end in enumerate(expert_offsets.tolist()):
        if end > start:
            yield e, slice(start, end)
        start = end


def _rows(values: Tensor, slots: Tensor, top_k: int, grouped: bool) -> Tensor:
    return values if grouped else values.index_select(0, slots // top_k)


def _per_token(rows: Tensor, slots: Tensor, top_k: int) -> Tensor:
    out = rows.new_zeros(slots.numel() // top_k, rows.shape[1])
    return out.index_add_(0, slots // top_k, rows)


def flatten_sort_count(expert_idxs: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    ids = expert_idxs.flatten()
    counts = torch.bincount(ids, minlength=num_experts)
    return torch.argsort(ids, stable=True), counts.cumsum(0).to(torch.int32)


def scatter_lora(
    x, weight, slots, expert_offsets, top_k, lora_a, lora_b, scaling, bias=None, gates=None,
    x_grouped=False, y_grouped=False,
) -> Tensor:  # fmt: skip
    rows = _rows(x, slots, top_k, x_grouped)
    out = rows.new_empty(rows.shape[0], weight.shape[1])
    a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
    for e, part in _segments(expert_offsets):
        y = F.linear(rows[part], weight[e], None if bias is None else bias[e])
        out[part] = y.addmm_(rows[part] @ a[e].T, b[e].T, alpha=scaling)
    return out if gates is None else _per_token(out * gates.flatten()[slots].unsqueeze(1), slots, top_k)


def scatter_lora_dx(
    dy, weight, slots, expert_offsets, top_k, lora_a, lora_b, scaling, bias=None, gates=None, x=None,
    x_grouped=False, y_grouped=False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows = _rows(dy, slots, top_k, y_grouped)
    out = rows.new_empty(rows.shape[0], weight.shape[2])
    a, b = lora_a.to(dy.dtype), lora_b.to(dy.dtype)
    for e, part in _segments(expert_offsets):
        out[part] = (rows[part] @ weight[e]).addmm_(rows[part] @ b[e], a[e], alpha=scaling)
    dgates = rows.new_empty(0)
    if gates is not None:
        flat = torch.linalg.vecdot(out.float(), x.float())
        for e, part in _segments(expert_offsets) if bias is not None else ():
            flat[part] += (rows[part] @ bias[e]).float()
        dgates = torch.empty_like(flat).index_copy(0, slots, flat).view(-1, top_k)
        out *= gates.flatten()[slots].unsqueeze(1)
    return out if x_grouped else _per_token(out, slots, top_k), dgates


def scatter_lora_dab(
    dy, x, slots, expert_offsets, top_k, lora_a, lora_b, scaling, gates=None, x_grouped=False,
    y_grouped=False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows = _rows(x, slots, top_k, x_grouped)
    grads = _rows(dy, slots, top_k, y_grouped)
    if gates is not None:
        grads = grads * gates.flatten()[slots].unsqueeze(1)
    da, db = torch.zeros_like(lora_a), torch.zeros_like(lora_b)
    a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
    for e, part in _segments(expert_offsets):
        da[e] = ((grads[part] @ b[e]).T @ rows[part]).mul_(scaling)
        db[e] = (grads[part].T @ (rows[part] @ a[e].T)).mul_(scaling)
    return da, db


OPERATORS = {
    "flatten_sort_count": flatten_sort_count,
    "scatter_lora": scatter_lora,
    "scatter_lora_dx": scatter_lora_dx,
    "scatter_lora_dab": scatter_lora_dab,
    "glu": glu,
}
