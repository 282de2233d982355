"""Shapes and dtypes of every result, without computing it: what torch.compile and torch.export trace."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import checks
from .calls import (
    CALLS,
    FlattenSortCount,
    Glu,
    GluBackward,
    ScatterLora,
    ScatterLoraBackward,
    ScatterLoraDab,
    ScatterLoraDbias,
    ScatterLoraDw,
    ScatterLoraDx,
)
from .layouts import empty_gradient, gate_gradient_dtype, sum_dtype


def flatten_sort_count(call: FlattenSortCount) -> tuple[Tensor, Tensor]:
    checks.flatten_sort_count(call)
    ids = call.expert_idxs
    slots = ids.new_empty(ids.shape[0] * ids.shape[1], dtype=torch.int64)
    return slots, ids.new_empty(call.num_experts, dtype=torch.int32)


def scatter_lora(call: ScatterLora) -> Tensor:
    checks.scatter_lora(call)
    rows = call.sorted_scattered_idxs.shape[0] if call.gates is None else call.gates.shape[0]
    dtype = sum_dtype(call.x.dtype, call.sum_fp32 and call.gates is not None)
    return call.x.new_empty(rows, checks.weight_of(call).shape[1], dtype=dtype)


def _input_gradients(call: ScatterLoraDx | ScatterLoraBackward, with_dgates: bool) -> tuple[Tensor, Tensor]:
    slots = call.sorted_scattered_idxs.shape[0]
    dgates = tuple(call.gates.shape) if with_dgates else (0,)
    rows = slots if call.x_grouped else slots // call.top_k
    dtype = sum_dtype(call.dy.dtype, call.sum_fp32 and not call.x_grouped)
    return (
        call.dy.new_empty(rows, checks.weight_of(call).shape[2], dtype=dtype),
        call.dy.new_empty(dgates, dtype=gate_gradient_dtype(call.dy.dtype)),
    )


def scatter_lora_dx(call: ScatterLoraDx) -> tuple[Tensor, Tensor]:
    checks.scatter_lora_dx(call)
    return _input_gradients(call, call.gates is not None and call.x is not None)


def scatter_lora_dab(call: ScatterLoraDab) -> tuple[Tensor, Tensor]:
    checks.scatter_lora_dab(call)
    return call.lora_a.new_empty(call.lora_a.shape), empty_gradient(call.lora_b)


def scatter_lora_backward(call: ScatterLoraBackward) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    checks.scatter_lora_backward(call)
    return (
        *_input_gradients(call, call.gates is not None and call.with_dgates),
        call.lora_a.new_empty(call.lora_a.shape),
        empty_gradient(call.lora_b),
    )


def scatter_lora_dw(call: ScatterLoraDw) -> Tensor:
    checks.scatter_lora_dw(call)
    return call.x.new_empty(call.expert_offsets.shape[0], call.dy.shape[1], call.x.shape[1])


def scatter_lora_dbias(call: ScatterLoraDbias) -> Tensor:
    checks.scatter_lora_dbias(call)
    return call.dy.new_empty(call.expert_offsets.shape[0], call.dy.shape[1])


def glu(call: Glu) -> Tensor:
    checks.glu(call)
    return call.h.new_empty(call.h.shape[0], call.h.shape[1] // 2)


def glu_backward(call: GluBackward) -> Tensor:
    checks.glu_backward(call)
    return call.h.new_empty(call.h.shape)


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


def _takes_arguments(name: str) -> Callable:
    fake, kind = FAKES[name], CALLS[name]

    def implementation(*args, **kwargs):
        return fake(kind(*args, **kwargs))

    return implementation


def register(lib: torch.library.Library) -> None:
    """Registers the fake of every operator with `lib`."""
    for name in FAKES:
        torch.library.register_fake(f"{lib.ns}::{name}", _takes_arguments(name), lib=lib)
