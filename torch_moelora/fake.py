"""Shapes and dtypes of every result, without computing it: what torch.compile and torch.export trace."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .layouts import empty_gradient


def gate_gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """dgates come back in the accumulators' dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def flatten_sort_count(expert_idxs: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    checks.flatten_sort_count(expert_idxs, num_experts)
    slots = expert_idxs.new_empty(expert_idxs.shape[0] * expert_idxs.shape[1], dtype=torch.int64)
    return slots, expert_idxs.new_empty(num_experts, dtype=torch.int32)


def scatter_lora(
    x, weight, slots, offsets, top_k, lora_a=None, lora_b=None, scaling=1.0, bias=None, gates=None,
    x_grouped=False, y_grouped=False,
) -> Tensor:  # fmt: skip
    checks.scatter_lora(
        x, weight, slots, offsets, top_k, lora_a, lora_b, scaling, bias, gates, x_grouped, y_grouped
    )
    rows = slots.shape[0] if gates is None else gates.shape[0]
    return x.new_empty(rows, weight.shape[1])


def _input_gradients(dy, weight, slots, top_k, gates, x_grouped, with_dgates) -> tuple[Tensor, Tensor]:
    rows = slots.shape[0] if x_grouped else slots.shape[0] // top_k
    dgates = tuple(gates.shape) if with_dgates else (0,)
    return (
        dy.new_empty(rows, weight.shape[2]),
        dy.new_empty(dgates, dtype=gate_gradient_dtype(dy.dtype)),
    )


def scatter_lora_dx(
    dy, weight, slots, offsets, top_k, lora_a=None, lora_b=None, scaling=1.0, bias=None, gates=None, x=None,
    x_grouped=False, y_grouped=False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    checks.scatter_lora_dx(
        dy, weight, slots, offsets, top_k, lora_a, lora_b, scaling, bias, gates, x, x_grouped, y_grouped
    )
    with_dgates = gates is not None and x is not None
    return _input_gradients(dy, weight, slots, top_k, gates, x_grouped, with_dgates)


def scatter_lora_dab(
    dy, x, slots, offsets, top_k, lora_a, lora_b, scaling=1.0, gates=None, x_grouped=False, y_grouped=False
) -> tuple[Tensor, Tensor]:
    checks.scatter_lora_dab(
        dy, x, slots, offsets, top_k, lora_a, lora_b, scaling, gates, x_grouped, y_grouped
    )
    return lora_a.new_empty(lora_a.shape), empty_gradient(lora_b)


def scatter_lora_backward(
    dy, x, weight, slots, offsets, top_k, lora_a, lora_b, scaling=1.0, bias=None, gates=None,
    x_grouped=False, y_grouped=False, with_dgates=True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    checks.scatter_lora_backward(
        dy, x, weight, slots, offsets, top_k, lora_a, lora_b, scaling, bias, gates, x_grouped, y_grouped
    )
    with_dgates = with_dgates and gates is not None
    return (
        *_input_gradients(dy, weight, slots, top_k, gates, x_grouped, with_dgates),
        lora_a.new_empty(lora_a.shape),
        empty_gradient(lora_b),
    )


def scatter_lora_dw(dy, x, slots, offsets, top_k, gates=None, x_grouped=False, y_grouped=False) -> Tensor:
    checks.scatter_lora_dw(dy, x, slots, offsets, top_k, gates, x_grouped, y_grouped)
    return x.new_empty(offsets.shape[0], dy.shape[1], x.shape[1])


def scatter_lora_dbias(dy, slots, offsets, top_k, gates=None, y_grouped=False) -> Tensor:
    checks.scatter_lora_dbias(dy, slots, offsets, top_k, gates, y_grouped)
    return dy.new_empty(offsets.shape[0], dy.shape[1])


def glu(h, act="silu", alpha=1.0, limit=None, up_shift=0.0, interleaved=False) -> Tensor:
    checks.glu(h, act, alpha, limit, up_shift)
    return h.new_empty(h.shape[0], h.shape[1] // 2)


def glu_backward(dy, h, act="silu", alpha=1.0, limit=None, up_shift=0.0, interleaved=False) -> Tensor:
    checks.glu_backward(dy, h, act, alpha, limit, up_shift)
    return h.new_empty(h.shape)


FAKES = {
    "flatten_sort_count": flatten_sort_count,
    "scatter_lora": scatter_lora,
    "scatter_lora_dx": scatter_lora_dx,
    "scatter_lora_dab": scatter_lora_dab,
    "scatter_lora_backward": scatter_lora_backward,
    "scatter_lora_dw": scatter_lora_dw,
    "scatter_lora_dbias": scatter_lora_dbias,
    "glu": glu,
    "glu_backward": glu_backward,
}


def register(lib: torch.library.Library) -> None:
    """Registers the fake of every operator with `lib`."""
    for name, fake in FAKES.items():
        torch.library.register_fake(f"{lib.ns}::{name}", fake, lib=lib)
