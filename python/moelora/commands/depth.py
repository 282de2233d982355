"""A model's decoder layers, and the model with only the first of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from moelora.experts import is_experts


def layers(model: nn.Module) -> nn.ModuleList:
    """The list of decoder layers: the longest one with experts in it."""
    lists = (m for m in model.modules() if isinstance(m, nn.ModuleList) and _has_experts(m))
    return max(lists, key=len)


def least(layers: nn.ModuleList) -> int:
    """How many of the first layers it takes to have experts among them."""
    return next(count for count, layer in enumerate(layers, 1) if _has_experts(layer))


@contextmanager
def first(layers: nn.ModuleList, count: int) -> Iterator[None]:
    """For the time of this the model has no layers but the first `count`."""
    rest = list(layers[count:])
    del layers[count:]
    try:
        yield
    finally:
        layers.extend(rest)


def _has_experts(module: nn.Module) -> bool:
    return any(map(is_experts, module.modules()))
