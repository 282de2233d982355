"""Memory layouts of results."""

from __future__ import annotations

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
