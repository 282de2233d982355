"""glu and glu_backward: one elementwise kernel each."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import checks
from ..calls import Glu, GluBackward
from . import configs


@triton.jit
def clamped(g, u, LIMIT: tl.constexpr):
    """min(g, LIMIT) and u inside ±LIMIT."""
    if LIMIT is not None:
        g = tl.minimum(g, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        u = tl.minimum(u, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        u = tl.maximum(u, -LIMIT, propagate_nan=tl.PropagateNan.ALL)
    return g, u


@triton.jit
def activation(g, ALPHA: tl.constexpr, ACT: tl.constexpr):
    """f(g) and f'(g)."""
    if ACT == "silu":
        s = tl.sigmoid(ALPHA * g)
        df = s * (1 + ALPHA * g * (1 - s))
    elif ACT == "gelu":
        s = 0.5 * (1 + tl.erf(g * 0.7071067811865476))
        df = s + g * tl.exp(-0.5 * g * g) * 0.3989422804014327
    else:
        # 0.5·(1 + tanh z) = σ(2z), which is 0 or 1 to the last bit past ±30, where g³ could overflow.
        _, c = clamped(g, g, 30.0)
        s = tl.sigmoid(1.5957691216057308 * (c + 0.044715 * c * c * c))
        df = s + c * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * c * c)
    return g * s, df


@triton.jit(do_not_specialize=["rows"])
def glu_forward(
    h, y, rows, inner, h_m, h_n, up,
    STEP: tl.constexpr, ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid: (cdiv(rows, BLOCK_M) · cdiv(inner, BLOCK_N),). y = f(g)·(u + SHIFT).

    h  [rows, 2·inner]: g in column c·STEP, u in column c·STEP + up
    y  [rows, inner] contiguous
    """
    ACC: tl.constexpr = tl.float64 if h.dtype.element_ty == tl.float64 else tl.float32
    blocks_n = tl.cdiv(inner, BLOCK_N)
    m = tl.program_id(0) // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    kept = (m < rows)[:, None] & (n < inner)[None, :]
    m, n = m.to(tl.int64), n.to(tl.int64)  # int64: rows·stride, 2·inner·stride
    at = h + m[:, None] * h_m
    g = tl.load(at + (n * STEP)[None, :] * h_n, mask=kept, other=0.0).to(ACC)  # [BM, BN]
    u = tl.load(at + (n * STEP + up)[None, :] * h_n, mask=kept, other=0.0).to(ACC)  # [BM, BN]
    g, u = clamped(g, u, LIMIT)
    f, _ = activation(g, ALPHA, ACT)
    tl.store(y + m[:, None] * inner + n[None, :], (f * (u + SHIFT)).to(y.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=["rows"])
def glu_gradient(
    dy, h, dh, rows, inner, dy_m, dy_n, h_m, h_n, up,
    STEP: tl.constexpr, ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid: (cdiv(rows, BLOCK_M) · cdiv(inner, BLOCK_N),). A clamped element takes no gradient.

    dy [rows, inner]
    h  [rows, 2·inner]: g in column c·STEP, u in column c·STEP + up
    dh [rows, 2·inner] contiguous, as h
    """
    ACC: tl.constexpr = tl.float64 if h.dtype.element_ty == tl.float64 else tl.float32
    blocks_n = tl.cdiv(inner, BLOCK_N)
    m = tl.program_id(0) // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    kept = (m < rows)[:, None] & (n < inner)[None, :]
    m, n = m.to(tl.int64), n.to(tl.int64)  # int64: rows·stride, 2·inner·stride
    at = h + m[:, None] * h_m
    g_in = tl.load(at + (n * STEP)[None, :] * h_n, mask=kept, other=0.0).to(ACC)  # [BM, BN]
    u_in = tl.load(at + (n * STEP + up)[None, :] * h_n, mask=kept, other=0.0).to(ACC)  # [BM, BN]
    d = tl.load(dy + m[:, None] * dy_m + n[None, :] * dy_n, mask=kept, other=0.0).to(ACC)  # [BM, BN]
    g, u = clamped(g_in, u_in, LIMIT)
    f, df = activation(g, ALPHA, ACT)
    dg, du = d * (u + SHIFT) * df, d * f
    if LIMIT is not None:
        dg = tl.where(g_in > LIMIT, 0.0, dg)
        du = tl.where(tl.abs(u_in) > LIMIT, 0.0, du)
    at = dh + m[:, None] * (2 * inner) + (n * STEP)[None, :]
    tl.store(at, dg.to(dh.dtype.element_ty), mask=kept)
    tl.store(at + up, du.to(dh.dtype.element_ty), mask=kept)


def _launch(kernel: Callable, tensors: tuple, strides: tuple, call: Glu | GluBackward) -> None:
    h, limit = call.h, call.limit
    rows, inner = h.shape[0], h.shape[1] // 2
    if rows == 0:
        return
    block_m, block_n = configs.elementwise(configs.machine(h.device), inner, h.dtype)
    grid = (triton.cdiv(rows, block_m) * triton.cdiv(inner, block_n),)
    step, up = (2, 1) if call.interleaved else (1, inner)
    kernel[grid](
        *tensors, rows, inner, *strides, up, STEP=step, ACT=call.act, ALPHA=call.alpha,
        LIMIT=None if limit is None or math.isinf(limit) else limit, SHIFT=call.up_shift,
        BLOCK_M=block_m, BLOCK_N=block_n,
    )  # fmt: skip


def glu(call: Glu) -> Tensor:
    """f(min(g, limit))·(clamp(u, ±limit) + up_shift): [rows, 2I] → [rows, I]."""
    checks.glu(call)
    h = call.h
    y = torch.empty((h.shape[0], h.shape[1] // 2), dtype=h.dtype, device=h.device)
    _launch(glu_forward, (h, y), h.stride(), call)
    return y


def glu_backward(call: GluBackward) -> Tensor:
    """dh [rows, 2I]."""
    checks.glu_backward(call)
    dy, h = call.dy, call.h
    dh = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    _launch(glu_gradient, (dy, h, dh), (*dy.stride(), *h.stride()), call)
    return dh
