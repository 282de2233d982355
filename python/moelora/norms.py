"""Frozen 16-bit norms on CPUs: some rows at a time, and once more in the backward instead of keeping more.

transformers' norms are a handful of elementwise operations in float32. On all rows at once each of them goes
through main memory, and autograd keeps the input in float32: of Qwen3-30B-A3B, 34 of the 85 MB that a layer
of 1024 tokens keeps. On some rows they stay in the cache, so that to compute them once more takes less time
than to read what was kept, and the input itself is all that is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from moelora.linears import HALF
from moelora.subclasses import Before, put

# Elements for each thread: half a MB in float32.
AT_ONCE = 1 << 17


def _blocks(rows: Tensor) -> Iterator[slice]:
    if isinstance(rows, FakeTensor):  # only what is kept is asked of it
        return iter([slice(None)])
    size = max(1, torch.get_num_threads() * AT_ONCE // rows.shape[1])
    return (slice(start, start + size) for start in range(0, len(rows), size))


class _ByRows(torch.autograd.Function):
    """norm(x [..., K]) of the same shape, by `norm(rows [n, K])`: the method of a module with a `weight` that
    treats each row by itself. Differentiable once, in x.
    """

    @staticmethod
    def forward(x: Tensor, norm: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor:
        rows, y = x.reshape(-1, x.shape[-1]), None
        for block in _blocks(rows):
            part = norm(rows[block])
            y = part.new_empty(x.shape) if y is None else y
            y.view(rows.shape)[block] = part
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, ctx.norm, weight = inputs
        ctx.save_for_backward(x, weight)  # this, so that a change in between is noticed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if ctx.norm.__self__.weight.data_ptr() != weight.data_ptr():
            raise RuntimeError("a norm's weight is another in the backward than it was in the forward")
        rows, d_rows = (t.reshape(-1, x.shape[-1]) for t in (x, dy))
        dx = torch.empty_like(rows)
        for block in _blocks(rows):
            with torch.enable_grad():
                part = rows[block].detach().requires_grad_()
                y = ctx.norm(part)
            (dx[block],) = torch.autograd.grad(y, part, d_rows[block])
        return dx.view(x.shape), None, None


class ByRows(Before):
    """In front of the class of a norm: its calls by rows, where they keep something and can be made so."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        norm = super().forward
        if len(args) != 1 or kwargs or not _can(args[0], self.weight):
            return norm(*args, **kwargs)
        return _ByRows.apply(args[0], norm, self.weight)


def _can(x: Tensor, weight: Tensor) -> bool:
    if torch.compiler.is_compiling() or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    kept = torch.is_grad_enabled() and x.requires_grad and x.dtype in HALF
    return kept and not weight.requires_grad and x.numel() > 0 and weight.shape == x.shape[-1:]


def _is_norm(module: nn.Module) -> bool:
    """Whether it is one of transformers' that divide rows by their root mean square and have one weight."""
    kind = type(module)
    known = kind.__name__.endswith("RMSNorm") and kind.__module__.startswith("transformers.models.")
    names = [name for name, _ in module.named_parameters()]
    return known and not isinstance(module, Before) and names == ["weight"]


def use(model: nn.Module) -> int:
    """Puts ByRows in front of the classes of a model's norms; returns of how many."""
    norms = [module for module in model.modules() if _is_norm(module)]
    for norm in norms:
        put(ByRows, norm)
    return len(norms)
