"""Frozen norms on CPUs: some rows at a time, and again in the backward instead of keeping what they make.

transformers' norms are a handful of elementwise operations in float32. On all rows at once each of them goes
through main memory, and autograd keeps the input in float32: of Qwen3-30B-A3B, 34 of the 85 MB that a layer
of 1024 tokens keeps. On some rows they stay in the cache, so that to compute them once more takes less time
than to read what was kept, and only the input itself is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moelora.subclasses import Before, put

AT_ONCE = 1 << 18  # elements: 1 MB in float32, of which each operation reads and writes one


def _blocks(rows: Tensor) -> Iterator[slice]:
    size = max(1, AT_ONCE // max(1, rows.shape[1]))
    return (slice(start, start + size) for start in range(0, len(rows), size))


class _ByRows(torch.autograd.Function):
    """norm(x [..., K]), of the same shape. `norm` treats each row by itself."""

    @staticmethod
    def forward(x: Tensor, norm: Callable[[Tensor], Tensor], *parameters: Tensor) -> Tensor:
        rows, y = x.reshape(-1, x.shape[-1]), None
        for block in _blocks(rows):
            part = norm(rows[block])
            y = part.new_empty(rows.shape) if y is None else y
            y[block] = part
        return y.view(x.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, ctx.norm, *parameters = inputs
        ctx.save_for_backward(x, *parameters)  # these, so that a change in between is noticed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        rows, d_rows = (t.reshape(-1, x.shape[-1]) for t in (x, dy))
        dx = torch.empty_like(rows)
        for block in _blocks(rows):
            with torch.enable_grad():
                part = rows[block].detach().requires_grad_()
                y = ctx.norm(part)
            (dx[block],) = torch.autograd.grad(y, part, d_rows[block])
        return dx.view(x.shape), None, *(None for _ in parameters)


class ByRows(Before):
    """Comes before the class of a norm."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        norm, parameters = super().forward, list(self.parameters())
        if len(args) != 1 or kwargs or not _here(args[0], parameters):
            return norm(*args, **kwargs)
        return _ByRows.apply(args[0], norm, *parameters)


def _here(x: Tensor, parameters: list[Tensor]) -> bool:
    """Whether a call can be made by rows."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
        return False
    frozen = not any(p.requires_grad for p in parameters)
    return frozen and x.device.type in ("cpu", "meta") and x.ndim > 1 and x.numel() > 0


def _is_norm(module: nn.Module) -> bool:
    """Whether it is transformers' and scales rows by their root mean square, with a weight at most."""
    kind = type(module)
    known = kind.__name__.endswith("RMSNorm") and kind.__module__.startswith("transformers.models.")
    return known and not isinstance(module, Before) and all(p.ndim == 1 for p in module.parameters())


def use(model: nn.Module) -> int:
    """Puts a model's norms on it; returns how many."""
    norms = [module for module in model.modules() if _is_norm(module)]
    for norm in norms:
        put(ByRows, norm)
    return len(norms)
