"""Triton's interpreter, and the bf16 that it lacks: it multiplies the bit patterns, without a word."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..switches import SWITCHES


@triton.jit
def bf16_products(x, y, SIZE: tl.constexpr):
    """x, y [SIZE, SIZE] bf16: y = x·xᵀ, rounded to nearest even."""
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tile = tl.load(x + at)
    tl.store(y + at, tl.dot(tile, tl.trans(tile)).to(tl.bfloat16))


@functools.cache
def computes_bf16() -> bool:
    """Whether this interpreter's products and conversions of bf16 are those of bf16."""
    x = torch.linspace(-3, 3, 256).view(16, 16).to(torch.bfloat16)
    y = torch.empty_like(x)
    try:
        bf16_products[(1,)](x, y, SIZE=16)
    except Exception:  # whatever an interpreter without bf16 raises
        return False
    exact = x.double() @ x.double().T
    return torch.allclose(y.double(), exact, rtol=0.004, atol=1e-6)  # half a step, 2⁻⁸, and the sum in fp32


def check(op: str, call: NamedTuple) -> None:
    """Raises RuntimeError for a bf16 argument that the interpreter would make something else of."""
    for name, t in zip(call._fields, call, strict=True):
        if isinstance(t, Tensor) and t.dtype == torch.bfloat16 and SWITCHES.triton_interpret:
            torch._check(
                computes_bf16(),
                lambda name=name: (
                    f"{op}: {name} must have dtype torch.float16 or torch.float32 in Triton's interpreter, "
                    "which has no bf16 arithmetic, got torch.bfloat16"
                ),
            )
