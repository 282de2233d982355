"""Memory layouts and dtypes of results."""

from __future__ import annotations

import torch
from torch import Tensor


def empty_gradient(lora_b: Tensor) -> Tensor:
    """Uninitialised memory for the gradient of `lora_b` [E, N, R], in its dtype.

    PEFT's B has the expert as its fastest dimension ([N, R, E] in memory): then so has the gradient, and
    accumulating it takes no transposed copy. For all other strides it is contiguous.
    """
    experts, outputs, rank = lora_b.shape
    if lora_b.stride() == (1, rank * experts, experts):
        return lora_b.new_empty(outputs, rank, experts).permute(2, 0, 1)
    return lora_b.new_empty(lora_b.shape)


def gate_gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """dgates come back in the accumulators' dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sum_dtype(dtype: torch.dtype, fp32: bool) -> torch.dtype:
    """That of a sum over top_k of rows of `dtype`; `fp32` where the call asks for the accumulators' own."""
    return gate_gradient_dtype(dtype) if fp32 else dtype
